"""The CPU's loops compiled for lesser instruction sets than the best that this machine has."""

import os
import subprocess
import sys

import pytest
import torch

from moe_ext._load import BACKEND

pytestmark = pytest.mark.skipif(BACKEND not in (None, "cpu"), reason="the CPU's own kernels")

BELOW = {"AVX512": ("avx2", "baseline"), "AVX2": ("baseline",)}
CASES = "sizes or few_tokens or rows_an_expert or batch_invariant or long_rows or activations"
FILES = ("test_topk_route.py", "test_router_logits.py", "test_grouped_ffn.py")


@pytest.mark.parametrize("name", BELOW.get(torch.backends.cpu.get_cpu_capability(), ()))
def test_same_results(name):
    """The stages' tests, in a process that takes that set: it is chosen once a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CASES]
    run = subprocess.run(
        [*command, *(os.path.join(os.path.dirname(__file__), file) for file in FILES)],
        env=os.environ | {"MOE_EXT_CPU": name}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
