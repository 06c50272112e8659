"""AMD's zentorch: `zentorch_fused_moe`, which vLLM takes on their processors."""

import torch

TITLE = "zentorch"
VENV = "zentorch"
REQUIREMENTS = ("torch==2.13.0", "zentorch==2.13.0.2", "numpy")
DTYPES = ("float32", "bfloat16")
NEEDS = ("avx512bw",)


def experts(gate_up_proj, down_proj):
    import zentorch  # noqa: F401 registers the operator

    fused_moe = torch.ops.zentorch.zentorch_fused_moe

    def bind(x, weights, experts):
        def run():
            y = torch.empty_like(x)
            fused_moe(
                y, x, gate_up_proj, down_proj, None, None, weights, experts, False, "silu"
            )  # fmt: skip
            return y

        return run

    return bind
