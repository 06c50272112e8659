"""Every primitive against what CUDA's and PTX's manuals say of it, written out.

The micro-kernels (kernels/*.cu) only write down what a primitive did; what it must do
is here. Runs with --backend emulated, and with --backend cuda on a GPU.
"""

import ctypes
import struct

import pytest
import torch

from emulator import micro as micro_kernels

pytestmark = pytest.mark.skipif(
    micro_kernels.BACKEND not in ("emulated", "cuda"), reason="needs --backend emulated, or a GPU"
)


@pytest.fixture(params=range(8 if micro_kernels.BACKEND == "emulated" else 1))
def seed(request):
    """Seeds 0 to 3 bring every order of threads and every delivery of copies."""
    if micro_kernels.BACKEND == "emulated":
        from emulator import control

        control.set(request.param)
    return request.param


def ints(*shape, fill=-1):
    return torch.full(shape, fill, dtype=torch.int32)


def signed(bits):
    return bits - (1 << 32) if bits >= 1 << 31 else bits


# ---- warps --------------------------------------------------------------------


def test_warp(micro, seed):
    values = [(7 * lane) % 32 for lane in range(32)]  # a permutation of 0..31
    out = ints(32, 16)
    micro("warp", torch.tensor(values, dtype=torch.int32), out)
    micro.golden("warp", out)
    parity = 0
    for value in values:
        parity ^= value
    for lane, value in enumerate(values):
        segment8, segment16 = lane // 8 * 8, lane // 16 * 16
        expected = [
            values[5],
            values[segment8 + (lane + 1) % 8],
            values[lane - 3] if lane - 3 >= segment16 else value,
            values[lane + 5] if lane + 5 < segment8 + 8 else value,
            values[lane ^ 9],
            # Into another segment: a lower one may be read, a higher one gives the own value.
            values[lane ^ 9] if (lane ^ 9) < segment8 + 8 else value,
            signed(sum((v % 3 == 0) << i for i, v in enumerate(values))),
            1,
            1,
            signed(sum((v // 5 == value // 5) << i for i, v in enumerate(values))),
            sum(values),
            -7,
            31 - 70,
            parity,
            values[lane ^ 5] if lane < 16 else 11,
            -70 + 31,  # the largest as unsigned
        ]
        assert out[lane].tolist() == expected, f"lane {lane}"


# ---- barriers, atomics, flags ---------------------------------------------------


def test_barriers(micro, seed):
    values = torch.randperm(128).int()
    out = ints(128, 6)
    micro("barriers", values, out)
    v = values.tolist()
    for thread in range(128):
        assert out[thread].tolist() == [
            v[thread ^ 63],
            v[127 - thread],
            -1 if thread < 64 else v[thread - 64] + 1000,
            43,  # 0, 3, ..., 126
            1,
            1,
        ], f"thread {thread}"


def test_atomics(micro, seed):
    cells = torch.tensor([0, 0, 50, 50, -1, 0, 0, 0, 0], dtype=torch.int32)
    micro("atomics", cells)
    total, parity = sum(range(200)), 0
    for x in range(200):
        parity ^= x
    assert cells.tolist() == [
        total, -total, -5, 194, ~0xFF, 0x7FFFFFFF, parity, -200, total,
    ]  # fmt: skip


def test_chain_of_blocks(micro, seed):
    state, sums = ints(20, fill=0), ints(19)
    micro("chain", 19, state, sums)
    assert sums.tolist() == torch.arange(1, 20).cumsum(0).tolist()


def test_last_block(micro, seed):
    out = ints(12)
    micro("last_block", 11, ints(1, fill=0), out)
    assert out[11] == sum(3 * i + 1 for i in range(11))


# ---- shared memory, cp.async, ldmatrix ---------------------------------------------


def test_dynamic_shared_memory(micro, seed):
    out = ints(4)
    micro("smem", out)
    assert out.tolist() == [0, 77, 8, 7]


def test_cp_async_fills_with_zeros(micro, seed):
    source = torch.randint(1, 255, (32, 16), dtype=torch.uint8)
    out = torch.full((3, 17, 32, 16), 255, dtype=torch.uint8)
    micro("copy_fill", source, out)
    for i, size in enumerate((4, 8, 16)):
        for read in range(size + 1):
            expected = torch.zeros(32, size, dtype=torch.uint8)
            expected[:, :read] = source[:, :read]
            assert torch.equal(out[i, read, :, :size], expected), (size, read)


@pytest.mark.parametrize("left", range(3))
def test_cp_async_groups_complete_in_order(micro, seed, left):
    source = torch.randint(1000, (3, 64), dtype=torch.int32)
    out = ints(3, 64)
    micro("copy_groups", left, source, out)
    assert torch.equal(out[: 3 - left], source[: 3 - left])


@pytest.mark.parametrize("transposed", (0, 1))
@pytest.mark.parametrize("matrices", (1, 2, 4))
def test_ldmatrix(micro, seed, matrices, transposed):
    elements = torch.arange(512, dtype=torch.int16).view(64, 8)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32].int()
    out = ints(32, 4)
    micro("ldmatrix", matrices, transposed, elements, rows, out)
    micro.golden(f"ldmatrix_x{matrices}{'_trans' if transposed else ''}", out)
    for lane in range(32):
        for m in range(matrices):
            # "Each thread receives a fragment from a row: thread 4 r + c elements 2 c, 2 c + 1
            # of row r"; with .trans the matrix is loaded in column-major format.
            matrix = elements[rows[8 * m : 8 * m + 8].long()]
            matrix = matrix.T if transposed else matrix
            low, high = matrix[lane // 4, lane % 4 * 2 :][:2].tolist()
            assert int(out[lane, m]) == low | high << 16, (lane, m)


# ---- mma -----------------------------------------------------------------------------

BF16, F16, TF32 = range(3)
DTYPES = {BF16: torch.bfloat16, F16: torch.float16, TF32: torch.float32}


def places(kind):
    """(row, column) of every element of a lane's fragments of A, B and C: the manual's tables
    for .m16n8k16 (16-bit types) and .m16n8k8 (.tf32)."""
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if kind == TF32:
            a = [(group + 8 * (i in (1, 3)), member + 4 * (i >= 2)) for i in range(4)]
            b = [(member + 4 * i, group) for i in range(2)]
        else:
            a = [
                (group + 8 * (i in (2, 3, 6, 7)), member * 2 + (i & 1) + 8 * (i >= 4))
                for i in range(8)
            ]
            b = [(member * 2 + (i & 1) + 8 * (i >= 2), group) for i in range(4)]
        c = [(group + 8 * (i >= 2), member * 2 + (i & 1)) for i in range(4)]
        yield a, b, c


def multiply(micro, kind, A, B, C):
    """C + A B by the instruction, through fragments."""
    fragments = {"a": [], "b": [], "c": []}
    for lane in places(kind):
        for name, matrix, elements in zip("abc", (A, B, C), lane):
            fragments[name].append([matrix[row, column] for row, column in elements])
    a, b = (torch.tensor(fragments[name]).to(DTYPES[kind]).contiguous() for name in "ab")
    out = torch.full((32, 4), float("nan"))
    micro("mma", kind, a, b, torch.tensor(fragments["c"]), out)
    result = torch.full((16, 8), float("nan"))
    for (_, _, c), values in zip(places(kind), out):
        for (row, column), value in zip(c, values):
            result[row, column] = value
    return result


@pytest.mark.parametrize("kind", (BF16, F16, TF32))
def test_mma_places(micro, seed, kind):
    depth = 8 if kind == TF32 else 16
    generator = torch.Generator().manual_seed(0)

    def small(*shape):  # every sum is exact
        return torch.randint(-8, 9, shape, generator=generator).float()

    A, B, C = small(16, depth), small(depth, 8), small(16, 8)
    result = multiply(micro, kind, A, B, C)
    assert torch.equal(result, C + A @ B)
    micro.golden(f"mma_places_{kind}", result)


@pytest.mark.parametrize("kind", (BF16, F16, TF32))
def test_mma_accumulates_in_float32(micro, seed, kind):
    depth = 8 if kind == TF32 else 16
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(16, depth, generator=generator).to(torch.bfloat16).float()
    B = torch.randn(depth, 8, generator=generator).to(torch.bfloat16).float()
    C = torch.randn(16, 8, generator=generator)
    result = multiply(micro, kind, A, B, C)
    oracle = C.double() + A.double() @ B.double()
    # A100's tensor cores add 8 products and the sum so far, each cut off at the last place of the
    # largest: 9 of those places in each of depth / 8 sums. A sum in 16 bits is off by more.
    products = A[:, :, None] * B[None]
    sums = C[:, None] + products.unflatten(1, (-1, 8)).sum(2).cumsum(1)
    largest = torch.cat([C[:, None], products, sums], 1).abs().amax(1)
    assert ((result - oracle).abs() <= depth / 8 * 9 * 2**-23 * largest).all()


def test_tf32_ignores_the_lower_bits(micro, seed):
    A = torch.zeros(16, 8)
    A[:, 0] = 1 + 2.0**-10 + 2.0**-11 + 2.0**-23  # the last two terms are past tf32
    B = torch.zeros(8, 8)
    B[0] = 1
    result = multiply(micro, TF32, A, B, torch.zeros(16, 8))
    micro.golden("tf32_lower_bits", result)
    assert torch.equal(result, torch.full((16, 8), 1 + 2.0**-10))


def test_rounding_to_tf32(micro, seed):
    def bits(x):
        return struct.unpack("<I", struct.pack("<f", x))[0]

    expected = {  # float32 bits: tf32 bits; to nearest, ties away from zero
        bits(1.0): bits(1.0),
        bits(1.0) + 0xFFF: bits(1.0),
        bits(1.0) + 0x1000: bits(1.0) + 0x2000,
        bits(1.0) + 0x1001: bits(1.0) + 0x2000,
        bits(1.0) + 0x2FFF: bits(1.0) + 0x2000,
        bits(-1.0) + 0x1000: bits(-1.0) + 0x2000,
        bits(2.0) - 1: bits(2.0),
        bits(0.0): bits(0.0),
        bits(-0.0): bits(-0.0),
        bits(float("inf")): bits(float("inf")),
    }
    inputs = torch.tensor([signed(x) for x in expected], dtype=torch.int32)
    out = ints(len(expected))
    micro("to_tf32", ctypes.c_int(len(expected)), inputs, out)
    micro.golden("to_tf32", out)
    assert out.tolist() == [signed(x) for x in expected.values()]


# ---- approximations ------------------------------------------------------------------

INF, NAN, SUBNORMAL = float("inf"), float("nan"), 2.0**-127


def approximate(micro, kernel, values):
    """What a kernel makes of any number of values."""
    padded = torch.zeros(-(-len(values) // 32) * 32)
    padded[: len(values)] = torch.as_tensor(values)
    out = torch.full_like(padded, NAN)
    micro(kernel, len(padded) // 32, padded, out)
    return out[: len(values)]


APPROXIMATIONS = {  # exact value, units of the last place, inputs' exponents, special values
    "ex2_approx": (
        torch.exp2, 2, (-20, 7),
        {0.0: 1, SUBNORMAL: 1, -SUBNORMAL: 1, INF: INF, -INF: 0, 128: INF, -127: 0},
    ),
    "rcp_approx": (
        torch.reciprocal, 1, (-120, 120),
        {0.0: INF, SUBNORMAL: INF, -SUBNORMAL: -INF, INF: 0, -INF: 0, 2.0**127: 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", APPROXIMATIONS)
def test_approximations(micro, seed, kernel):
    exact, ulps, exponents, special = APPROXIMATIONS[kernel]
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(*exponents, (4000,), generator=generator)
    x = torch.ldexp(torch.rand(4000, generator=generator) + 1, exponent)
    x = torch.where(torch.rand(4000, generator=generator) < 0.5, x, -x)
    expected = exact(x.double())
    x, expected = (t[expected.log2().abs() < 126] for t in (x, expected.abs()))
    out = approximate(micro, kernel, x)
    unit = torch.ldexp(torch.ones_like(expected), expected.log2().floor().int() - 23)
    error = (out.abs().double() - expected) / unit
    assert (error.abs() <= ulps).all()
    assert kernel == "ex2_approx" or torch.equal(out.sign(), x.sign())
    if micro_kernels.BACKEND == "emulated":  # it errs as far as it may, both ways
        assert error.max() > ulps - 0.5 and error.min() < 0.5 - ulps
    assert torch.equal(approximate(micro, kernel, x), out)
    assert approximate(micro, kernel, list(special)).tolist() == list(special.values())
    assert approximate(micro, kernel, [NAN]).isnan().all()


# ---- the host's part of a launch ---------------------------------------------------------


@pytest.mark.parametrize("first, then, questions", ((50, 40, 2), (50, 50, 2), (50, 60, 3)))
def test_shared_memory_is_asked_for_once(micro, first, then, questions):
    """Once a kernel and device, by any number of threads; again for more, and after an error."""
    asked = ints(3, 2, fill=0)
    errors = micro.library.micro_smem_grants(
        4, 3, 2, first, then, ctypes.c_void_p(asked.data_ptr())
    )
    assert errors == 6 and asked.tolist() == [[questions] * 2] * 3
