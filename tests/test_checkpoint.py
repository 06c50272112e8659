"""Activation checkpointing: the same gradients, and everything counted once."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import moe_ext
from support.layer_suite import H, make
from support.oracle import HAS_OPS, bits_equal, unit

KINDS = {
    "reentrant": dict(use_reentrant=True),
    "non-reentrant": dict(use_reentrant=False),
    "selective": dict(use_reentrant=False, context_fn=moe_ext.checkpoint_policy),
}


def train(layer, x, kind=None, mask=None):
    """One training step's results and what it left behind."""
    torch.manual_seed(0)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    block = functools.partial(layer, padding_mask=mask)
    y = block(x) if kind is None else checkpoint(block, x, **KINDS[kind])
    y.square().sum().backward()
    step_counts = layer._stats.step_counts.clone()
    moe_ext.update_router_biases(layer)
    left = dict(bias=layer.gate.e_score_correction_bias.clone(), step_counts=step_counts)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return gradients | left | layer.stats(reset=True) | {"y": y.detach(), "x": x.grad}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(jitter_eps=0.1, jitter_target="block", z_loss_coef=0.01, drop_policy="probs"),
        dict(capacity_factor=0.5, renormalize_after_drop=True, shared_expert_intermediate_size=8),
    ],
)
def test_checkpointing_changes_nothing(kind, options, padded):
    plain, checkpointed = (make(bias_update_rate=0.1, seed=5, **options) for _ in range(2))
    x = unit(2, 12, H, dtype=torch.float64)
    mask = torch.rand(2, 12) < 0.3 if padded else None
    expected = train(plain, x, None, mask)
    assert expected["forwards"] == 1 and expected["step_counts"].sum() == 2 * expected["tokens"]
    actual = train(checkpointed, x, kind, mask)
    for name in expected:
        assert bits_equal(actual[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_padding_context_has_to_stay_open(kind):
    layer, mask = make(), torch.tensor([True, False, False])
    x = unit(3, H, dtype=torch.float64).requires_grad_()
    with moe_ext.padding(mask):
        checkpoint(layer, x, **KINDS[kind]).sum().backward()
    inside = x.grad.clone()
    assert not inside[0].any() and inside[1:].any()
    with moe_ext.padding(mask):
        y = checkpoint(layer, x, **KINDS[kind])
    with pytest.raises(RuntimeError, match="call backward.. inside `with moe_ext.padding"):
        y.sum().backward()
    with moe_ext.padding(mask):  # without checkpointing it may end before
        y = layer(x.detach())
    y.sum().backward()


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "moe_ext":
            name = op.name().removeprefix("moe_ext::")
            self.calls[name] = self.calls.get(name, 0) + 1
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif(not HAS_OPS, reason="the reference registers no operators")
def test_the_policy_keeps_the_routing():
    layer = make()
    x = unit(9, H, dtype=torch.float64).requires_grad_()
    with CountOps() as ops:
        checkpoint(layer, x, **KINDS["selective"]).sum().backward()
    forward = ("router_logits", "topk_route", "capacity_scatter", "moe_forward")
    assert [ops.calls[name] for name in forward] == [1, 1, 1, 2]
    assert ops.calls["moe_backward"] == ops.calls["topk_route_backward"] == 1

    def keep_experts(ctx, op, *args, **kwargs):
        if op is torch.ops.moe_ext.moe_forward.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    both = functools.partial(moe_ext.checkpoint_policy, keep_experts)
    with CountOps() as ops:
        checkpoint(layer, x, use_reentrant=False, context_fn=both).sum().backward()
    assert [ops.calls[name] for name in forward] == [1, 1, 1, 1]
