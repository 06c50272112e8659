"""The options of a layer in four groups, each a frozen record that is checked when it is made.

`config.MoEConfig` is made of them. No two share a name.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import torch
from typing_extensions import dataclass_transform

from ._checks import (
    DROP_POLICIES,
    SCORE_FUNCTIONS,
    check_dtype,
    check_flag,
    check_integer,
    check_name,
    check_number,
)
from .reference import ACTIVATIONS, GATES
from .types import Activation

__all__ = ["CapacityConfig", "ExpertsConfig", "LossConfig", "RouterConfig"]


def _refuse(config, name, value):
    raise dataclasses.FrozenInstanceError(
        f"{type(config).__name__}: {name} cannot be set, a config is frozen:"
        f" config.replace({name}=...) makes another, layer.{name} = ... gives a layer another"
    )


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls):
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__setattr__ = _refuse
    return cls


class Checked:
    """What the records do to their own fields while they are made."""

    def _check(self, check, *names, **limits):
        """Each of these fields, by a function of `_checks`, as that returns it."""
        for name in names:
            self._put(name, check("MoE", name, getattr(self, name), **limits))

    def _put(self, name, value):
        object.__setattr__(self, name, value)


@record
class RouterConfig(Checked):
    """Which experts a token takes, and with what weights.

    Attributes:
        num_experts: E.
        top_k: K, experts a token takes.
        score_function: "softmax" over the E logits, "sigmoid", or "softmax_topk", softmax over
            the K chosen logits.
        norm_topk_prob: Divide a token's K weights by their sum (not for softmax_topk, whose
            weights sum to 1). With top_k=1 that makes every weight 1: only the losses train the
            router then, and `MoE` warns of it.
        routed_scaling_factor: A factor on the weights.
        n_group: The experts form n_group groups of neighbours, of equal size.
        topk_group: Only experts of so many groups, the best ones, are eligible.
        group_score: A group is scored by its best expert ("max") or the sum of its best two
            ("top2_sum").
        gate_bias: Whether the router has a bias.
        score_correction_bias: Whether it has `e_score_correction_bias`, a float32 buffer that is
            added to the scores for the choice alone. Implied by a rate above 0.
        bias_update_rate: Above 0: loss-free balancing, see `update_router_biases`.
        router_dtype: The router's input and parameters are cast to it first; None: they go in as
            they are, and float32 accumulates (float64 for float64).
        jitter_eps: In training, the tokens are multiplied by uniform(1 - eps, 1 + eps) ...
        jitter_target: ... for the "router" alone, or for the whole "block" (Mixtral).
    """

    num_experts: int = 8
    top_k: int = 2
    score_function: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    gate_bias: bool = False
    score_correction_bias: bool = False
    bias_update_rate: float = 0.0
    router_dtype: torch.dtype | None = None
    jitter_eps: float = 0.0
    jitter_target: str = "router"

    def __post_init__(self):
        self._check(check_integer, "num_experts")
        self._check(check_integer, "top_k", "n_group", maximum=self.num_experts)
        self._check(check_number, "routed_scaling_factor", minimum=-math.inf)
        self._check(check_name, "score_function", known=SCORE_FUNCTIONS)
        self._check(check_integer, "topk_group", maximum=self.n_group)
        self._check(check_name, "group_score", known=("max", "top2_sum"))
        self._check(check_flag, "norm_topk_prob", "gate_bias", "score_correction_bias")
        self._check(check_number, "bias_update_rate")
        self._check(check_dtype, "router_dtype")
        self._check(check_number, "jitter_eps", below=1.0)
        self._check(check_name, "jitter_target", known=("router", "block"))
        if self.num_experts % self.n_group:
            raise ValueError(
                f"MoE: n_group must divide num_experts ({self.num_experts}), got {self.n_group}"
            )
        eligible = self.num_experts // self.n_group * self.topk_group
        if self.top_k > eligible:
            raise ValueError(
                f"MoE: top_k must be at most the {eligible} experts of topk_group={self.topk_group}"
                f" groups, got {self.top_k}"
            )
        if self.bias_update_rate > 0:
            self._put("score_correction_bias", True)

    def scoring(self) -> dict[str, Any]:
        """The keywords of `functional.topk_route` that say how scores become a choice and weights."""
        return dict(
            score_function=self.score_function,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
        )

    @property
    def weighs_one(self) -> bool:
        """Whether every token has one weight, which is 1 whatever the router says."""
        normalised = self.norm_topk_prob or self.score_function == "softmax_topk"
        return self.top_k == 1 < self.num_experts and normalised


@record
class ExpertsConfig(Checked):
    """What an expert computes, and which experts every token takes.

    Attributes:
        activation: An `Activation`; its name alone will do. In the options of `MoE` its fields
            stand side by side with the others: activation="swiglu", limit=7.0.
        bias: Whether the experts have biases, the shared ones too.
        shared_expert_intermediate_size: Size of a network that every token takes; 0: none.
        shared_expert_gate: Whether a sigmoid gate scales its output (Qwen2-MoE).
    """

    activation: Activation = Activation()
    bias: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False

    def __post_init__(self):
        self._put("activation", _checked(Activation.of(self.activation)))
        self._check(check_flag, "bias", "shared_expert_gate")
        self._check(check_integer, "shared_expert_intermediate_size", minimum=0)
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError(
                "MoE: shared_expert_gate must be False without shared experts"
                " (shared_expert_intermediate_size=0), got True"
            )


def _checked(activation):
    """The record, as the ops take it."""
    name, limit, alpha, up_offset, transposed, interleaved = activation
    check_name("MoE", "activation", name, (*GATES, *ACTIVATIONS))
    if limit is not None:
        limit = check_number("MoE", "limit", limit, positive=True)
    alpha = check_number("MoE", "alpha", alpha, minimum=-math.inf)
    up_offset = check_number("MoE", "up_offset", up_offset, minimum=-math.inf)
    check_flag("MoE", "transposed", transposed)
    check_flag("MoE", "interleaved", interleaved)
    if name not in GATES and (limit is not None or up_offset != 0.0):
        raise ValueError(
            "MoE: limit and up_offset must be left alone without a gate"
            f" (gated: {', '.join(GATES)}), got activation={name!r}"
        )
    if name != "swiglu" and alpha != 1.0:
        raise ValueError(f"MoE: alpha must be 1.0 for {name!r} (it is swiglu's), got {alpha}")
    if name not in GATES and interleaved:
        raise ValueError(
            f"MoE: interleaved must be False for {name!r}, which has no gate, got True"
        )
    return Activation(name, limit, alpha, up_offset, transposed, interleaved)


@record
class CapacityConfig(Checked):
    """How many rows an expert takes, and who stays when it is full.

    Attributes:
        capacity_factor: In training an expert takes at most
            C = min(max(ceil(capacity_factor * T * K / E), min_capacity), T) rows; an assignment
            that is dropped adds 0. None: dropless.
        eval_capacity_factor: The same in eval; None: dropless.
        min_capacity: See C.
        expert_capacity: An absolute C, in training and eval, instead of the factors.
        capacity_scope: "batch", or "sequence": x is (..., S, H), C comes from S, and every
            sequence fills the experts by itself (Switch in `transformers`).
        drop_policy: Who stays when an expert is full: "token": tokens in order; "choice": all
            first choices in token order, then all second ones (GShard); "probs": the largest
            weights. "choice" and "probs" let later tokens displace earlier ones: with a capacity
            the future leaks into a causal language model's training.
        renormalize_after_drop: Scale a token's kept weights up to the sum of all of them; 0
            where all were dropped.
    """

    capacity_factor: float | Fraction | None = 1.25
    eval_capacity_factor: float | Fraction | None = None
    min_capacity: int = 4
    expert_capacity: int | None = None
    capacity_scope: str = "batch"
    drop_policy: str = "token"
    renormalize_after_drop: bool = False

    def __post_init__(self):
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) is not None:
                check_number(
                    "MoE", name, getattr(self, name), positive=True
                )  # a Fraction stays one
        self._check(check_integer, "min_capacity", minimum=0)
        if self.expert_capacity is not None:
            self._check(check_integer, "expert_capacity")
        self._check(check_name, "capacity_scope", known=("batch", "sequence"))
        self._check(check_name, "drop_policy", known=DROP_POLICIES)
        self._check(check_flag, "renormalize_after_drop")


@record
class LossConfig(Checked):
    """What keeps the router useful, and how it gets there.

    Attributes:
        aux_loss_coef: Coefficient of the balance loss E * sum f_i P_i, 1.0 at perfect balance
            whatever K (Hugging Face's router_aux_loss_coef is this one over K).
        z_loss_coef: Coefficient of mean(logsumexp(logits)^2).
        inject_losses: In training, let both losses reach the router on the backward path of y,
            with no change to the training loop, times `loss_scale` (see `set_loss_scale`).
            False: `Routing` returns them attached, without their coefficients, for loops that
            add them.
    """

    aux_loss_coef: float = 0.01
    z_loss_coef: float = 0.0
    inject_losses: bool = True

    def __post_init__(self):
        self._check(check_number, "aux_loss_coef", "z_loss_coef")
        self._check(check_flag, "inject_losses")
