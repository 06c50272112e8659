"""Experts whose gate is called: the rows in expert order, a matrix product an expert."""

import torch
from torch import Tensor

from ...functional import _autocast, gather_rows
from .stacks import Stack, gradients_like, rows_of_each_expert, stack_of, wanted_only


def called_ffn(experts, x, plan, up, down, up_bias, down_bias, up_lora=None, down_lora=None):
    """Every expert's network on its rows (R, H), through the module's own gate; the tail is 0.

    Not fused: copies of the tokens and of the gate's result are kept for the backward pass.
    """
    x, up, down, up_bias, down_bias = _autocast(x, up, down, up_bias, down_bias)
    ups = stack_of(up, up_bias, up_lora, experts.is_transposed)
    downs = stack_of(down, down_bias, down_lora, experts.is_transposed)
    apply_gate = experts._apply_gate if experts.has_gate else experts.act_fn
    grouped_linear = torch.ops.moe_ext_transformers.grouped_linear
    rows = grouped_linear(gather_rows(x, plan), *ups, plan.expert_offsets)
    rows = apply_gate(rows).to(down.dtype)
    return grouped_linear(rows, *downs, plan.expert_offsets)


# One opaque op, because a loop over experts reads the offsets: torch.compile could not.


@torch.library.custom_op("moe_ext_transformers::grouped_linear", mutates_args=())
def _forward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    offsets: Tensor,
) -> Tensor:  # fmt: skip
    """`Stack.times` for the rows of every expert; the tail is 0."""
    stack = Stack(weight, bias, a, b)
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for e, r in rows_of_each_expert(offsets):
        stack.times(rows[r], e, out=out[r])
    return out


@torch.library.custom_op("moe_ext_transformers::grouped_linear_backward", mutates_args=())
def _backward(
    dout: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None,
    b: Tensor | None, offsets: Tensor, output_mask: list[bool],
) -> list[Tensor]:  # fmt: skip
    stack = Stack(weight, bias, a, b)
    gradients = gradients_like((rows, *stack), output_mask)
    drows, *of_stack = wanted_only([g.zero_() for g in gradients], output_mask)
    for e, r in rows_of_each_expert(offsets):
        stack.write_gradients(Stack(*of_stack), rows[r], dout[r], e)
        if drows is not None:
            stack.times_transposed(dout[r], e, out=drows[r])
    return gradients


@_forward.register_fake
def _(rows, weight, bias, a, b, offsets):
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_backward.register_fake
def _(dout, rows, weight, bias, a, b, offsets, output_mask):
    return gradients_like((rows, weight, bias, a, b), output_mask)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dout):
    backward = torch.ops.moe_ext_transformers.grouped_linear_backward
    output_mask = list(ctx.needs_input_grad[:5])
    gradients = backward(dout, *ctx.saved_tensors, output_mask)
    return *wanted_only(gradients, output_mask), None


_forward.register_autograd(_gradient, setup_context=_save)
