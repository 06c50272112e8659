"""What torch must know about the ops beyond their kernels: fakes and gradients.

The schemas stand in csrc/schema.cpp. A fake gives the shapes and dtypes of the
results; a gradient is a call of the stage's backward op, which computes only
what its output mask asks for. Differentiating a backward op is an error.
"""

import torch

from .reference import accumulation_dtype

ops = torch.ops.moe_ext


# ---- fakes -------------------------------------------------------------------


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
        rows = torch.sym_min(rows, num_experts * capacity * num_sequences)
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


# ---- gradients ---------------------------------------------------------------


# The ops as functions with a gradient, by name. The same formulas are registered for the
# ops themselves, which torch.compile and direct callers use; but in eager mode
# torch.library's wrapper takes some 90 us a call, and an autograd.Function that goes
# straight to the kernel a fifth of it.
differentiable = {}


def _register_gradient(name, setup_context, backward):
    def unpack_and_backward(ctx, *grads):
        return backward(ctx, ctx.saved_tensors, *grads)

    torch.library.register_autograd(
        f"moe_ext::{name}", unpack_and_backward, setup_context=setup_context
    )
    if setup_context is None:
        return

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = getattr(ops, name)(*args)
        setup_context(ctx, args, output)
        return output

    def backward_below_autograd(ctx, *grads):
        # Unpacking may recompute a checkpointed forward pass, which needs its autograd.
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the backward op has to refuse what follows
            return backward(ctx, saved, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return backward(ctx, saved, *grads)

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward_below_autograd)}
    differentiable[name] = type(name, (torch.autograd.Function,), body).apply


def _wanted(ctx, *places):
    """Which of these inputs need a gradient. Trailing defaults of a call are not among ctx's."""
    needs = ctx.needs_input_grad
    return tuple(place < len(needs) and needs[place] for place in places)


def _pick(mask, gradients):
    """The gradients that were asked for; None for the others."""
    return tuple(g if wanted else None for wanted, g in zip(mask, gradients))


def _router_logits_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _router_logits_backward(ctx, saved, grad):
    mask = _wanted(ctx, 0, 1, 2)
    return _pick(mask, ops.router_logits_backward(grad, *saved, mask))


def _topk_route_setup(ctx, inputs, output):
    logits, *_ = inputs
    ctx.score_function, ctx.norm_topk_prob, ctx.scale = inputs[5:8]
    experts, counts = output[1], output[2]
    ctx.mark_non_differentiable(experts, counts)
    ctx.set_materialize_grads(False)
    padding_mask = inputs[3]
    ctx.save_for_backward(logits, experts, padding_mask)


def _topk_route_backward(
    ctx, saved, grad_weights, _experts, _counts, grad_score_sums, grad_logsumexp
):
    if grad_weights is None and grad_score_sums is None and grad_logsumexp is None:
        return (None,) * 11
    grad = ops.topk_route_backward(
        grad_weights, grad_score_sums, grad_logsumexp, *saved,
        ctx.score_function, ctx.norm_topk_prob, ctx.scale,
    )  # fmt: skip
    return (grad, *(None,) * 10)


def _gather_rows_setup(ctx, inputs, output):
    _, _, assignment_row = inputs
    ctx.save_for_backward(assignment_row)


def _gather_rows_backward(ctx, saved, grad_rows):
    return ops.gather_rows_backward(grad_rows, *saved), None, None


def _grouped_ffn_setup(ctx, inputs, output):
    x, *plan_and_parameters = inputs[:8]
    ctx.options = inputs[8:14]
    preactivations = output[1]
    ctx.mark_non_differentiable(preactivations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, preactivations, *plan_and_parameters)


def _grouped_ffn_backward(ctx, saved, grad_rows, _preactivations):
    if grad_rows is None:
        return (None,) * 16
    mask = _wanted(ctx, 0, 4, 5, 6, 7)
    gradients = ops.grouped_ffn_backward(grad_rows, *saved, *ctx.options, output_mask=mask)
    dx, *parameters = _pick(mask, gradients)
    return (dx, None, None, None, *parameters, *(None,) * 8)


def _weighted_combine_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weighted_combine_backward(ctx, saved, grad):
    mask = _wanted(ctx, 0, 1)
    gradients = ops.weighted_combine_backward(grad, *saved, mask)
    return (*_pick(mask, gradients), None, None)


def _moe_forward_setup(ctx, inputs, output):
    x, weights, *plan_and_parameters = inputs[:10]
    ctx.options = inputs[10:16]
    preactivations = output[1]
    ctx.mark_non_differentiable(preactivations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weights, preactivations, *plan_and_parameters)


def _moe_forward_backward(ctx, saved, grad, _preactivations):
    if grad is None:
        return (None,) * 18
    mask = _wanted(ctx, 0, 1, 6, 7, 8, 9)
    gradients = ops.moe_backward(grad, *saved, *ctx.options, output_mask=mask)
    dx, dweights, *parameters = _pick(mask, gradients)
    return (dx, dweights, None, None, None, None, *parameters, *(None,) * 8)


_register_gradient("router_logits", _router_logits_setup, _router_logits_backward)
_register_gradient("topk_route", _topk_route_setup, _topk_route_backward)
_register_gradient("gather_rows", _gather_rows_setup, _gather_rows_backward)
_register_gradient("grouped_ffn", _grouped_ffn_setup, _grouped_ffn_backward)
_register_gradient("weighted_combine", _weighted_combine_setup, _weighted_combine_backward)
_register_gradient("moe_forward", _moe_forward_setup, _moe_forward_backward)


def _refuse_double_backward(ctx, saved, *_):
    raise RuntimeError("moe_ext: the gradient of a gradient (double backward) is not supported")


for _name in ("router_logits", "topk_route", "gather_rows", "grouped_ffn", "weighted_combine"):
    _register_gradient(f"{_name}_backward", None, _refuse_double_backward)
_register_gradient("moe_backward", None, _refuse_double_backward)
