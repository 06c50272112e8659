"""FlopCounterMode over the ops and over the layer."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from moe_ext import functional
from support.layer_suite import E, H, I, K, make
from support.oracle import HAS_OPS, draw_ffn, unit

pytestmark = pytest.mark.skipif(not HAS_OPS, reason="the reference is made of torch's own ops")

T = 20


def counted(function, *inputs):
    """(forward, backward) FLOPs, every input wanting its gradient."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as forward:
        y = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_every_op_has_a_formula():
    names = {n.removeprefix("moe_ext::") for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("moe_ext::")}  # fmt: skip
    names -= {"cpu_instruction_sets", "sm90_is_refused"}  # questions to the library
    assert names and all(getattr(torch.ops.moe_ext, name) in flop_registry for name in names)


def test_the_products_are_counted():
    route = functional.topk_route(unit(T, E), K)
    plan = functional.capacity_scatter(route.experts, E)
    x, weights = unit(T, H), route.weights.detach()
    p = draw_ffn(H, I, E, torch.float32)
    up, down = p["up_proj"], p["down_proj"]
    experts = 6 * T * K * H * I
    combine = 2 * T * K * H
    assert counted(functional.router_logits, x, unit(E, H)) == (2 * T * H * E, 4 * T * H * E)
    ffn = counted(lambda *a: functional.grouped_ffn(a[0], plan, *a[1:]), x, up, down)
    assert ffn == (experts, 2 * experts)
    fused = counted(lambda *a: functional.moe_forward(*a[:2], plan, *a[2:]), x, weights, up, down)
    assert fused == (experts + combine, 2 * experts)
    rows = unit(T * K, H)
    both = counted(lambda *a: functional.weighted_combine(*a, plan), rows, weights)
    assert both == (combine, 2 * combine)
    assert counted(lambda a: functional.gather_rows(a, plan), x) == (0, 0)


def test_lora_s_factors_are_counted():
    plan = functional.capacity_scatter(functional.topk_route(unit(T, E), K).experts, E)
    sizes, rank = ((H, 2 * I), (I, H)), 3
    factors = [t for n, m in sizes for t in (unit(E, n, rank), unit(E, rank, m))]
    inputs = (unit(T, H), *draw_ffn(H, I, E, torch.float32).values(), *factors)

    def ffn(x, up, down, *factors):
        return functional.grouped_ffn(x, plan, up, down, None, None, *factors)

    a, b = (2 * T * K * rank * sum(n[i] for n in sizes) for i in (0, 1))
    experts = 6 * T * K * H * I
    # A: towards the rows' gradient, its own, and x A again for B's; B: before A's, and its own.
    assert counted(ffn, *inputs) == (experts + a + b, 2 * experts + 3 * a + 2 * b)


def test_what_is_frozen_costs_nothing():
    layer = make(dtype=torch.float32, capacity_factor=None)
    layer.experts.requires_grad_(False)
    forward, backward = counted(layer, unit(T, H))
    assert forward == 6 * T * K * H * I + 2 * T * K * H + 2 * T * H * E
    # Without the gradients of the experts' weights it costs what the forward does.
    assert backward == 6 * T * K * H * I + 4 * T * H * E


def test_a_capacity_limits_the_rows():
    layer = make(dtype=torch.float32, expert_capacity=1)
    forward, _ = counted(layer, unit(T, H))
    assert forward == 6 * E * H * I + 2 * T * K * H + 2 * T * H * E


@pytest.mark.parametrize("capacity, rows", [(None, T * K), (1, 2 * E), (T, T * K)])
def test_an_inference_in_one_op(capacity, rows):
    layer = make(dtype=torch.float32)
    stats = layer._stats
    call = functools.partial(
        torch.ops.moe_ext.moe_infer, unit(2, T // 2, H), layer.gate.weight, None,
        stats.counts, stats.score_sums, stats.totals, K, *layer.experts.weights(),
        capacity=capacity, num_sequences=2,
    )  # fmt: skip
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        call()
    assert forward.get_total_flops() == 6 * rows * H * I + 2 * T * K * H + 2 * T * H * E


def test_other_widths_and_layouts():
    for options in (dict(activation="relu"), dict(activation="relu", transposed=True)):
        layer = make(dtype=torch.float32, capacity_factor=None, **options)
        forward, backward = counted(layer, unit(T, H))
        assert forward == 4 * T * K * H * I + 2 * T * K * H + 2 * T * H * E
        assert backward == 2 * 4 * T * K * H * I + 4 * T * H * E
