"""What every training script asks of a model's parameters: which decay, and how many there are."""

from typing import NamedTuple

from torch import nn

from ._checks import check_number, describe


class Count(NamedTuple):
    """How many parameters a model has, and how many a token meets."""

    total: int
    active: int


def parameter_groups(model, weight_decay=0.1):
    """Two groups for an optimizer: what decays, and what does not.

        optimizer = torch.optim.AdamW(moe_ext.parameter_groups(model, weight_decay=0.1), lr=3e-4)

    Without decay: routers and the gates of shared experts, whose scale is their temperature;
    biases, also those of the experts, which have two dimensions; norms and everything else
    of fewer than two. Frozen parameters are left out, shared ones stand once.

    Returns:
        [{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}].

    Raises:
        TypeError, ValueError: model is no module; weight_decay no number of at least 0.
    """
    from .moe import MoE

    _check_module("parameter_groups", model)
    weight_decay = check_number("parameter_groups", "weight_decay", weight_decay)
    kept = set()
    for module in model.modules():
        if isinstance(module, MoE):
            gates = [m for m in (module.gate, module.shared_expert_gate) if m is not None]
            kept.update(p for gate in gates for p in gate.parameters())
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() < 2 or name.endswith("bias") or parameter in kept
            (rest if plain else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def count_parameters(model):
    """(total, active): all parameters, and those that one token meets.

    Of each `MoE`'s experts top_k of num_experts are active. Shared parameters count once.

    Raises:
        TypeError: model is no module.
    """
    from .moe import MoE

    _check_module("count_parameters", model)
    total = sum(p.numel() for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    share = {p: m.top_k / m.num_experts for m in layers for p in m.experts.parameters()}
    idle = sum(round(p.numel() * (1 - used)) for p, used in share.items())
    return Count(total, total - idle)


def _check_module(op, model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {describe(model)}")
