"""The losses that keep a router useful, and how they reach it.

Balance:  aux = E * sum_i f_i * P_i,   f_i the share of assignments that went to
expert i before any drop (a constant to autograd), P_i its mean score.
z-loss:   z = mean_t logsumexp(logits_t)^2.

In training `MoE` injects coefficient * loss * scale on the backward path, so a
training loop needs no change. The gradient enters where the weights leave the
router: whatever backward pass reaches the layer's output also trains its balance.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._checks import SCORE_FUNCTIONS, autocast_dtype, check_name, describe
from .reference import accumulation_dtype, scores_of

__all__ = ["load_balancing_loss", "z_loss"]

NORMALIZATIONS = ("assignments", "switch", "hf")


def ordered_sum(values):
    """The sum of a 1-D tensor in blocks of 256, so in an order that no thread count changes."""
    return F.pad(values, (0, -values.shape[0] % 256)).view(-1, 256).sum(1).sum()


def balance_loss(counts, score_sums, tokens, top_k):
    """E * sum f_i P_i of one layer from what `topk_route` measured.

    counts (E): assignments; score_sums (E): sums of normalised scores; tokens: how
    many were not padding, a number or a tensor. 1.0 is perfect balance, whatever K.
    """
    share = counts.to(score_sums.dtype) / (tokens * top_k)
    return counts.shape[0] * torch.dot(share, score_sums / tokens)


def z_loss(logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """mean_t logsumexp(logits_t)^2 over the tokens that are not padding (ST-MoE).

    logits: (..., E), any floating dtype; padding_mask: bool (...), True is padding.
    Returns a float32 scalar (float64 for float64 logits), differentiable in logits.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    if padding_mask is None:
        logsumexp = logits.logsumexp(-1).reshape(-1)
        return mean_square(logsumexp, max(logsumexp.shape[0], 1))
    padding_mask = padding_mask.reshape(logits.shape[:-1])
    # Both ways: padding may hold NaN, whose gradient a later 0 does not stop.
    logits = logits.masked_fill(padding_mask[..., None], 0)
    logsumexp = logits.logsumexp(-1).masked_fill(padding_mask, 0).reshape(-1)
    return mean_square(logsumexp, (~padding_mask).sum().clamp(min=1))


def mean_square(logsumexp, tokens):
    return ordered_sum(logsumexp.square()) / tokens


def load_balancing_loss(
    logits: Tensor | Sequence[Tensor],
    experts: Tensor | Sequence[Tensor],
    *,
    padding_mask: Tensor | None = None,
    score_function: str = "softmax",
    normalization: str = "assignments",
) -> Tensor:
    """The balance loss of one layer, or of several, from their recorded routing.

    The loss is E * sum_i f_i * P_i, with P_i the mean score of expert i over the
    tokens that are not padding (sigmoid scores are first normalised to sum to 1),
    and f_i, through which no gradient flows:

    - "assignments": expert i's share of the T*K assignments. Perfect balance is 1.
      This is what `MoE` trains with and reports in `Routing.aux_loss`.
    - "switch": its share of the tokens' first choices (Switch, GShard). Perfect
      balance is 1.
    - "hf": its assignments per token, and all layers pooled before the product, as
      `transformers`' load_balancing_loss_func does. Perfect balance is K, and two
      layers that collapsed on different experts look balanced.

    Args:
        logits: (T, E) router logits, any floating dtype; or a sequence of them, one
            a layer.
        experts: (T, K) int32 or int64, best first, as in `Routing.experts`; or a
            sequence. Ids of E and above count for nothing.
        padding_mask: bool (T,), or any shape of T elements; True is padding.
        score_function: "softmax", "sigmoid" or "softmax_topk" (scored as softmax).
        normalization: see above.

    Returns:
        A float32 scalar (float64 for float64 logits): the mean over the layers, or,
        for "hf", the loss of the pool. Differentiable in the logits.

    Raises:
        TypeError, ValueError: an unknown name, or logits and experts that do not
            fit each other.
    """
    op = "load_balancing_loss"
    check_name(op, "normalization", normalization, NORMALIZATIONS)
    check_name(op, "score_function", score_function, SCORE_FUNCTIONS)
    layers = _layers(op, logits, experts)
    tokens = layers[0][0].shape[0]
    present = None
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool or padding_mask.numel() != tokens:
            error = TypeError if padding_mask.dtype != torch.bool else ValueError
            raise error(
                f"{op}: padding_mask must be bool of shape ({tokens},), got {describe(padding_mask)}"
            )
        present = ~padding_mask.reshape(-1)
        tokens = present.sum().clamp(min=1)
    else:
        tokens = max(tokens, 1)

    measured = []
    for layer_logits, layer_experts in layers:
        num_experts = layer_logits.shape[1]
        if present is not None:  # before the scores: padding may hold NaN
            layer_logits = layer_logits.masked_fill(~present[:, None], 0)
        scores = scores_of(layer_logits.to(accumulation_dtype(layer_logits.dtype)), score_function)
        if score_function == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        ids = layer_experts[:, :1] if normalization == "switch" else layer_experts
        valid = ids < num_experts
        if present is not None:
            scores = torch.where(present[:, None], scores, 0.0)
            valid = valid & present[:, None]
        # scatter_add on integers: no host read (bincount has one), and any order is exact.
        index = ids.clamp(max=num_experts - 1).reshape(-1).long()
        counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
        counts.scatter_add_(0, index, valid.reshape(-1).long())
        measured.append((counts, scores.sum(0), ids.shape[1]))

    if normalization == "hf":
        counts, sums = (sum(parts) for parts in list(zip(*measured))[:2])
        return balance_loss(counts, sums, tokens * len(measured), 1)
    losses = [balance_loss(counts, sums, tokens, top_k) for counts, sums, top_k in measured]
    return torch.stack(losses).mean()


def _layers(op, logits, experts):
    """[(logits, experts)] of every layer, checked."""
    if isinstance(logits, torch.Tensor):
        logits, experts = [logits], [experts]
    if len(logits) != len(experts) or len(logits) == 0:
        raise ValueError(
            f"{op}: experts must be as many tensors as logits, at least one,"
            f" got {len(experts)} for {len(logits)}"
        )
    for layer_logits, layer_experts in zip(logits, experts):
        if not layer_logits.is_floating_point():
            raise TypeError(
                f"{op}: logits must be floating of shape (T, E), got {describe(layer_logits)}"
            )
        if layer_logits.dim() != 2 or layer_logits.shape != logits[0].shape:
            raise ValueError(
                f"{op}: logits must be of shape (T, E), the same in every layer,"
                f" got {describe(layer_logits)}"
            )
        expected = f"int32 or int64 of shape (T, K), with T = {layer_logits.shape[0]}"
        if layer_experts.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: experts must be {expected}, got {describe(layer_experts)}")
        if layer_experts.dim() != 2 or layer_experts.shape[0] != layer_logits.shape[0]:
            raise ValueError(f"{op}: experts must be {expected}, got {describe(layer_experts)}")
    return list(zip(logits, experts))


class _Inject(torch.autograd.Function):
    """The weights, unchanged; on the way back, the gradients of the coefficients' losses.

    d aux / d score_sums = E f / tokens and d z / d logsumexp = 2 logsumexp / tokens: the
    losses themselves need not be computed.
    """

    @staticmethod
    def forward(ctx, weights, score_sums, logsumexp, counts, present, scale, coefficients):
        ctx.save_for_backward(logsumexp, counts, present, scale)
        ctx.coefficients = coefficients
        ctx.top_k = weights.shape[1]
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad):
        logsumexp, counts, present, scale = ctx.saved_tensors
        aux_coef, z_coef = ctx.coefficients
        tokens = max(logsumexp.shape[0], 1) if present is None else present
        per_token = scale.to(logsumexp) / tokens
        grad_score_sums = grad_logsumexp = None
        if aux_coef > 0:
            factor = aux_coef * counts.shape[0] / ctx.top_k
            grad_score_sums = counts * (per_token * factor / tokens)
        if z_coef > 0:
            grad_logsumexp = logsumexp * (per_token * (2 * z_coef))
        return grad, grad_score_sums, grad_logsumexp, None, None, None, None


def inject(route, present, scale, aux_coef, z_coef):
    """`route.weights`, such that the backward pass through them adds the router's losses.

    To what is minimised it adds scale * (aux_coef * aux + z_coef * z). present: how many
    tokens are not padding, a scalar tensor, or None for all; scale: a scalar tensor.
    """
    return _Inject.apply(
        route.weights, route.score_sums, route.logsumexp, route.counts, present, scale,
        (aux_coef, z_coef),
    )  # fmt: skip


def of_forward(layer, x, route, padding_mask, return_routing):
    """(weights, aux_loss, z_loss); in training the weights carry the losses' gradient."""
    config = layer.config.losses
    coefficients = config.aux_loss_coef, config.z_loss_coef
    injects = (
        layer.training
        and config.inject_losses
        and max(coefficients) > 0
        and torch.is_grad_enabled()
        and route.weights.requires_grad
    )
    if not (injects or return_routing):
        return route.weights, None, None
    present = None if padding_mask is None else (~padding_mask).sum().clamp(min=1)
    weights, aux_loss, z_loss = route.weights, None, None
    if injects:
        if not (torch.compiler.is_compiling() or layer._loss_scale_is_set):
            warn_unscaled(x, layer)
        weights = inject(route, present, layer.loss_scale, *coefficients)
    if return_routing:
        score_sums, logsumexp = route.score_sums, route.logsumexp
        if config.inject_losses:
            score_sums, logsumexp = score_sums.detach(), logsumexp.detach()
        tokens = max(len(logsumexp), 1) if present is None else present
        aux_loss = balance_loss(route.counts, score_sums, tokens, weights.shape[1])
        z_loss = mean_square(logsumexp, tokens)
    return weights, aux_loss, z_loss


_warned: set[str] = set()
_steps = 0  # of all optimizers; their fused kernels leave a weight's _version as it is


def _count_step(*_):
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def warn_unscaled(x, layer):
    """Once a process and cause: training whose injected losses are not scaled."""
    if (autocast_dtype(x.device.type) or x.dtype) == torch.float16:
        _warn_once("training in float16", "unscaled, where GradScaler scales the loop's own loss")
    if _accumulates(layer):
        _warn_once("accumulating gradients", "in full with every backward pass of a step")


def _accumulates(layer):
    """Whether a gradient is there and no step was taken since the last such forward.

    A loop that keeps gradients as zeros has a gradient too, but a step in between.
    """
    weight = layer.gate._parameters.get("weight")
    if weight is None or not weight.requires_grad:  # PEFT's are inside of it
        weight = next((p for p in layer.gate.parameters() if p.requires_grad), None)
    if weight is None:
        return False
    before, layer._step_seen = layer._step_seen, (weight._version, _steps)
    recomputed = torch._C._current_graph_task_id() != -1
    return weight.grad is not None and layer._step_seen == before and not recomputed


def _warn_once(what, how):
    if what not in _warned:
        _warned.add(what)
        warnings.warn(
            f"moe_ext: {what} injects the router's losses {how}. Before each step call"
            " moe_ext.set_loss_scale(model, scale), where scale is scaler.get_scale() (1.0 without"
            " a GradScaler) / accumulation_steps; or set_loss_scale(model, 1.0) if that is meant."
            " In transformers' Trainer RoutingCallback does it.",
            stacklevel=7,
        )
