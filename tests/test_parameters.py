"""moe_ext.parameter_groups and moe_ext.count_parameters."""

import pytest
import torch
from torch import nn

import moe_ext
from layer_suite import E, H, I, make

OPTIONS = dict(
    bias=True, gate_bias=True, shared_expert_intermediate_size=8, shared_expert_gate=True
)


def test_what_decays():
    model = nn.Sequential(nn.Linear(H, H).double(), nn.LayerNorm(H).double(), make(**OPTIONS))
    model[0].weight.requires_grad_(False)
    model.tied = model[2]
    names = {p: name for name, p in model.named_parameters()}
    decayed, rest = moe_ext.parameter_groups(model, weight_decay=0.3)
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    assert [names[p] for p in decayed["params"]] == [
        "2.experts.gate_up_proj", "2.experts.down_proj", "2.shared_experts.gate_proj.weight",
        "2.shared_experts.up_proj.weight", "2.shared_experts.down_proj.weight",
    ]  # fmt: skip
    everything = [*decayed["params"], *rest["params"]]
    assert len(set(everything)) == len(everything) == len(names) - 1
    torch.optim.AdamW([decayed, rest])


def test_how_many_a_token_meets():
    model = nn.Sequential(nn.Linear(H, H), make(top_k=3, shared_expert_intermediate_size=8))
    total, active = moe_ext.count_parameters(model)
    dense = H * H + H + E * H + 3 * 8 * H
    assert total == dense + E * 3 * H * I and active == dense + 3 * 3 * H * I
    assert moe_ext.count_parameters(nn.Linear(2, 3)) == (9, 9)


def test_bad_arguments():
    for function in (moe_ext.parameter_groups, moe_ext.count_parameters):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
            function([1])
    with pytest.raises(ValueError, match="parameter_groups: weight_decay"):
        moe_ext.parameter_groups(make(), weight_decay=-1.0)
