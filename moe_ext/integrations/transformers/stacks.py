"""A stack of matrices, one an expert, and its products with the rows of each expert."""

from typing import NamedTuple

import torch
from torch import Tensor


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


def stack_of(weight, bias, lora, transposed):
    """Of the experts' parameters; `lora` is what adapters add, a `lora.LowRank` or None."""
    a, b = (None, None) if lora is None else (factor.to(weight.dtype) for factor in lora)
    return Stack(weight if transposed else weight.mT, bias, a, b)


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
