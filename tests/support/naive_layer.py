"""The whole layer written out token by token, from the formulas alone.

It shares no code with moe_ext: what `MoE` must compute, and what a training step's
gradients must be. Slow, float64, differentiable by autograd.
"""

import math
from fractions import Fraction

import torch

PHI = {
    "silu": lambda g: g / (1 + torch.exp(-g)),
    "gelu": lambda g: g * 0.5 * (1 + torch.erf(g / math.sqrt(2))),
    "gelu_tanh": lambda g: (
        0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    ),
    "relu": lambda g: torch.where(g > 0, g, 0.0),
    "relu2": lambda g: torch.where(g > 0, g * g, 0.0),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def ffn(layer, x, gate, up, down, gate_bias=0.0, up_bias=0.0, down_bias=0.0):
    """down phi(gate x) * (up x): weights are (out, in)."""
    name, limit, alpha, up_offset, *_ = layer.config.experts.activation
    u = up @ x + up_bias
    if name not in GATED:
        return down @ PHI[name](u) + down_bias
    g = gate @ x + gate_bias
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if name == "swiglu":
        phi = g / (1 + torch.exp(-alpha * g))
    else:
        phi = PHI[GATED[name]](g)
    return down @ (phi * (u + up_offset)) + down_bias


def expert(layer, e, x):
    experts, activation = layer.experts, layer.config.experts.activation
    gated = activation.name in GATED
    up = (experts.gate_up_proj if gated else experts.up_proj)[e]
    down = experts.down_proj[e]
    up_bias = experts.gate_up_proj_bias if gated else experts.up_proj_bias
    up_bias = torch.zeros(1) if up_bias is None else up_bias[e]
    down_bias = 0.0 if experts.down_proj_bias is None else experts.down_proj_bias[e]
    if activation.transposed:
        up, down = up.T, down.T
    up_bias = up_bias.expand(len(up))
    if not gated:
        return ffn(layer, x, None, up, down, 0.0, up_bias, down_bias)
    half = len(up) // 2
    rows = (slice(0, None, 2), slice(1, None, 2)) if activation.interleaved else None
    g, u = rows or (slice(0, half), slice(half, None))
    return ffn(layer, x, up[g], up[u], down, up_bias[g], up_bias[u], down_bias)


def choose(layer, scores):
    """The K best ids by score plus bias, from the best groups, ties to the lower id."""
    options, bias = layer.config.router, layer.gate.e_score_correction_bias
    choice = scores.detach() if bias is None else scores.detach() + bias
    choice = choice.tolist()
    size = len(choice) // options.n_group
    groups = [range(i * size, (i + 1) * size) for i in range(options.n_group)]
    taken = 1 if options.group_score == "max" else 2

    def group_score(group):
        return sum(sorted((choice[e] for e in group), reverse=True)[:taken])

    best = sorted(groups, key=lambda g: (-group_score(g), g[0]))[: options.topk_group]
    eligible = sorted(e for group in best for e in group)
    return sorted(eligible, key=lambda e: (-choice[e], e))[: layer.top_k]


def capacity(layer, tokens):
    if layer.expert_capacity is not None:
        return min(layer.expert_capacity, tokens)
    factor = layer.capacity_factor if layer.training else layer.eval_capacity_factor
    if factor is None:
        return None
    exact = Fraction(factor).limit_denominator(10**6) * tokens * layer.top_k / layer.num_experts
    return min(max(math.ceil(exact), layer.min_capacity), tokens)


def keep(layer, experts, weights, present, sequences):
    """The set of assignments (t, j) that stay."""
    kept = set()
    for sequence in sequences:
        c = capacity(layer, len(sequence))
        load = [0] * layer.num_experts
        todo = [(t, j) for t in sequence if present[t] for j in range(layer.top_k)]
        if layer.drop_policy == "choice":
            todo.sort(key=lambda a: (a[1], a[0]))
        elif layer.drop_policy == "probs":
            todo.sort(key=lambda a: (-weights[a[0]][a[1]].item(), a))
        for t, j in todo:
            e = experts[t][j]
            if c is None or load[e] < c:
                kept.add((t, j))
                load[e] += 1
    return kept


def naive_layer(layer, x, padding_mask=None):
    """(y, aux, z, statistics) of layer(x) without jitter."""
    options = layer.config.router
    H, E, K = layer.hidden_size, layer.num_experts, layer.top_k
    tokens = x.reshape(-1, H)
    T = len(tokens)
    present = [True] * T if padding_mask is None else (~padding_mask).reshape(-1).tolist()
    n = max(sum(present), 1)
    scope = x.shape[-2] if layer.capacity_scope == "sequence" else T
    sequences = [range(i, i + scope) for i in range(0, T, max(scope, 1))]

    logits, experts, weights = [], [], []
    score_sums, square_lse, entropies = torch.zeros(E, dtype=x.dtype), 0.0, 0.0
    counts = [0] * E
    for t in range(T):
        logit = layer.gate.weight @ tokens[t]
        if layer.gate.bias is not None:
            logit = logit + layer.gate.bias
        exps = torch.exp(logit - logit.max().detach())
        softmax = exps / exps.sum()
        score = 1 / (1 + torch.exp(-logit)) if layer.score_function == "sigmoid" else softmax
        ids = choose(layer, score)
        w = score[ids]
        if layer.score_function == "softmax_topk":
            w = torch.exp(logit[ids] - logit[ids].max().detach())
            w = w / w.sum()
        elif options.norm_topk_prob:
            w = w / (w.sum() + 1e-20)
        logits.append(logit)
        experts.append(ids)
        weights.append(w * options.routed_scaling_factor)
        if present[t]:
            p = score / score.sum()
            score_sums = score_sums + p
            square_lse = square_lse + torch.logsumexp(logit, 0) ** 2
            entropies -= (p * p.clamp(min=1e-300).log()).sum().item()
            for e in ids:
                counts[e] += 1
    kept = keep(layer, experts, weights, present, sequences)

    y = []
    for t in range(T):
        out = torch.zeros(H, dtype=x.dtype)
        mine = [j for j in range(K) if (t, j) in kept]
        if mine:
            scale = 1.0
            if layer.renormalize_after_drop:
                scale = weights[t].sum() / sum(weights[t][j] for j in mine)
            for j in mine:
                out = out + scale * weights[t][j] * expert(layer, experts[t][j], tokens[t])
        if layer.shared_experts is not None and present[t]:
            s = layer.shared_experts
            gate = None if s.gate_proj is None else s.gate_proj.weight
            biases = [0.0 if m is None or m.bias is None else m.bias
                      for m in (s.gate_proj, s.up_proj, s.down_proj)]  # fmt: skip
            shared = ffn(layer, tokens[t], gate, s.up_proj.weight, s.down_proj.weight, *biases)
            if layer.shared_expert_gate is not None:
                shared = shared / (1 + torch.exp(-(layer.shared_expert_gate.weight[0] @ tokens[t])))
            out = out + shared
        y.append(out)
    y = torch.stack(y).reshape(x.shape) if T else x.clone()

    f = torch.tensor(counts, dtype=x.dtype) / (n * K)
    aux = E * (f * score_sums / n).sum()
    z = square_lse / n
    assignments = sum(counts)
    P = (score_sums / max(score_sums.sum().item(), 1e-300)).tolist()
    log_e = math.log(E) if E > 1 else 1.0
    lost = [t for t in range(T) if present[t] and not any((t, j) in kept for j in range(K))]
    statistics = {
        "load": counts,
        "drop_rate": 1 - len(kept) / assignments if assignments else 0.0,
        "lost_rate": len(lost) / n,
        "entropy": -sum(p * math.log(p) for p in P if p > 0) / log_e if E > 1 else 1.0,
        "token_entropy": entropies / n / log_e if E > 1 else 1.0,
        "max_violation": max(counts) * E / assignments - 1 if assignments else 0.0,
        "dead_experts": counts.count(0) if assignments else 0.0,
        "max_logit": max((v.max().item() for v, p in zip(logits, present) if p), default=0.0),
        "tokens": sum(present),
    }
    return y, aux, z, statistics
