"""Experts whose gate is called: the rows in expert order, a matrix product an expert."""

import torch
from torch import Tensor

from ...functional import _autocast, gather_rows


def called_ffn(experts, x, plan, up, down, up_bias, down_bias):
    """Every expert's network on its rows (R, H), through the module's own gate; the tail is 0.

    Not fused: copies of the tokens and of the gate's result are kept for the backward pass.
    """
    x, up, down, up_bias, down_bias = _autocast(x, up, down, up_bias, down_bias)
    apply_gate = experts._apply_gate if experts.has_gate else experts.act_fn
    rows = grouped_linear(gather_rows(x, plan), up, up_bias, plan, experts.is_transposed)
    rows = apply_gate(rows).to(down.dtype)
    return grouped_linear(rows, down, down_bias, plan, experts.is_transposed)


def grouped_linear(rows, weight, bias, plan, transposed):
    """rows[r] @ weight[e] + bias[e] for the rows of every expert; the tail is 0."""
    weight = weight if transposed else weight.transpose(1, 2)
    return torch.ops.moe_ext_transformers.grouped_linear(rows, weight, bias, plan.expert_offsets)


# One opaque op, because a loop over experts reads the offsets: torch.compile could not.


@torch.library.custom_op("moe_ext_transformers::grouped_linear", mutates_args=())
def _forward(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for e, r in _of_each_expert(offsets):
        if bias is None:
            torch.mm(rows[r], weight[e], out=out[r])
        else:
            torch.addmm(bias[e], rows[r], weight[e], out=out[r])
    return out


@torch.library.custom_op("moe_ext_transformers::grouped_linear_backward", mutates_args=())
def _backward(
    dout: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    drows, dweight = torch.zeros_like(rows), torch.zeros_like(weight)
    dbias = weight.new_zeros(weight.shape[0] if has_bias else 0, weight.shape[2])
    for e, r in _of_each_expert(offsets):
        torch.mm(dout[r], weight[e].T, out=drows[r])
        torch.mm(rows[r].T, dout[r], out=dweight[e])
        if has_bias:
            torch.sum(dout[r], 0, out=dbias[e])
    return drows, dweight, dbias


def _of_each_expert(offsets):
    """(e, its slice of the rows) of the experts that have rows."""
    offsets = offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(offsets, offsets[1:])) if a < b]


@_forward.register_fake
def _(rows, weight, bias, offsets):
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_backward.register_fake
def _(dout, rows, weight, offsets, has_bias):
    dbias = weight.new_empty(weight.shape[0] if has_bias else 0, weight.shape[2])
    return torch.empty_like(rows), torch.empty_like(weight), dbias


def _save(ctx, inputs, output):
    rows, weight, bias, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)
    ctx.has_bias = bias is not None


def _gradient(ctx, dout):
    rows, weight, offsets = ctx.saved_tensors
    backward = torch.ops.moe_ext_transformers.grouped_linear_backward
    drows, dweight, dbias = backward(dout, rows, weight, offsets, ctx.has_bias)
    return drows, dweight, dbias if ctx.has_bias else None, None


_forward.register_autograd(_gradient, setup_context=_save)
