"""MoE with the weights of transformers' own blocks: the same outputs, the same gradients."""

import inspect

import pytest
import torch

import moe_ext
from support.oracle import assert_within_bound, relative_error, unit

pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock  # noqa: E402
from transformers.models.switch_transformers.modeling_switch_transformers import (  # noqa: E402
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

H, I, E, K = 32, 20, 8, 3
GROUPS = dict(n_group=4, topk_group=2)
COMMON = dict(hidden_size=H, num_experts_per_tok=K, experts_implementation="eager")
DEEPSEEK = dict(moe_intermediate_size=I, n_routed_experts=E, n_shared_experts=2) | COMMON


def deepseek_v2(method):
    scale = dict(routed_scaling_factor=16.0, norm_topk_prob=False)
    groups = GROUPS if method == "group_limited_greedy" else {}
    config = DeepseekV2Config(**DEEPSEEK, **GROUPS, **scale, topk_method=method)
    return DeepseekV2Moe(config), dict(shared_expert_intermediate_size=2 * I, **groups, **scale)


def deepseek_v3(norm_topk_prob):
    scale = dict(routed_scaling_factor=2.5, norm_topk_prob=norm_topk_prob)
    return DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK, **GROUPS, **scale)), dict(
        score_function="sigmoid", group_score="top2_sum", score_correction_bias=True,
        shared_expert_intermediate_size=2 * I, **GROUPS, **scale,
    )  # fmt: skip


def mixtral():
    return MixtralSparseMoeBlock(
        MixtralConfig(intermediate_size=I, num_local_experts=E, **COMMON)
    ), {}


def qwen2_moe(norm_topk_prob):
    config = Qwen2MoeConfig(
        moe_intermediate_size=I, num_experts=E, shared_expert_intermediate_size=3 * I,
        norm_topk_prob=norm_topk_prob, **COMMON,
    )  # fmt: skip
    return Qwen2MoeSparseMoeBlock(config), dict(
        shared_expert_intermediate_size=3 * I,
        shared_expert_gate=True,
        norm_topk_prob=norm_topk_prob,
    )


def switch(capacity):
    """Top-1, the raw probability as weight, ReLU; drops by position within each sequence."""
    config = SwitchTransformersConfig(d_model=H, d_ff=I, num_experts=E, expert_capacity=capacity)
    return SwitchTransformersSparseMLP(config).eval(), dict(
        top_k=1, activation="relu", norm_topk_prob=False,
        expert_capacity=capacity, capacity_scope="sequence",
    )  # fmt: skip


BLOCKS = {
    "mixtral": mixtral,
    "deepseek_v2": lambda: deepseek_v2("greedy"),
    "deepseek_v2_groups": lambda: deepseek_v2("group_limited_greedy"),
    "deepseek_v3": lambda: deepseek_v3(True),
    "deepseek_v3_unnormalised": lambda: deepseek_v3(False),
    "qwen2_moe": lambda: qwen2_moe(False),
    "qwen2_moe_normalised": lambda: qwen2_moe(True),
    "switch": lambda: switch(2),
    "switch_roomy": lambda: switch(64),
}


def renamed(tensors):
    """Switch keeps every expert apart and calls the gate a classifier; the others are ours."""
    if "router.classifier.weight" not in tensors:
        return {n.replace("shared_expert.", "shared_experts."): t for n, t in tensors.items()}
    stacked = {
        ours: torch.stack([tensors[f"experts.expert_{e}.{theirs}.weight"] for e in range(E)])
        for ours, theirs in (("experts.up_proj", "wi"), ("experts.down_proj", "wo"))
    }
    return {"gate.weight": tensors["router.classifier.weight"]} | stacked


def initialise(block):
    """Weights of unit-scale effect and, in DeepSeek-V3, biases that change the choice."""
    for parameter in block.parameters():
        parameter.data = unit(*parameter.shape, dtype=torch.float64, fan_in=parameter.shape[-1])
    for name, buffer in block.named_buffers():
        assert name == "gate.e_score_correction_bias"
        buffer.copy_(0.2 * unit(E))


def results(module, x, dy, rename=lambda tensors: tensors):
    """Output and gradients of x and of all parameters, by our names."""
    x = x.clone().requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, (x, *named.values()), dy, allow_unused=True)
    gradients = [
        torch.zeros_like(t) if g is None else g for t, g in zip((x, *named.values()), gradients)
    ]
    return {"y": y.detach(), "dx": gradients[0], **rename(dict(zip(named, gradients[1:])))}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", ((2, 13), (16, 1), (3, 40)))
def test_block(name, shape):
    if name == "switch" and "torch.argmax" not in inspect.getsource(SwitchTransformersTop1Router):
        pytest.skip("Switch of this transformers counts an expert's capacity over the whole batch")
    block, options = BLOCKS[name]()
    initialise(block)
    options = dict(top_k=K, capacity_factor=None, aux_loss_coef=0.0) | options
    x, dy = unit(*shape, H), unit(*shape, H)

    theirs, ours = {}, {}
    for dtype in (torch.float64, torch.float32):
        block.to(dtype)
        layer = moe_ext.MoE(H, I, E, **options, dtype=dtype)
        # Strict: every name of theirs is a name of ours. Qwen2-MoE's loads as it is, too.
        state = block.state_dict()
        layer.load_state_dict(renamed(state) if name.startswith("switch") else state)
        theirs[dtype] = results(block, x.to(dtype), dy.to(dtype), renamed)
        ours[dtype] = results(layer, x.to(dtype), dy.to(dtype))

    oracle, baseline = theirs[torch.float64], theirs[torch.float32]
    assert ours[torch.float32].keys() == oracle.keys()
    for result, expected in oracle.items():
        # Their routers round to float32, whatever the block's dtype.
        error = relative_error(ours[torch.float64][result], expected)
        assert error <= 4 * torch.finfo(torch.float32).eps, f"{result}: {error}"
        assert_within_bound(result, ours[torch.float32][result], expected, baseline[result])
    if name == "switch" and shape == (3, 40):
        assert (oracle["y"] == 0).all(-1).sum() >= 3 * (40 - 2 * E), "nothing was dropped"


def test_deepseek_v3_bias_changes_the_choice():
    """What the cases above would not show: that the bias took part at all."""
    block, options = BLOCKS["deepseek_v3"]()
    initialise(block)
    layer = moe_ext.MoE(H, I, E, top_k=K, capacity_factor=None, **options).double()
    layer.load_state_dict(block.state_dict())
    x = unit(2, 13, H, dtype=torch.float64)
    _, routing = layer(x, return_routing=True)
    layer.gate.e_score_correction_bias.zero_()
    _, unbiased = layer(x, return_routing=True)
    assert not torch.equal(routing.experts, unbiased.experts)
    chosen = block.gate(x)[2].sort(-1).values
    assert torch.equal(routing.experts.long().sort(-1).values, chosen)
