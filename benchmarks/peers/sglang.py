"""sglang's `fused_experts_cpu`, as vLLM's wheel carries it.

Its Python refuses a processor without AMX; the kernels have `vdpbf16ps` tiles too."""

import torch

from peers import vllm

TITLE = "sglang"
VENV = vllm.VENV
REQUIREMENTS = vllm.REQUIREMENTS
DTYPES = ("bfloat16",)
NEEDS = ("avx512_bf16",)

UNQUANTISED = 0


def experts(gate_up_proj, down_proj):
    kernels = vllm.load_kernels()
    w1, w2 = (kernels.convert_weight_packed(weight) for weight in (gate_up_proj, down_proj))
    scales_to_limits = [None] * 10

    def bind(x, weights, experts):
        def run():
            y = torch.empty_like(x)
            kernels.fused_experts_cpu(
                y, x, w1, w2, weights, experts, UNQUANTISED, *scales_to_limits, True
            )  # fmt: skip
            return y

        return run

    return bind
