"""Inputs and neighbours that are rare and valid, or that are refused in words."""

import pytest
import torch
from torch import nn

from moe_ext import MoE, functional, reference
from support.layer_suite import E, H, I, assert_close, assert_step_matches, make
from support.oracle import HAS_OPS, bits_equal, unit

# ---- shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("drop_policy", ["token", "choice", "probs"])
def test_empty_batches(shape, scope, drop_policy):
    layer = make(
        capacity_scope=scope, drop_policy=drop_policy, z_loss_coef=0.1,
        shared_expert_intermediate_size=4,
    )  # fmt: skip
    x = unit(*shape, H, dtype=torch.float64).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    for options in (dict(), dict(padding_mask=mask)):
        layer.zero_grad()
        y, routing = layer(x, return_routing=True, **options)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape and routing.plan.expert_offsets.sum() == 0
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name
    assert layer.eval()(x).shape == x.shape and layer.stats()["tokens"] == 0.0


@pytest.mark.parametrize("options", [{}, dict(capacity_scope="sequence", capacity_factor=0.5)])
def test_one_dimension_is_one_token(options):
    layer = make(**options)
    x = unit(H, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    assert y.shape == (H,) and bits_equal(y, layer(x[None])[0])
    assert routing.experts.shape == (1, 2)
    assert_step_matches(layer, x[None])
    assert not layer(x, padding_mask=torch.tensor(True)).any()
    with pytest.raises(ValueError, match=r"x must be .* \(..., 16\), got float64 \(\)"):
        layer(x[0])


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_in_words(layout):
    x = torch.nested.nested_tensor([unit(2, H), unit(3, H)], layout=layout)
    with pytest.raises(TypeError, match=r"MoE: x must be .* got a nested one: .*to_padded_tensor"):
        make(dtype=torch.float32)(x)
    with pytest.raises(TypeError, match="got a sparse_coo one"):
        make(dtype=torch.float32)(unit(3, H).to_sparse())


@pytest.mark.skipif(not HAS_OPS, reason="the reference reads from the device")
@pytest.mark.parametrize("training", [True, False])
def test_meta_tensors_have_shapes(training):
    layer = MoE(H, I, E, 2, device="meta", shared_expert_intermediate_size=8, z_loss_coef=0.1)
    x = torch.empty(3, 5, H, device="meta", requires_grad=True)
    mask = torch.empty(3, 5, dtype=torch.bool, device="meta")
    layer.train(training)
    for options in (dict(), dict(padding_mask=mask)):
        y, routing = layer(x, return_routing=True, **options)
        y.sum().backward()
        assert y.is_meta and y.shape == x.shape and routing.logits.shape == (15, E)
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in layer.parameters())
    assert layer.stats()["forwards"] == 0.0


# ---- the choice where the softmax underflows -----------------------------------------------


@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [5, 16, 70, 1100])
def test_softmax_topk_chooses_by_the_logits(module, dtype, num_experts):
    logits = torch.stack([torch.randperm(num_experts) for _ in range(9)])
    logits = (logits - num_experts // 2).clamp(-1000, 1000)
    logits[:, 3] = 3000  # whose score is 1, and all the others' 0
    logits = logits.to(dtype)
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :4]
    route = module.topk_route(logits, 4, score_function="softmax_topk")
    assert torch.equal(route.experts.long(), expected)
    groups = dict(n_group=5, topk_group=2) if num_experts % 5 == 0 else {}
    grouped = module.topk_route(logits, 2, score_function="softmax_topk", **groups)
    again = reference.topk_route(logits.double(), 2, score_function="softmax_topk", **groups)
    assert torch.equal(grouped.experts, again.experts)
    if groups:
        size = num_experts // 5
        best = (
            logits.view(9, 5, size)
            .amax(-1)
            .sort(dim=-1, descending=True, stable=True)
            .indices[:, :2]
        )
        assert ((grouped.experts[..., None] // size) == best[:, None]).any(-1).all()


@pytest.mark.parametrize("module", [functional, reference])
def test_softmax_topk_with_a_bias_chooses_by_the_softmax(module):
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.5])  # more than the second score lacks, less than its logit
    route = module.topk_route(logits, 2, score_function="softmax_topk", selection_bias=bias)
    assert route.experts.tolist() == [[0, 2]]


# ---- names in a state_dict -------------------------------------------------------------


class Below(nn.Module):
    """A layer below a module that is called as Qwen2-MoE calls a part of the layer."""

    def __init__(self):
        super().__init__()
        self.shared_expert = nn.Module()
        self.shared_expert.moe = make(shared_expert_intermediate_size=8)


def test_a_module_named_shared_expert_above():
    source, target = Below(), Below()
    own = source.state_dict()
    theirs = {name.replace("shared_experts.", "shared_expert."): t for name, t in own.items()}
    assert theirs.keys() != own.keys()
    for state in (theirs, own):
        target = Below()
        target.load_state_dict(state)
        assert bits_equal(target.state_dict(), own)


def test_both_names_at_once_are_one_too_many():
    layer = make(shared_expert_intermediate_size=8)
    state = layer.state_dict() | {"shared_expert.up_proj.weight": torch.zeros(8, H)}
    with pytest.raises(RuntimeError, match="Unexpected key.*shared_expert.up_proj.weight"):
        layer.load_state_dict(state)


# ---- checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda name, t: (name, t.clone().requires_grad_()),
    lambda name, t: (name, torch.stack([t, t], -1)[..., 0]),
    lambda name, t: (name.replace("shared_experts.", "shared_expert."), t),
])  # fmt: skip
def test_blocks_from_odd_tensors_and_names(change):
    options = dict(shared_expert_intermediate_size=8, shared_expert_gate=True, capacity_factor=None)
    layer = make(**options).eval()
    state = dict(change(*item) for item in layer.export_state_dict("deepseek", 3).items())
    x = unit(5, H, dtype=torch.float64)
    loaded = MoE.from_pretrained_block(
        state, 3, hidden_size=H, intermediate_size=I, num_experts=E, **options
    ).eval()
    assert_close(loaded(x), layer(x))
    assert all(p.is_leaf and p.requires_grad for p in loaded.parameters())


def test_a_shared_expert_without_a_place_is_named():
    layer = make(shared_expert_intermediate_size=8, capacity_factor=None)
    state = layer.export_state_dict("deepseek", 3)
    state = {name.replace("shared_experts.", "shared_expert."): t for name, t in state.items()}
    with pytest.raises(ValueError, match="shared_expert.gate_proj.weight.* no place"):
        MoE.from_pretrained_block(state, 3, hidden_size=H, intermediate_size=I, num_experts=E)
