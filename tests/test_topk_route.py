"""topk_route: the choice, the weights, and what the losses need.

Where a choice is compared with the reference's, the logits are multiples of 1/8:
they tie exactly, or are far from it, in every dtype.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext import functional, reference
from moe_ext.testing import relative_error
from moe_ext.types import RouterOutput
from support.ffn_suite import needs_ops
from support.oracle import (
    DTYPES,
    assert_matches,
    assert_same_bits,
    bits_equal,
    evaluate,
    strided,
    unit,
)

SCORE_FUNCTIONS = ("softmax", "sigmoid", "softmax_topk")


def eighths(*shape, dtype=torch.float32):
    return ((torch.randn(shape) * 8).round() / 8).to(dtype)


def bind(module, top_k, **options):
    return lambda logits: module.topk_route(logits, top_k, **options)


def check(logits, top_k, **options):
    """Outputs and gradients against float64; the results."""
    return assert_matches(
        bind(functional, top_k, **options), bind(reference, top_k, **options), dict(logits=logits)
    )


# ---- against the float64 reference ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("norm_topk_prob", (True, False))
@pytest.mark.parametrize("scale", (1.0, 2.5))
def test_score_functions(dtype, score_function, norm_topk_prob, scale):
    options = dict(norm_topk_prob=norm_topk_prob, routed_scaling_factor=scale)
    check(eighths(30, 12, dtype=dtype), 3, score_function=score_function, **options)


@pytest.mark.parametrize("num_experts", (1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 1000))
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_sizes(num_experts, score_function):
    for top_k in {1, min(2, num_experts), min(8, num_experts), min(40, num_experts), num_experts}:
        check(eighths(5, num_experts), top_k, score_function=score_function)


@pytest.mark.parametrize("num_experts", (513, 1024, 1025, 1100))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_long_rows(num_experts, dtype):
    """Past 1024 experts (512 in float64) a GPU keeps the row in memory."""
    logits = eighths(7, num_experts, dtype=dtype)
    mask = torch.tensor([False] * 5 + [True, False])
    check(logits, 9, padding_mask=mask, score_function="sigmoid", routed_scaling_factor=2.5)
    check(logits, 70, selection_bias=torch.randn(num_experts), norm_topk_prob=False)
    if num_experts % 4 == 0:
        for score in ("max", "top2_sum"):
            check(logits, 5, n_group=num_experts // 4, topk_group=3, group_score=score)
    experts = torch.randint(num_experts + 9, (7, 40))
    experts[0, :4] = 3
    check(logits, 40, experts=experts, score_function="softmax_topk")


GROUPS_OF_TWO = dict(n_group=33, topk_group=3, group_score="max")


@pytest.mark.parametrize("num_experts, groups", ((3, {}), (65, {}), (66, GROUPS_OF_TWO)))
def test_many_tokens(num_experts, groups):
    """Enough of them that a GPU's team takes several (65 experts: 2; see topk_route_grid)."""
    tokens = 17000
    logits = eighths(tokens, num_experts)
    mask = torch.rand(tokens) < 0.1
    route = functional.topk_route(logits, 2, padding_mask=mask, **groups)
    expected = reference.topk_route(logits.double(), 2, padding_mask=mask, **groups)
    assert torch.equal(route.experts, expected.experts)
    assert torch.equal(route.counts, expected.counts)
    for name in ("weights", "score_sums", "logsumexp"):
        error = relative_error(getattr(route, name), getattr(expected, name))
        assert error < 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("tokens", (0, 1, 255, 256, 257, 513, 1100))
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_token_blocks(tokens, score_function):
    """score_sums goes over blocks of 256 tokens."""
    check(eighths(tokens, 6), 2, score_function=score_function)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("group_score", ("max", "top2_sum"))
@pytest.mark.parametrize("groups", ((2, 1), (4, 2), (4, 4), (12, 3)))
@pytest.mark.parametrize("biased", (False, True))
def test_groups(dtype, score_function, group_score, groups, biased):
    n_group, topk_group = groups
    check(
        eighths(40, 12, dtype=dtype),
        3,
        score_function=score_function,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        selection_bias=torch.randn(12) if biased else None,
    )


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_selection_bias_chooses_and_does_not_weigh(bias_dtype):
    bias = (torch.randn(8) / 4).to(bias_dtype)
    logits = eighths(50, 8)
    result = check(logits, 2, score_function="sigmoid", selection_bias=bias)
    plain = functional.topk_route(logits, 2, score_function="sigmoid")
    assert not torch.equal(result["experts"], plain.experts)
    chosen = logits.sigmoid().gather(-1, result["experts"].long())
    torch.testing.assert_close(result["weights"], chosen / chosen.sum(-1, keepdim=True))


def test_the_bias_has_no_gradient():
    bias = torch.randn(8, requires_grad=True)
    logits = eighths(5, 8).requires_grad_()
    functional.topk_route(logits, 2, selection_bias=bias).weights[:, 0].sum().backward()
    assert bias.grad is None and logits.grad is not None


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_padding(score_function, dtype):
    """Padding has no expert, no weight, no share in any sum and no gradient, even if NaN."""
    mask = torch.rand(300) < 0.4
    logits = eighths(300, 6, dtype=dtype)
    result = check(logits, 2, score_function=score_function, padding_mask=mask)
    assert (result["experts"][mask] == 6).all()
    assert not result["weights"][mask].any() and not result["logsumexp"][mask].any()
    assert result["counts"].sum() == 2 * (~mask).sum()
    logits[mask] = math.nan
    function = bind(functional, 2, score_function=score_function, padding_mask=mask)
    spoiled = evaluate(function, dict(logits=logits))
    assert not spoiled["d_logits"][mask].any()
    for name, value in spoiled.items():
        assert value.isfinite().all(), name
        if not name.startswith("d_"):
            assert bits_equal(value, result[name]), name


@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "softmax_topk"])
def test_padding_that_is_nan_has_no_gradient(module, score_function):
    mask = torch.tensor([False, True, False])
    logits = unit(3, 8).masked_fill(mask[:, None], float("nan")).requires_grad_()
    route = module.topk_route(logits, 2, padding_mask=mask, score_function=score_function)
    floats = (route.weights * unit(3, 2)).sum() + (route.score_sums * unit(8)).sum()
    (floats + route.logsumexp.square().sum()).backward()
    assert logits.grad[~mask].any(-1).all() and logits.grad.isfinite().all()
    assert not logits.grad[mask].any()


def test_all_padding():
    result = check(eighths(4, 3), 2, padding_mask=torch.ones(4, dtype=torch.bool))
    assert all(not value.any() for name, value in result.items() if name != "experts")


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("norm_topk_prob", (True, False))
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("masked", (False, True))
def test_replay(score_function, norm_topk_prob, id_dtype, masked):
    """A recorded choice: with duplicates, with sentinels, with rows of nothing else."""
    experts = torch.randint(7, (40, 3), dtype=id_dtype)
    experts[:3] = torch.tensor([[5, 5, 6], [0, 0, 0], [1, 9, 1000]])
    options = dict(
        experts=experts,
        score_function=score_function,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=1.5,
        padding_mask=torch.rand(40) < 0.3 if masked else None,
    )
    logits = torch.randn(40, 5)
    result = check(logits, 3, **options)
    assert not result["weights"][result["experts"] >= 5].any()
    leaf = logits.requires_grad_()
    route = functional.topk_route(leaf, 3, **options)
    (gradient,) = torch.autograd.grad(route.weights.square().sum(), leaf)
    assert not gradient[0].any(), "a token of sentinels alone has a gradient"


def test_replay_of_the_own_choice():
    logits = torch.randn(30, 9)
    route = functional.topk_route(logits, 3)
    again = functional.topk_route(logits, 3, experts=route.experts)
    assert bits_equal(tuple(route), tuple(again))


def test_a_huge_id_stays_a_sentinel():
    experts = torch.tensor([[2**31, 2**40]])
    route = functional.topk_route(torch.randn(1, 4), 2, experts=experts)
    assert (route.experts >= 4).all() and not route.weights.any() and not route.counts.any()


@st.composite
def routings(draw):
    num_experts = draw(st.sampled_from((1, 2, 4, 6, 8, 12, 16, 24, 48)))
    groups = [g for g in range(1, num_experts + 1) if num_experts % g == 0]
    n_group = draw(st.sampled_from(groups))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, min(10, topk_group * num_experts // n_group)))
    options = dict(
        score_function=draw(st.sampled_from(SCORE_FUNCTIONS)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from((1.0, 0.5, 16.0))),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(("max", "top2_sum"))),
    )
    return draw(st.integers(0, 60)), num_experts, top_k, options


@given(
    routings(),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_drawn(routing, dtype, biased, masked, seed):
    torch.manual_seed(seed)
    tokens, num_experts, top_k, options = routing
    if biased:
        options["selection_bias"] = torch.randn(num_experts)
    if masked:
        options["padding_mask"] = torch.rand(tokens) < 0.3
    check(eighths(tokens, num_experts, dtype=dtype), top_k, **options)


# ---- the choice ----


def test_ties_go_to_the_lower_id():
    logits = torch.zeros(1, 40)
    for top_k in (1, 3, 32, 33, 40):  # picking and sorting
        assert functional.topk_route(logits, top_k).experts.tolist() == [list(range(top_k))]
    logits[0, [7, 3, 30]] = 1.0
    assert functional.topk_route(logits, 4).experts.tolist() == [[3, 7, 30, 0]]
    route = functional.topk_route(logits, 2, n_group=4, topk_group=1)
    assert route.experts.tolist() == [[3, 7]]
    assert functional.topk_route(
        torch.zeros(1, 8), 2, n_group=4, topk_group=2
    ).experts.tolist() == [[0, 1]]


def test_ineligible_groups_come_after_minus_infinity():
    logits = torch.tensor([[5.0, -math.inf, 4.0, 3.0]])
    route = functional.topk_route(logits, 2, n_group=2, topk_group=1)
    assert route.experts.tolist() == [[0, 1]]


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("top_k", (2, 5, 40))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_not_finite(score_function, value, top_k, dtype):
    """Ids stay in range and distinct, other tokens as they are; what is made of it is torch's."""
    logits = eighths(6, 40, dtype=dtype)
    expected = functional.topk_route(logits, top_k, score_function=score_function)
    logits[1, 3] = logits[2, 0] = value
    logits[4] = value
    options = dict(score_function=score_function)
    actual = functional.topk_route(logits, top_k, **options)
    oracle = reference.topk_route(logits, top_k, **options)
    for row in actual.experts.tolist():
        assert len(set(row)) == top_k and 0 <= min(row) and max(row) < 40
    assert torch.equal(actual.experts, oracle.experts)
    torch.testing.assert_close(actual.weights, oracle.weights, equal_nan=True)
    torch.testing.assert_close(actual.logsumexp, oracle.logsumexp, equal_nan=True)
    for token in (0, 3, 5):
        assert bits_equal(actual.weights[token], expected.weights[token])


def test_nan_bias_ranks_last():
    bias = torch.tensor([math.nan, 0.0, 0.0, 0.0])
    route = functional.topk_route(torch.tensor([[9.0, 1.0, 2.0, 3.0]]), 4, selection_bias=bias)
    assert route.experts.tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_extreme_logits(score_function):
    """Scores that underflow leave finite weights and gradients."""
    logits = torch.tensor([[500.0, -500.0, 0.0, 100.0], [-1e30, -1e30, 1e30, 0.0]])
    result = evaluate(bind(functional, 2, score_function=score_function), dict(logits=logits))
    assert all(value.isfinite().all() for value in result.values())
    oracle = reference.topk_route(logits.double(), 2, score_function=score_function)
    torch.testing.assert_close(result["weights"].double(), oracle.weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result["logsumexp"].double(), oracle.logsumexp, rtol=1e-6, atol=0)


# ---- gradients ----


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("norm_topk_prob", (True, False))
@pytest.mark.parametrize("wanted", ("weights", "score_sums", "logsumexp"))
def test_each_gradient_alone(score_function, norm_topk_prob, wanted):
    """A loss that takes one output: the others' gradients are None, not zeros."""

    def one(module):
        function = bind(
            module, 3, score_function=score_function, norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=2.0, padding_mask=mask,
        )  # fmt: skip
        return lambda logits: getattr(function(logits), wanted)

    mask = torch.rand(30) < 0.2
    assert_matches(one(functional), one(reference), dict(logits=eighths(30, 7)))


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("norm_topk_prob", (True, False))
def test_gradcheck(score_function, norm_topk_prob):
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([False, True, False, False, False])

    def function(logits):
        route = functional.topk_route(
            logits, 2, padding_mask=mask, score_function=score_function,
            norm_topk_prob=norm_topk_prob, routed_scaling_factor=1.7,
        )  # fmt: skip
        return route.weights, route.score_sums, route.logsumexp

    assert torch.autograd.gradcheck(function, logits)


def test_integers_are_not_differentiable():
    route = functional.topk_route(torch.randn(4, 5, requires_grad=True), 2)
    assert not route.experts.requires_grad and not route.counts.requires_grad
    assert route.experts.dtype == route.counts.dtype == torch.int32


# ---- tensors as they come ----


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_non_contiguous(score_function):
    logits, experts = torch.randn(20, 9), torch.randint(9, (20, 2))
    bias, mask = torch.randn(9), torch.rand(20) < 0.3
    for options in (dict(selection_bias=bias), dict(experts=experts), dict(padding_mask=mask)):
        views = {name: strided(t) for name, t in options.items()}
        function = bind(functional, 2, score_function=score_function, **options)
        viewed = bind(functional, 2, score_function=score_function, **views)
        cotangents = {}
        assert bits_equal(
            evaluate(function, dict(logits=logits), cotangents=cotangents),
            evaluate(viewed, dict(logits=strided(logits)), cotangents=cotangents),
        )
        assert bits_equal(tuple(function(logits)), tuple(viewed(logits.t().contiguous().t())))


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_same_bits(score_function, set_threads):
    function = bind(functional, 3, score_function=score_function)
    assert_same_bits(function, dict(logits=torch.randn(1300, 20)), set_threads)


@needs_ops
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_a_token_does_not_depend_on_the_others(score_function):
    logits = torch.randn(700, 24)
    everything = functional.topk_route(logits, 4, score_function=score_function)
    for part in (slice(0, 1), slice(250, 270), slice(699, 700)):
        alone = functional.topk_route(logits[part], 4, score_function=score_function)
        for name in ("weights", "experts", "logsumexp"):
            assert bits_equal(getattr(alone, name), getattr(everything, name)[part]), name


# ---- as an operator ----


@needs_ops
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("replay", (False, True))
def test_opcheck(dtype, replay):
    logits = torch.randn(9, 8, requires_grad=True, dtype=dtype)
    options = dict(
        selection_bias=torch.randn(8),
        padding_mask=torch.rand(9) < 0.3,
        experts=torch.randint(9, (9, 3)) if replay else None,
        score_function="sigmoid",
        n_group=4,
        topk_group=2,
    )
    torch.library.opcheck(torch.ops.moe_ext.topk_route.default, (logits, 3), options)


@needs_ops
@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)))
def test_opcheck_backward(given):
    gradients = (unit(9, 3), unit(8), unit(9))
    gradients = [gradient if g else None for gradient, g in zip(gradients, given)]
    experts = torch.randint(9, (9, 3), dtype=torch.int32)
    arguments = (*gradients, unit(9, 8), experts, torch.rand(9) < 0.3, "softmax", True, 2.0)
    torch.library.opcheck(torch.ops.moe_ext.topk_route_backward.default, arguments)
    if not any(given):
        assert not torch.ops.moe_ext.topk_route_backward(*arguments).any()


def test_compile():
    """One graph for every T from 2 on, with eager mode's bits."""

    def function(logits):
        return bind(functional, 2, score_function="sigmoid")(logits)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 16, 300):
        logits, cotangents = torch.randn(tokens, 6), {}
        with torch._dynamo.config.patch(error_on_recompile=tokens > 7):
            actual = evaluate(compiled, dict(logits=logits), cotangents=cotangents)
        assert bits_equal(actual, evaluate(function, dict(logits=logits), cotangents=cotangents))


@needs_ops
def test_double_backward_is_an_error():
    logits = torch.randn(4, 5, requires_grad=True)
    weights = functional.topk_route(logits, 2).weights
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---- bad input ----

BAD = (
    (dict(logits=torch.zeros(4, 6, dtype=torch.int64)), TypeError, "logits must be .* int64"),
    (dict(logits=torch.zeros(6)), ValueError, r"logits must be .* \(T, E\).* float32 \(6,\)"),
    (dict(logits=torch.zeros(4, 0)), ValueError, "logits must be"),
    (dict(top_k=2.0), TypeError, "top_k must be of type int, got float"),
    (dict(score_function=None), TypeError, "score_function must be of type str, got NoneType"),
    (dict(top_k=0), ValueError, r"top_k must be in 1\.\.E = 6, got 0"),
    (dict(top_k=7), ValueError, r"top_k must be in 1\.\.E = 6, got 7"),
    (dict(n_group=4), ValueError, "n_group must be .* divisor of E = 6, got 4"),
    (dict(n_group=0), ValueError, "n_group must be"),
    (dict(n_group=3, topk_group=4), ValueError, r"topk_group must be in 1\.\.n_group = 3, got 4"),
    (dict(n_group=3, topk_group=0), ValueError, "topk_group must be"),
    (dict(top_k=3, n_group=3, topk_group=1), ValueError, "top_k must be at most .* 2, got 3"),
    (
        dict(score_function="softplus"),
        ValueError,
        "score_function must be one of softmax, sigmoid, softmax_topk, got softplus",
    ),
    (dict(group_score="sum"), ValueError, "group_score must be one of max, top2_sum, got sum"),
    (dict(selection_bias=torch.zeros(5)), ValueError, r"selection_bias must be .*\(6,\), got .*5"),
    (dict(selection_bias=torch.zeros(6, dtype=torch.int32)), TypeError, "selection_bias must be"),
    (
        dict(padding_mask=torch.ones(4, dtype=torch.int64)),
        TypeError,
        r"padding_mask must be bool .*attention_mask == 0.* got int64 \(4,\)",
    ),
    (dict(padding_mask=torch.zeros(5, dtype=torch.bool)), ValueError, "padding_mask must be bool"),
    (dict(padding_mask=torch.zeros(4, 1, dtype=torch.bool)), ValueError, "padding_mask must be"),
    (dict(experts=torch.zeros(4, 2)), TypeError, r"experts must be int32 or int64 .*float32"),
    (dict(experts=torch.zeros(4, 3, dtype=torch.int32)), ValueError, "experts must be int32"),
)


@needs_ops
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    spoiled, error, text = BAD[case]
    arguments = dict(logits=torch.zeros(4, 6), top_k=2) | spoiled
    with pytest.raises(error, match="^topk_route: " + text):
        functional.topk_route(**arguments)


@needs_ops
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
def test_ids_below_zero(id_dtype):
    """The CPU refuses them. Only the memory of a GPU could tell: there they are sentinels."""
    experts = torch.tensor([[-1, 2], [0, torch.iinfo(id_dtype).min]], dtype=id_dtype)
    logits = torch.randn(2, 6, requires_grad=True)
    if functional.BACKEND not in ("emulated", "cuda"):
        with pytest.raises(ValueError, match="experts must be ids of at least 0.*got -"):
            functional.topk_route(logits, 2, experts=experts)
        return
    route = functional.topk_route(logits, 2, experts=experts)
    expected = functional.topk_route(logits, 2, experts=torch.where(experts < 0, 6, experts))
    assert bits_equal(tuple(route), tuple(expected))
    assert route.weights[0, 0] == 0 == route.weights[1, 1] and route.experts.max() == 6
    arguments = (unit(2, 2), None, None, logits.detach())
    options = (None, "softmax", False, 1.0)
    backward = torch.ops.moe_ext.topk_route_backward
    assert bits_equal(
        backward(*arguments, experts, *options), backward(*arguments, route.experts, *options)
    )


@needs_ops
def test_result_is_a_route():
    route = functional.topk_route(torch.randn(3, 4), 2)
    assert isinstance(route, RouterOutput) and [t.shape for t in route] == [
        (3, 2),
        (3, 2),
        (4,),
        (4,),
        (3,),
    ]
