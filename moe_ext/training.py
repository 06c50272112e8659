"""What a training loop calls between its steps: the scale of the losses, the biases' moves."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._checks import check_number, describe
from .groups import group_of
from .moe import MoE
from .routing import Router

__all__ = ["set_loss_scale", "update_router_biases", "update_router_biases_on_step"]


def set_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Sets the factor on the injected losses of every `MoE` in `model`.

    An injected gradient does not pass through the loop's own loss, so it knows
    neither its scaling nor its averaging. Before the forward passes of a step:

        moe_ext.set_loss_scale(model, scaler.get_scale() / accumulation_steps)

    Args:
        model: a module; all `MoE` inside take part.
        scale: a finite number, or a tensor with one element (nothing is read back to
            the host). It is written in place into each layer's `loss_scale`, a
            float64 tensor outside of the state_dict, 1.0 at first.

    Raises:
        TypeError, ValueError: not a number or one-element tensor; NaN or infinite.
    """
    if not isinstance(scale, torch.Tensor):
        scale = torch.tensor(
            check_number("set_loss_scale", "scale", scale), dtype=torch.float64, device="cpu"
        )
    elif scale.numel() != 1:
        raise ValueError(
            f"set_loss_scale: scale must be a number or a tensor of one element,"
            f" got {describe(scale)}"
        )
    for module in model.modules():
        if isinstance(module, MoE):
            module.loss_scale.copy_(scale.detach().reshape(()))
            module._loss_scale_is_set = True


def update_router_biases(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Loss-free balancing: moves the selection biases against the load since the last call.

        bias_i += bias_update_rate * sign(mean(n) - n_i)

    with n_i the training assignments of expert i since then (before any drop, padding
    left out), summed over the processes, so that every rank makes the same step.
    Call it once an optimizer step. A forward that activation checkpointing repeats
    counts once. Nothing is read back to the host. (Wang et al. 2024; DeepSeek-V3.)

    Args:
        model: every `MoE` inside with `bias_update_rate > 0` takes part.
        process_group: whose counts are summed, in one all-reduce, and all its ranks must
            call. None: where torch.distributed is initialised the ranks that hold the same
            layers, which the first call finds out over the default group; else this
            process alone.

    Raises:
        ValueError: the routers are sharded such that they do not tell who holds the same.
    """
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, MoE) and m.config.router.bias_update_rate > 0
    }
    routers = {name: next(m.gate.parameters()) for name, m in layers.items()}
    move_biases(
        [
            (m._stats, m.config.router.bias_update_rate, selection_bias_of(m.gate))
            for m in layers.values()
        ],
        *group_of("update_router_biases", model, routers, process_group),
    )


def selection_bias_of(gate):
    """The buffer on an `MoE`'s choice, or None, also where other modules (PEFT's, FSDP's) are
    wrapped around the router."""
    routers = (m for m in gate.modules() if isinstance(m, Router))
    return next((m.float32_bias() for m in routers), None)


@torch.no_grad()
def move_biases(layers, reduce=False, process_group=None):
    """`update_router_biases` for [(RoutingStats, bias_update_rate, bias (E) float32)]."""
    if not layers:
        return
    device = layers[0][2].device
    counts = torch.cat([stats.step_counts.to(device) for stats, _, _ in layers])
    if reduce:
        dist.all_reduce(counts, group=process_group)
    for (stats, rate, bias), n in zip(layers, counts.split([b.numel() for _, _, b in layers])):
        n = n.double()
        step = rate * torch.sign(n.mean() - n)
        bias += step.to(bias).view_as(bias)
        stats.step_counts.zero_()


def update_router_biases_on_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
) -> RemovableHandle:
    """Calls `update_router_biases(model, process_group)` after each step of this one optimizer.

    Returns the hook's handle; `handle.remove()` ends it.
    """
    return optimizer.register_step_post_hook(
        lambda *_: update_router_biases(model, process_group),
    )
