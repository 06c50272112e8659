"""How a result is judged: the error bound, drawn inputs, drawn shapes.

A test of a stage is mostly one call:

    inputs = dict(x=unit(T, H, dtype=dtype), weight=unit(E, H, dtype=dtype, fan_in=H))
    assert_matches(functional.router_logits, reference.router_logits, inputs)

It runs the function, the reference in the same dtype (the baseline: one F.linear
an expert) and the reference in float64 (the oracle), forward and backward, and
holds every output and every gradient to DESIGN's bound:

    |actual - oracle| / |oracle|  <=  max(1.5 * the baseline's error, 4 eps of the dtype)

Data is of unit scale: a wrong kernel passes any tolerance on weights of 0.02.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_ext import reference
from moe_ext._load import BACKEND
from moe_ext.testing import error_limit, evaluate, in_float64, relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (*reference.GATES, *reference.ACTIVATIONS)
ROUTINGS = ("distinct", "skewed", "one_expert", "duplicates", "sentinels")

DEVICE = torch.get_default_device()  # cuda with --backend cuda

# The tests that need registered ops (schemas, fakes, saved tensors, bits).
HAS_OPS = BACKEND != "reference"


# ---- data ---------------------------------------------------------------------


def unit(*shape, dtype=torch.float32, fan_in=1):
    """Normal data; a weight takes its fan_in, so that what it produces is of unit scale."""
    return (torch.randn(shape, dtype=torch.float64) / fan_in**0.5).to(dtype)


def redraw():
    """Seeds torch; a call of what comes back takes it there again, on every device. (A state of
    torch's generator is the CPU's alone.)"""
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    return lambda: torch.manual_seed(seed)


def strided(tensor):
    """The same values in a non-contiguous tensor with padding between the elements."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), 77, dtype=tensor.dtype)
    view = wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    return view.copy_(tensor)


def shifted(tensor):
    """The same values in a view that begins one element into its storage."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


def draw_experts(tokens, num_experts, top_k, routing="distinct"):
    """Experts (T, K) int32: a routing of one of the kinds in ROUTINGS.

    distinct: as a router chooses. skewed: the same, most tokens on few experts.
    one_expert: every assignment on one. duplicates: with replacement.
    sentinels: distinct, a third of the ids replaced by ids >= E.
    """
    if routing == "one_expert":
        return torch.full((tokens, top_k), int(torch.randint(num_experts, ())), dtype=torch.int32)
    if routing == "duplicates":
        return torch.randint(num_experts, (tokens, top_k), dtype=torch.int32)
    scores = torch.randn(tokens, num_experts)
    if routing == "skewed":
        scores -= torch.arange(num_experts)
    experts = scores.argsort(-1, descending=True)[:, :top_k].int()
    if routing == "sentinels":
        past = num_experts + torch.randint(3, experts.shape, dtype=torch.int32) * 1000
        experts = torch.where(torch.rand(experts.shape) < 1 / 3, past, experts)
    return experts


def draw_plan(tokens, num_experts, top_k, routing="distinct", capacity=None):
    """The reference's plan for drawn experts."""
    experts = draw_experts(tokens, num_experts, top_k, routing)
    return reference.capacity_scatter(experts, num_experts, capacity)


def draw_ffn(hidden, width, num_experts, dtype, *, gated=True, bias=False, transposed=False):
    """up_proj, down_proj and, with `bias`, up_bias and down_bias, of unit-scale effect."""
    wide = 2 * width if gated else width
    up, down = (num_experts, wide, hidden), (num_experts, hidden, width)
    if transposed:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    parameters = dict(
        up_proj=unit(*up, dtype=dtype, fan_in=max(hidden, 1)),
        down_proj=unit(*down, dtype=dtype, fan_in=max(width, 1)),
    )
    if bias:
        parameters["up_bias"] = unit(num_experts, wide, dtype=dtype)
        parameters["down_bias"] = unit(num_experts, hidden, dtype=dtype)
    return parameters


class Shape(NamedTuple):
    tokens: int
    hidden: int
    width: int
    num_experts: int
    top_k: int
    routing: str
    capacity: int | None
    seed: int


@st.composite
def shapes(draw, max_tokens=40):
    """A Shape, edge values first: no token, one expert, K = E, sizes of 1, tight capacities."""
    size = st.sampled_from((1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64))
    num_experts = draw(st.sampled_from((1, 2, 3, 5, 8, 13)))
    return Shape(
        tokens=draw(st.sampled_from((0, 1, 2, 3, 7, 16, 17)) | st.integers(0, max_tokens)),
        hidden=draw(size),
        width=draw(size),
        num_experts=num_experts,
        top_k=draw(st.sampled_from((1, min(2, num_experts), num_experts))),
        routing=draw(st.sampled_from(ROUTINGS)),
        capacity=draw(st.none() | st.sampled_from((0, 1, 2, 5))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


# ---- judging ------------------------------------------------------------------


def assert_within_bound(name, actual, oracle, baseline, dtype=None):
    """DESIGN's bound. `dtype` is the one whose eps counts (default: of `actual`).

    Where the oracle is zero everywhere, `actual` must be.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    dtype = dtype or actual.dtype
    error, allowed = relative_error(actual, oracle), relative_error(baseline, oracle)
    limit = error_limit(allowed, dtype)
    assert error <= limit, (
        f"{name}: relative error {error:.3g} against float64, at most {limit:.3g} allowed "
        f"(baseline {allowed:.3g}, {dtype}, shape {tuple(actual.shape)})"
    )


def bits_equal(a, b):
    """Whether two tensors, or two equal structures of tensors, hold the same bits."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.is_floating_point:
            integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
            a, b = (t.detach().contiguous().view(integer) for t in (a, b))
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bits_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(bits_equal(p, q) for p, q in zip(a, b))
    return a == b


class Draws:
    """A function's results beside the baseline's and the oracle's, over one or several draws.

    An error measured on few numbers is luck: one that nearly cancels makes its relative
    error as large as it likes. So tests of small sizes pool draws until `is_telling`.
    """

    def __init__(self):
        self.results = {}  # name: three lists of flat tensors

    def add(self, function, reference_function, inputs, frozen=()):
        """Runs one draw forward and backward; returns its results, named as by `evaluate`."""
        cotangents = {}
        actual = evaluate(function, inputs, frozen, cotangents)
        baseline = evaluate(reference_function, inputs, frozen, cotangents)
        oracle = evaluate(reference_function, in_float64(inputs), frozen, cotangents)
        assert actual.keys() == oracle.keys()
        for name, result in actual.items():
            expected = oracle[name]
            assert result.shape == expected.shape, f"{name}: {result.shape}, not {expected.shape}"
            if result.dtype.is_floating_point:
                pooled = self.results.setdefault(name, ([], [], []))
                for pool, tensor in zip(pooled, (result, expected, baseline[name])):
                    pool.append(tensor.flatten())
            else:
                assert result.dtype == expected.dtype and torch.equal(result, expected), name
        return actual

    def is_telling(self):
        """Whether every result has at least 64 elements by now (or none: it is empty)."""
        sizes = [sum(map(len, actual)) for actual, _, _ in self.results.values()]
        return all(size == 0 or size >= 64 for size in sizes)

    def assert_within_bound(self, dtype=None):
        for name, pooled in self.results.items():
            assert_within_bound(name, *map(torch.cat, pooled), dtype)


def assert_matches(function, reference_function, inputs, frozen=(), dtype=None):
    """Holds every output and gradient of function(**inputs) to the bound, integers to equality.

    Options go into `inputs` as they are or into a closure. `dtype`: whose eps counts
    (default: of each result). Returns the results, named as by `evaluate`.
    """
    draws = Draws()
    actual = draws.add(function, reference_function, inputs, frozen)
    draws.assert_within_bound(dtype)
    return actual


def several_runs(set_threads):
    """For runs that must give the same bits: twice with 1 and with 2 threads; in the emulator
    under eight orders of threads and blocks, and deliveries of copies."""
    if BACKEND == "emulated":
        from emulator import control

        for seed in range(8):
            yield control.set(seed)
    else:
        for threads in (1, 1, 2, 2):
            yield set_threads(threads)


def assert_same_bits(function, inputs, set_threads, frozen=()):
    """Outputs and gradients have the same bits in several_runs."""
    cotangents = {}
    runs = [evaluate(function, inputs, frozen, cotangents) for _ in several_runs(set_threads)]
    for run in runs[1:]:
        for name, result in run.items():
            assert bits_equal(result, runs[0][name]), f"{name}: not the same bits"
