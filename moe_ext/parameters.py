"""What every training script asks of a model's parameters: which decay, and how many there are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import check_flag, check_number, describe
from .moe import MoE

__all__ = ["Count", "ExpertMatrix", "count_parameters", "parameter_groups"]


class Count(NamedTuple):
    """How many parameters a model has, and how many a token meets."""

    total: int
    active: int


class ExpertMatrix(nn.Parameter):
    """One matrix of one expert (out, in) as a parameter: the stack's memory, and its gradient.

    What an optimizer reads and writes is the stack's, at any time: `grad` is a view of
    `stack.grad`, and setting it to None sets that to None.
    """

    stack: nn.Parameter
    place: Callable[[Tensor], Tensor]

    def __new__(cls, stack: nn.Parameter, place: Callable[[Tensor], Tensor]) -> Self:
        """place: from a tensor of the stack's shape to the matrix in it, as a view."""
        matrix = torch.Tensor._make_subclass(cls, place(stack.detach()), True)
        matrix.stack, matrix.place = stack, place
        return matrix

    @property
    def grad(self) -> Tensor | None:
        return None if self.stack.grad is None else self.place(self.stack.grad)

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        if grad is None:
            self.stack.grad = None
            return
        if self.stack.grad is None:
            self.stack.grad = torch.zeros_like(self.stack)
        self.place(self.stack.grad).copy_(grad)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.1, *, expert_matrices: bool = False
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what decays, and what does not.

        optimizer = torch.optim.AdamW(moe_ext.parameter_groups(model, weight_decay=0.1), lr=3e-4)

    With `expert_matrices` a group before them has the stacks of the experts as matrices, for an
    optimizer of these; gate and up are apart. Make it after the model has its device and dtype.

        experts, *others = moe_ext.parameter_groups(model, expert_matrices=True)
        optimizers = torch.optim.Muon([experts], lr=2e-3), torch.optim.AdamW(others, lr=3e-4)

    Without decay: routers and the gates of shared experts, whose scale is their temperature;
    biases, also those of the experts, which have two dimensions; norms and everything else
    of fewer than two. Frozen parameters are left out, shared ones stand once.

    Returns:
        [{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}],
        and with `expert_matrices` before them the `ExpertMatrix`, with weight_decay.

    Raises:
        TypeError, ValueError: model is no module; weight_decay no number of at least 0; with
            `expert_matrices` a stack that is sharded, of which a matrix is no view.
    """
    _check_module("parameter_groups", model)
    weight_decay = check_number("parameter_groups", "weight_decay", weight_decay)
    check_flag("parameter_groups", "expert_matrices", expert_matrices)
    matrices: dict[nn.Parameter, list[ExpertMatrix]] = {}  # by stack
    kept: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, MoE):
            gates = [m for m in (module.gate, module.shared_expert_gate) if m is not None]
            kept.update(p for gate in gates for p in gate.parameters())
            if expert_matrices:
                matrices |= _matrices(module)
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in matrices:
            plain = parameter.dim() < 2 or name.endswith("bias") or parameter in kept
            (rest if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if expert_matrices:
        of_experts = [matrix for of_stack in matrices.values() for matrix in of_stack]
        groups.insert(0, {"params": of_experts, "weight_decay": weight_decay})
    return groups


def _matrices(layer):
    """{stack: [ExpertMatrix]} of a layer's experts that are trained."""
    found = {}
    for name, stack in layer.experts.named_parameters():
        if not stack.requires_grad or stack.dim() != 3:
            continue
        if type(stack) is not nn.Parameter:
            raise TypeError(
                f"parameter_groups: expert_matrices needs {name} as a plain parameter, got"
                f" {type(stack).__name__}: a matrix of it would be no view"
            )
        parts = [slice(None)]
        if name.endswith("gate_up_proj"):
            half = layer.intermediate_size
            parts = [slice(0, half), slice(half, None)]
            if layer.interleaved:
                parts = [slice(0, None, 2), slice(1, None, 2)]
        found[stack] = [
            ExpertMatrix(stack, _place(expert, part, layer.transposed))
            for expert in range(len(stack))
            for part in parts
        ]
    return found


def _place(expert, part, transposed):
    return lambda stack: (stack[expert].t() if transposed else stack[expert])[part]


def count_parameters(model: nn.Module) -> Count:
    """(total, active): all parameters, and those that one token meets.

    Of each `MoE`'s experts top_k of num_experts are active. Shared parameters count once.

    Raises:
        TypeError: model is no module.
    """
    _check_module("count_parameters", model)
    total = sum(p.numel() for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    routers = [(m, m.config.router) for m in layers]
    share = {p: r.top_k / r.num_experts for m, r in routers for p in m.experts.parameters()}
    idle = sum(round(p.numel() * (1 - used)) for p, used in share.items())
    return Count(total, total - idle)


def _check_module(op, model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {describe(model)}")
