"""Experts whose gate is called: the rows in expert order, a matrix product an expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...functional import _autocast, gather_rows


def called_ffn(experts, x, plan, *parameters):
    """Every expert's network on its rows (R, H), through the module's own gate; the tail is 0.

    Not fused: copies of the tokens and of the gate's result are kept for the backward pass.
    """
    x, up, down, up_bias, down_bias, *factors = _autocast(x, *parameters)
    if not experts.is_transposed:
        up, down = up.mT, down.mT
    ups, downs = Stack(up, up_bias, *factors[:2]), Stack(down, down_bias, *factors[2:])
    apply_gate = experts._apply_gate if experts.has_gate else experts.act_fn
    grouped_linear = torch.ops.moe_ext_transformers.grouped_linear
    rows = grouped_linear(gather_rows(x, plan), *ups, plan.expert_offsets)
    rows = apply_gate(rows).to(down.dtype)
    return grouped_linear(rows, *downs, plan.expert_offsets)


class Stack(NamedTuple):
    """rows W_e + b_e, or with LoRA rows W_e + (rows A_e) B_e + b_e: A_e B_e is never formed.

    Gradients lie in a Stack too, with None for what needs none.
    """

    weight: Tensor  # (E, in, out)
    bias: Tensor | None  # (E, out)
    a: Tensor | None  # (E, in, r)
    b: Tensor | None  # (E, r, out)

    def times(self, rows, e, out=None):
        if self.bias is None:
            out = torch.mm(rows, self.weight[e], out=out)
        else:
            out = torch.addmm(self.bias[e], rows, self.weight[e], out=out)
        return out if self.a is None else out.addmm_(rows @ self.a[e], self.b[e])

    def times_transposed(self, grad, e, out=None):
        """The gradient of the rows, from that of the result."""
        out = torch.mm(grad, self.weight[e].T, out=out)
        return out if self.a is None else out.addmm_(grad @ self.b[e].T, self.a[e].T)

    def write_gradients(self, into, rows, grad, e):
        if into.weight is not None:
            torch.mm(rows.T, grad, out=into.weight[e])
        if into.bias is not None:
            torch.sum(grad, 0, out=into.bias[e])
        if into.a is not None:
            torch.mm(rows.T, grad @ self.b[e].T, out=into.a[e])
        if into.b is not None:
            torch.mm((rows @ self.a[e]).T, grad, out=into.b[e])


def rows_of_each_expert(offsets):
    """(e, its slice of the rows) of the experts that have rows."""
    offsets = offsets.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(offsets, offsets[1:])) if a < b]


def gradients_like(tensors, output_mask):
    """Uninitialised, contiguous; empty where the mask does not ask for one."""
    some = next(t for t in tensors if t is not None)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else some.new_empty(0)
        for t, wanted in zip(tensors, output_mask)
    ]


def wanted_only(gradients, output_mask):
    """None in the place of those that the mask does not ask for."""
    return [g if wanted else None for g, wanted in zip(gradients, output_mask)]


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
