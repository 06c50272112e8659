"""Hopper's primitives against the PTX manual, written out; see test_primitives.py.

On a GPU these need one of compute capability 9.0.
"""

import ctypes
import itertools
import os
import re

import pytest
import torch

from emulator import micro as micro_kernels

EMULATED = micro_kernels.BACKEND == "emulated"
pytestmark = pytest.mark.skipif(
    not EMULATED
    and not (micro_kernels.BACKEND == "cuda" and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs --backend emulated, or a GPU of compute capability 9.0",
)


@pytest.fixture(params=range(8 if EMULATED else 1))
def seed(request):
    if EMULATED:
        from emulator import control

        control.set(request.param, device=1)
    return request.param


def test_mbarrier_hands_over(micro, seed):
    given = torch.arange(6 * 32, dtype=torch.int32).view(6, 32)
    out = torch.full_like(given, -1)
    micro("mbarrier_ring", given, out)
    assert torch.equal(out, given)


# ---- TMA ---------------------------------------------------------------------------------------


def swizzle(byte):
    """Where a byte goes under the 128-byte swizzle: bits 4 to 6 are xored with bits 7 to 9."""
    return byte ^ ((byte >> 7 & 7) << 4)


BOXES = {  # dims: sizes, box, coordinates; the innermost first
    "inside": ((128, 96), (64, 64), (64, 16)),
    "past the end": ((120, 40), (64, 64), (64, 24)),
    "before the start": ((128, 40), (64, 32), (-8, -5)),
    "nothing of it": ((64, 16), (64, 16), (0, 16)),
    "three": ((72, 10, 5), (64, 4, 8), (16, 8, 1)),
    "four": ((64, 3, 4, 5), (32, 2, 3, 4), (8, 2, 0, 3)),
    "five": ((40, 3, 3, 3, 4), (16, 2, 2, 2, 3), (32, 0, 2, 1, 2)),
}


def box_of(sizes, box, at, swizzled):
    """(element of the tensor or None, element of shared memory) for each of the box."""
    for where, place in enumerate(itertools.product(*map(range, reversed(box)))):
        position = [a + p for a, p in zip(at, reversed(place), strict=True)]
        element = None
        if all(0 <= p < size for p, size in zip(position, sizes, strict=True)):
            element, step = 0, 1
            for p, size in zip(position, sizes, strict=True):
                element += p * step
                step *= size
        yield element, (swizzle(2 * where) if swizzled else 2 * where) // 2


def copy(micro, store, data, sizes, strides, box, at, swizzled, raw):
    longs = [torch.tensor(x, dtype=torch.int64) for x in (sizes, strides)]
    numbers = [torch.tensor(x, dtype=torch.int32) for x in (box, at)]
    host = [x.numpy().ctypes.data for x in (*longs, *numbers)]
    pointers = [ctypes.c_void_p(x) for x in host]
    return micro.run("box", store, len(sizes), data, *pointers, swizzled, raw)


def dense_strides(sizes):
    strides, step = [], 2
    for size in sizes[:-1]:
        step *= size
        strides.append(step)
    return strides


@pytest.mark.parametrize("swizzled", [0, 1])
@pytest.mark.parametrize("name", BOXES)
def test_tma(micro, seed, name, swizzled):
    sizes, box, at = BOXES[name]
    count = torch.Size(sizes).numel()
    data = torch.arange(1, count + 1, dtype=torch.int16)
    raw = torch.zeros(64 * 64, dtype=torch.int16)
    strides = dense_strides(sizes)
    code, message = copy(micro, 0, data, sizes, strides, box, at, swizzled, raw)
    assert code == 0, message
    expected = torch.full_like(raw, -1)
    for element, place in box_of(sizes, box, at, swizzled):
        expected[place] = 0 if element is None else data[element]
    assert torch.equal(raw, expected)

    # The same box back, into a tensor of its own: outside of it nothing is written.
    raw = torch.arange(64 * 64, dtype=torch.int16)
    written = torch.full((count,), -7, dtype=torch.int16)
    code, message = copy(micro, 1, written, sizes, strides, box, at, swizzled, raw)
    assert code == 0, message
    expected = torch.full_like(written, -7)
    for element, place in box_of(sizes, box, at, swizzled):
        if element is not None:
            expected[element] = raw[place]
    assert torch.equal(written, expected)


@pytest.mark.parametrize("store", [0, 1])
def test_a_ragged_map_ends_at_any_row(micro, seed, store):
    """Rows of a matrix from `begin` on, `count` of them, through a map that knows neither: two
    more dimensions, and an address that wraps around at 64 bits."""
    rows, columns, begin, count = 40, 64, 13, 9
    stride, half = columns * 2, 1 << 30
    sizes = (columns, half, 2**31 - 1, 2**31 - 1)
    strides = (stride, stride, 2**35 - stride)
    data = torch.arange(rows * columns, dtype=torch.int16).view(rows, columns)
    raw = torch.arange(64 * 64, dtype=torch.int16).flip(0).contiguous()
    given, before = raw.clone(), data.clone()
    for first in range(0, count, 4):
        at = (0, half - count + first, begin + count, half)
        box = (64, 4, 1, 1)
        code, message = copy(micro, store, data, sizes, strides, box, at, 0, raw)
        assert code == 0, message
        there = min(4, count - first)
        if store:
            before[begin + first : begin + first + there] = given.view(64, 64)[:there]
        else:
            assert torch.equal(raw.view(64, 64)[:there], data[begin + first :][:there])
            assert (raw.view(64, 64)[there:4] == 0).all()
    assert torch.equal(data, before)


@pytest.mark.parametrize(
    "refused",
    [
        {"offset": 4},  # bytes: no multiple of 16
        {"strides": (72,)},
        {"box": (4, 8)},  # 8 bytes
        {"box": (128, 8), "swizzled": 1},  # rows of more than 128 bytes
        {"box": (64, 257)},
    ],
)
def test_a_map_that_the_driver_refuses(micro, seed, refused):
    data = torch.zeros(64 * 300, dtype=torch.int16)[refused.get("offset", 0) // 2 :]
    box, strides = refused.get("box", (64, 8)), refused.get("strides", (128,))
    raw = torch.zeros(64 * 64, dtype=torch.int16)
    swizzled = refused.get("swizzled", 0)
    assert copy(micro, 0, data, (64, 290), strides, box, (0, 0), swizzled, raw)[0] == -3


# ---- wgmma -------------------------------------------------------------------------------------


def lay(matrix, mn_major):
    """Shared memory of a (mn, 64) operand: rows of 128 bytes, swizzled."""
    mn, k = torch.meshgrid(*map(torch.arange, matrix.shape), indexing="ij")
    byte = mn // 64 * 8192 + k * 128 + mn % 64 * 2 if mn_major else mn * 128 + k * 2
    image = torch.empty(matrix.numel(), dtype=matrix.dtype)
    image[(byte ^ ((byte >> 7 & 7) << 4)) // 2] = matrix
    return image


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("majors", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["kk", "kn", "mk", "mn"])
@pytest.mark.parametrize("n", [32, 64, 128, 192, 256])
def test_wgmma(micro, seed, n, majors, dtype):
    if n < 64 and majors[1]:
        pytest.skip("rows of 128 bytes are 64 columns")
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-9, 10, (rows, 64), generator=generator) for rows in (64, n))
    accumulators = torch.randint(-99, 100, (64, n), generator=generator).float()
    accumulate = seed % 2
    # Of 16 rows a warp, thread t holds pairs of columns of two.
    t, i = torch.arange(128)[:, None], torch.arange(n // 2)
    held = t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2
    given = accumulators[held]
    out = torch.zeros_like(given)
    images = [lay(x.to(dtype), major) for x, major in zip((a, b), majors, strict=True)]
    micro("wgmma", n, dtype == torch.bfloat16, *majors, *images, given, accumulate, out)
    expected = (a @ b.T).float() + accumulate * accumulators
    assert torch.equal(out, expected[held])


@pytest.mark.parametrize("transposed", [0, 1])
def test_stmatrix(micro, seed, transposed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randint(-999, 999, (4, 8, 8), generator=generator, dtype=torch.int16)
    registers = torch.zeros(32, 4, 2, dtype=torch.int16)  # lower half first
    for m, lane, half in itertools.product(range(4), range(32), range(2)):
        group, member = lane // 4, lane % 4 * 2 + half
        at = (member, group) if transposed else (group, member)
        registers[lane, m, half] = matrices[m][at]
    rows = torch.randperm(32, generator=generator, dtype=torch.int32)
    out = torch.zeros(32, 8, dtype=torch.int16)
    micro("stmatrix", transposed, registers, rows, out)
    assert torch.equal(out[rows.long()], matrices.view(32, 8))


def test_registers_and_election(micro, seed):
    elected = torch.full((384,), -1, dtype=torch.int32)
    micro("registers", elected)
    assert (elected.view(12, 32).sum(1) == 1).all()  # one lane of each warp


# ---- all of it together ------------------------------------------------------------------------

FAULTS = {  # of kernels/hopper_pipeline.cu: what is said of it; None: C is wrong
    "no_wait_for_empty": "race|all 1 of the phase have come|deadlock",
    "wrong_parity_at_full": "race|has not been written|while a copy|deadlock|all 1 of the phase",
    "wrong_parity_at_empty": "deadlock.*at the mbarrier",
    "phase_not_flipped": "deadlock|race|while a copy|all 1 of the phase",
    "full_counts_two": r"deadlock.*1 of 2 have come, 0 bytes are missing",
    "expects_one_box": "while a copy|is left with|deadlock|race|is on its way",
    "released_before_the_wait": "race: TMA writes .* which block 0, wgmma of warp",
    "last_release_missing": "deadlock.*at the mbarrier",
    "released_by_every_lane": "all [18] of the phase have come|race: TMA|deadlock",
    "no_fence_of_the_barriers": "no fence of its initialisation",
    "no_barrier_behind_the_barriers": "there is no mbarrier|race",
    "no_wgmma_fence": "no wgmma.fence",
    "no_commit": "ends with a wgmma in flight|race: TMA writes",
    "accumulators_read_early": "ends with a wgmma in flight|no wgmma.fence|race",
    "accumulators_written_in_flight": "was written in flight",
    "accumulators_not_cleared": None,
    "one_warp_apart": "have not done the same wgmmas",
    "wrong_step_along_k": None,
    "no_proxy_fence": "no fence.proxy.async after the write by",
    "no_barrier_before_the_store": "race|has not been written|no fence.proxy.async",
    "staging_reused": "race: write of byte .* read by block 0, TMA for thread",
    "exit_before_the_store_has_read": "has not waited for TMA to read",
    "registers_never_given": "deadlock.*for 232 registers",
}
CHECKED = os.environ.get("MOE_EXT_EMULATOR_BUILD") == "checked"
ONLY_CHECKED = {"no_proxy_fence"}  # a fast build has one kind of memory


def pipeline(micro, fault):
    """Whether the kernel gave C, and what was said if it was stopped."""
    tiles, k_blocks = 2, 3
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-3, 4, (rows, 64 * k_blocks), generator=generator).bfloat16()
        for rows in (128 * tiles, 64)
    )
    c = torch.full((128 * tiles, 64), float("nan"), dtype=torch.bfloat16)
    code, message = micro.run("pipeline", fault.encode(), a, b, c, tiles, k_blocks)
    assert code in (0, -1)
    if code:
        return False, message
    return torch.equal(c, (a.float() @ b.float().T).bfloat16()), ""


def test_pipeline(micro, seed):
    right, message = pipeline(micro, "none")
    assert right, message


@pytest.mark.skipif(not EMULATED, reason="needs --backend emulated")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(micro, fault):
    from emulator import control

    found = []
    for seed in range(8):
        control.set(seed, device=1)
        right, message = pipeline(micro, fault)
        if message:
            assert FAULTS[fault] and re.search(FAULTS[fault], message, re.DOTALL), message
        found.append(not right)
    if fault in ONLY_CHECKED and not CHECKED:
        assert not any(found)
    else:
        assert all(found) if CHECKED else any(found), found
