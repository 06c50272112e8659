"""The stages of an MoE layer as functions of tensors.

    logits = router_logits(x, gate_weight)
    route = topk_route(logits, top_k)
    plan = capacity_scatter(route.experts, num_experts)
    y = moe_forward(x, route.weights, plan, gate_up_proj, down_proj)

`moe_forward` is `grouped_ffn` and `weighted_combine` in one, and keeps less for
the backward pass. `gather_rows` copies tokens into plan order, for rows that travel:
`grouped_ffn` needs no such copy.

T tokens, H hidden size, I intermediate size, E experts, K top_k, C capacity. An
assignment (t, j) is token t's j-th choice; a row is a kept assignment's place in
expert order; a `Plan` says which assignment became which row. Row arrays have
R = min(T K, E C num_sequences) entries, known before any routing; what the plan does
not use of them, its tail, holds -1 in indices and 0 in rows.

All functions: the same inputs give the same bits, forward and backward, whatever the
number of threads. Nothing is read back to the host. float64, float32, bfloat16 and
float16; sums are accumulated in float32 (float64 for float64) and rounded once.
Empty inputs, experts without rows, K = E, duplicate experts in a row and
non-contiguous tensors are valid. Wrong dtypes raise TypeError, wrong shapes, values,
names and devices ValueError, before any work. A second derivative, forward-mode AD
and the transforms of torch.func raise RuntimeError.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import reference
from ._checks import autocast_dtype
from ._load import BACKEND, BUILD_INFO, build_for_cuda
from .types import Activation, ExpertParameters, Plan, RouterOutput

__all__ = [
    "batch_invariant",
    "capacity_scatter",
    "gather_rows",
    "grouped_ffn",
    "moe_forward",
    "router_logits",
    "topk_route",
    "weighted_combine",
]

ops = torch.ops.moe_ext
P = ParamSpec("P")
T = TypeVar("T")

# A plain global: torch.compile traces it (it refuses a ContextVar), and a backward
# pass that recomputes on one of autograd's own threads sees it.
_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside, a token's output does not depend on which other tokens share its batch.

        with moe_ext.batch_invariant():
            y = layer(x)            # dropless: layer(x)[3] has the bits of layer(x[3:4])[0]

    It pins the order of the sums inside an expert's matrix products, which otherwise
    may follow the number of rows. Routing, and the order in which a token's K outputs
    are added, are the same either way. With a capacity, other tokens can still take a
    token's place. The setting belongs to the process, not to a thread.
    """
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = previous


def _autocast(x, *others):
    """x and the experts' parameters in autocast's dtype, where autocast is on."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return (x, *others)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# A forced path takes the tensors of its own device alone.
_FORCED = BACKEND if BACKEND in ("cpu", "cuda") else None
_OTHER = {"cpu": "cuda", "cuda": "cpu"}.get(str(_FORCED))


def _check_forced(name, args):
    for tensor in args:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == _OTHER:
            raise ValueError(
                f"{name}: MOE_EXT_BACKEND={BACKEND} takes tensors on {_FORCED}, got one on"
                f" {tensor.device}"
            )


def _unsupported(error):
    """The dispatcher's text where it has no kernel, in our words, or None."""
    found = re.match(
        r"Could not run 'moe_ext::(\w+)' with arguments from the '(\w+)' backend", str(error)
    )
    if found is None:
        return None
    op, backend = found.groups()
    text = f"{op}: tensors of the {backend} backend are not supported"
    if backend == "CUDA" and BUILD_INFO["cuda"] is None:
        text = f"{op}: the tensors are on a GPU, and moe_ext was built for the CPU alone. {build_for_cuda()}"
    return NotImplementedError(text)


def _call(name, *args):
    """The op; what it cannot take is refused in words."""
    op = getattr(ops, name)
    if torch.compiler.is_compiling():
        return op(*args)
    if _FORCED:
        _check_forced(name, args)
    # The ops' gradients are unknown to torch.func: a silent zero there.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{name}: the transforms of torch.func (grad, vmap, jvp ...) are not supported:"
            " use torch.autograd"
        )
    try:
        return op(*args)
    except RuntimeError as error:
        if told := _unsupported(error):
            raise told from None
        # The dispatcher's word for an argument that is not of the schema's type.
        wrong = re.match(
            r"moe_ext::(\w+)\(\) Expected a value of type '(?:Optional\[)?(\w+)\]?'"
            r" for argument '(\w+)' but instead found type '(\w+)'",
            str(error),
        )
        if wrong is None:
            raise
        op, expected, argument, got = wrong.groups()
        raise TypeError(f"{op}: {argument} must be of type {expected}, got {got}") from None


def stage(function: Callable[P, T]) -> Callable[P, T]:
    """A function that calls a stage's op; or under MOE_EXT_BACKEND=reference, its counterpart in
    `reference`, which takes the same arguments."""
    if BACKEND != "reference":
        return function
    plain = getattr(reference, function.__name__.lstrip("_"))

    @functools.wraps(function)
    def in_plain_pytorch(*args: P.args, **kwargs: P.kwargs) -> T:
        first: Any = next(iter((*args, *kwargs.values())))
        with torch.autocast(first.device.type, enabled=False):
            return plain(*args, **kwargs)

    return in_plain_pytorch


@stage
def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """logits = x weight^T + bias, accumulated and returned in float32.

    x and weight go in as they are: no float32 copy of x is made or kept for the
    backward pass, and autocast leaves the op alone.

    Args:
        x: (T, H).
        weight: (E, H), of x's dtype or another floating one.
        bias: (E), of weight's dtype, or None.

    Returns:
        (T, E) float32; float64 where x or weight is.

    Differentiable in x, weight and bias. 2 T H E FLOPs.
    """
    return _call("router_logits", x, weight, bias)


@stage
def topk_route(
    logits: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    padding_mask: Tensor | None = None,
    experts: Tensor | None = None,
    score_function: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
) -> RouterOutput:
    """Scores, the choice of experts, their weights, and what the losses need: one pass.

        s = softmax(logits) or sigmoid(logits)          (E of a token sum to 1, or each in 0..1)
        experts = the top_k largest of s + selection_bias, best first
        weights = s[experts]                            never with the bias
        weights /= sum(weights) + 1e-20                 with norm_topk_prob
        weights *= routed_scaling_factor

    softmax_topk weights by softmax over the chosen logits, and chooses by the logits: as
    the softmax orders them, also where it underflows. With a selection_bias, or groups
    scored by "top2_sum", it chooses by the softmax.

    Args:
        logits: (T, E), any floating dtype; scores are float32 (float64 for float64).
        top_k: K, from 1 to the number of eligible experts.
        selection_bias: (E) float32, or None. DeepSeek-V3's e_score_correction_bias.
        padding_mask: (T,) bool, True is padding: its experts are E, its weights 0, and it
            counts in no sum.
        experts: (T, K) int32 or int64: a recorded choice to take instead of choosing;
            ids >= E are sentinels, of weight 0.
        score_function: "softmax", "sigmoid" or "softmax_topk".
        norm_topk_prob, routed_scaling_factor: see above.
        n_group, topk_group, group_score: the experts form n_group groups of neighbours,
            scored by their best expert ("max", DeepSeek-V2) or the sum of their best two
            ("top2_sum", DeepSeek-V3); experts outside of the topk_group best groups are
            not eligible.

    Returns:
        RouterOutput(weights (T, K), experts (T, K) int32, counts (E) int32,
        score_sums (E), logsumexp (T)): counts and score_sums over the tokens that are not
        padding, each token's scores summing to 1 in the latter.

    A tie goes to the lower expert id. NaN ranks below every number, so a row of NaN
    still gets K distinct experts of the lowest ids; its weights are NaN.
    Differentiable in logits through weights, score_sums and logsumexp; the choice is a
    constant. No gradient reaches selection_bias.
    """
    route = _call(
        "topk_route", logits, top_k, selection_bias, padding_mask, experts, score_function,
        norm_topk_prob, routed_scaling_factor, n_group, topk_group, group_score,
    )  # fmt: skip
    return RouterOutput(*route)


@stage
def capacity_scatter(
    experts: Tensor,
    num_experts: int,
    capacity: int | None = None,
    *,
    weights: Tensor | None = None,
    padding_mask: Tensor | None = None,
    drop_policy: str = "token",
    num_sequences: int = 1,
) -> Plan:
    """The plan: which assignment becomes which row, and which are dropped.

    Rows are in expert order, and by ascending t*K + j within an expert, whatever
    decided who stays.

    Args:
        experts: (T, K) int32 or int64; ids >= E are sentinels (no row); ids < 0 raise
            ValueError on the CPU.
        num_experts: E.
        capacity: C, the most rows an expert takes (of each sequence); None: no limit.
        weights: (T, K), floating: what drop_policy "probs" goes by; unused otherwise.
        padding_mask: (T,) bool; padding takes no capacity and counts nowhere.
        drop_policy: who stays in a full expert. "token": by t*K + j (megablocks), so that
            no later token matters to an earlier one; "choice": all first choices in token
            order, then all second ones, ... (GShard); "probs": the largest weights, ties by
            t*K + j, NaN last.
        num_sequences: the T tokens are so many sequences of equal length, and each fills
            the experts by itself.

    Returns:
        Plan(expert_offsets (E+1), row_token (R), row_assignment (R),
        assignment_row (T, K), expert_counts (E)), all int32. expert_counts is before
        any drop.

    Not differentiable: everything in it is an index.
    """
    plan = _call(
        "capacity_scatter", experts, num_experts, capacity, weights, padding_mask, drop_policy,
        num_sequences,
    )  # fmt: skip
    return Plan(*plan)


@stage
def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    """rows[r] = x[row_token[r]]: the tokens in the plan's order, as other ranks want them.

    For expert parallelism: what it returns goes through an all-to-all. `grouped_ffn`
    and `moe_forward` gather by themselves and need no such copy.

    Args:
        x: (T, H).
        plan: of `capacity_scatter`.

    Returns:
        (R, H) in x's dtype; the tail is 0.

    Differentiable in x: a token's gradient is the sum of its rows' gradients, added in
    the order of j. 2 R H elements of traffic forward, R H + T H backward.
    """
    return _call("gather_rows", x, plan.row_token, plan.assignment_row)


def grouped_ffn(
    x: Tensor,
    plan: Plan,
    *parameters: Any,
    activation: Activation | str = "swiglu",
    **by_name: Any,
) -> Tensor:
    """Every expert's feed-forward network on its rows, a matrix product an expert.

        rows[r] = down_proj[e] phi(up_proj[e] x[row_token[r]] + up_bias[e]) + down_bias[e]

    With LoRA's factors a matrix takes x to x W + (x A) B; A B is never formed, and gradients of
    what is frozen cost nothing.

    Args:
        x: (T, H).
        plan: of `capacity_scatter`.
        *parameters, **by_name: `ExpertParameters`, in their order or by name: up_proj,
            down_proj, and the biases and LoRA's factors or None; of x's dtype.
        activation: an `Activation`, which says too how the matrices lie; its name alone will do.

    Returns:
        (R, H) in x's dtype, in plan order; the tail is 0. Under autocast, x and the
        parameters are taken in its dtype.

    Differentiable in x and the parameters; keeps x and the pre-activations (R, 2I) or
    (R, I) for the backward pass. 6 H I FLOPs a row with a gate, 4 H I without.
    """
    x, *parameters = _autocast(x, *ExpertParameters(*parameters, **by_name))
    return _grouped_ffn(x, plan, *parameters, activation=Activation.of(activation))


@stage
def _grouped_ffn(x, plan, *parameters, activation):
    keep_preactivations = _needs_gradient(x, *parameters)
    rows, _ = _call(
        "grouped_ffn", x, plan.expert_offsets, plan.row_token, plan.assignment_row, *parameters,
        *activation, keep_preactivations, _batch_invariant,
    )  # fmt: skip
    return rows


@stage
def weighted_combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """y[t] = sum_j weights[t, j] * rows[assignment_row[t, j]], dropped assignments left out.

    Args:
        rows: (R, H) of `grouped_ffn`.
        weights: (T, K), of rows' dtype or float32.
        plan: of `capacity_scatter`.

    Returns:
        (T, H) in rows' dtype; the K terms are added in the order of j.

    Differentiable in rows and weights; a dropped assignment's weight gets exactly 0.
    """
    return _call("weighted_combine", rows, weights, plan.row_assignment, plan.assignment_row)


def moe_forward(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    *parameters: Any,
    activation: Activation | str = "swiglu",
    **by_name: Any,
) -> Tensor:
    """`weighted_combine(grouped_ffn(x, ...), weights, plan)` in one op.

        y[t] = sum_j weights[t, j] * FFN_experts[t, j](x[t])        over the kept (t, j)

    For the backward pass it keeps x, the weights and the pre-activations (R, 2I) or
    (R, I), not the experts' outputs: the weights' gradient <dy, rows> is formed as
    <dA, A> + <dy, down_bias> from what the backward pass computes anyway.

    Args:
        x: (T, H).
        weights: (T, K), of x's dtype or float32.
        plan: of `capacity_scatter`.
        *parameters, **by_name: `ExpertParameters`, in their order or by name: up_proj,
            down_proj, and the biases and LoRA's factors or None; of x's dtype.
        activation: an `Activation`, which says too how the matrices lie; its name alone will do.

    Returns:
        (T, H) in x's dtype. Under autocast, x and the parameters are taken in its dtype.

    Differentiable in x, weights and the parameters. 6 H I FLOPs a row with a gate,
    4 H I without.
    """
    x, *parameters = _autocast(x, *ExpertParameters(*parameters, **by_name))
    return _moe_forward(x, weights, plan, *parameters, activation=Activation.of(activation))


@stage
def _moe_forward(x, weights, plan, *parameters, activation):
    keep_preactivations = _needs_gradient(x, weights, *parameters)
    y, _ = _call(
        "moe_forward", x, weights, plan.expert_offsets, plan.row_token, plan.row_assignment,
        plan.assignment_row, *parameters, *activation, keep_preactivations, _batch_invariant,
    )  # fmt: skip
    return y
