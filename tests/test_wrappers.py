"""MoE under wrappers that act at a module's forward, and off the meta device on every way."""

import copy

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext import MoE
from support.layer_suite import E, H, K, make
from support.oracle import bits_equal, relative_error, unit

OPTIONS = dict(bias_update_rate=1e-3, shared_expert_intermediate_size=8, shared_expert_gate=True)


# ---- who may read a parameter ----------------------------------------------------------


class Parked(nn.Module):
    """Its module's parameters are on the meta device but for the time of a forward."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.kept = dict(module.named_parameters(recurse=False))
        self.park()

    def park(self):
        for name, parameter in self.kept.items():
            self.module._parameters[name] = nn.Parameter(parameter.to("meta"))

    def forward(self, *args):
        self.module._parameters.update(self.kept)
        try:
            return self.module(*args)
        finally:
            self.park()


def test_a_parameter_is_read_by_its_own_module_alone():
    layer = make(**OPTIONS).eval()
    x = unit(5, H, dtype=torch.float64)
    expected = layer(x)
    layer.gate, layer.experts = Parked(layer.gate), Parked(layer.experts)
    assert bits_equal(layer(x), expected)
    layer.train()(x)
    before = layer.gate.module.e_score_correction_bias.clone()
    moe_ext.update_router_biases(layer)
    assert before.ne(layer.gate.module.e_score_correction_bias).any()


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_accelerate_offload(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(H, H).double(), make(**OPTIONS)).eval()
    x = unit(4, H, dtype=torch.float64)
    expected = model(x)
    if how == "cpu_offload":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        model = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model[1].experts.down_proj.is_meta
    with torch.no_grad():
        assert bits_equal(model(x), expected)


@pytest.mark.parametrize("target", [["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"],
                                    ["gate.weight", "experts.down_proj"]])  # fmt: skip
def test_lora_around_the_layer_s_own_modules(target):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(make(dtype=torch.float32, bias_update_rate=1e-3)).eval()
    x = unit(6, H)
    before = model(x).detach()
    config = peft.LoraConfig(r=2, target_parameters=[f"0.{name}" for name in target])
    tuned = peft.get_peft_model(model, config).to("cpu")
    assert relative_error(tuned(x), before.double()) < 1e-6
    tuned.train()
    tuned(x).square().sum().backward()
    adapters = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert adapters and all(p.grad is not None and "lora" in n for n, p in adapters.items())
    moe_ext.update_router_biases(tuned)
    with torch.no_grad():
        for name, parameter in adapters.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    after = tuned.eval()(x).detach()
    assert relative_error(after, before.double()) > 1e-3
    assert relative_error(tuned.merge_and_unload()(x), after.double()) < 1e-5


def test_experts_of_another_dtype_are_named():
    layer = make()
    layer.experts.float()
    with pytest.raises(TypeError, match="MoE: x must be float32 as the experts' parameters"):
        layer(unit(3, H, dtype=torch.float64))


# ---- off the meta device -----------------------------------------------------------------


def assign(layer, source):
    layer.load_state_dict(source.state_dict(), assign=True)


def module_by_module(layer, source):
    for module in layer.modules():  # as FSDP does
        if list(module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    layer.load_state_dict(source.state_dict())


def one_by_one(layer, source):
    """As transformers loads a checkpoint: tensor for tensor, buffers in the model's dtype."""
    for name, tensor in source.state_dict().items():
        parent, _, child = name.rpartition(".")
        module = layer.get_submodule(parent)
        if child in module._parameters:
            module._parameters[child] = nn.Parameter(tensor.clone())
        else:
            module._buffers[child] = tensor.double()


def whole(layer, source):
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())


@pytest.mark.parametrize("way", [assign, module_by_module, one_by_one, whole])
def test_every_way_off_the_meta_device(way):
    source = make(**OPTIONS)
    with torch.device("meta"):
        layer = MoE(H, 12, E, K, dtype=torch.float64, **OPTIONS)
    layer(torch.empty(3, H, dtype=torch.float64, device="meta"))
    moe_ext.set_loss_scale(layer, 0.5)
    way(layer, source)
    moe_ext.set_loss_scale(source, 0.5)
    x = unit(8, H, dtype=torch.float64)
    for module in (layer, source):
        module(x).square().sum().backward()
        moe_ext.update_router_biases(module)
    for (name, p), q in zip(layer.named_parameters(), source.parameters()):
        assert bits_equal(p.grad, q.grad), name
    actual, expected = layer.stats(), source.stats()
    assert torch.equal(actual.load, expected.load) and actual == expected
    assert actual["tokens"] == 8.0
    bias = layer.gate.e_score_correction_bias
    assert bits_equal(bias, source.gate.e_score_correction_bias) and bias.dtype == torch.float32


def test_state_survives_a_stay_on_meta():
    layer = make()
    layer(unit(7, H, dtype=torch.float64))
    moe_ext.set_loss_scale(layer, 3.0)
    layer.to("meta").to_empty(device="cpu")
    assert layer.stats()["tokens"] == 7.0 and layer.loss_scale == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_leaves_the_loss_scale_alone(dtype):
    torch.set_default_dtype(dtype)
    try:
        layer = MoE(H, 12, E, K)
        copied = copy.deepcopy(layer)
        for scale in (65536.0, 65536 / 3, 1e-9):
            moe_ext.set_loss_scale(copied, scale)
            assert copied.loss_scale.item() == scale and layer.loss_scale == 1.0
    finally:
        torch.set_default_dtype(torch.float32)
