"""gather_rows: the tokens in plan order, and the sum of a token's rows on the way back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext import functional, reference
from support.ffn_suite import needs_ops, needs_values
from support.oracle import (
    DTYPES,
    ROUTINGS,
    assert_matches,
    assert_same_bits,
    bits_equal,
    draw_plan,
    evaluate,
    shapes,
    shifted,
    strided,
    unit,
)


def bind(module, plan, gather=None):
    gather = gather or module.gather_rows
    return lambda x: gather(x, plan)


def draw(plan, hidden, dtype=torch.float32):
    return dict(x=unit(len(plan.assignment_row), hidden, dtype=dtype))


def check(plan, hidden, dtype=torch.float32):
    """Rows bit by bit, the gradient within the bound; what belongs to nothing is exactly 0."""
    inputs = draw(plan, hidden, dtype)
    result = assert_matches(bind(functional, plan), bind(reference, plan), inputs)
    held = int(plan.expert_offsets[-1])
    assert bits_equal(result["output"][:held], inputs["x"][plan.row_token[:held].long()])
    assert not result["output"][held:].any()
    assert not result["d_x"][(plan.assignment_row < 0).all(-1)].any()
    return result


# ---- against the float64 reference ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("capacity", (None, 0, 3))
def test_routings(dtype, routing, capacity):
    check(draw_plan(25, 6, 3, routing, capacity), 40, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (0, 1, 2, 15, 16, 17, 255, 256, 257, 700, 1024))
def test_hidden_sizes(dtype, hidden):
    check(draw_plan(20, 4, 3, capacity=14), hidden, dtype)


@pytest.mark.parametrize("top_k", (1, 2, 7, 32))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_top_k(top_k, dtype):
    check(draw_plan(9, 32, top_k), 20, dtype)


@given(shapes(), st.sampled_from(DTYPES))
def test_drawn(shape, dtype):
    torch.manual_seed(shape.seed)
    plan = draw_plan(shape.tokens, shape.num_experts, shape.top_k, shape.routing, shape.capacity)
    # One number alone may cancel to less than its rounding.
    check(plan, shape.hidden + 16, dtype)


@pytest.mark.parametrize("module", (functional, reference))
def test_gradcheck(module):
    plan = draw_plan(6, 3, 2, "sentinels", 2)
    (x,) = draw(plan, 5, torch.float64).values()
    assert torch.autograd.gradcheck(bind(module, plan), x.requires_grad_())


# ---- what is not touched ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tails_gradient_is_never_read(dtype):
    plan = draw_plan(20, 4, 3, "sentinels", capacity=8)
    inputs, cotangents = draw(plan, 12, dtype), {}
    function = bind(functional, plan)
    expected = evaluate(function, inputs, cotangents=cotangents)
    cotangents["output"][plan.row_token < 0] = math.nan
    assert bits_equal(evaluate(function, inputs, cotangents=cotangents), expected)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_not_finite_values_reach_their_rows_only(value):
    plan = draw_plan(20, 4, 2, capacity=8)
    inputs = draw(plan, 12)
    inputs["x"][5, 3] = value
    output = bind(functional, plan)(**inputs)
    touched = torch.zeros_like(output, dtype=torch.bool)
    touched[plan.row_token == 5, 3] = True
    assert torch.equal(~output.isfinite(), touched)


@needs_ops
@pytest.mark.parametrize("dtype", DTYPES)
def test_k_is_summed_in_order(dtype):
    """Big, small, minus big: any other order gives another number."""
    big, small = {torch.float16: (2048.0, 1.0)}.get(dtype, (2.0**30, 1.0))
    plan = reference.capacity_scatter(torch.tensor([[2, 0, 1]]), 3)
    x = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    gradient = torch.empty(3, 1, dtype=dtype)
    gradient[plan.assignment_row[0].long(), 0] = torch.tensor([big, -big, small], dtype=dtype)
    functional.gather_rows(x, plan).backward(gradient)
    assert x.grad.item() == small


@needs_ops
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sums_are_rounded_once(dtype):
    """1 + eps / 2 + eps / 2: rounded after every term it stays 1."""
    plan = reference.capacity_scatter(torch.tensor([[0, 1, 2]]), 3)
    x = torch.zeros(1, 20, dtype=dtype, requires_grad=True)
    eps = torch.finfo(dtype).eps
    gradient = torch.tensor([1, eps / 2, eps / 2], dtype=dtype)[:, None].expand(3, 20)
    functional.gather_rows(x, plan).backward(gradient)
    assert (x.grad == 1 + eps).all()


# ---- tensors as they come ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_non_contiguous(dtype):
    plan = draw_plan(20, 4, 3, capacity=10)
    inputs, cotangents = draw(plan, 33, dtype), {}
    expected = evaluate(bind(functional, plan), inputs, cotangents=cotangents)
    views = {name: strided(t) for name, t in inputs.items()}
    plan = plan._replace(
        row_token=strided(plan.row_token), assignment_row=strided(plan.assignment_row)
    )
    cotangents["output"] = strided(cotangents["output"])
    assert bits_equal(evaluate(bind(functional, plan), views, cotangents=cotangents), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned(dtype):
    """A view that begins one element into its storage: no vector of it is aligned."""
    plan = draw_plan(20, 4, 3, capacity=10)
    inputs, cotangents = draw(plan, 32, dtype), {}
    expected = evaluate(bind(functional, plan), inputs, cotangents=cotangents)
    cotangents["output"] = shifted(cotangents["output"])
    views = dict(x=shifted(inputs["x"]))
    assert bits_equal(evaluate(bind(functional, plan), views, cotangents=cotangents), expected)


def test_expanded_gradient():
    """sum().backward() sends a gradient whose strides are 0."""
    plan = draw_plan(10, 4, 2, capacity=4)
    x = unit(10, 6).requires_grad_()
    functional.gather_rows(x, plan).sum().backward()
    kept = (plan.assignment_row >= 0).sum(-1, keepdim=True)
    torch.testing.assert_close(x.grad, kept.expand(10, 6).float(), rtol=0, atol=0)


@needs_ops
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_same_bits(dtype, set_threads):
    plan = draw_plan(400, 8, 4, capacity=150)
    assert_same_bits(bind(functional, plan), draw(plan, 300, dtype), set_threads)


# ---- as an operator ----


@needs_ops
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("capacity", (None, 2))
def test_opcheck(dtype, capacity):
    plan = draw_plan(9, 4, 2, "sentinels", capacity)
    x = draw(plan, 8, dtype)["x"].requires_grad_()
    ops = torch.ops.moe_ext
    torch.library.opcheck(ops.gather_rows.default, (x, plan.row_token, plan.assignment_row))
    gradient = unit(len(plan.row_token), 8, dtype=dtype)
    torch.library.opcheck(ops.gather_rows_backward.default, (gradient, plan.assignment_row))


def test_compile():
    """One graph for every T from 2 on, with eager mode's bits."""
    compiled = torch.compile(
        functional.gather_rows, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (7, 16, 40):
        plan = draw_plan(tokens, 4, 2)
        inputs, cotangents = draw(plan, 6), {}
        with torch._dynamo.config.patch(error_on_recompile=tokens > 7):
            actual = evaluate(bind(None, plan, compiled), inputs, cotangents=cotangents)
        assert bits_equal(actual, evaluate(bind(functional, plan), inputs, cotangents=cotangents))


@needs_ops
def test_double_backward_is_an_error():
    plan = draw_plan(5, 4, 2)
    x = unit(5, 6).requires_grad_()
    output = functional.gather_rows(x, plan)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---- bad input ----

BAD = (
    ("x", lambda t: t.int(), TypeError, r"got int32 \(6, 6\)"),
    ("x", lambda t: t[0], ValueError, r"got float32 \(6,\)"),
    ("x", lambda t: t[:-1], ValueError, "", "assignment_row"),
    ("row_token", lambda t: t.long(), TypeError, r"got int64 \(12,\)"),
    ("row_token", lambda t: t.repeat(2), ValueError, r"T\*K = 12, got int32 \(24,\)"),
    ("assignment_row", lambda t: t.long(), TypeError, r"got int64 \(6, 2\)"),
    ("assignment_row", lambda t: t.flatten(), ValueError, r"got int32 \(12,\)"),
    ("assignment_row", lambda t: t[:-1], ValueError, r"T = 6, got int32 \(5, 2\)"),
)


@needs_ops
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    name, spoil, error, text, *others = BAD[case]
    plan = draw_plan(6, 4, 2)
    inputs = draw(plan, 6)
    if name in inputs:
        inputs[name] = spoil(inputs[name])
    else:
        plan = plan._replace(**{name: spoil(getattr(plan, name))})
    blamed = "|".join([name, *others])
    with pytest.raises(error, match=rf"^gather_rows: ({blamed}) must be .*{text}"):
        bind(functional, plan)(**inputs)


@needs_values
def test_tokens_and_rows_past_the_last_are_refused():
    plan, x = draw_plan(6, 4, 2), unit(6, 6).requires_grad_()
    with pytest.raises(ValueError, match="^gather_rows: row_token must be below 6, got 6"):
        functional.gather_rows(x, plan._replace(row_token=plan.row_token + 1))
    output = functional.gather_rows(x, plan._replace(assignment_row=plan.assignment_row + 1))
    with pytest.raises(
        ValueError, match="^gather_rows_backward: assignment_row must be below 12, got 12"
    ):
        output.sum().backward()
