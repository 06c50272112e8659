"""The planted faults of the CUDA kernels; the emulated suite must catch each of them.

A fault that only some schedules show names `--emulator-seeds` among its tests.
"""

from mutants.faults import faults

KERNEL_FAULTS = []

# ---- topk_route ---------------------------------------------------------------

ROUTE = "tests/test_topk_route.py::"

fault = faults("csrc/cuda/kernels/topk_route.cu", into=KERNEL_FAULTS)
fault(
    "teams count before the counts are cleared",
    "  __syncthreads();  // any team may count any expert",
    "",
    ROUTE + "test_token_blocks",
    "--emulator-seeds=4",
)
# ---- router_logits ------------------------------------------------------------

LOGITS = "tests/test_router_logits.py::"

fault = faults("csrc/cuda/kernels/router_logits.cu", into=KERNEL_FAULTS)
fault(
    "a step is multiplied before all of it has arrived",
    "    if (more) store(stage ^ 1);  // all are past the step that read it\n    __syncthreads();",
    "    if (more) store(stage ^ 1);",
    LOGITS + "test_hidden_sizes",
    "--emulator-seeds=2",
)
# ---- accumulate_stats -----------------------------------------------------------

fault = faults(
    "csrc/cuda/kernels/accumulate_stats.cu", "tests/test_accumulate_stats.py", into=KERNEL_FAULTS
)
fault(
    "the block's parts are added up without a barrier",
    "half /= 2) {\n    __syncthreads();",
    "half /= 2) {",
)
