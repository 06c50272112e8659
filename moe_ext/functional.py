"""The stages of an MoE layer as functions of tensors.

    logits = router_logits(x, gate_weight)
    route = topk_route(logits, top_k)
    plan = capacity_scatter(route.experts, num_experts)
    y = moe_forward(x, route.weights, plan, gate_up_proj, down_proj)

`moe_forward` is `grouped_ffn` and `weighted_combine` in one, and keeps less for
the backward pass.
"""

import contextlib

import torch

from . import reference
from ._load import BACKEND
from .types import Plan, Route

ops = torch.ops.moe_ext

# A plain global: torch.compile traces it (it refuses a ContextVar), and a backward
# pass that recomputes on one of autograd's own threads sees it.
_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled=True):
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = previous


def _autocast(x, *others):
    """x and the experts' parameters in autocast's dtype, where autocast is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def router_logits(x, weight, bias=None):
    if BACKEND == "reference":
        return reference.router_logits(x, weight, bias)
    return ops.router_logits(x, weight, bias)


def topk_route(
    logits,
    top_k,
    *,
    selection_bias=None,
    padding_mask=None,
    experts=None,
    score_function="softmax",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    n_group=1,
    topk_group=1,
    group_score="max",
):
    options = dict(
        selection_bias=selection_bias,
        padding_mask=padding_mask,
        experts=experts,
        score_function=score_function,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
    )
    if BACKEND == "reference":
        return reference.topk_route(logits, top_k, **options)
    return Route(*ops.topk_route(logits, top_k, **options))


def capacity_scatter(
    experts,
    num_experts,
    capacity=None,
    *,
    weights=None,
    padding_mask=None,
    drop_policy="choice",
    num_sequences=1,
):
    if BACKEND == "reference":
        return reference.capacity_scatter(
            experts, num_experts, capacity, weights=weights, padding_mask=padding_mask,
            drop_policy=drop_policy, num_sequences=num_sequences,
        )  # fmt: skip
    return Plan(
        *ops.capacity_scatter(
            experts, num_experts, capacity, weights, padding_mask, drop_policy, num_sequences
        )
    )


def grouped_ffn(
    x,
    plan,
    up_proj,
    down_proj,
    up_bias=None,
    down_bias=None,
    *,
    activation="swiglu",
    limit=None,
    alpha=1.0,
    up_offset=0.0,
    transposed=False,
    interleaved=False,
):
    x, *parameters = _autocast(x, up_proj, down_proj, up_bias, down_bias)
    options = (activation, limit, alpha, up_offset, transposed, interleaved)
    if BACKEND == "reference":
        return reference.grouped_ffn(x, plan, *parameters, **dict(zip(_FFN_OPTIONS, options)))
    rows, _ = ops.grouped_ffn(
        x, plan.expert_offsets, plan.row_token, plan.assignment_row, *parameters, *options,
        _needs_gradient(x, *parameters), _batch_invariant,
    )  # fmt: skip
    return rows


_FFN_OPTIONS = ("activation", "limit", "alpha", "up_offset", "transposed", "interleaved")


def weighted_combine(rows, weights, plan):
    if BACKEND == "reference":
        return reference.weighted_combine(rows, weights, plan)
    return ops.weighted_combine(rows, weights, plan.row_assignment, plan.assignment_row)


def moe_forward(
    x,
    weights,
    plan,
    up_proj,
    down_proj,
    up_bias=None,
    down_bias=None,
    *,
    activation="swiglu",
    limit=None,
    alpha=1.0,
    up_offset=0.0,
    transposed=False,
    interleaved=False,
):
    x, *parameters = _autocast(x, up_proj, down_proj, up_bias, down_bias)
    options = (activation, limit, alpha, up_offset, transposed, interleaved)
    if BACKEND == "reference":
        return reference.moe_forward(x, weights, plan, *parameters, **dict(zip(_FFN_OPTIONS, options)))
    y, _ = ops.moe_forward(
        x, weights, plan.expert_offsets, plan.row_token, plan.row_assignment, plan.assignment_row,
        *parameters, *options,
        _needs_gradient(x, weights, *parameters), _batch_invariant,
    )  # fmt: skip
    return y
