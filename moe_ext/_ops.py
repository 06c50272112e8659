"""The ops' fakes: the shapes and dtypes of their results, for torch.compile and the meta device.

The schemas stand in csrc/schema.cpp, the gradients in csrc/autograd.cpp.
"""

from types import SimpleNamespace

import torch

from ._compat import smaller
from .reference import accumulation_dtype
from .types import ExpertParameters

ops = torch.ops.moe_ext


def _fake(name):
    return torch.library.register_fake(f"moe_ext::{name}")


def by_name(op, args, kwargs):
    """A call's arguments as attributes, under their names in the schema, defaults included."""
    arguments = getattr(ops, op).default._schema.arguments
    values = {a.name: a.default_value for a in arguments}
    values |= dict(zip(values, args)) | kwargs
    return SimpleNamespace(**values)


def experts_of(call):
    """The tensors of such a call that the experts hold."""
    return [getattr(call, name) for name in ExpertParameters._fields]


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
def _(*args, **kwargs):
    call = by_name("capacity_scatter", args, kwargs)
    tokens, top_k = call.experts.shape
    rows = tokens * top_k
    if call.capacity is not None:
        rows = smaller(rows, call.num_experts * call.capacity * call.num_sequences)
    return tuple(
        call.experts.new_empty(shape, dtype=torch.int32)
        for shape in (
            (call.num_experts + 1,),
            (rows,),
            (rows,),
            (tokens, top_k),
            (call.num_experts,),
        )
    )


@_fake("gather_rows")
def _(x, row_token, assignment_row):
    return x.new_empty(row_token.shape[0], x.shape[1])


@_fake("gather_rows_backward")
def _(grad_rows, assignment_row):
    return grad_rows.new_empty(assignment_row.shape[0], grad_rows.shape[1])


def _preactivations(call):
    width = call.up_proj.shape[2 if call.transposed else 1]
    keep = call.keep_preactivations
    return call.x.new_empty(call.row_token.shape[0], width) if keep else call.x.new_empty(0)


@_fake("grouped_ffn")
def _(*args, **kwargs):
    call = by_name("grouped_ffn", args, kwargs)
    rows = call.x.new_empty(call.row_token.shape[0], call.x.shape[1])
    return rows, _preactivations(call)


@_fake("grouped_ffn_backward")
def _(*args, **kwargs):
    call = by_name("grouped_ffn_backward", args, kwargs)
    return _masked(call.output_mask, call.x, *experts_of(call))


@_fake("weighted_combine")
def _(rows, weights, row_assignment, assignment_row):
    return rows.new_empty(weights.shape[0], rows.shape[1])


@_fake("weighted_combine_backward")
def _(grad, rows, weights, row_assignment, assignment_row, output_mask):
    return _masked(output_mask, rows, weights)


@_fake("moe_forward")
def _(*args, **kwargs):
    call = by_name("moe_forward", args, kwargs)
    y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
    return y, _preactivations(call)


@_fake("moe_backward")
def _(*args, **kwargs):
    call = by_name("moe_backward", args, kwargs)
    return _masked(call.output_mask, call.x, call.weights, *experts_of(call))


@_fake("accumulate_stats")
def _(*_, **__):
    return None


@_fake("moe_infer")
def _(x, *_, **__):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
