"""Activation checkpointing that keeps the routing of the first forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["checkpoint_policy"]

ROUTING_OPS = ("router_logits", "topk_route", "capacity_scatter")


def checkpoint_policy(
    policy: Callable[..., CheckpointPolicy] | None = None,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` for checkpointing a region with `MoE` layers in it.

        checkpoint(block, x, use_reentrant=False, context_fn=moe_ext.checkpoint_policy)

    The logits, the choice of experts and the plan of the first forward are saved and
    used again, so that the second forward cannot choose otherwise at a near-tie (as
    kernels that differ in their last bits would). They are small: T * (E + 5 K)
    numbers a layer. Everything else is recomputed. Layers under MOE_EXT_BACKEND=reference
    are recomputed as a whole.

    Args:
        policy: what to do with the other operators, as in
            torch.utils.checkpoint.create_selective_checkpoint_contexts: a function
            (ctx, op, *args, **kwargs) -> CheckpointPolicy; None recomputes them.
            `context_fn=functools.partial(moe_ext.checkpoint_policy, policy)`.

    Returns:
        Two context managers: for the forward pass and for its recomputation.
    """
    ops = torch.ops.moe_ext
    # The reference backend registers no operators.
    saved = {getattr(ops, name).default for name in ROUTING_OPS if hasattr(ops, name)}

    def decide(ctx, op, *args, **kwargs):
        if op in saved:
            return CheckpointPolicy.MUST_SAVE
        if policy is not None:
            return policy(ctx, op, *args, **kwargs)
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)
