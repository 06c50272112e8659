"""What torch.utils.flop_counter.FlopCounterMode counts for the ops, forward and backward.

As for torch's own ops: two FLOPs a multiplication of a matrix product, nothing for what is done
an element. Rows are as many as the plan has room for: T*K, or E*C where that is less.
"""

import functools
import math

import torch
from torch.utils.flop_counter import register_flop_formula

from ._ops import by_name

ops = torch.ops.moe_ext

# The formulas see a call by its arguments' names, each tensor as its shape.


def _router(tokens, weight):
    num_experts, hidden = weight
    return 2 * tokens * num_experts * hidden


def _router_logits(call):
    return _router(call.x[0], call.weight)


def _router_logits_backward(call):
    return sum(call.output_mask[:2]) * _router_logits(call)


def _products(rows, call):
    """Of the products of so many rows with up_proj, down_proj and the factors of both."""
    matrices = (
        call.up_proj, call.down_proj,
        call.up_lora_a, call.up_lora_b, call.down_lora_a, call.down_lora_b,
    )  # fmt: skip
    return [0 if matrix is None else 2 * rows * matrix[1] * matrix[2] for matrix in matrices]


def _products_backward(call, dx, *wanted, wants_inner=False):
    up, down, up_a, up_b, down_a, down_b = _products(call.row_token[0], call)
    dup, ddown, dup_bias, _, dup_a, dup_b, ddown_a, ddown_b = wanted
    # The gradient of the activations: what comes before down_proj wants it.
    inner = dx or wants_inner or dup or dup_bias or dup_a or dup_b
    full = (down + down_a) * inner + (up + up_a) * dx + up * dup + down * ddown
    # Either factor's gradient takes what the other one makes of the rows.
    of_up = up_b * (dx or dup_a) + up_a * dup_a + (up_a + up_b) * dup_b
    of_down = down_b * (inner or ddown_a) + down_a * ddown_a + (down_a + down_b) * ddown_b
    return full + of_up + of_down


def _grouped_ffn(call):
    return sum(_products(call.row_token[0], call))


def _grouped_ffn_backward(call):
    return _products_backward(call, *call.output_mask)


def _combine(tokens, top_k, hidden):
    return 2 * tokens * top_k * hidden


def _weighted_combine(call):
    return _combine(*call.weights, call.rows[1])


def _weighted_combine_backward(call):
    return sum(call.output_mask) * _weighted_combine(call)


def _moe_forward(call):
    return _grouped_ffn(call) + _combine(*call.weights, call.x[1])


def _moe_backward(call):
    dx, dweights, *wanted = call.output_mask
    return _products_backward(call, dx, *wanted, wants_inner=dweights)


def _moe_infer(call):
    *shape, hidden = call.x
    tokens = math.prod(shape)
    rows = tokens * call.top_k
    if call.capacity is not None:
        rows = min(rows, call.gate_weight[0] * call.capacity * call.num_sequences)
    return (
        _router(tokens, call.gate_weight)
        + sum(_products(rows, call))
        + _combine(tokens, call.top_k, hidden)
    )


def _none(call):
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


def _register(op, formula):
    @functools.wraps(formula)
    def of_call(*args, **kwargs):
        return formula(by_name(op, args, kwargs))

    register_flop_formula(getattr(ops, op))(of_call)


for _op, _formula in FORMULAS.items():
    _register(_op, _formula)
