"""The stages in plain PyTorch: for reading, and as the oracle.

Every function has the name, the arguments and the results of its counterpart in
`moe_ext.functional`, and is differentiable by autograd alone. In float64 this is
what all other implementations are measured against. Loops over experts, host
reads and copies are welcome here; speed is not the point.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Activation, ExpertParameters, Plan, RouterOutput

__all__ = [
    "accumulate_stats",
    "capacity_scatter",
    "gather_rows",
    "grouped_ffn",
    "moe_forward",
    "router_logits",
    "topk_route",
    "weighted_combine",
]


def accumulation_dtype(dtype):
    """The dtype of logits, scores and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def scores_of(logits, score_function):
    """What the choice is made by, (T, E)."""
    return logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)


def choose_experts(scores, top_k, selection_bias, n_group, topk_group, group_score):
    """The ids (T, K) of the K best experts, best first; ties and NaN: see below.

    The choice is by score plus selection bias. With groups, the E experts form
    `n_group` groups of neighbours; a group is scored by its best expert (`max`)
    or by the sum of its best two (`top2_sum`); only the best `topk_group` groups
    are eligible. A tie goes to the lower id; NaN ranks below every number.
    """
    choice = scores.detach() if selection_bias is None else scores.detach() + selection_bias
    choice = torch.where(choice.isnan(), -math.inf, choice)
    if topk_group < n_group:
        grouped = choice.unflatten(-1, (n_group, -1))
        best = grouped.sort(dim=-1, descending=True, stable=True).values
        group_scores = best[..., : 1 if group_score == "max" else 2].sum(-1)
        kept = group_scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk_group]
        eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, kept, True)
        # Ineligible experts come after every eligible one, even one at -inf.
        eligible = eligible.repeat_interleave(grouped.shape[-1], -1)
    else:
        eligible = torch.ones_like(choice, dtype=torch.bool)
    by_score = choice.sort(dim=-1, descending=True, stable=True).indices
    eligible_first = eligible.gather(-1, by_score).int().sort(dim=-1, descending=True, stable=True)
    return by_score.gather(-1, eligible_first.indices)[..., :top_k]


def topk_route(
    logits: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    padding_mask: Tensor | None = None,
    experts: Tensor | None = None,
    score_function: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
) -> RouterOutput:
    logits = logits.to(accumulation_dtype(logits.dtype))
    if padding_mask is not None:  # may hold NaN, and 0 * NaN is NaN on the way back
        logits = logits.masked_fill(padding_mask[:, None], 0)
    num_experts = logits.shape[-1]
    scores = scores_of(logits, score_function)
    if experts is None:
        adds_scores = selection_bias is not None or (
            group_score == "top2_sum" and topk_group < n_group
        )
        # The logits order as their softmax does, and do not underflow.
        choice = logits if score_function == "softmax_topk" and not adds_scores else scores
        experts = choose_experts(choice, top_k, selection_bias, n_group, topk_group, group_score)
        if padding_mask is not None:
            experts = experts.masked_fill(padding_mask[:, None], num_experts)
    elif padding_mask is not None:
        experts = experts.masked_fill(padding_mask[:, None], num_experts)
    experts = experts.long()
    valid = experts < num_experts
    index = experts.clamp(max=num_experts - 1)
    if score_function == "softmax_topk":
        chosen = logits.gather(-1, index).masked_fill(~valid, -math.inf)
        # A row without any valid choice (padding) would be 0/0.
        weights = torch.where(valid.any(-1, keepdim=True), chosen, 0.0).softmax(-1)
        weights = torch.where(valid, weights, 0.0)
    else:
        weights = torch.where(valid, scores.gather(-1, index), 0.0)
        if norm_topk_prob:
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(valid.any(-1, keepdim=True), total + 1e-20, 1.0)
    weights = weights * routed_scaling_factor

    present = (
        torch.ones_like(logits[:, 0], dtype=torch.bool) if padding_mask is None else ~padding_mask
    )
    distribution = scores / scores.sum(-1, keepdim=True) if score_function == "sigmoid" else scores
    score_sums = torch.where(present[:, None], distribution, 0.0).sum(0)
    logsumexp = torch.where(present, logits.logsumexp(-1), 0.0)
    counts = torch.bincount(experts[valid], minlength=num_experts)
    return RouterOutput(weights, experts.int(), counts.int(), score_sums, logsumexp)


def capacity_scatter(
    experts: Tensor,
    num_experts: int,
    capacity: int | None = None,
    *,
    weights: Tensor | None = None,
    padding_mask: Tensor | None = None,
    drop_policy: str = "token",
    num_sequences: int = 1,
) -> Plan:
    tokens, top_k = experts.shape
    flat = experts.long()
    if padding_mask is not None:
        flat = flat.masked_fill(padding_mask[:, None], num_experts)
    flat = flat.clamp(max=num_experts).reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]

    assignment = torch.arange(tokens * top_k, device=flat.device)
    kept = flat < num_experts
    if capacity is not None:
        if drop_policy == "token":
            order = assignment
        elif drop_policy == "choice":
            order = assignment.view(tokens, top_k).t().reshape(-1)
        else:
            assert weights is not None
            key = weights.detach().reshape(-1).double()
            order = (
                torch.where(key.isnan(), -math.inf, key)
                .sort(dim=-1, descending=True, stable=True)
                .indices
            )
        sequence = assignment // max(top_k * (tokens // num_sequences), 1)
        bucket = (sequence * (num_experts + 1) + flat)[order]
        by_bucket = bucket.sort(dim=-1, stable=True).indices
        starts = torch.bincount(bucket, minlength=num_sequences * (num_experts + 1)).cumsum(0)
        starts = F.pad(starts, (1, 0))[:-1]
        place = torch.empty_like(bucket)
        place[by_bucket] = torch.arange(len(bucket), device=flat.device) - starts[bucket[by_bucket]]
        kept[order] &= place < capacity

    row_assignment = (
        flat.masked_fill(~kept, num_experts).sort(dim=-1, stable=True).indices[: int(kept.sum())]
    )
    rows = len(flat) if capacity is None else min(len(flat), num_experts * capacity * num_sequences)
    assignment_row = torch.full_like(flat, -1)
    assignment_row[row_assignment] = torch.arange(len(row_assignment), device=flat.device)
    tail = (0, rows - len(row_assignment))
    offsets = torch.bincount(flat[kept], minlength=num_experts).cumsum(0)
    return Plan(
        expert_offsets=F.pad(offsets, (1, 0)).int(),
        row_token=F.pad(row_assignment // top_k, tail, value=-1).int(),
        row_assignment=F.pad(row_assignment, tail, value=-1).int(),
        assignment_row=assignment_row.view(tokens, top_k).int(),
        expert_counts=counts.int(),
    )


def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    tail = plan.row_token < 0
    return torch.where(tail[:, None], 0.0, x[plan.row_token.clamp(min=0).long()])


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(preactivations, activation):
    """(rows, 2I) -> (rows, I) for a gate, (rows, I) -> (rows, I) otherwise."""
    if activation.name not in GATES:
        return ACTIVATIONS[activation.name](preactivations)
    if activation.interleaved:
        gate, up = preactivations[..., 0::2], preactivations[..., 1::2]
    else:
        gate, up = preactivations.chunk(2, -1)
    return gated_activation(gate, up, activation)


def gated_activation(gate, up, activation):
    """phi(gate) * (up + up_offset), both clamped first: the gate from above, up on both sides."""
    name, limit, alpha, up_offset, *_ = activation
    if limit is not None:
        # Not clamp, whose gradient at the limit itself, where half precision often rounds to, is 1
        # before torch 2.14 and 0 from then on. Here it is 1.
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    if name == "swiglu":
        return gate * torch.sigmoid(alpha * gate) * (up + up_offset)
    return ACTIVATIONS[GATES[name]](gate) * (up + up_offset)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    """F.linear, with LoRA's factors (in, r) and (r, out) where they are not None."""
    y = F.linear(x, weight, bias)
    return y if a is None or b is None else y + x @ a @ b


def grouped_ffn(
    x: Tensor,
    plan: Plan,
    *parameters: Any,
    activation: Activation | str = "swiglu",
    **by_name: Any,
) -> Tensor:
    p = ExpertParameters(*parameters, **by_name)
    activation = Activation.of(activation)
    up_proj, down_proj = p.up_proj, p.down_proj
    if activation.transposed:
        up_proj, down_proj = up_proj.mT, down_proj.mT
    offsets = plan.expert_offsets.tolist()
    rows = []
    for expert, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        beside_up, beside_down = (
            [None if t is None else t[expert] for t in tensors]
            for tensors in (
                (p.up_bias, p.up_lora_a, p.up_lora_b),
                (p.down_bias, p.down_lora_a, p.down_lora_b),
            )
        )
        mine = x[plan.row_token[begin:end].long()]
        a = activate(linear(mine, up_proj[expert], *beside_up), activation)
        rows.append(linear(a, down_proj[expert], *beside_down))
    rows.append(x.new_zeros(len(plan.row_token) - offsets[-1], x.shape[-1]))
    return torch.cat(rows)


def weighted_combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    kept = plan.assignment_row >= 0
    if len(rows) == 0:
        # Zeros, still part of the graph of both.
        return rows.sum(0) + torch.where(kept, weights, 0.0).sum(-1, keepdim=True).to(rows.dtype)
    mine = rows[plan.assignment_row.clamp(min=0).long()]
    dtype = accumulation_dtype(torch.promote_types(rows.dtype, weights.dtype))
    mine = torch.where(kept[..., None], mine, 0.0).to(dtype)
    return (torch.where(kept, weights, 0.0).to(dtype)[..., None] * mine).sum(1).to(rows.dtype)


def moe_forward(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    *parameters: Any,
    activation: Activation | str = "swiglu",
    **by_name: Any,
) -> Tensor:
    rows = grouped_ffn(x, plan, *parameters, activation=activation, **by_name)
    return weighted_combine(rows, weights, plan)


@torch.no_grad()
def accumulate_stats(
    counts: Tensor,
    score_sums: Tensor,
    totals: Tensor,
    step_counts: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    expert_counts: Tensor,
    route_score_sums: Tensor,
    assignment_row: Tensor | None = None,
    padding_mask: Tensor | None = None,
    score_function: str = "softmax",
) -> None:
    """Adds one forward's routing to running sums, all of them changed in place.

    `totals` holds tokens, assignments, dropped assignments, tokens that lost all
    of theirs, the sum of the tokens' entropies in nats, the largest logit, and
    the number of forwards; all of it may be reset to zero at any time. Nothing
    happens while a backward pass runs: that forward is a recomputation.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    counts += expert_counts
    score_sums += route_score_sums
    if step_counts is not None:
        step_counts += expert_counts
    present = slice(None) if padding_mask is None else ~padding_mask
    logits = logits.to(accumulation_dtype(logits.dtype))[present]
    assigned = experts[present] < logits.shape[-1]
    kept = assigned if assignment_row is None else assigned & (assignment_row[present] >= 0)
    scores = scores_of(logits, score_function)
    scores = scores / scores.sum(-1, keepdim=True)
    largest = logits.max().double() if logits.numel() else totals.new_tensor(-math.inf)
    totals[5] = torch.where(totals[6] > 0, torch.maximum(totals[5], largest), largest)
    totals[[0, 1, 2, 3, 4, 6]] += torch.stack(
        [
            totals.new_tensor(len(logits)),
            assigned.sum(),
            assigned.sum() - kept.sum(),
            (assigned.any(-1) & ~kept.any(-1)).sum(),
            -torch.special.xlogy(scores, scores).sum(dtype=torch.float64),
            totals.new_tensor(1.0),
        ]
    )
