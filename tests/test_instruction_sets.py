"""The CPU's loops on every instruction set of this machine, of which a process uses one."""

import os
import subprocess
import sys

import pytest
import torch

from moe_ext._load import BACKEND

pytestmark = pytest.mark.skipif(BACKEND not in (None, "cpu"), reason="the CPU's own kernels")

USED, *OTHERS = torch.ops.moe_ext.cpu_instruction_sets() if BACKEND in (None, "cpu") else (None,)
CASES = "sizes or few_tokens or rows_an_expert or batch_invariant or long_rows or activations"
FILES = ("test_topk_route.py", "test_router_logits.py", "test_grouped_ffn.py")


def run(name, *command):
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"MOE_EXT_CPU": name}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_same_results(name):
    """The stages' tests, in a process that takes that set."""
    files = (os.path.join(os.path.dirname(__file__), file) for file in FILES)
    done = run(name, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CASES, *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("name", sorted({"avx2", "avx512"} & {USED, *OTHERS}))
def test_same_choice(name):
    """Logits and routing weights have the same bits wherever products and sums are fused."""
    ask = (
        "import torch, moe_ext.functional as f; torch.manual_seed(0);"
        "logits = f.router_logits(torch.randn(70, 1300), torch.randn(37, 1300) / 36);"
        "route = f.topk_route(logits, 4, score_function='sigmoid');"
        "print([t.view(torch.int32).tolist() for t in (logits, route.weights, route.experts)])"
    )
    fused = [run(other, "-c", ask).stdout for other in (name, "avx2")]
    assert fused[0] == fused[1] and len(fused[0]) > 70 * 37


def test_names():
    known = ("baseline", "avx2", "avx512", "avx512_bf16")
    assert "baseline" in (USED, *OTHERS) and {USED, *OTHERS} <= set(known)
    ask = "import torch, moe_ext; print(torch.ops.moe_ext.cpu_instruction_sets()[0])"
    for name in OTHERS:
        assert run(name, "-c", ask).stdout.strip() == name


def test_one_that_is_not_here():
    done = run("sparc", "-c", "import moe_ext")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: MOE_EXT_CPU must be one of this processor's") and all(
        name in last for name in (USED, *OTHERS, "sparc")
    )
