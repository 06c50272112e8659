"""A CUDA build on a machine without a GPU: what was built, what is in it, and that the
package works on the CPU all the same. `make cuda-import` builds one and runs this."""

import os
import re
import subprocess
import sys

import pytest
import torch

from moe_ext import _load

pytestmark = pytest.mark.skipif(
    not (_load.BUILD_INFO and _load.BUILD_INFO["cuda"]), reason="needs a CUDA build"
)

OPS = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_ext::")]
# Questions to the library, and one that is made of the others.
WITHOUT_BACKENDS = {
    "moe_ext::cpu_instruction_sets",
    "moe_ext::sm90_is_refused",
    "moe_ext::moe_infer",
}


@pytest.mark.parametrize("key", ("CUDA", "CPU", "Meta"))
@pytest.mark.parametrize("op", sorted({*OPS} - WITHOUT_BACKENDS))
def test_every_op_is_there(op, key):
    if key == "Meta":  # the fakes are Python's
        assert torch._library.simple_registry.singleton.find(op).fake_impl.kernel is not None
    else:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


@pytest.mark.parametrize("op", sorted(WITHOUT_BACKENDS))
def test_every_op_without_backends_is_there(op):
    assert torch._C._dispatch_has_kernel(op)


def test_the_stages_are_among_them():
    assert {f"moe_ext::{stage}" for stage in (
        "router_logits", "topk_route", "capacity_scatter", "gather_rows", "grouped_ffn",
        "weighted_combine", "moe_forward", "accumulate_stats",
    )} <= set(OPS)  # fmt: skip


def test_what_was_built_for():
    built = [arch for arch in _load.BUILD_INFO["archs"] if arch.startswith(("sm_", "compute_"))]
    assert built and _load.BUILD_INFO["cuda"] == torch.version.cuda
    # As the error for another GPU names them: csrc/cuda/device.h.
    assert f"{', '.join(built)}\0".encode() in _load.find_library().read_bytes()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if re.fullmatch(r"(\d+\.\d+a?(\+PTX)?;?)+", asked):
        for arch in filter(None, asked.split(";")):
            number = arch.removesuffix("+PTX").replace(".", "")
            assert f"sm_{number}" in built
            assert (f"compute_{number}" in built) == arch.endswith("+PTX")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_works():
    # From where this package lies: -m looks into the working folder first.
    done = subprocess.run(
        [sys.executable, "-m", "moe_ext"], cwd=_load.PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("PASS") and "sm_" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_cuda_tensor_is_torchs_error():
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|nvidia"):
        torch.zeros(1, device="cuda")
