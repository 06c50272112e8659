"""capacity_scatter: the plan, entry by entry, beside a loop that says what it means."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext import functional, reference
from moe_ext.types import Plan
from support.ffn_suite import ON_GPU, needs_ops, needs_values
from support.oracle import DTYPES, ROUTINGS, bits_equal, draw_experts, several_runs, strided

POLICIES = ("choice", "token", "probs")


def naive(experts, num_experts, capacity, weights, padding_mask, drop_policy, num_sequences):
    """The plan by its definition: in the order of the policy, each takes a place if one is left."""
    tokens, top_k = experts.shape
    ids = experts.tolist()
    valid = [
        (t, j)
        for t in range(tokens)
        for j in range(top_k)
        if ids[t][j] < num_experts and not (padding_mask is not None and padding_mask[t])
    ]

    def weight(t, j):
        value = float(weights[t, j])
        return -math.inf if math.isnan(value) else value

    order = {
        "choice": lambda a: (a[1], a[0]),
        "token": lambda a: a,
        "probs": lambda a: (-weight(*a), a),
    }
    used, kept = {}, set()
    for t, j in valid if capacity is None else sorted(valid, key=order[drop_policy]):
        place = (t // max(tokens // num_sequences, 1), ids[t][j])
        used[place] = used.get(place, 0) + 1
        if capacity is None or used[place] <= capacity:
            kept.add((t, j))
    mine = [
        [(t, j) for t, j in valid if (t, j) in kept and ids[t][j] == e] for e in range(num_experts)
    ]
    rows = [assignment for expert in mine for assignment in expert]
    total = tokens * top_k
    if capacity is not None:
        total = min(total, num_experts * capacity * num_sequences)
    tail = [-1] * (total - len(rows))
    row_of = {assignment: r for r, assignment in enumerate(rows)}
    lengths = [0, *(len(expert) for expert in mine)]
    return Plan(
        torch.tensor(lengths).cumsum(0).int(),
        torch.tensor([t for t, _ in rows] + tail, dtype=torch.int32),
        torch.tensor([t * top_k + j for t, j in rows] + tail, dtype=torch.int32),
        torch.tensor(
            [[row_of.get((t, j), -1) for j in range(top_k)] for t in range(tokens)],
            dtype=torch.int32,
        ).view(tokens, top_k),
        torch.tensor([sum(ids[t][j] == e for t, j in valid) for e in range(num_experts)]).int(),
    )


def check(experts, num_experts, capacity=None, **options):
    plan = functional.capacity_scatter(experts, num_experts, capacity, **options)
    defaults = dict(weights=None, padding_mask=None, drop_policy="token", num_sequences=1)
    for oracle in (
        naive(experts, num_experts, capacity, **defaults | options),
        reference.capacity_scatter(experts, num_experts, capacity, **options),
    ):
        for name in Plan._fields:
            actual, expected = getattr(plan, name), getattr(oracle, name)
            assert actual.dtype == torch.int32 and torch.equal(actual, expected), name
    return plan


# ---- against the definition ----


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("capacity", (None, 0, 1, 3, 1000))
@pytest.mark.parametrize("drop_policy", POLICIES)
def test_routings(routing, id_dtype, capacity, drop_policy):
    experts = draw_experts(30, 6, 3, routing).to(id_dtype)
    check(experts, 6, capacity, weights=torch.rand(30, 3), drop_policy=drop_policy)


@pytest.mark.parametrize("capacity", (None, 1, 2))
@pytest.mark.parametrize("drop_policy", POLICIES)
@pytest.mark.parametrize("num_sequences", (1, 2, 3, 24))
@pytest.mark.parametrize("masked", (False, True))
def test_sequences_and_padding(capacity, drop_policy, num_sequences, masked):
    options = dict(drop_policy=drop_policy, num_sequences=num_sequences, weights=torch.rand(24, 2))
    if masked:
        options["padding_mask"] = torch.rand(24) < 0.4
    check(draw_experts(24, 4, 2, "skewed"), 4, capacity, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_dtype_with_ties_and_nan(dtype):
    weights = (torch.randn(60, 2) * 2).round().to(dtype)
    weights[::7, 0] = math.nan
    weights[3::7] = -math.inf
    weights[5::7] = math.inf
    weights[6::7] = -0.0
    for capacity in (1, 4, 9, 15):
        check(draw_experts(60, 3, 2), 3, capacity, weights=weights, drop_policy="probs")


@given(
    st.integers(1, 3),
    st.integers(0, 12),
    st.sampled_from((1, 2, 5, 40)),
    st.integers(1, 4),
    st.none() | st.integers(0, 6),
    st.sampled_from(POLICIES),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_drawn(sequences, length, num_experts, top_k, capacity, drop_policy, masked, seed):
    torch.manual_seed(seed)
    tokens = sequences * length
    check(
        torch.randint(num_experts + 2, (tokens, top_k)),
        num_experts,
        capacity,
        weights=torch.randn(tokens, top_k).round(),
        padding_mask=torch.rand(tokens) < 0.2 if masked else None,
        drop_policy=drop_policy,
        num_sequences=sequences,
    )


# ---- by hand ----


def test_drop_orders():
    """Two places; the second token's first choice comes before the first one's second."""
    experts = torch.tensor([[1, 0], [0, 1], [0, 1]])
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    kept = {
        policy: (check(experts, 2, 2, weights=weights, drop_policy=policy).assignment_row >= 0)
        for policy in POLICIES
    }
    assert kept["choice"].tolist() == [[True, False], [True, True], [True, False]]
    assert kept["token"].tolist() == [[True, True], [True, True], [False, False]]
    assert kept["probs"].tolist() == [[True, False], [True, True], [True, False]]


def test_padding_takes_no_place():
    mask = torch.tensor([True, False, True, False])
    plan = check(torch.zeros(4, 1, dtype=torch.int32), 1, 2, padding_mask=mask)
    assert plan.row_token.tolist() == [1, 3] and plan.expert_counts.tolist() == [2]


def test_rows_are_known_before_the_routing():
    for capacity, sequences, rows in ((None, 1, 12), (1, 1, 4), (1, 2, 8), (2, 2, 12), (9, 1, 12)):
        for expert in (0, 7):
            experts = torch.full((6, 2), expert, dtype=torch.int32)
            plan = check(experts, 4, capacity, num_sequences=sequences)
            assert plan.row_token.shape == plan.row_assignment.shape == (rows,)


@pytest.mark.parametrize("capacity", (2**31, 2**62, 2**63 - 1))
def test_huge_capacity_is_dropless(capacity):
    experts = draw_experts(10, 4, 2)
    plan = functional.capacity_scatter(experts, 4, capacity)
    assert bits_equal(tuple(plan), tuple(functional.capacity_scatter(experts, 4)))


def test_huge_ids_are_sentinels():
    check(torch.tensor([[2**31, 1], [2**40, 2**32 + 1]]), 3)


def test_no_tokens():
    for capacity in (None, 0, 3):
        plan = check(torch.zeros(0, 2, dtype=torch.int32), 5, capacity)
        assert plan.expert_offsets.tolist() == [0] * 6


def check_large(experts, num_experts, capacity=None, **options):
    """As `check`, for sizes that the naive loop takes too long for."""
    plan = functional.capacity_scatter(experts, num_experts, capacity, **options)
    expected = reference.capacity_scatter(experts, num_experts, capacity, **options)
    for name in Plan._fields:
        assert torch.equal(getattr(plan, name), getattr(expected, name)), name


@pytest.mark.parametrize("drop_policy", POLICIES)
@pytest.mark.parametrize("routing", ("skewed", "sentinels", "one_expert"))
@pytest.mark.parametrize("sequences, capacity", ((1, None), (1, 150), (3, 60), (150, 3)))
def test_many_segments(drop_policy, routing, sequences, capacity):
    """More assignments than a warp, a block or a part of the sort takes by itself."""
    tokens = 1650  # no whole number of equal segments in the batch, nor in a third of it
    experts = draw_experts(tokens, 12, 4, routing)
    weights = (torch.rand(tokens, 4) * 50).round() / 50  # with ties
    mask = torch.rand(tokens) < 0.1
    check_large(
        experts, 12, capacity, weights=weights, padding_mask=mask, drop_policy=drop_policy,
        num_sequences=sequences,
    )  # fmt: skip


@pytest.mark.parametrize("drop_policy", POLICIES)
@pytest.mark.parametrize(
    "num_experts, sequences", ((65, 1), (65, 4), (1500, 1), (1500, 4), (7000, 4))
)
def test_many_experts(drop_policy, num_experts, sequences):
    """More experts than counters fit a block's shared memory, or than are scanned at a time."""
    experts = torch.randint(num_experts, (200, 8))
    experts[::3] //= 100
    weights = torch.randn(200, 8)
    for capacity in (None, 2):
        check_large(
            experts, num_experts, capacity, weights=weights, drop_policy=drop_policy,
            num_sequences=sequences,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_differ_in_every_digit(dtype):
    """Numbers of all magnitudes and both signs; then neighbours, which the last bits tell apart."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(size)
    everything = torch.randint(info.min, info.max, (400, 2), dtype=size).view(dtype)
    neighbours = (torch.ones((), dtype=dtype).view(size) + torch.randint(300, (400, 2))).to(size)
    for weights in (everything, neighbours.view(dtype), -neighbours.view(dtype)):
        experts = draw_experts(400, 3, 2)
        for capacity in (1, 100, 250):
            check_large(experts, 3, capacity, weights=weights, drop_policy="probs")


@pytest.mark.skipif(not ON_GPU, reason="elsewhere it is an error")
def test_ids_below_zero_are_sentinels_on_a_gpu():
    experts = draw_experts(30, 4, 3, "sentinels").long()
    below = torch.where(experts >= 4, torch.randint(-(2**40), 0, experts.shape), experts)
    for capacity in (None, 5):
        expected = functional.capacity_scatter(experts, 4, capacity)
        assert bits_equal(tuple(functional.capacity_scatter(below, 4, capacity)), tuple(expected))


# ---- tensors as they come ----


def test_non_contiguous():
    experts, weights, mask = draw_experts(20, 4, 3), torch.rand(20, 3), torch.rand(20) < 0.3
    options = dict(drop_policy="probs")
    expected = functional.capacity_scatter(
        experts, 4, 3, weights=weights, padding_mask=mask, **options
    )
    actual = functional.capacity_scatter(
        strided(experts), 4, 3, weights=strided(weights), padding_mask=strided(mask), **options
    )
    turned = functional.capacity_scatter(
        experts.t().contiguous().t(), 4, 3, weights=weights, padding_mask=mask, **options
    )
    assert bits_equal(tuple(expected), tuple(actual)) and bits_equal(tuple(expected), tuple(turned))


@pytest.mark.parametrize(
    "name, dim",
    (("experts", 0), ("experts", 1), ("weights", 0), ("weights", 1), ("padding_mask", 0)),
)
def test_strides_past_2_31(name, dim):
    """Offsets need 64 bits. Of the storage only the values themselves are ever touched."""
    tensors = dict(experts=torch.tensor([[0, 1], [1, 2]], dtype=torch.int32))
    tensors["weights"] = torch.tensor([[0.5, 0.25], [0.75, 1.0]], dtype=torch.bfloat16)
    if name == "padding_mask":
        tensors[name] = torch.tensor([False, True])
    near = tensors[name]
    strides = [1] * near.ndim
    strides[dim] = 2**31 + 3
    storage = torch.empty(2**31 + 5, dtype=near.dtype)
    tensors[name] = storage.as_strided(near.shape, strides).copy_(near)
    check(num_experts=3, capacity=1, drop_policy="probs", **tensors)


def test_inputs_stay_as_they_are_and_need_no_gradient():
    experts, weights = draw_experts(20, 4, 3), torch.rand(20, 3, requires_grad=True)
    before = experts.clone(), weights.clone()
    plan = functional.capacity_scatter(experts, 4, 2, weights=weights, drop_policy="probs")
    assert bits_equal(before, (experts, weights)) and not any(t.requires_grad for t in plan)


@pytest.mark.parametrize("drop_policy", POLICIES)
def test_same_bits(drop_policy, set_threads):
    experts, weights = draw_experts(3000, 16, 4, "skewed"), torch.rand(3000, 4).half()
    plans = []
    for _ in several_runs(set_threads):
        options = dict(weights=weights, drop_policy=drop_policy)
        plans.append(tuple(functional.capacity_scatter(experts, 16, 300, **options)))
    assert all(bits_equal(plan, plans[0]) for plan in plans[1:])


# ---- as an operator ----


@needs_ops
@pytest.mark.parametrize("capacity", (None, 0, 2, 100))
@pytest.mark.parametrize("drop_policy", POLICIES)
def test_opcheck(capacity, drop_policy):
    arguments = (draw_experts(10, 4, 2), 4, capacity, torch.rand(10, 2), torch.rand(10) < 0.3)
    op = torch.ops.moe_ext.capacity_scatter.default
    torch.library.opcheck(op, (*arguments, drop_policy, 2))
    torch.library.opcheck(op, arguments, dict(num_sequences=5))


@pytest.mark.parametrize("capacity", (None, 3))
def test_compile(capacity):
    def function(experts):
        return tuple(functional.capacity_scatter(experts, 4, capacity))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 16, 40):
        experts = draw_experts(tokens, 4, 2)
        with torch._dynamo.config.patch(error_on_recompile=tokens > 7):
            assert bits_equal(compiled(experts), function(experts))


# ---- bad input ----

BAD = (
    (
        dict(experts=torch.zeros(4, 2)),
        TypeError,
        r"experts must be int32 or int64 of shape \(T, K\), got float32 \(4, 2\)",
    ),
    (dict(experts=torch.zeros(4, 2, dtype=torch.bool)), TypeError, "experts must .* got bool"),
    (dict(experts=torch.zeros(4, dtype=torch.int32)), ValueError, r"experts must .* int32 \(4,\)"),
    (dict(num_experts=0), ValueError, "num_experts must be .* got 0"),
    (dict(num_experts=2**31), ValueError, "num_experts must be"),
    (dict(capacity=1.5), TypeError, "capacity must be of type int, got float"),
    (dict(capacity=-1), ValueError, "capacity must be None or at least 0, got -1"),
    (
        dict(drop_policy="random"),
        ValueError,
        "drop_policy must be one of choice, token, probs, got random",
    ),
    (dict(capacity=1, drop_policy="probs"), ValueError, "weights must be given .* got None"),
    (dict(weights=[1.0]), TypeError, "weights must be of type Tensor, got list"),
    (dict(weights=torch.zeros(4, 2).int()), TypeError, r"weights must be .* got int32 \(4, 2\)"),
    (dict(weights=torch.zeros(4, 3)), ValueError, r"weights must be .*\(4, 2\) like experts, got"),
    (dict(padding_mask=torch.ones(4).long()), TypeError, "padding_mask must .*attention_mask == 0"),
    (dict(padding_mask=torch.ones(3).bool()), ValueError, r"padding_mask must be .* bool \(3,\)"),
    (dict(num_sequences=3), ValueError, "num_sequences must be .* divisor of T = 4, got 3"),
    (dict(num_sequences=0), ValueError, "num_sequences must be .* got 0"),
)


@needs_ops
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    spoiled, error, text = BAD[case]
    arguments = dict(experts=torch.zeros(4, 2, dtype=torch.int32), num_experts=3) | spoiled
    with pytest.raises(error, match="^capacity_scatter: " + text):
        functional.capacity_scatter(**arguments)


@needs_values
def test_ids_below_zero_are_refused():
    for experts, lowest in ((torch.tensor([[0, 1], [2, -1]]), -1), (torch.full((4, 2), -3), -3)):
        with pytest.raises(
            ValueError, match=f"^capacity_scatter: experts must be ids of at least 0.* got {lowest}"
        ):
            functional.capacity_scatter(experts, 3)
