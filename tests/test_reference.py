"""The oracle's own proof: gradcheck, formulas written out by hand, naive loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from moe_ext import Activation, reference
from support.oracle import (
    ACTIVATIONS,
    ROUTINGS,
    assert_within_bound,
    draw_experts,
    draw_ffn,
    draw_plan,
    shapes,
    unit,
)

F64 = torch.float64


def leaf(*shape, fan_in=1):
    return unit(*shape, dtype=F64, fan_in=fan_in).requires_grad_()


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-12, atol=1e-13)


# ---- router_logits ------------------------------------------------------------


def test_router_logits_is_a_product_in_float32():
    x, weight, bias = unit(5, 7, dtype=torch.bfloat16), unit(3, 7, dtype=torch.bfloat16), unit(3)
    logits = reference.router_logits(x, weight, bias)
    assert logits.dtype == torch.float32
    expected = (x.double()[:, None] * weight.double()).sum(-1) + bias.double()
    assert_within_bound("logits", logits, expected, logits)
    assert gradcheck(reference.router_logits, (leaf(4, 5), leaf(3, 5), leaf(3)))


# ---- topk_route ---------------------------------------------------------------

ROUTE_OPTIONS = [
    dict(),
    dict(norm_topk_prob=False),
    dict(norm_topk_prob=False, routed_scaling_factor=16.0, n_group=3, topk_group=2),
    dict(score_function="sigmoid", n_group=3, topk_group=1, group_score="top2_sum"),
    dict(score_function="sigmoid", norm_topk_prob=False, routed_scaling_factor=2.5),
    dict(score_function="softmax_topk", routed_scaling_factor=0.5),
]


@pytest.mark.parametrize("options", ROUTE_OPTIONS)
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("replayed", (False, True))
def test_topk_route_gradcheck(options, padded, replayed):
    extra = dict(options, selection_bias=unit(6, dtype=F64))
    if padded:
        extra["padding_mask"] = torch.tensor([False, True, False, False, True])
    if replayed:
        extra["experts"] = draw_experts(5, 6, 2, "duplicates")

    def route(logits):
        result = reference.topk_route(logits, 2, **extra)
        return result.weights, result.score_sums, result.logsumexp

    # Spread logits: no near-tie that a finite difference could step over.
    logits = torch.stack([torch.randperm(6) * 0.7 for _ in range(5)]).double().requires_grad_()
    assert gradcheck(route, (logits,))


def test_mixtral_is_a_softmax_over_the_chosen_logits():
    logits = unit(50, 8, dtype=F64)
    mixtral = reference.topk_route(logits, 2)
    chosen = logits.sort(-1, descending=True).values[:, :2]
    close(mixtral.weights, chosen.softmax(-1))
    close(
        reference.topk_route(logits, 2, score_function="softmax_topk").weights, chosen.softmax(-1)
    )
    assert torch.equal(mixtral.experts.long(), logits.sort(-1, descending=True).indices[:, :2])


def test_deepseek_v3_by_hand():
    """s + bias chooses, groups by the sum of their best two; the weight is the unbiased s."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.7, 0.2]], dtype=F64)
    logits = scores.logit()
    # Groups (0.9, 0.1), (0.6, 0.5), (0.7, 0.2): sums 1.0, 1.1, 0.9; the second wins.
    options = dict(score_function="sigmoid", n_group=3, topk_group=1, group_score="top2_sum")
    route = reference.topk_route(logits, 2, routed_scaling_factor=2.5, **options)
    assert route.experts.tolist() == [[2, 3]]
    close(route.weights, torch.tensor([[0.6, 0.5]], dtype=F64) / 1.1 * 2.5)
    # By their best expert, the first group wins, and gives both experts.
    route = reference.topk_route(logits, 2, **(options | dict(group_score="max")))
    assert route.experts.tolist() == [[0, 1]]
    # A bias of 0.3 on expert 5 lifts the third group to 1.2; the weights stay unbiased.
    bias = torch.tensor([0, 0, 0, 0, 0, 0.3], dtype=F64)
    route = reference.topk_route(logits, 2, selection_bias=bias, norm_topk_prob=False, **options)
    assert route.experts.tolist() == [[4, 5]]
    close(route.weights, torch.tensor([[0.7, 0.2]], dtype=F64))


def test_deepseek_v2_by_hand():
    """Softmax, groups scored by their best, not renormalised, scaled."""
    probabilities = torch.tensor([[0.05, 0.30, 0.20, 0.15, 0.25, 0.05]], dtype=F64)
    options = dict(norm_topk_prob=False, routed_scaling_factor=16.0, n_group=3, topk_group=2)
    route = reference.topk_route(probabilities.log(), 3, **options)
    # The groups' bests are 0.30, 0.20, 0.25: experts 2 and 3 are out.
    assert route.experts.tolist() == [[1, 4, 0]]
    close(route.weights, torch.tensor([[0.30, 0.25, 0.05]], dtype=F64) * 16)


def test_ties_go_to_the_lower_id_and_nan_ranks_last():
    assert reference.topk_route(torch.zeros(1, 5), 3).experts.tolist() == [[0, 1, 2]]
    logits = torch.tensor([[1.0, math.nan, 2.0, -math.inf]])
    sigmoid = reference.topk_route(logits, 4, score_function="sigmoid").experts
    assert sigmoid.tolist() == [[2, 0, 3, 1]]
    # Two equal groups: the first; an eligible -inf stands before an ineligible number.
    logits = torch.tensor([[-math.inf, 1.0, 1.0, 0.0]])
    route = reference.topk_route(logits, 2, score_function="sigmoid", n_group=2, topk_group=1)
    assert route.experts.tolist() == [[1, 0]]


@pytest.mark.parametrize("score_function", ("softmax", "sigmoid", "softmax_topk"))
def test_statistics_leave_padding_out(score_function):
    logits = unit(9, 4, dtype=F64)
    mask = torch.arange(9) % 3 == 1
    route = reference.topk_route(logits, 2, padding_mask=mask, score_function=score_function)
    assert (route.experts[mask] == 4).all() and not route.weights[mask].any()
    scores = logits.sigmoid() if score_function == "sigmoid" else logits.exp()
    scores = scores / scores.sum(-1, keepdim=True)
    close(route.score_sums, sum(scores[t] for t in range(9) if not mask[t]))
    close(route.logsumexp, torch.where(mask, 0.0, logits.exp().sum(-1).log()))
    counts = [
        sum(int(e) == i for t in range(9) if not mask[t] for e in route.experts[t])
        for i in range(4)
    ]
    assert route.counts.tolist() == counts


def test_routing_gradients_by_formula():
    """The formulas of the backward pass, written out."""
    logits, dw = leaf(6, 5), unit(6, 2, dtype=F64)

    def gradient(**options):
        route = reference.topk_route(logits, 2, **options)
        (grad,) = torch.autograd.grad(route.weights, logits, dw)
        return grad, route.weights.detach(), route.experts.long()

    def scattered(ids, values):
        return torch.zeros(6, 5, dtype=F64).scatter(1, ids, values)

    p, s = logits.detach().softmax(-1), logits.detach().sigmoid()
    grad, w, ids = gradient(norm_topk_prob=False)
    dp = scattered(ids, dw)
    close(grad, p * (dp - (p * dp).sum(-1, keepdim=True)))
    grad, w, ids = gradient(score_function="sigmoid", routed_scaling_factor=2.5)
    total = s.gather(1, ids).sum(-1, keepdim=True)
    ds = (2.5 * dw - (2.5 * dw * w / 2.5).sum(-1, keepdim=True)) / total
    close(grad, scattered(ids, ds) * s * (1 - s))
    grad, w, ids = gradient(score_function="softmax_topk")
    close(grad, scattered(ids, w * (dw - (w * dw).sum(-1, keepdim=True))))
    route = reference.topk_route(logits, 2)
    (grad,) = torch.autograd.grad(route.logsumexp.square().mean(), logits)
    close(grad, 2 / 6 * logits.detach().logsumexp(-1, keepdim=True) * p)


# ---- capacity_scatter ---------------------------------------------------------


def scatter_by_loops(experts, num_experts, capacity, weights, mask, policy, num_sequences):
    """The plan as nested lists, one assignment after another."""
    tokens, top_k = experts.shape
    taken, length = {}, tokens // num_sequences
    order = [(t, j) for t in range(tokens) for j in range(top_k)]
    if policy == "choice":
        order.sort(key=lambda a: a[1])  # stable: all first choices in token order, then all second
    elif policy == "probs":
        order.sort(key=lambda a: -float(weights[a]))
    kept = []
    for t, j in order:
        e = int(experts[t, j])
        if e >= num_experts or mask[t]:
            continue
        place = taken.get((t // length, e), 0)
        taken[t // length, e] = place + 1
        if capacity is None or place < capacity:
            kept.append((e, t * top_k + j))
    kept.sort()
    counts = [sum(n for (_, e), n in taken.items() if e == i) for i in range(num_experts)]
    offsets = [sum(e < i for e, _ in kept) for i in range(num_experts + 1)]
    rows = tokens * top_k
    if capacity is not None:
        rows = min(rows, num_experts * capacity * num_sequences)
    tail = [-1] * (rows - len(kept))
    assignment_row = [[-1] * top_k for _ in range(tokens)]
    for row, (_, a) in enumerate(kept):
        assignment_row[a // top_k][a % top_k] = row
    return (
        offsets,
        [a // top_k for _, a in kept] + tail,
        [a for _, a in kept] + tail,
        assignment_row,
        counts,
    )


@given(
    shapes(max_tokens=24),
    st.sampled_from(("choice", "token", "probs")),
    st.booleans(),
    st.booleans(),
)
def test_capacity_scatter_is_the_loop(shape, policy, padded, two_sequences):
    torch.manual_seed(shape.seed)
    sequences = 2 if two_sequences and shape.tokens else 1
    tokens = shape.tokens * sequences
    experts = draw_experts(tokens, shape.num_experts, shape.top_k, shape.routing)
    # Few distinct weights, so that ties are common.
    weights = torch.randint(4, (tokens, shape.top_k)) / 4
    mask = torch.rand(tokens) < (0.3 if padded else 0)
    plan = reference.capacity_scatter(
        experts, shape.num_experts, shape.capacity, weights=weights, padding_mask=mask,
        drop_policy=policy, num_sequences=sequences,
    )  # fmt: skip
    expected = scatter_by_loops(
        experts, shape.num_experts, shape.capacity, weights, mask, policy, sequences
    )
    assert all(t.dtype == torch.int32 for t in plan)
    for name, actual, wanted in zip(plan._fields, plan, expected):
        assert actual.tolist() == wanted, name


def test_drop_orders_by_hand():
    """Three tokens, experts 0 and 1, one place each."""
    experts = torch.tensor([[0, 1], [1, 0], [1, 0]])
    weights = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]])

    def kept(policy):
        plan = reference.capacity_scatter(experts, 2, 1, weights=weights, drop_policy=policy)
        return (plan.assignment_row >= 0).int().tolist()

    assert kept("choice") == [[1, 0], [1, 0], [0, 0]]
    assert kept("token") == [[1, 1], [0, 0], [0, 0]]
    assert kept("probs") == [[0, 0], [1, 0], [0, 1]]


# ---- grouped_ffn, weighted_combine, moe_forward ---------------------------------


def ffn_by_loops(x, experts, weights, p, activation, limit=None, alpha=1.0, up_offset=0.0):
    """y by the definition, one assignment and one unit after another; weights (out, in)."""
    phi = {
        "silu": lambda v: v / (1 + math.exp(-alpha * v)),
        "gelu": lambda v: 0.5 * v * (1 + math.erf(v / 2**0.5)),
        "gelu_tanh": lambda v: (
            0.5 * v * (1 + math.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3)))
        ),
        "relu": lambda v: max(v, 0.0),
        "relu2": lambda v: max(v, 0.0) ** 2,
    }
    gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for j, e in enumerate(experts[t].tolist()):
            if e >= len(p["up_proj"]):
                continue
            h = [float(w @ x[t] + b) for w, b in zip(p["up_proj"][e], p["up_bias"][e])]
            if activation in gates:
                half = len(h) // 2
                gate, up = h[:half], h[half:]
                if limit is not None:
                    gate = [min(v, limit) for v in gate]
                    up = [max(min(v, limit), -limit) for v in up]
                a = [phi[gates[activation]](g) * (u + up_offset) for g, u in zip(gate, up)]
            else:
                a = [phi[activation](v) for v in h]
            out = p["down_proj"][e] @ torch.tensor(a, dtype=F64) + p["down_bias"][e]
            y[t] += weights[t, j] * out
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe_forward_is_the_definition(activation, routing):
    T, H, I, E, K = 7, 5, 4, 3, 2
    gated = activation in reference.GATES
    x, weights = unit(T, H, dtype=F64), unit(T, K, dtype=F64)
    p = draw_ffn(H, I, E, F64, gated=gated, bias=True)
    experts = draw_experts(T, E, K, routing)
    plan = reference.capacity_scatter(experts, E)
    options = {}
    if gated:
        options |= dict(limit=0.8, up_offset=1.0)
    if activation == "swiglu":
        options |= dict(alpha=1.702)
    expected = ffn_by_loops(x, experts, weights, p, activation, **options)

    def computed(parameters, **layout):
        act = Activation(activation, **options, **layout)
        return reference.moe_forward(x, weights, plan, **parameters, activation=act)

    close(computed(p), expected)
    transposed = p | {name: p[name].mT.contiguous() for name in ("up_proj", "down_proj")}
    close(computed(transposed, transposed=True), expected)
    if gated:
        gate, up = p["up_proj"].chunk(2, 1)
        gate_bias, up_bias = p["up_bias"].chunk(2, 1)
        interleaved = p | dict(
            up_proj=torch.stack((gate, up), 2).flatten(1, 2),
            up_bias=torch.stack((gate_bias, up_bias), 2).flatten(1, 2),
        )
        close(computed(interleaved, interleaved=True), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", (False, True))
def test_moe_forward_gradcheck(activation, transposed):
    T, H, I, E, K = 4, 3, 2, 3, 2
    gated = activation in reference.GATES
    plan = draw_plan(T, E, K, "duplicates", capacity=2)
    p = draw_ffn(H, I, E, F64, gated=gated, bias=True, transposed=transposed)
    options = dict(name=activation, transposed=transposed)
    if gated:
        options |= dict(limit=1.5, alpha=1.3, up_offset=0.5, interleaved=transposed)

    def forward(x, weights, *parameters):
        return reference.moe_forward(
            x, weights, plan, *parameters, activation=Activation(**options)
        )

    assert gradcheck(forward, (leaf(T, H), leaf(T, K), *(t.requires_grad_() for t in p.values())))


def test_swiglu_gradients_by_formula():
    """dg = dh*u*phi'(g), du = dh*phi(g), silu' = s(1 + g(1 - s)); dw = <dy, o>; do = w*dy."""
    x, w = leaf(1, 4), leaf(1, 1)
    p = {name: t.requires_grad_() for name, t in draw_ffn(4, 3, 1, F64).items()}
    plan = reference.capacity_scatter(torch.zeros(1, 1, dtype=torch.int32), 1)
    dy = unit(1, 4, dtype=F64)
    y = reference.moe_forward(x, w, plan, **p)
    dx, dw, dup, ddown = torch.autograd.grad(y, (x, w, *p.values()), dy)
    up, down = (t.detach()[0] for t in p.values())
    g, u = (up @ x.detach()[0]).chunk(2)
    s = g.sigmoid()
    a = g * s * u
    do = w.detach()[0] * dy[0]
    da = down.T @ do
    dh = torch.cat((da * u * s * (1 + g * (1 - s)), da * g * s))
    close(dw, (dy[0] @ (down @ a)).view(1, 1))
    close(ddown[0], torch.outer(do, a))
    close(dup[0], torch.outer(dh, x.detach()[0]))
    close(dx[0], up.T @ dh)


def test_dropped_and_sentinel_assignments_get_exactly_nothing():
    x, weights = leaf(6, 4), leaf(6, 2)
    experts = torch.tensor([[0, 9]] * 6)
    plan = reference.capacity_scatter(experts, 2, 3)
    y = reference.moe_forward(x, weights, plan, **draw_ffn(4, 3, 2, F64))
    dx, dweights = torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    assert (
        not y[3:].any() and not dx[3:].any() and not dweights[3:].any() and not dweights[:, 1].any()
    )
    assert y[:3].any(1).all() and dx[:3].any(1).all() and dweights[:3, 0].all()


def test_the_gradient_at_a_limit_is_that_within():
    """Which torch's own clamp has it depends on its release; half precision often rounds there."""
    gate = torch.tensor([0.5, 0.75, 1.0, -1.0, math.nan], requires_grad=True)
    up = torch.tensor([-0.75, 0.75, 1.0, -1.0, 0.5], requires_grad=True)
    y = reference.gated_activation(gate, up, Activation("reglu", limit=0.75))
    assert torch.equal(y[:4], torch.tensor([-0.375, 0.5625, 0.5625, 0.0])) and y[4].isnan()
    y.sum().backward()
    assert gate.grad[:4].tolist() == [-0.75, 0.75, 0.0, 0.0]
    assert up.grad[:4].tolist() == [0.5, 0.75, 0.0, 0.0]
