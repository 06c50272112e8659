"""What the tests of the emulator share."""

import pytest
import torch

from emulator import micro as micro_kernels


@pytest.fixture(scope="module")
def micro():
    return micro_kernels.Micro()


@pytest.fixture(autouse=True)
def on_the_cpu():
    """What is drawn and compared lies there, on a GPU too: Micro takes it to the device."""
    with torch.device("cpu"):
        yield
