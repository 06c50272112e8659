"""KTransformers' kt-kernel, which brings a torch of its own (7 GB with CUDA's libraries).

Its threads spin between calls."""

import torch

TITLE = "kt-kernel"
VENV = "kt_kernel"
REQUIREMENTS = ("kt-kernel==0.7.2",)
DTYPES = ("bfloat16",)
NEEDS = ("avx2",)

MAX_TOKENS = 4096  # of a call: the size of its buffers


def experts(gate_up_proj, down_proj):
    from kt_kernel import kt_kernel_ext as kt

    num_experts, hidden, intermediate = down_proj.shape
    pool = kt.WorkerPoolConfig()
    pool.subpool_count = 1
    pool.subpool_numa_map = [0]
    pool.subpool_thread_count = [torch.get_num_threads()]
    threads = kt.CPUInfer(pool)

    def finish(task):
        threads.submit(task)
        threads.sync()

    def layer(top_k):
        on_gpu = torch.zeros(num_experts, dtype=torch.bool)
        config = kt.moe.MOEConfig(num_experts, top_k, hidden, intermediate, on_gpu.data_ptr())
        config.layer_idx = 0
        config.pool = threads.backend_
        config.max_len = MAX_TOKENS
        gate, up = gate_up_proj.chunk(2, 1)
        for name, stack in (("gate", gate), ("up", up), ("down", down_proj)):
            setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in stack]])
        # The class for AMX has kernels for AVX-512 too; where there is neither it is missing.
        kind = getattr(kt.moe, "AMXBF16_MOE", None) or kt.moe.AVX2BF16_MOE
        moe = kind(config)
        physical = torch.arange(num_experts)
        finish(moe.load_weights_task(physical.data_ptr()))
        return moe, on_gpu, physical

    def bind(x, weights, experts):
        tokens, top_k = experts.shape
        if tokens > MAX_TOKENS:
            raise ValueError(f"at most {MAX_TOKENS} tokens, got {tokens}")
        if top_k not in layers:
            layers[top_k] = layer(top_k)
        moe = layers[top_k][0]
        count, experts = torch.tensor([tokens], dtype=torch.int32), experts.long()

        def run():
            y = torch.empty_like(x)
            finish(
                moe.forward_task(
                    count.data_ptr(), top_k, experts.data_ptr(), weights.data_ptr(),
                    x.data_ptr(), y.data_ptr(), False,
                )
            )  # fmt: skip
            return y

        return run

    layers = {}
    return bind
