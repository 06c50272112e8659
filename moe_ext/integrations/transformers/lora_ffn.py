"""Experts with LoRA whose gate is known: fused like `functional.moe_forward`, with its memory.

    h = x (U_e + A_e B_e)        rows = act(h) (D_e + A'_e B'_e)        y[t] = sum_j w[t, j] rows[t, j]

x, w and h are kept for the backward pass. Rows gathered, activated or multiplied by a factor are
computed again, for an expert at a time.
"""

import torch
from torch import Tensor

from ...functional import _autocast, _needs_gradient, weighted_combine
from ...reference import GATES, accumulation_dtype, activate, gated_activation
from ...types import Activation, Plan
from .stacks import Stack, gradients_like, rows_of_each_expert, stack_of, wanted_only


def lora_ffn(
    x, weights, plan, up, down, up_bias, down_bias, up_lora, down_lora, *,
    activation,
):  # fmt: skip
    """`functional.moe_forward` of experts with a `lora.LowRank` for one or both of their stacks.

    Returns:
        (T, H); with None for weights the rows of `functional.grouped_ffn` (R, H), the tail 0.

    Differentiable in x, weights, the parameters and the factors; what is frozen costs nothing.
    """
    x, up, down, up_bias, down_bias = _autocast(x, up, down, up_bias, down_bias)
    ups = stack_of(up, up_bias, up_lora, activation.transposed)
    downs = stack_of(down, down_bias, down_lora, activation.transposed)
    keep_preactivations = _needs_gradient(x, weights, *ups, *downs)
    op = torch.ops.moe_ext_transformers.lora_ffn
    return op(x, weights, *ups, *downs, *plan, *activation, keep_preactivations)[0]


# Opaque for torch.compile, like unfused.py's.


@torch.library.custom_op("moe_ext_transformers::lora_ffn", mutates_args=())
def _forward(
    x: Tensor, weights: Tensor | None,
    up: Tensor, up_bias: Tensor | None, up_a: Tensor | None, up_b: Tensor | None,
    down: Tensor, down_bias: Tensor | None, down_a: Tensor | None, down_b: Tensor | None,
    expert_offsets: Tensor, row_token: Tensor, row_assignment: Tensor, assignment_row: Tensor,
    expert_counts: Tensor,
    name: str, limit: float | None, alpha: float, up_offset: float, transposed: bool,
    interleaved: bool,
    keep_preactivations: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, or without weights the rows; and the pre-activations h (R, 2I or I), or none of them."""
    activation = Activation(name, limit, alpha, up_offset, transposed, interleaved)
    plan = Plan(expert_offsets, row_token, row_assignment, assignment_row, expert_counts)
    ups, downs = Stack(up, up_bias, up_a, up_b), Stack(down, down_bias, down_a, down_b)
    rows = x.new_zeros(len(row_token), x.shape[1])
    kept = x.new_zeros(len(row_token) if keep_preactivations else 0, up.shape[2])
    for e, r in rows_of_each_expert(expert_offsets):
        h = ups.times(x[row_token[r]], e, out=kept[r] if keep_preactivations else None)
        h = h.to(accumulation_dtype(x.dtype))
        a = activate(h, activation)
        downs.times(a.to(x.dtype), e, out=rows[r])
    return rows if weights is None else weighted_combine(rows, weights, plan), kept


@torch.library.custom_op("moe_ext_transformers::lora_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor, preactivations: Tensor, x: Tensor, weights: Tensor | None,
    up: Tensor, up_bias: Tensor | None, up_a: Tensor | None, up_b: Tensor | None,
    down: Tensor, down_bias: Tensor | None, down_a: Tensor | None, down_b: Tensor | None,
    expert_offsets: Tensor, row_token: Tensor, row_assignment: Tensor, assignment_row: Tensor,
    expert_counts: Tensor,
    name: str, limit: float | None, alpha: float, up_offset: float, transposed: bool,
    interleaved: bool,
    output_mask: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Of the first ten inputs. The weights' is <dA, A> + <dy, bias>, with dA before it is weighted."""
    activation = Activation(name, limit, alpha, up_offset, transposed, interleaved)
    plan = Plan(expert_offsets, row_token, row_assignment, assignment_row, expert_counts)
    ups, downs = Stack(up, up_bias, up_a, up_b), Stack(down, down_bias, down_a, down_b)
    gradients = gradients_like((x, weights, *ups, *downs), output_mask)
    wanted = wanted_only([g.zero_() for g in gradients], output_mask)
    dx, dweights, dups, ddowns = *wanted[:2], Stack(*wanted[2:6]), Stack(*wanted[6:])
    drows = None if dx is None else x.new_zeros(len(row_token), x.shape[1])
    dtype = accumulation_dtype(x.dtype)
    for e, r in rows_of_each_expert(expert_offsets):
        h = preactivations[r].to(dtype)
        a = activate(h, activation)
        dy = grad[r] if weights is None else grad[row_token[r]]
        da = downs.times_transposed(dy, e).to(dtype)
        if weights is not None:
            assignment = row_assignment[r].long()
            if dweights is not None:
                of_bias = 0 if down_bias is None else dy.to(dtype) @ down_bias[e].to(dtype)
                inner = (da * a).sum(1) + of_bias
                dweights.view(-1)[assignment] = inner.to(weights.dtype)
            w = weights.view(-1)[assignment, None]
            dy, da = (dy * w).to(x.dtype), da * w
        downs.write_gradients(ddowns, a.to(x.dtype), dy, e)
        dh = activate_backward(da, h, activation).to(x.dtype)
        ups.write_gradients(dups, x[row_token[r]], dh, e)
        if drows is not None:
            ups.times_transposed(dh, e, out=drows[r])
    if drows is not None:  # a token's is the sum of its rows'
        ones = x.new_ones(assignment_row.shape, dtype=dtype)
        gradients[0] = weighted_combine(drows, ones, plan)
    return gradients


def activate_backward(da, h, activation):
    """The gradient of `reference.activate`, in closed form: autograd does not run inside an op."""
    if activation.name not in GATES:
        return DERIVATIVES[activation.name](h, 1.0) * da
    _, limit, alpha, up_offset, _, interleaved = activation
    halves = [slice(0, None, 2), slice(1, None, 2)]
    if not interleaved:
        half = h.shape[1] // 2
        halves = [slice(0, half), slice(half, None)]
    gate, up = (h[:, half] for half in halves)
    g, u = (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
    phi = gated_activation(g, 0.0, Activation(activation.name, alpha=alpha, up_offset=1.0))
    dgate = da * (u + up_offset) * DERIVATIVES[GATES[activation.name]](g, alpha)
    dup = da * phi
    if limit is not None:
        dgate, dup = dgate * (gate <= limit), dup * (up.abs() <= limit)
    dh = torch.empty_like(h)
    dh[:, halves[0]], dh[:, halves[1]] = dgate, dup
    return dh


def _silu(g, alpha):
    s = torch.sigmoid(alpha * g)
    return s * (1 + alpha * g * (1 - s))


DERIVATIVES = {
    "silu": _silu,
    "gelu": lambda g, _: torch.ops.aten.gelu_backward(torch.ones_like(g), g),
    "gelu_tanh": lambda g, _: torch.ops.aten.gelu_backward(
        torch.ones_like(g), g, approximate="tanh"
    ),
    "relu": lambda g, _: (g > 0).to(g.dtype),
    "relu2": lambda g, _: 2 * g.clamp(min=0),
}


@_forward.register_fake
def _(x, weights, up, *rest):
    row_token, keep_preactivations = rest[8], rest[-1]
    rows = row_token.shape[0]
    out = x.new_empty(rows if weights is None else x.shape[0], x.shape[1])
    return out, x.new_empty(rows if keep_preactivations else 0, up.shape[2])


@_backward.register_fake
def _(grad, preactivations, *rest):
    return gradients_like(rest[:10], rest[-1])


def _save(ctx, inputs, output):
    tensors, ctx.options = inputs[:15], inputs[15:21]
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, _):
    output_mask = list(ctx.needs_input_grad[:10])
    backward = torch.ops.moe_ext_transformers.lora_ffn_backward
    gradients = backward(grad, *ctx.saved_tensors, *ctx.options, output_mask)
    return *wanted_only(gradients, output_mask), *[None] * 12


_forward.register_autograd(_gradient, setup_context=_save)
