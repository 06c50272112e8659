"""The layers that the benchmarks compare, ours and transformers', and one step of each."""

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import moe_ext

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def our_layer(shape, dtype, device):
    layer = moe_ext.MoE(
        shape.hidden, shape.intermediate, shape.num_experts, shape.top_k,
        capacity_factor=None, aux_loss_coef=0.0, dtype=dtype, device=device,
    )  # fmt: skip
    for parameter in layer.parameters():  # unit scale: a smaller one would hide differences
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def peer_block(implementation, shape, layer):
    """transformers' block over the layer's own parameters."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.load_state_dict(layer.state_dict(), assign=True)
    return block.requires_grad_(True)


def clear_tokens(layer, shape, dtype, device):
    """x (1, T, H): of four times as many, the tokens whose K-th choice is furthest ahead of
    the next one, so that a router in bfloat16 chooses the same experts."""
    candidates = torch.randn(4 * shape.tokens, shape.hidden, device=device).to(dtype)
    logits = candidates.double() @ layer.gate.weight.detach().double().T
    best = logits.topk(shape.top_k + 1).values
    clearest = (best[:, -2] - best[:, -1]).argsort(descending=True)[: shape.tokens]
    return candidates[clearest.sort().values][None]


def inference(module, x):
    def call():
        with torch.no_grad():
            module(x)

    return call


def training(module, x, grad):
    x = x.detach().clone().requires_grad_()

    def call():
        module(x).backward(grad)

    def reset():
        x.grad = None
        module.zero_grad(set_to_none=True)

    return call, reset


def check_agreement(name, layer, block, x):
    _, routing = layer(x, return_routing=True)
    theirs = block.gate(x)[2]
    if not torch.equal(routing.experts.long().sort(-1).values, theirs.sort(-1).values):
        raise RuntimeError(f"{name}: the peer chose other experts, the timings would not compare")
    ours, theirs = layer(x).double(), block(x).double()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    tolerance = TOLERANCE[str(x.dtype).removeprefix("torch.")]
    if not error <= tolerance:
        raise RuntimeError(f"{name}: outputs differ by {error:.2e} of their norm, over {tolerance}")
