"""Plans of which entries lead nowhere, on a GPU: such entries are sentinels, never followed out
of a tensor; MOE_EXT_CHECK=1 names them. The CPU refuses them, always."""

import pytest
import torch

from moe_ext import functional
from moe_ext._load import BACKEND
from support.ffn_suite import FFNStage
from support.oracle import bits_equal, draw_plan, evaluate, unit

pytestmark = pytest.mark.skipif(BACKEND not in ("cuda", "emulated"), reason="kernels of a GPU")

NOWHERE = (-1, -(2**31), 2**31 - 1, 10**6)
# (tokens, dtype, transposed): the kernels for decoding, ordinary arithmetic and tensor cores.
KERNELS = {
    "decode": (5, torch.bfloat16, False),
    "simt": (40, torch.float32, False),
    "sm80": (40, torch.bfloat16, False),
    "sm80 transposed": (40, torch.float16, True),
}
K, E, H, I = 2, 4, 72, 48


class Stage(FFNStage):
    stage, weighted = "moe_forward", True


def spoiled(plan, name, places, values=NOWHERE):
    tensor = getattr(plan, name).clone()
    flat = tensor.view(-1)
    for place, value in zip(places, values):
        flat[place] = value
    return plan._replace(**{name: tensor})


def rows_used(plan):
    return int(plan.expert_offsets[-1])


@pytest.fixture(params=KERNELS)
def drawn(request):
    return draw(*KERNELS[request.param])


def draw(tokens, dtype, transposed):
    """inputs, plan, a function of a plan that runs the stage on them."""
    stage = Stage()
    inputs = stage.inputs(tokens, H, I, E, K, dtype, transposed=transposed)
    cotangents = {}

    def run(plan):
        function = stage.bind(functional, plan, transposed=transposed)
        return evaluate(function, inputs, cotangents=cotangents)

    return inputs, draw_plan(tokens, E, K), run


def test_rows_of_no_token_count_nothing(drawn):
    """As if their assignments had been dropped."""
    inputs, plan, run = drawn
    rows = torch.randperm(rows_used(plan))[: len(NOWHERE)]
    dropped = spoiled(plan, "assignment_row", plan.row_assignment[rows].long(), (-1,) * len(rows))
    wrong = spoiled(dropped, "row_token", rows)
    result, referred = run(wrong), run(spoiled(plan, "row_token", rows))
    for name, value in referred.items():  # whether or not an assignment still leads to them
        assert value.isfinite().all(), name
        assert torch.equal(value, result[name]), name
    lost = plan.row_assignment[rows].long()
    assert not result["d_weights"].flatten()[lost].any()
    kept = torch.ones(len(inputs["x"]), dtype=torch.bool)
    kept[plan.row_token[rows].long()] = False
    clean = run(plan)
    for name in ("output", "d_x"):
        assert bits_equal(result[name][kept], clean[name][kept]), name


def test_rows_of_no_assignment_have_no_gradient(drawn):
    inputs, plan, run = drawn
    rows = torch.randperm(rows_used(plan))[: len(NOWHERE)]
    lost = plan.row_assignment[rows].long()
    result, clean = run(spoiled(plan, "row_assignment", rows)), run(plan)
    assert bits_equal(result["output"], clean["output"])
    weights = result["d_weights"].flatten()
    assert not weights[lost].any()
    kept = torch.ones(len(weights), dtype=torch.bool)
    kept[lost] = False
    assert bits_equal(weights[kept], clean["d_weights"].flatten()[kept])
    for name, value in result.items():
        assert value.isfinite().all(), name


def test_assignments_of_no_row_are_dropped(drawn):
    inputs, plan, run = drawn
    places = torch.randperm(plan.assignment_row.numel())[: len(NOWHERE)]
    result = run(spoiled(plan, "assignment_row", places))
    expected = run(spoiled(plan, "assignment_row", places, (-1,) * len(places)))
    assert bits_equal(result, expected)


@pytest.mark.parametrize(
    "offsets, meant",
    (
        ({0: -7}, {}),
        ({E: 2**31 - 1}, {}),  # R is as many as there are
        ({0: -(2**31), 1: -5}, {1: 0}),
        ({E - 1: 10**9, E: 10**9}, {E - 1: "R"}),
    ),
)
def test_offsets_past_the_rows_are_the_first_or_the_last(drawn, offsets, meant):
    inputs, plan, run = drawn
    rows = rows_used(plan)
    assert rows == len(plan.row_token)
    wrong = spoiled(plan, "expert_offsets", offsets, offsets.values())
    values = [rows if value == "R" else value for value in meant.values()]
    right = spoiled(plan, "expert_offsets", meant, values)
    assert bits_equal(run(wrong), run(right))


def test_offsets_that_fall_stay_inside(drawn):
    inputs, plan, run = drawn
    wrong = plan.expert_offsets.flip(0)
    run(plan._replace(expert_offsets=wrong))  # the emulator reports what leaves a tensor


@pytest.mark.parametrize("kernel", ["simt", "sm80", "sm80 transposed"])
def test_offsets_that_fall_take_no_rows_from_others(kernel):
    """As many as several tiles have."""
    _, plan, run = draw(150, *KERNELS[kernel][1:])
    rows = len(plan.row_token)
    offsets = torch.tensor([0, 0, rows, rows, rows], dtype=torch.int32)
    falling = torch.tensor([200, 0, rows, rows, rows], dtype=torch.int32)
    results = [run(plan._replace(expert_offsets=o)) for o in (falling, offsets)]
    assert bits_equal(*results)


def test_gather_and_combine(drawn):
    inputs, plan, _ = drawn
    x = inputs["x"].requires_grad_()
    wrong = spoiled(spoiled(plan, "row_token", range(4)), "assignment_row", range(4))
    rows = functional.gather_rows(x, wrong)
    unreferred = torch.ones(len(rows), dtype=torch.bool)
    unreferred[[r for r in wrong.assignment_row.flatten().tolist() if 0 <= r < len(rows)]] = False
    unowned = unreferred & ((wrong.row_token < 0) | (wrong.row_token >= len(x)))
    assert not rows[unowned].any()
    rows.sum().backward()
    weights = unit(*plan.assignment_row.shape).requires_grad_()
    y = functional.weighted_combine(
        unit(*rows.shape, dtype=x.dtype).requires_grad_(),
        weights,
        spoiled(wrong, "row_assignment", range(4)),
    )
    y.sum().backward()
    assert not weights.grad.flatten()[:4].any() and y.isfinite().all()


# ---- the switch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, place, value, text",
    (
        ("row_token", 3, 40, r"row_token\[3\] must be in 0..39, got 40"),
        ("row_token", 5, -1, r"row_token\[5\] must be in 0..39, got -1"),
        ("row_assignment", 7, 80, r"row_assignment\[7\] must be in 0..79, got 80"),
        ("assignment_row", 9, 10**9, r"assignment_row\[9\] must be below 80, got 1000000000"),
        (
            "expert_offsets",
            2,
            -4,
            r"expert_offsets\[2\] must rise from 0 to at most R = 80, got -4",
        ),
        (
            "expert_offsets",
            4,
            81,
            r"expert_offsets\[4\] must rise from 0 to at most R = 80, got 81",
        ),
    ),
)
def test_the_switch_names_op_argument_and_place(name, place, value, text, monkeypatch):
    stage, plan = Stage(), draw_plan(40, E, K)
    inputs = stage.inputs(40, H, I, E, K, torch.float32)
    wrong = spoiled(plan, name, [place], [value])
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    y = stage.call(leaves, wrong)
    monkeypatch.setenv("MOE_EXT_CHECK", "1")
    with pytest.raises(ValueError, match=f"^moe_forward: {text}"):
        stage.call(inputs, wrong)
    with pytest.raises(ValueError, match=f"^moe_backward: {text}"):
        y.sum().backward()
    stage.call(leaves, plan).sum().backward()  # one that fits is let through
    if name in ("row_token", "assignment_row") and value > 0:
        with pytest.raises(ValueError, match=rf"^gather_rows: {name}\[{place}\]"):
            functional.gather_rows(inputs["x"], wrong)
    if name in ("row_assignment", "assignment_row"):
        with pytest.raises(ValueError, match=rf"^weighted_combine: {name}\[{place}\]"):
            functional.weighted_combine(unit(80, H), inputs["weights"], wrong)
