"""How forwards of transformers' experts are counted for whatever watches them."""

import math

import torch

from ...stats import counting
from ...types import RouterOutput


def in_registry(module):
    """Whether transformers' registry of experts functions says what computes its forward."""
    return "is_concatenated" in vars(module)  # its decorator writes it into every instance


def observe(experts, top_k_index, top_k_weights):
    """Counts a forward's choices, where a `RoutingHealth` watches these experts."""
    watchers = getattr(experts, "_routing_watchers", ())
    # Under expert parallelism ids are local here, and tokens other ranks': see count_call.
    if watchers and not getattr(experts, "_is_expert_parallel", False):
        _count(watchers, experts, top_k_index, top_k_weights)


def count_call(watchers, experts, args, kwargs):
    """A forward pre-hook: what a rank's own router chose, by the experts' ids in the model."""
    given = {**dict(zip(ARGUMENTS, args)), **kwargs}
    _count(watchers, experts, given["top_k_index"], given["top_k_weights"])


ARGUMENTS = "hidden_states", "top_k_index", "top_k_weights"


@torch.no_grad()
def _count(watchers, experts, top_k_index, top_k_weights):
    watchers = counting(watchers, experts.training)
    for stats in watchers:
        stats.to(top_k_index.device)
    num_experts = len(watchers[0].counts)
    counted = top_k_index.flatten().long().clamp(max=num_experts)
    load = torch.zeros(num_experts + 1, dtype=torch.int32, device=counted.device)
    load = load.scatter_add(0, counted, torch.ones_like(counted, dtype=torch.int32))[:-1]
    assignment_row = None
    if getattr(experts, "sentinels_are_drops", False):
        dropped = top_k_index >= num_experts
        assignment_row = torch.where(dropped, -1, 0).int()
        top_k_index = top_k_index.masked_fill(dropped, 0)
    # Of the scores nothing is known here but the weights: the load stands for their sums, or NaN
    # where a weight is not finite, and logits of 0 for the logits.
    is_finite = top_k_weights.isfinite().all()
    route = RouterOutput(
        None, top_k_index, load, torch.where(is_finite, load.double(), math.nan), None
    )
    logits = torch.zeros(len(top_k_index), num_experts, device=load.device)
    for stats in watchers:
        stats.accumulate(logits, route, assignment_row, None, "softmax", experts.training)
