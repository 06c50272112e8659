"""Every kernel once or twice, on small shapes with odd sizes: a program for compute-sanitizer."""

import torch

import moe_ext

DEVICE = "cpu" if moe_ext._load.BACKEND == "emulated" else "cuda"

LAYERS = (
    dict(hidden=64, width=48),
    dict(hidden=72, width=40, capacity_factor=None, activation="gelu", bias=True),
    dict(hidden=64, width=48, num_experts=1, top_k=1, capacity_factor=None),  # tiles of 256 rows
    dict(hidden=33, width=17, drop_policy="probs", transposed=True),  # the simple product
    dict(hidden=64, width=64, num_experts=16, top_k=4, score_function="sigmoid", n_group=4,
         topk_group=2, group_score="top2_sum", bias_update_rate=0.1, interleaved=True,
         capacity_scope="sequence"),
)  # fmt: skip


def main():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # float32 takes the tensor cores
    for options in LAYERS:
        options = {"num_experts": 8, "top_k": 2} | options
        hidden, width = options.pop("hidden"), options.pop("width")
        experts, top_k = options.pop("num_experts"), options.pop("top_k")
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            layer = moe_ext.MoE(
                hidden, width, experts, top_k, dtype=dtype, device=DEVICE, init_std=0.2, **options
            )
            moe_ext.set_loss_scale(layer, 1.0)
            # decoding, few rows, several tiles
            for tokens in (515,) if experts == 1 else (1, 13, 150):
                x = torch.randn(2, tokens, hidden, dtype=dtype, device=DEVICE, requires_grad=True)
                mask = torch.zeros(2, tokens, dtype=torch.bool, device=DEVICE)
                mask[:, tokens - tokens // 4 :] = True
                y = layer(x, padding_mask=mask)
                y.square().sum().backward()
                with torch.no_grad():
                    layer(x[:1])
                layer.stats()
                gradients = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
                assert all(t.isfinite().all() for t in (y, *gradients))
    plan = moe_ext.functional.capacity_scatter(
        torch.randint(8, (100, 2), dtype=torch.int32, device=DEVICE), 8, 20
    )
    x = torch.randn(100, 40, device=DEVICE, requires_grad=True)
    moe_ext.functional.gather_rows(x, plan).sum().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
