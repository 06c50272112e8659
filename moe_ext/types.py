"""The records that travel between the stages."""

from typing import NamedTuple

import torch
from torch import Tensor

Device = torch.device | str | int | None  # as torch takes it

__all__ = ["Activation", "ExpertParameters", "Plan", "RouterOutput"]


class RouterOutput(NamedTuple):
    """What `topk_route` decides and measures, in one pass over the logits."""

    weights: Tensor  # (T, K) float32 (float64 for float64 logits)
    experts: Tensor  # (T, K) int32; E marks a padding token's assignments
    counts: Tensor  # (E) int32: assignments of each expert, padding left out
    score_sums: Tensor  # (E): sum over tokens of the scores, normalised to 1 a token
    logsumexp: Tensor  # (T): of the logits; 0 for padding


class Plan(NamedTuple):
    """What `capacity_scatter` decides: which assignment becomes which row."""

    expert_offsets: Tensor  # (E+1) int32: expert e owns rows [offsets[e], offsets[e+1])
    row_token: Tensor  # (R) int32: the token of each row; -1 in the tail
    row_assignment: Tensor  # (R) int32: t*K + j of each row; -1 in the tail
    assignment_row: Tensor  # (T, K) int32: the row of each assignment; -1 where dropped
    expert_counts: Tensor  # (E) int32: assignments of each expert before any drop


class ExpertParameters(NamedTuple):
    """What the experts hold, an expert's beside the next one's; all of one dtype.

    The experts' ops take these side by side, in this order; so do the functions.
    """

    up_proj: (
        Tensor  # (E, 2I, H), the rows [gate; up], or (E, I, H) for an activation without a gate
    )
    down_proj: Tensor  # (E, H, I)
    up_bias: Tensor | None = None  # (E, 2I) or (E, I)
    down_bias: Tensor | None = None  # (E, H)
    # LoRA: (E, in, r) and (E, r, out) times the scale, whichever way the matrix lies that they add
    # to: x W_e + (x A_e) B_e.
    up_lora_a: Tensor | None = None
    up_lora_b: Tensor | None = None
    down_lora_a: Tensor | None = None
    down_lora_b: Tensor | None = None


class Activation(NamedTuple):
    """What the experts compute between their two matrices, and how these lie.

        gated:    phi(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)
        ungated:  phi(up)

    The experts' ops take these side by side, in this order.
    """

    name: str = (
        "swiglu"  # gated: swiglu geglu geglu_tanh reglu; else silu gelu gelu_tanh relu relu2
    )
    limit: float | None = None  # of a gated one; None: nothing is clamped
    alpha: float = 1.0  # swiglu's phi(g) is g * sigmoid(alpha g)
    up_offset: float = 0.0  # of a gated one. gpt-oss: limit 7, alpha 1.702, up_offset 1
    transposed: bool = False  # up_proj is (E, H, 2I) and down_proj (E, I, H)
    interleaved: bool = False  # the rows of gate and up alternate, the gate first

    @classmethod
    def of(cls, activation: "Activation | str") -> "Activation":
        """The record; a name alone leaves the rest as it is."""
        return cls(activation) if isinstance(activation, str) else activation
