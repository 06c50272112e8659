"""Experts whose gate is called: the rows in expert order, a matrix product an expert."""

import torch
from torch import Tensor

from ...functional import _autocast, gather_rows


def called_ffn(experts, x, plan, up, down, up_bias, down_bias, up_lora=None, down_lora=None):
    """Every expert's network on its rows (R, H), through the module's own gate; the tail is 0.

    Not fused: copies of the tokens and of the gate's result are kept for the backward pass.
    `up_lora` and `down_lora` are what adapters add to the matrices, `lora.LowRank`.
    """
    x, up, down, up_bias, down_bias = _autocast(x, up, down, up_bias, down_bias)
    apply_gate = experts._apply_gate if experts.has_gate else experts.act_fn
    rows = gather_rows(x, plan)
    rows = grouped_linear(rows, up, up_bias, plan, experts.is_transposed, up_lora)
    rows = apply_gate(rows).to(down.dtype)
    return grouped_linear(rows, down, down_bias, plan, experts.is_transposed, down_lora)


def grouped_linear(rows, weight, bias, plan, transposed, lora=None):
    """rows[r] @ (weight[e] + lora.a[e] @ lora.b[e]) + bias[e], e the row's expert; the tail is 0.

    The factors are never multiplied with each other.
    """
    op, offsets = torch.ops.moe_ext_transformers.grouped_linear, plan.expert_offsets
    out = op(rows, weight if transposed else weight.transpose(1, 2), bias, offsets)
    if lora is not None:
        a, b = (factor.to(rows.dtype) for factor in lora)
        out = out + op(op(rows, a, None, offsets), b, None, offsets)
    return out


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
    dout: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    needs_rows, needs_weight, needs_bias = output_mask
    drows, dweight, dbias = (t.zero_() for t in _gradients_like(dout, weight, output_mask))
    for e, r in _of_each_expert(offsets):
        if needs_rows:
            torch.mm(dout[r], weight[e].T, out=drows[r])
        if needs_weight:
            torch.mm(rows[r].T, dout[r], out=dweight[e])
        if needs_bias:
            torch.sum(dout[r], 0, out=dbias[e])
    return drows, dweight, dbias


def _gradients_like(dout, weight, output_mask):
    """Of rows, weight and bias, uninitialised; empty where the mask does not ask for one."""
    experts, inside, outside = weight.shape
    shapes = (dout.shape[0], inside), weight.shape, (experts, outside)
    return tuple(
        dout.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, output_mask)
    )


def _of_each_expert(offsets):
    """(e, its slice of the rows) of the experts that have rows."""
    offsets = offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(offsets, offsets[1:])) if a < b]


@_forward.register_fake
def _(rows, weight, bias, offsets):
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_backward.register_fake
def _(dout, rows, weight, offsets, output_mask):
    return _gradients_like(dout, weight, output_mask)


def _save(ctx, inputs, output):
    rows, weight, _, offsets = inputs
    needs_weight = ctx.needs_input_grad[1]  # frozen experts keep no rows
    ctx.save_for_backward(rows if needs_weight else None, weight, offsets)


def _gradient(ctx, dout):
    rows, weight, offsets = ctx.saved_tensors
    output_mask = list(ctx.needs_input_grad[:3])
    backward = torch.ops.moe_ext_transformers.grouped_linear_backward
    gradients = backward(dout, rows, weight, offsets, output_mask)
    return *(g if wanted else None for g, wanted in zip(gradients, output_mask)), None


_forward.register_autograd(_gradient, setup_context=_save)
