"""csrc/cpu/memory.h: large blocks are kept and fit again."""

import sys

import pytest
import torch

import moe_ext
from moe_ext._load import BACKEND

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or BACKEND not in (None, "cpu"), reason="the CPU ops on Linux"
)


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_training_steps_reuse_their_memory():
    """Gradients and workspaces of 200 MB a step, whose sizes change a little from step to
    step: none of it is fresh memory, whose pages the system has to clear. Small tensors,
    which are malloc's, take a few pages now and then."""
    layer = moe_ext.MoE(16, 4096, num_experts=8, top_k=2, capacity_factor=None)

    def faults_of_a_step(tokens):
        x = torch.randn(tokens, 16, requires_grad=True)
        before = page_faults()
        layer(x).square().sum().backward()
        layer.zero_grad(set_to_none=True)
        return page_faults() - before

    faults = [faults_of_a_step(tokens) for tokens in 8 * [1024, 1000, 960]]
    assert min(faults[6:]) < 10
