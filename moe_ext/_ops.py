"""The ops' fakes: the shapes and dtypes of their results, for torch.compile and the meta device.

The schemas stand in csrc/schema.cpp, the gradients in csrc/autograd.cpp.
"""

import torch

from ._compat import smaller
from .reference import accumulation_dtype

ops = torch.ops.moe_ext


def _fake(name):
    return torch.library.register_fake(f"moe_ext::{name}")


def _masked(mask, *shaped_like):
    """One fake a result: like its tensor where the mask asks for it, else empty."""
    reference = next(t for t in shaped_like if t is not None)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if wanted and t is not None
        else (reference if t is None else t).new_empty(0)
        for wanted, t in zip(mask, shaped_like)
    )


@_fake("router_logits")
def _(x, weight, bias=None):
    dtype = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@_fake("router_logits_backward")
def _(grad_logits, x, weight, output_mask):
    dx, dweight = _masked(output_mask[:2], x, weight)
    dtype = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    return dx, dweight, x.new_empty(weight.shape[0] if output_mask[2] else 0, dtype=dtype)


@_fake("topk_route")
def _(logits, top_k, *_, **__):
    tokens, num_experts = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(tokens, top_k, dtype=dtype),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=dtype),
        logits.new_empty(tokens, dtype=dtype),
    )


@_fake("topk_route_backward")
def _(grad_weights, grad_score_sums, grad_logsumexp, logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake("capacity_scatter")
def _(experts, num_experts, capacity=None, *_, num_sequences=1, **__):
    # A positional num_sequences is the seventh argument.
    num_sequences = _[3] if len(_) > 3 else num_sequences
    tokens, top_k = experts.shape
    rows = tokens * top_k
    if capacity is not None:
        rows = smaller(rows, num_experts * capacity * num_sequences)
    return tuple(
        experts.new_empty(shape, dtype=torch.int32)
        for shape in ((num_experts + 1,), (rows,), (rows,), (tokens, top_k), (num_experts,))
    )


@_fake("gather_rows")
def _(x, row_token, assignment_row):
    return x.new_empty(row_token.shape[0], x.shape[1])


@_fake("gather_rows_backward")
def _(grad_rows, assignment_row):
    return grad_rows.new_empty(assignment_row.shape[0], grad_rows.shape[1])


def _preactivations(x, rows, up_proj, activation, transposed, keep):
    width = up_proj.shape[2 if transposed else 1]
    return x.new_empty(rows, width) if keep else x.new_empty(0)


@_fake("grouped_ffn")
def _(
    x, expert_offsets, row_token, assignment_row, up_proj, down_proj, up_bias=None, down_bias=None,
    activation="swiglu", limit=None, alpha=1.0, up_offset=0.0, transposed=False, interleaved=False,
    keep_preactivations=True, batch_invariant=False,
):  # fmt: skip
    rows = row_token.shape[0]
    return x.new_empty(rows, x.shape[1]), _preactivations(
        x, rows, up_proj, activation, transposed, keep_preactivations
    )


@_fake("grouped_ffn_backward")
def _(
    grad_rows, x, preactivations, expert_offsets, row_token, assignment_row,
    up_proj, down_proj, up_bias, down_bias, *_, output_mask, **__,
):  # fmt: skip
    return _masked(output_mask, x, up_proj, down_proj, up_bias, down_bias)


@_fake("weighted_combine")
def _(rows, weights, row_assignment, assignment_row):
    return rows.new_empty(weights.shape[0], rows.shape[1])


@_fake("weighted_combine_backward")
def _(grad, rows, weights, row_assignment, assignment_row, output_mask):
    return _masked(output_mask, rows, weights)


@_fake("moe_forward")
def _(
    x, weights, expert_offsets, row_token, row_assignment, assignment_row,
    up_proj, down_proj, up_bias=None, down_bias=None,
    activation="swiglu", limit=None, alpha=1.0, up_offset=0.0, transposed=False, interleaved=False,
    keep_preactivations=True, batch_invariant=False,
):  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format), _preactivations(
        x, row_token.shape[0], up_proj, activation, transposed, keep_preactivations
    )


@_fake("moe_backward")
def _(
    grad, x, weights, preactivations, expert_offsets, row_token, row_assignment, assignment_row,
    up_proj, down_proj, up_bias, down_bias, *_, output_mask, **__,
):  # fmt: skip
    return _masked(output_mask, x, weights, up_proj, down_proj, up_bias, down_bias)


@_fake("accumulate_stats")
def _(*_, **__):
    return None


@_fake("moe_infer")
def _(x, *_, **__):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Last: it needs the ops.
from . import flops  # noqa: E402, F401
