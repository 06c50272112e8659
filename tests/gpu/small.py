"""Every kernel once or twice, on small shapes with odd sizes: a program for compute-sanitizer."""

import torch

import moe_ext

LAYERS = (
    dict(hidden=64, width=48),
    dict(hidden=72, width=40, capacity_factor=None, activation="gelu", bias=True),
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
                hidden, width, experts, top_k, dtype=dtype, device="cuda", init_std=0.2, **options
            )
            moe_ext.set_loss_scale(layer, 1.0)
            for tokens in (1, 13, 150):  # decoding, few rows, several tiles
                x = torch.randn(2, tokens, hidden, dtype=dtype, device="cuda", requires_grad=True)
                mask = torch.zeros(2, tokens, dtype=torch.bool, device="cuda")
                mask[:, tokens - tokens // 4 :] = True
                y = layer(x, padding_mask=mask)
                y.square().sum().backward()
                with torch.no_grad():
                    layer(x[:1])
                layer.stats()
                gradients = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
                assert all(t.isfinite().all() for t in (y, *gradients))
    plan = moe_ext.functional.capacity_scatter(
        torch.randint(8, (100, 2), dtype=torch.int32, device="cuda"), 8, 20
    )
    x = torch.randn(100, 40, device="cuda", requires_grad=True)
    moe_ext.functional.gather_rows(x, plan).sum().backward()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
