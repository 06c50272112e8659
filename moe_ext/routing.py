"""The router: logits of every token, its choice of experts, and the bias on that choice."""

from fractions import Fraction
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import functional
from ._checks import check_integer, check_same_device
from ._compat import larger, smaller
from .groups import group_of
from .types import Plan


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


class Router(nn.Module):
    """x (T, H) -> logits (T, E) and a `Route` with each token's top_k experts and weights.

    `options`: those of `functional.topk_route`, a dict that it shares with its `MoE`.
    Parameters `weight` (E, H) and `bias` (E) or None. The buffer
    `e_score_correction_bias` (E) is added to the scores for the choice alone, never
    to the weights (DeepSeek-V3); it receives no gradient and stays float32 whatever
    the module is cast to, because bfloat16 would lose its steps of 1e-3.
    """

    def __init__(
        self, hidden_size, num_experts, options, *,
        bias=False, score_correction_bias=False, input_dtype=None, init_std=0.02,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.input_dtype = input_dtype
        self.init_std = init_std
        self.options = options
        kwargs = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, **kwargs))
        self.bias = nn.Parameter(torch.empty(num_experts, **kwargs)) if bias else None
        correction = None
        if score_correction_bias:
            correction = torch.empty(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    @property
    def top_k(self):
        return self.options["top_k"]

    @top_k.setter
    def top_k(self, top_k):
        self.options["top_k"] = check_integer("MoE", "top_k", top_k, maximum=len(self.weight))

    def reset_parameters(self):
        """The weight from a normal distribution of `init_std`; the biases zero."""
        nn.init.normal_(self.weight, std=self.init_std)
        for zero in (self.bias, self.e_score_correction_bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(self, x, padding_mask=None, experts=None):
        """Logits and `Route`; `experts` (T, K) replays a recorded choice."""
        weight, bias = self.weight, self.bias
        check_same_device(x, weight)
        dtype = self.input_dtype
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        logits = functional.router_logits(x, weight, bias)
        route = functional.topk_route(
            logits, selection_bias=self.float32_bias(),
            padding_mask=padding_mask, experts=experts, **self.options,
        )  # fmt: skip
        return logits, route

    def float32_bias(self):
        """The selection bias, float32 again where something assigned it in another dtype."""
        bias = self.e_score_correction_bias
        if bias is not None and bias.dtype != torch.float32:
            self.e_score_correction_bias = bias = bias.float()
        return bias

    def _apply(self, fn, recurse=True):
        bias = self.e_score_correction_bias

        def keep_float32(tensor):
            changed = fn(tensor)
            if tensor is bias and changed.dtype != tensor.dtype:
                return tensor.to(changed.device)
            return changed

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.float32_bias()  # assign=True takes any dtype

    def extra_repr(self):
        return ", ".join(
            [
                f"weight={tuple(self.weight.shape)}",
                *(f"{name}={value!r}" for name, value in self.options.items()),
            ]
        )


def capacity_ratio(factor, num_experts):
    """(numerator, denominator) of factor / E, or None: dropless.

    The factor is the fraction nearest to it with a denominator of at most a million.
    """
    if factor is None:
        return None
    # A factor of E is no limit already, and keeps the integers small.
    ratio = Fraction(min(factor, num_experts)).limit_denominator(10**6) / num_experts
    return ratio.numerator, ratio.denominator


def capacity_of(ratio, tokens, min_capacity, top_k):
    """C = min(max(ceil(ratio * T * K), min_capacity), T), or None: dropless.

    Exact integers, and symbolic ones for torch.compile.
    """
    if ratio is None:
        return None
    numerator, denominator = ratio
    capacity = -(-(tokens * numerator * top_k) // denominator)
    return smaller(larger(capacity, min_capacity), tokens)


def renormalize_after_drop(weights, assignment_row):
    """Weights (T, K) whose kept ones sum to what all of them did; 0 where all were dropped."""
    kept = torch.where(assignment_row >= 0, weights, 0.0)
    kept_sum = kept.sum(-1, keepdim=True)
    lost = kept_sum == 0
    # The inner where keeps 0/0 out of the gradient too.
    scale = weights.sum(-1, keepdim=True) / torch.where(lost, 1.0, kept_sum)
    return kept * torch.where(lost, 0.0, scale)


def update_router_biases(model, process_group=None):
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
    from .moe import MoE

    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, MoE) and m.bias_update_rate > 0
    }
    routers = {name: next(m.gate.parameters()) for name, m in layers.items()}
    move_biases(
        [(m._stats, m.bias_update_rate, selection_bias_of(m.gate)) for m in layers.values()],
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


def update_router_biases_on_step(optimizer, model, process_group=None):
    """Calls `update_router_biases(model, process_group)` after each step of this one optimizer.

    Returns the hook's handle; `handle.remove()` ends it.
    """
    return optimizer.register_step_post_hook(
        lambda *_: update_router_biases(model, process_group),
    )
