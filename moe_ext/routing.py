"""The router: logits of every token, and its choice of experts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from ._checks import check_same_device
from .config import MoEConfig
from .types import Device, Plan, RouterOutput

__all__ = ["Router", "Routing"]


class Routing(NamedTuple):
    """What one forward of a layer decided: `MoE(..., return_routing=True)`.

    `MoE(x, routing=recorded)` takes `experts` and `plan` from it and computes the
    weights anew. A `plan` of None is made anew too, under the layer's own capacity.
    """

    logits: Tensor | None  # (T, E) float32 (float64 for float64 layers)
    weights: Tensor | None  # (T, K): what each choice counts
    experts: Tensor  # (T, K) int32, best first; E marks a padding token's
    plan: Plan | None = None  # which assignment became which row, see Plan
    aux_loss: Tensor | None = None  # scalar, 1.0 at perfect balance; before its coefficient
    z_loss: Tensor | None = None  # scalar; before its coefficient


class Settings:
    """A layer's config where its router finds it too: the only copy."""

    def __init__(self, config: MoEConfig):
        self.config = config


class Router(nn.Module):
    """x (T, H) -> logits (T, E) and a `RouterOutput` with each token's top_k experts and weights.

    Parameters `weight` (E, H) and `bias` (E) or None. The buffer
    `e_score_correction_bias` (E) is added to the scores for the choice alone, never
    to the weights (DeepSeek-V3); it receives no gradient and stays float32 whatever
    the module is cast to, because bfloat16 would lose its steps of 1e-3.
    """

    def __init__(self, settings: Settings, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.settings = settings
        hidden_size, router = settings.config.hidden_size, settings.config.router
        num_experts = router.num_experts

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight = parameter(num_experts, hidden_size)
        self.bias = parameter(num_experts) if router.gate_bias else None
        correction = None
        if router.score_correction_bias:
            correction = torch.empty(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    @property
    def top_k(self):
        return self.settings.config.router.top_k

    @top_k.setter
    def top_k(self, top_k):
        self.settings.config = self.settings.config.replace(top_k=top_k)

    def reset_parameters(self) -> None:
        """The weight from a normal distribution of `init_std`; the biases zero."""
        nn.init.normal_(self.weight, std=self.settings.config.init_std)
        for zero in (self.bias, self.e_score_correction_bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, experts: Tensor | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """Logits and `RouterOutput`; `experts` (T, K) replays a recorded choice."""
        router = self.settings.config.router
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        check_same_device(x, weight)
        dtype = router.router_dtype
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        logits = functional.router_logits(x, weight, bias)
        route = functional.topk_route(
            logits, router.top_k, selection_bias=self.float32_bias(),
            padding_mask=padding_mask, experts=experts, **router.scoring(),
        )  # fmt: skip
        return logits, route

    def float32_bias(self) -> Tensor | None:
        """The selection bias, float32 again where something assigned it in another dtype."""
        bias: Tensor | None = self.e_score_correction_bias
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
            self.e_score_correction_bias = bias
        return bias

    def _apply(self, fn, recurse=True):
        bias: Tensor | None = self.e_score_correction_bias

        def keep_float32(tensor):
            changed = fn(tensor)
            if tensor is bias and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)
            return changed

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.float32_bias()  # assign=True takes any dtype

    def extra_repr(self) -> str:
        options = {"top_k": self.top_k, **self.settings.config.router.scoring()}
        return ", ".join(
            [f"weight={tuple(self.weight.shape)}", *(f"{k}={v!r}" for k, v in options.items())]
        )


def renormalize_after_drop(weights, assignment_row):
    """Weights (T, K) whose kept ones sum to what all of them did; 0 where all were dropped."""
    kept = torch.where(assignment_row >= 0, weights, 0.0)
    kept_sum = kept.sum(-1, keepdim=True)
    lost = kept_sum == 0
    # The inner where keeps 0/0 out of the gradient too.
    scale = weights.sum(-1, keepdim=True) / torch.where(lost, 1.0, kept_sum)
    return kept * torch.where(lost, 0.0, scale)
