"""What the tests of the emulator share."""

import pytest
import torch


@pytest.fixture(scope="module")
def micro():
    # Not above: where a file of this folder is named to pytest, this one is read before --backend is.
    from emulator.micro import Micro

    return Micro()


@pytest.fixture(autouse=True)
def on_the_cpu():
    """What is drawn and compared lies there, on a GPU too: Micro takes it to the device."""
    with torch.device("cpu"):
        yield
