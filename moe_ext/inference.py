"""A layer's inference in one op, `moe_infer`, where calling its modules would add nothing.

The op runs the same stages, so the bits are those of the modules. What it saves is their
Python, which with few tokens and the weights out of the caches is a good part of a layer's time.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from ._load import BACKEND
from .experts import Experts
from .routing import Router

_PLAIN = (torch.Tensor, nn.Parameter)


def operands(layer, x):
    """(gate.weight, gate.bias, e_score_correction_bias, *experts.weights()) if `moe_infer` may
    stand for the layer's modules on x (..., H), else None."""
    # Training has more to it: jitter, losses, the counts for loss-free balancing. Under
    # torch.compile Python costs nothing, and a graph of stages says more.
    if layer.training or BACKEND == "reference" or torch.compiler.is_compiling():
        return None
    gate, experts = layer.gate, layer.experts
    # Statistics that others count along, or that have yet to follow the tokens' device.
    if layer._routing_watchers or layer._stats.counts.device != x.device:
        return None
    # Hooks watch the modules, modes the ops; or another module stands in their place.
    if _has_any_global_hook() or torch._C._len_torch_dispatch_stack():
        return None
    if not (_runs_alone(gate, Router) and _runs_alone(experts, Experts)):
        return None
    # Options that the op does not have.
    config = layer.config
    if config.capacity.renormalize_after_drop or config.router.router_dtype is not None:
        return None
    tensors = (gate.weight, gate.bias, gate.float32_bias(), *experts.weights())
    # Subclasses (DTensor, fake and quantised tensors ...) have ways of their own.
    if type(x) not in _PLAIN:
        return None
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return None
    # The op has no gradient, and autocast casts between the stages.
    if functional._needs_gradient(x, *tensors) or torch.is_autocast_enabled(x.device.type):
        return None
    return tensors


def _runs_alone(module, cls):
    """Whether calling the module runs cls.forward and nothing else. To parametrize or to
    shard a module changes its class; quantisation and adapters put another in its place."""
    own = vars(module)
    return type(module) is cls and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl")
    )


def moe_infer(layer, operands, x, padding_mask):
    """The routed experts' y of x, both (..., H), counted in the layer's statistics.

    padding_mask: bool, x.shape[:-1] or as many elements in one dimension, or None.
    """
    weight, bias, selection_bias, *experts = operands
    stats, config = layer._stats, layer.config
    capacity, num_sequences = config.room(x.shape, training=False)
    return functional._call(
        "moe_infer", x, weight, bias, stats.counts, stats.score_sums, stats.totals,
        config.router.top_k, *experts, *config.experts.activation, selection_bias, padding_mask,
        *config.router.scoring().values(), capacity, config.capacity.drop_policy, num_sequences,
        functional._batch_invariant,
    )  # fmt: skip
