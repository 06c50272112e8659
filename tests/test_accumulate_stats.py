"""accumulate_stats, the op itself: test_stats.py says what a layer makes of it."""

import math

import pytest
import torch

from moe_ext import reference
from moe_ext.stats import ASSIGNMENTS, DROPPED, ENTROPY, FORWARDS, LOST_TOKENS, MAX_LOGIT, TOKENS
from support.ffn_suite import needs_ops
from support.oracle import DTYPES, bits_equal, several_runs, strided

SCORE_FUNCTIONS = ("softmax", "sigmoid", "softmax_topk")

pytestmark = needs_ops


def sums(num_experts):
    """counts, score_sums, totals, step_counts, of a fresh start."""
    return (
        torch.zeros(num_experts, dtype=torch.int64),
        torch.zeros(num_experts, dtype=torch.float64),
        torch.zeros(FORWARDS + 1, dtype=torch.float64),
        torch.zeros(num_experts, dtype=torch.int64),
    )


def draw(tokens, num_experts, top_k=2, dtype=torch.float32, id_dtype=torch.int32):
    """logits, experts, expert_counts, route_score_sums, assignment_row, padding_mask; of the
    experts some are sentinels, of the assignments some have no row."""
    logits = (2 * torch.randn(tokens, num_experts)).to(dtype)
    experts = torch.randint(num_experts + 2, (tokens, top_k), dtype=id_dtype)
    return (
        logits,
        experts,
        torch.bincount(experts.flatten().long(), minlength=num_experts)[:num_experts].int(),
        torch.rand(num_experts, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        torch.randint(-2, 9, experts.shape, dtype=torch.int32),
        torch.rand(tokens) < 0.2,
    )


def expect(before, forward, function):
    """What the reference makes of it in float64."""
    after = tuple(t.clone() for t in before)
    reference.accumulate_stats(*after, forward[0].double(), *forward[1:], function)
    return after


def check(tokens, num_experts, function="softmax", before=None, **options):
    forward = draw(tokens, num_experts, **options)
    before = before or sums(num_experts)
    expected = expect(before, forward, function)
    torch.ops.moe_ext.accumulate_stats(*before, *forward, function)
    for got, wanted in zip(before, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * max(tokens, 1))
        if not got.is_floating_point():
            assert torch.equal(got, wanted)
    exact = [TOKENS, ASSIGNMENTS, DROPPED, LOST_TOKENS, FORWARDS]
    assert torch.equal(before[2][exact], expected[2][exact])
    return before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
def test_dtypes(dtype, function, id_dtype):
    check(40, 9, function, dtype=dtype, id_dtype=id_dtype)


@pytest.mark.parametrize("num_experts", (1, 2, 31, 32, 33, 255, 256, 257, 600))
@pytest.mark.parametrize("function", ("softmax", "sigmoid"))
def test_numbers_of_experts(num_experts, function):
    check(21, num_experts, function, top_k=min(num_experts, 40))


@pytest.mark.parametrize("tokens", (0, 1, 7, 8, 9, 255, 257, 2047, 2057, 16397))
def test_numbers_of_tokens(tokens):
    """From 2049 on a GPU's threads add up several blocks each; from 16384 on, a block has
    more than a token a warp."""
    check(tokens, 3, dtype=torch.float64)


def test_forwards_add_up():
    before = sums(5)
    for tokens in (6, 0, 30):
        check(tokens, 5, before=before)
    assert before[2][FORWARDS] == 3


def test_a_maximum_below_zero():
    """The zeros of a fresh start are no maximum."""
    logits, *rest = draw(9, 4)
    totals = sums(4)
    for below in (5, 3, 4):
        torch.ops.moe_ext.accumulate_stats(*totals, -logits.abs() - below, *rest, "softmax")
    rows = logits.abs().amin(-1)[~rest[-1]]
    assert totals[2][MAX_LOGIT].item() == pytest.approx(-rows.min().item() - 3, abs=1e-5)


def test_the_optional_arguments():
    counts, score_sums, totals, _ = before = sums(6)
    logits, experts, *of_route, _, _ = forward = draw(20, 6)
    expected = expect(before, (*forward[:4], None, None), "sigmoid")
    torch.ops.moe_ext.accumulate_stats(
        counts, score_sums, totals, None, logits, experts, *of_route, None, None, "sigmoid"
    )
    assert torch.equal(counts, expected[0]) and totals[DROPPED] == 0
    torch.testing.assert_close(totals, expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", ("softmax", "sigmoid"))
def test_padding_is_not_read(function):
    logits, *rest, mask = draw(50, 7)
    results = []
    for value in (0.0, math.nan, math.inf):
        results.append(sums(7))
        changed = torch.where(mask[:, None], value, logits)
        torch.ops.moe_ext.accumulate_stats(*results[-1], changed, *rest, mask, function)
    assert all(bits_equal(result, results[0]) for result in results[1:])


def test_a_nan_is_not_hidden():
    logits, *rest = draw(300, 7)
    rest[-1].zero_()
    logits[171, 3] = math.nan
    totals = sums(7)
    torch.ops.moe_ext.accumulate_stats(*totals, logits, *rest, "softmax")
    assert totals[2][[MAX_LOGIT, ENTROPY]].isnan().all()


def test_scores_that_underflow_count_nothing():
    logits, *rest = draw(9, 4)
    logits[:, 0], logits[:, 1:] = 0, -1e4
    totals = sums(4)
    torch.ops.moe_ext.accumulate_stats(*totals, logits, *rest, "softmax")
    assert totals[2][ENTROPY] == 0


def test_non_contiguous():
    logits, experts, *rest = draw(60, 8)
    results = sums(8), sums(8)
    torch.ops.moe_ext.accumulate_stats(*results[0], logits, experts, *rest, "softmax")
    torch.ops.moe_ext.accumulate_stats(
        *results[1], strided(logits), strided(experts), *rest, "softmax"
    )
    assert bits_equal(*results)


def test_same_bits(set_threads):
    forward = draw(3000, 12)
    results = []
    for _ in several_runs(set_threads):
        results.append(sums(12))
        torch.ops.moe_ext.accumulate_stats(*results[-1], *forward, "sigmoid")
    assert all(bits_equal(result, results[0]) for result in results[1:])
