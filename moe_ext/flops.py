"""What torch.utils.flop_counter.FlopCounterMode counts for the ops, forward and backward.

As for torch's own ops: two FLOPs a multiplication of a matrix product, nothing for what is done
an element. Rows are as many as the plan has room for: T*K, or E*C where that is less.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

ops = torch.ops.moe_ext


def _router_logits(x, weight, *_, **__):
    (tokens, hidden), num_experts = x, weight[0]
    return 2 * tokens * num_experts * hidden


def _router_logits_backward(grad_logits, x, weight, output_mask, **_):
    return sum(output_mask[:2]) * _router_logits(x, weight)


def _experts(rows, up_proj, down_proj):
    """(of the product with up_proj, of that with down_proj), for so many rows."""
    return tuple(2 * rows * matrix[1] * matrix[2] for matrix in (up_proj, down_proj))


def _experts_backward(rows, up_proj, down_proj, wants_x, wants_weights, wants_up, wants_down):
    up, down = _experts(rows, up_proj, down_proj)
    # The gradient of the activations: what comes before down_proj wants it.
    inner = wants_x or wants_weights or wants_up
    return down * inner + up * wants_x + up * wants_up + down * wants_down


def _grouped_ffn(x, expert_offsets, row_token, assignment_row, up_proj, down_proj, *_, **__):
    return sum(_experts(row_token[0], up_proj, down_proj))


def _grouped_ffn_backward(
    grad_rows, x, preactivations, expert_offsets, row_token, assignment_row, up_proj, down_proj,
    *_, output_mask, **__,
):  # fmt: skip
    dx, dup, ddown, dup_bias, _ = output_mask
    return _experts_backward(row_token[0], up_proj, down_proj, dx, dup_bias, dup, ddown)


def _weighted_combine(rows, weights, *_, **__):
    return 2 * weights[0] * weights[1] * rows[1]


def _weighted_combine_backward(
    grad_y, rows, weights, row_assignment, assignment_row, output_mask, **_
):
    return sum(output_mask) * _weighted_combine(rows, weights)


def _moe_forward(
    x, weights, expert_offsets, row_token, row_assignment, assignment_row, up_proj, down_proj,
    *_, **__,
):  # fmt: skip
    return sum(_experts(row_token[0], up_proj, down_proj)) + _weighted_combine(x, weights)


def _moe_backward(
    grad_y, x, weights, preactivations, expert_offsets, row_token, row_assignment, assignment_row,
    up_proj, down_proj, *_, output_mask, **__,
):  # fmt: skip
    dx, dweights, dup, ddown, dup_bias, _ = output_mask
    wants_inner = dweights or dup_bias
    return _experts_backward(row_token[0], up_proj, down_proj, dx, wants_inner, dup, ddown)


def _moe_infer(
    x, gate_weight, gate_bias, counts, score_sums, totals, top_k, up_proj, down_proj, up_bias,
    down_bias, activation=None, limit=None, alpha=None, up_offset=None, transposed=None,
    interleaved=None, selection_bias=None, padding_mask=None, score_function=None,
    norm_topk_prob=None, routed_scaling_factor=None, n_group=None, topk_group=None,
    group_score=None, capacity=None, drop_policy=None, num_sequences=1, *_, **__,
):  # fmt: skip
    *shape, hidden = x
    tokens = math.prod(shape)
    rows = tokens * top_k
    if capacity is not None:
        rows = min(rows, gate_weight[0] * capacity * num_sequences)
    return (
        _router_logits((tokens, hidden), gate_weight)
        + sum(_experts(rows, up_proj, down_proj))
        + _weighted_combine((rows, hidden), (tokens, top_k))
    )


def _none(*_, **__):
    return 0


FORMULAS = {
    "router_logits": _router_logits,
    "router_logits_backward": _router_logits_backward,
    "topk_route": _none,
    "topk_route_backward": _none,
    "capacity_scatter": _none,
    "gather_rows": _none,
    "gather_rows_backward": _none,
    "grouped_ffn": _grouped_ffn,
    "grouped_ffn_backward": _grouped_ffn_backward,
    "weighted_combine": _weighted_combine,
    "weighted_combine_backward": _weighted_combine_backward,
    "moe_forward": _moe_forward,
    "moe_backward": _moe_backward,
    "accumulate_stats": _none,
    "moe_infer": _moe_infer,
}

for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(ops, _name))(_formula)
