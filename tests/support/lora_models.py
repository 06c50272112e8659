"""Experts under PEFT's adapters, and their results on moe_ext beside PEFT's own."""

import copy

import pytest
import test_experts
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from moe_ext.integrations.transformers import lora, register
from support import tiny_models
from support.oracle import assert_within_bound, draw_experts, relative_error, unit

T, E, K = test_experts.T, test_experts.E, test_experts.K
R = 3
GATES = test_experts.GATES | test_experts.CALLED


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(ParamWrapper, "_activate_lora", ParamWrapper._activate_lora)
    monkeypatch.setattr(lora, "_warned", set())
    register()


class Block(nn.Module):
    """What PEFT can wrap: a module that has the experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.experts(hidden_states, top_k_index, top_k_weights)


MATRICES = ("gate_up_proj", "up_proj", "down_proj")


def adapted(model, parameters=MATRICES, **options):
    """The model with LoRA on its experts, of factors that change as much as the experts do."""
    found = {name for name, _ in model.named_parameters()}
    targets = [f"experts.{p}" for p in parameters if any(f.endswith(f"experts.{p}") for f in found)]
    options = dict(r=R, lora_alpha=2 * R, target_modules=[], target_parameters=targets) | options
    model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
    draw_factors(model)
    return model


def draw_factors(model):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = unit(*parameter.shape, fan_in=parameter.shape[1])
        elif "lora_B" in name:
            parameter.data = unit(*parameter.shape, fan_in=R)


def adapted_experts(**options):
    """Experts of any layout and gate, wrapped."""
    return adapted(Block(test_experts.make(**options)))


def implementation(model, name):
    for module in tiny_models.experts_of(model):
        module.config._experts_implementation = name


def draw(routing="distinct"):
    return dict(
        hidden_states=unit(T, test_experts.H),
        top_k_index=draw_experts(T, E, K, routing).long(),
        top_k_weights=torch.rand(T, K),
    )


def results(model, inputs, name, dtype=torch.float32, run=None):
    """The output and every gradient of `model` in that dtype on the implementation `name`."""
    model = copy.deepcopy(model).to(dtype)
    implementation(model, name)
    inputs = {
        n: t.to(dtype).detach().requires_grad_() if t.is_floating_point() else t
        for n, t in inputs.items()
    }
    output = (run or (lambda model, inputs: model(**inputs)))(model, inputs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output.dtype))
    taken = {n: t.grad for n, t in inputs.items() if t.grad is not None}
    taken |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(
        n in taken and taken[n].any() for n, p in model.named_parameters() if p.requires_grad
    )
    return taken | dict(output=output.detach())


def assert_as_peft(model, inputs, dtype=torch.float64, **options):
    """Against `eager` with PEFT's own path: that in float64, and that in the same dtype."""
    ours = results(model, inputs, "moe_ext", dtype, **options)
    peft_s = results(model, inputs, "eager", dtype, **options)
    oracle = results(model, inputs, "eager", torch.float64, **options)
    assert ours.keys() == peft_s.keys()
    for name, expected in oracle.items():
        assert_within_bound(name, ours[name], expected, peft_s[name], dtype)
    return ours


def assert_near_peft(model, inputs, dtype, limit, **options):
    """Against `eager` with PEFT's own path in float64."""
    ours = results(model, inputs, "moe_ext", dtype, **options)
    peft_s = results(model, inputs, "eager", torch.float64, **options)
    assert ours.keys() == peft_s.keys()
    for name, expected in peft_s.items():
        assert relative_error(ours[name], expected) < limit, name
