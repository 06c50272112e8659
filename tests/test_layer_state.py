"""MoE as a module: casts, state_dict, copies, the meta device, and autocast around it."""

import copy
import io
import pickle

import pytest
import torch

import moe_ext
from moe_ext import MoE
from support.layer_suite import E, H, I, K, assert_close, make
from support.oracle import DEVICE, bits_equal, relative_error, unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_router_in_float32(dtype):
    layer = make(dtype=torch.float32, shared_expert_intermediate_size=8)
    moe_ext.set_loss_scale(layer, 1.0)
    x = unit(9, H, dtype=torch.float32).requires_grad_()
    _, plain = layer(x, return_routing=True)
    with torch.autocast(DEVICE.type, dtype=dtype):
        y, routing = layer(x, return_routing=True)
        y_low = layer(x.detach().to(dtype))
    y.sum().backward()
    assert y.dtype == torch.float32 and y_low.dtype == dtype
    assert bits_equal(routing.logits, plain.logits) and bits_equal(routing.weights, plain.weights)
    low = copy.deepcopy(layer).to(dtype)
    low.gate.weight.data = low.gate.weight.data.float().copy_(layer.gate.weight.data)
    assert relative_error(y, layer(x, routing=routing).double()) < 20 * torch.finfo(dtype).eps
    assert (
        relative_error(y, layer(x, routing=routing).double()) > torch.finfo(torch.float32).eps * 20
    )
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_selection_bias_stays_float32():
    layer = make(score_correction_bias=True)
    bias = layer.gate.e_score_correction_bias.clone()
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: torch.nn.Sequential(m).to(torch.float64)[0],
    ):
        layer = cast(layer)
        assert bits_equal(layer.gate.e_score_correction_bias, bias)
    state = {k: v.bfloat16() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert (
        MoE(
            4, 4, 2, 1, score_correction_bias=True, dtype=torch.bfloat16
        ).gate.e_score_correction_bias.dtype
        == torch.float32
    )
    assert "gate.e_score_correction_bias" not in make().state_dict()


def test_state_dict_has_the_names_of_hugging_face():
    layer = make(shared_expert_intermediate_size=4, shared_expert_gate=True, gate_bias=True,
                 bias_update_rate=0.1)  # fmt: skip
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "gate.weight": (E, H),
        "gate.bias": (E,),
        "gate.e_score_correction_bias": (E,),
        "experts.gate_up_proj": (E, 2 * I, H),
        "experts.down_proj": (E, H, I),
        "shared_experts.gate_proj.weight": (4, H),
        "shared_experts.up_proj.weight": (4, H),
        "shared_experts.down_proj.weight": (H, 4),
        "shared_expert_gate.weight": (1, H),
    }
    ungated = make(activation="relu2", bias=True, transposed=True)
    assert {name: tuple(t.shape) for name, t in ungated.experts.state_dict().items()} == {
        "up_proj": (E, H, I),
        "down_proj": (E, I, H),
        "up_proj_bias": (E, I),
        "down_proj_bias": (E, H),
    }
    state = {k.replace("shared_experts", "shared_expert"): v for k, v in layer.state_dict().items()}
    names = set(state)
    other = torch.nn.Sequential(make(shared_expert_intermediate_size=4, shared_expert_gate=True,
                                     gate_bias=True, bias_update_rate=0.1))  # fmt: skip
    other.load_state_dict({f"0.{k}": v for k, v in state.items()})  # Qwen2-MoE's names
    x = unit(5, H, dtype=torch.float64)
    assert bits_equal(other(x), layer(x)) and set(state) == names


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_independent(how):
    layer = make(bias_update_rate=0.1)
    x = unit(20, H, dtype=torch.float64)
    layer(x)
    if how == "deepcopy":
        copied = copy.deepcopy(layer)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert copied.stats()["tokens"] == 20
    assert bits_equal(copied(x), layer(x))
    assert copied.stats(reset=True)["tokens"] == 40 and layer.stats()["tokens"] == 40
    moe_ext.update_router_biases(copied)
    assert copied.gate.e_score_correction_bias.ne(layer.gate.e_score_correction_bias).any()
    moe_ext.set_loss_scale(copied, 7.0)
    assert layer.loss_scale == 1.0


def test_from_the_meta_device():
    layer = MoE(H, I, E, K, bias=True, bias_update_rate=0.1, shared_expert_intermediate_size=4,
                shared_expert_gate=True, gate_bias=True, device="meta")  # fmt: skip
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device=DEVICE)
    assert layer.loss_scale == 1.0 and layer.stats()["forwards"] == 0.0
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(float("nan"))
    layer.reset_parameters()
    for name, t in (*layer.named_parameters(), *layer.named_buffers()):
        if name.endswith("bias"):
            assert not t.any(), name
        elif t.numel() > 500:
            assert 0.015 < t.std() < 0.025, name
        else:
            assert 0 < t.abs().max() < 0.12, name
    assert layer(unit(3, H)).isfinite().all()


def test_functional_call():
    layer, other = make(seed=1), make(seed=2)
    x = unit(5, H, dtype=torch.float64)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert bits_equal(y, other(x))


def test_parametrized_weights():
    layer = make()
    x = unit(5, H, dtype=torch.float64)

    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    expected = layer(x) / 2
    torch.nn.utils.parametrize.register_parametrization(layer.experts, "down_proj", Half())
    assert_close(layer(x), expected)


def test_repr_says_what_matters():
    text = repr(make(bias_update_rate=0.001))
    for part in ("hidden_size=16", "num_experts=8", "top_k=2", "capacity_factor=1.25",
                 "bias_update_rate=0.001", "gate_up_proj=(8, 24, 16)"):  # fmt: skip
        assert part in text
