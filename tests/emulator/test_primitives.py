"""Every primitive against what CUDA's and PTX's manuals say of it, written out.

The micro-kernels (kernels/*.cu) only write down what a primitive did; what it must do
is here. Runs with --backend emulated.
"""

import ctypes
import os

import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("MOE_EXT_BACKEND") != "emulated", reason="needs --backend emulated"
)


@pytest.fixture(scope="module")
def micro():
    """micro(name, *arguments) runs a micro-kernel; tensors go as pointers."""
    from emulator import control

    library = control.primitives()

    def call(name, *arguments):
        converted = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        code = getattr(library, name)(*converted)
        assert code == 0, library.micro_error_text().decode() if code < 0 else f"cudaError {code}"

    return call


@pytest.fixture(params=range(4))
def seed(request):
    from emulator import control

    return control.set(request.param)


def signed(bits):
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def test_warp(micro, seed):
    values = [(7 * lane) % 32 for lane in range(32)]  # a permutation of 0..31
    out = torch.full((32, 16), -1, dtype=torch.int32)
    micro("micro_warp", torch.tensor(values, dtype=torch.int32), out)
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
            signed((-70 + 31) % 2**32),
        ]
        assert out[lane].tolist() == expected, f"lane {lane}"
