"""weighted_combine: each token's weighted sum of its rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext import functional, reference
from support.ffn_suite import ON_GPU, needs_ops, needs_values
from support.oracle import (
    DTYPES,
    ROUTINGS,
    assert_matches,
    assert_same_bits,
    assert_within_bound,
    bits_equal,
    draw_plan,
    evaluate,
    shapes,
    shifted,
    strided,
    unit,
)


def bind(module, plan, combine=None):
    combine = combine or module.weighted_combine
    return lambda rows, weights: combine(rows, weights, plan)


def draw(plan, hidden, dtype=torch.float32, weights_dtype=torch.float32):
    """Rows and weights of unit scale for a plan."""
    rows = unit(len(plan.row_token), hidden, dtype=dtype)
    return dict(rows=rows, weights=unit(*plan.assignment_row.shape, dtype=weights_dtype))


def check(plan, hidden, dtype=torch.float32, weights_dtype=torch.float32):
    """The output and both gradients against float64; what belongs to nothing is exactly 0."""
    inputs = draw(plan, hidden, dtype, weights_dtype)
    result = assert_matches(bind(functional, plan), bind(reference, plan), inputs)
    dropped = plan.assignment_row < 0
    assert not result["d_weights"][dropped].any()
    assert not result["d_rows"][plan.row_assignment < 0].any()
    assert not result["output"][dropped.all(-1)].any()
    return result


# ---- against the float64 reference ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", (True, False))
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("capacity", (None, 0, 3))
def test_routings(dtype, own, routing, capacity):
    """Weights of the rows' dtype, and of float32."""
    weights_dtype = dtype if own or dtype == torch.float64 else torch.float32
    check(draw_plan(25, 6, 3, routing, capacity), 40, dtype, weights_dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_float64_weights(dtype):
    check(draw_plan(25, 6, 3), 40, dtype, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (1, 2, 15, 16, 17, 255, 256, 257, 700, 1024))
def test_hidden_sizes(dtype, hidden):
    """The hidden size goes in blocks of 256."""
    check(draw_plan(9, 4, 2, capacity=4), hidden, dtype)


@pytest.mark.parametrize("top_k", (1, 2, 7, 32))
def test_top_k(top_k):
    check(draw_plan(9, 32, top_k), 20)


@given(shapes(), st.sampled_from(DTYPES), st.booleans())
def test_drawn(shape, dtype, own):
    torch.manual_seed(shape.seed)
    plan = draw_plan(shape.tokens, shape.num_experts, shape.top_k, shape.routing, shape.capacity)
    # One number alone may cancel to less than its rounding.
    check(plan, shape.hidden + 16, dtype, dtype if own else torch.float64)


def test_gradcheck():
    plan = draw_plan(6, 3, 2, "sentinels", 2)
    inputs = draw(plan, 5, torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(bind(functional, plan), leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_long_rows(dtype):
    """A weight's gradient over 40000 elements: a single float32 sum would lose digits."""
    plan = draw_plan(3, 2, 1)
    inputs = draw(plan, 40000, dtype)
    inputs["rows"] = inputs["rows"].abs()
    check_sum = evaluate(bind(functional, plan), inputs, cotangents=dict(output=inputs["rows"][:3]))
    rows = inputs["rows"].double()
    expected = (rows[plan.assignment_row[:, 0].long()] * rows[:3]).sum(-1)
    actual = check_sum["d_weights"][:, 0].double()
    assert ((actual - expected).abs() <= 4 * torch.finfo(torch.float32).eps * expected).all()


def one_row_a_token(tokens):
    """Token t's only row is row t."""
    return reference.capacity_scatter(torch.zeros(tokens, 1, dtype=torch.int32), 1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_16_bit_number_is_read_as_it_is(dtype):
    rows = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    output = functional.weighted_combine(rows, torch.ones(len(rows), 1), one_row_a_token(len(rows)))
    number = ~rows.isnan()
    assert torch.equal(output[number], rows[number]) and output[~number].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_results_are_rounded_to_nearest_even(dtype):
    """All exponents, ties and what lies beside them: as torch converts, both ways."""
    tie = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # bits that are rounded away
    bits = torch.randint(-(2**31), 2**31, (40000,))
    bits[::4] = (bits[::4] >> tie << tie) | 1 << (tie - 1)
    bits[1::4] = bits[::4] + 1
    bits[2::4] = bits[::4] - 1
    numbers = bits.int().view(torch.float32)[:, None]
    plan = one_row_a_token(len(numbers))
    rows = torch.ones(len(numbers), 1, dtype=dtype, requires_grad=True)
    output = functional.weighted_combine(rows, numbers, plan)
    (gradient,) = torch.autograd.grad(output, rows, torch.ones_like(output))
    expected = numbers.to(dtype)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


# ---- what is not touched ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_rows_and_the_tail_are_never_read(dtype):
    plan = draw_plan(20, 4, 3, "sentinels", capacity=8)
    inputs = draw(plan, 12, dtype)
    function, cotangents = bind(functional, plan), {}
    expected = evaluate(function, inputs, cotangents=cotangents)
    inputs["rows"][plan.row_assignment < 0] = math.nan
    inputs["weights"][plan.assignment_row < 0] = math.nan
    assert bits_equal(evaluate(function, inputs, cotangents=cotangents), expected)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_not_finite_values_reach_their_tokens_only(value):
    plan = draw_plan(20, 4, 2)
    inputs = draw(plan, 12)
    inputs["rows"][5, 3] = value
    output = bind(functional, plan)(**inputs)
    touched = torch.zeros_like(output, dtype=torch.bool)
    touched[plan.row_token[5].long(), 3] = True
    assert torch.equal(~output.isfinite(), touched)


@needs_ops
@pytest.mark.parametrize("dtype", DTYPES)
def test_k_is_summed_in_order(dtype):
    """Big, small, minus big: any other order gives another number."""
    big, small = {torch.float16: (2048.0, 1.0)}.get(dtype, (2.0**30, 1.0))
    plan = reference.capacity_scatter(torch.tensor([[2, 0, 1]]), 3)
    rows = torch.empty(3, 1, dtype=dtype)
    rows[plan.assignment_row[0].long(), 0] = torch.tensor([big, -big, small], dtype=dtype)
    weights = torch.ones(1, 3, dtype=torch.float32)
    assert functional.weighted_combine(rows, weights, plan).item() == small


# ---- tensors as they come ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_non_contiguous(dtype):
    plan = draw_plan(20, 4, 3, capacity=10)
    inputs = draw(plan, 33, dtype)
    cotangents = {}
    expected = evaluate(bind(functional, plan), inputs, cotangents=cotangents)
    views = {name: strided(t) for name, t in inputs.items()}
    plan = plan._replace(
        row_assignment=strided(plan.row_assignment), assignment_row=strided(plan.assignment_row)
    )
    cotangents["output"] = strided(cotangents["output"])
    assert bits_equal(evaluate(bind(functional, plan), views, cotangents=cotangents), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned(dtype):
    """Views that begin one element into their storage: no vector of them is aligned."""
    plan = draw_plan(20, 4, 3, capacity=10)
    inputs, cotangents = draw(plan, 32, dtype), {}
    expected = evaluate(bind(functional, plan), inputs, cotangents=cotangents)
    views = {name: shifted(t) for name, t in inputs.items()}
    cotangents["output"] = shifted(cotangents["output"])
    actual = evaluate(bind(functional, plan), views, cotangents=cotangents)
    assert bits_equal(actual["output"], expected["output"])
    assert bits_equal(actual["d_rows"], expected["d_rows"])
    # An inner product may be summed in another order where packs cannot be read.
    assert_within_bound("d_weights", actual["d_weights"], *[expected["d_weights"]] * 2)


def test_more_than_2_31_elements():
    """Offsets need 64 bits. Only the two rows that the token takes are ever touched."""
    hidden = 4096
    count = 2**31 // hidden + 2
    rows = torch.empty(count, hidden, dtype=torch.bfloat16)
    taken = torch.tensor([1, count - 1])
    rows[taken] = unit(2, hidden, dtype=rows.dtype)
    row_assignment = torch.full((count,), -1, dtype=torch.int32)
    row_assignment[taken] = torch.arange(2, dtype=torch.int32)
    few = draw_plan(1, 2, 2)._replace(
        row_assignment=torch.arange(2, dtype=torch.int32),
        assignment_row=torch.arange(2, dtype=torch.int32)[None],
    )
    many = few._replace(row_assignment=row_assignment, assignment_row=taken.int()[None])
    weights, cotangents = unit(1, 2), {}
    expected, actual = (
        evaluate(bind(functional, plan), dict(rows=r, weights=weights), ["rows"], cotangents)
        for plan, r in ((few, rows[taken]), (many, rows))
    )
    assert bits_equal(actual, expected)


def test_expanded_gradient():
    """sum().backward() sends a gradient whose strides are 0."""
    plan = draw_plan(10, 4, 2)
    leaves = {name: t.requires_grad_() for name, t in draw(plan, 6).items()}
    bind(functional, plan)(**leaves).sum().backward()
    row = plan.assignment_row.long()
    expected = leaves["rows"].detach()[row].sum(-1)
    torch.testing.assert_close(leaves["weights"].grad, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_same_bits(dtype, set_threads):
    plan = draw_plan(400, 8, 4, capacity=150)
    assert_same_bits(bind(functional, plan), draw(plan, 300, dtype), set_threads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_token_does_not_depend_on_the_others(dtype):
    experts = torch.randint(6, (50, 3), dtype=torch.int32)
    plan = reference.capacity_scatter(experts, 6)
    inputs = draw(plan, 70, dtype)
    everything = bind(functional, plan)(**inputs)
    for token in (0, 17, 49):
        alone = reference.capacity_scatter(experts[token : token + 1], 6)
        mine = plan.assignment_row[token].long()
        rows = torch.empty(3, 70, dtype=dtype)
        rows[alone.assignment_row[0].long()] = inputs["rows"][mine]
        one = functional.weighted_combine(rows, inputs["weights"][token : token + 1], alone)
        assert bits_equal(one[0], everything[token])


# ---- as an operator ----


@needs_ops
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("capacity", (None, 2))
def test_opcheck(dtype, capacity):
    plan = draw_plan(9, 4, 2, "sentinels", capacity)
    leaves = [t.requires_grad_() for t in draw(plan, 8, dtype).values()]
    op = torch.ops.moe_ext.weighted_combine.default
    torch.library.opcheck(op, (*leaves, plan.row_assignment, plan.assignment_row))


@needs_ops
@pytest.mark.parametrize("mask", ((True, True), (True, False), (False, True)))
def test_output_mask(mask):
    plan = draw_plan(9, 4, 2)
    inputs = list(draw(plan, 8, torch.bfloat16).values())
    arguments = (
        unit(9, 8, dtype=torch.bfloat16),
        *inputs,
        plan.row_assignment,
        plan.assignment_row,
    )
    op = torch.ops.moe_ext.weighted_combine_backward
    torch.library.opcheck(op.default, (*arguments, mask))
    both = op(*arguments, (True, True))
    for wanted, gradient, full, source in zip(mask, op(*arguments, mask), both, inputs):
        assert bits_equal(gradient, full) if wanted else gradient.shape == (0,)
        assert gradient.dtype == source.dtype


def test_compile():
    """One graph for every T from 2 on, with eager mode's bits."""
    compiled = torch.compile(
        functional.weighted_combine, fullgraph=True, dynamic=True, backend="aot_eager"
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
    leaves = {name: t.requires_grad_() for name, t in draw(plan, 6).items()}
    output = bind(functional, plan)(**leaves)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves["rows"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---- bad input ----

BAD = (
    ("rows", lambda t: t.int(), TypeError, r"got int32 \(12, 6\)"),
    ("rows", lambda t: t[0], ValueError, r"got float32 \(6,\)"),
    ("rows", lambda t: t[:-1], ValueError, "", "row_assignment"),
    ("weights", lambda t: t.half(), TypeError, r"rows' dtype float32 or .* got float16 \(6, 2\)"),
    ("weights", lambda t: t.long(), TypeError, "got int64"),
    ("weights", lambda t: t.flatten(), ValueError, ""),
    ("weights", lambda t: t[:-1], ValueError, "", "assignment_row"),
    ("row_assignment", lambda t: t.long(), TypeError, r"got int64 \(12,\)"),
    ("row_assignment", lambda t: t[:-1], ValueError, r"R = 12, got int32 \(11,\)"),
    ("assignment_row", lambda t: t.long(), TypeError, r"got int64 \(6, 2\)"),
    ("assignment_row", lambda t: t[:, :1], ValueError, r"like weights, got int32 \(6, 1\)"),
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
    with pytest.raises(error, match=rf"^weighted_combine: ({blamed}) must be .*{text}"):
        bind(functional, plan)(**inputs)


@needs_values
def test_rows_and_assignments_past_the_last_are_refused():
    plan = draw_plan(6, 4, 2)
    spoiled = plan._replace(assignment_row=plan.assignment_row + 1)
    with pytest.raises(
        ValueError, match="^weighted_combine: assignment_row must be below 12, got 12"
    ):
        bind(functional, spoiled)(**draw(plan, 6))
    spoiled = plan._replace(row_assignment=plan.row_assignment + 1)
    leaves = {name: t.requires_grad_() for name, t in draw(plan, 6).items()}
    with pytest.raises(
        ValueError, match="^weighted_combine_backward: row_assignment must be below"
    ):
        bind(functional, spoiled)(**leaves).sum().backward()


@pytest.mark.skipif(not ON_GPU, reason="elsewhere it is an error")
def test_a_row_past_the_last_counts_as_dropped():
    plan = draw_plan(6, 4, 2, capacity=4)
    inputs, cotangents = draw(plan, 6), {}
    rows = plan.assignment_row
    expected = evaluate(
        bind(functional, plan._replace(assignment_row=torch.where(rows == 3, -1, rows))), inputs,
        cotangents=cotangents,
    )  # fmt: skip
    past = len(plan.row_token)
    actual = evaluate(
        bind(functional, plan._replace(assignment_row=torch.where(rows == 3, past, rows))), inputs,
        cotangents=cotangents,
    )  # fmt: skip
    used = torch.arange(past) != 3  # no gradient is written of a row that no token takes
    for results in (actual, expected):
        results["d_rows"] = results["d_rows"][used]
    assert bits_equal(actual, expected)
