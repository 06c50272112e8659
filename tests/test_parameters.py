"""moe_ext.parameter_groups and moe_ext.count_parameters."""

import pytest
import torch
from torch import nn

import moe_ext
from support.layer_suite import E, H, I, make
from support.oracle import unit

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


LAYOUTS = [
    dict(),
    dict(interleaved=True, transposed=True),
    dict(transposed=True),
    dict(activation="gelu"),
    dict(interleaved=True),
]


def dense_matrices(layer):
    """{expert: [gate, up, down] or [up, down]}, each (out, in), copies of what experts compute with."""
    up, down = (t.transpose(1, 2) if layer.transposed else t for t in layer.experts.weights()[:2])
    if layer.activation == "gelu":
        return [[up[e].clone(), down[e].clone()] for e in range(E)]
    gates = up[:, ::2] if layer.interleaved else up[:, :I]
    ups = up[:, 1::2] if layer.interleaved else up[:, I:]
    return [[gates[e].clone(), ups[e].clone(), down[e].clone()] for e in range(E)]


@pytest.mark.parametrize("options", LAYOUTS)
def test_an_optimizer_of_matrices(options):
    """As if every matrix of every expert were a parameter of its own."""
    layer = make(dtype=torch.float32, bias=True, **options)
    experts, decayed, rest = moe_ext.parameter_groups(layer, 0.1, expert_matrices=True)
    stacks = set(layer.experts.weights()[:2])
    assert experts["weight_decay"] == 0.1 and not stacks & {*decayed["params"], *rest["params"]}
    apart = [nn.Parameter(m) for matrices in dense_matrices(layer) for m in matrices]
    by_value = {tuple(m.detach().flatten().tolist()): m for m in experts["params"]}
    ours = [by_value[tuple(m.detach().flatten().tolist())] for m in apart]
    assert len(ours) == len(experts["params"])
    optimizers = [torch.optim.Muon([{**experts, "params": p}], lr=0.1) for p in (ours, apart)]
    for _ in range(2):
        for _ in range(2):  # gradients accumulate
            layer(unit(20, H)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        assert norm > 0.5
        before = [alone.detach().clone() for alone in apart]
        for matrix, alone in zip(ours, apart):
            alone.grad = matrix.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        after = [m for matrices in dense_matrices(layer) for m in matrices]
        assert all(torch.equal(now, alone) for now, alone in zip(after, apart))
        assert not any(torch.equal(now, old) for now, old in zip(after, before))
        optimizers[0].zero_grad()
        assert all(stack.grad is None for stack in stacks)
    ours[0].grad = torch.ones_like(ours[0])
    assert sum(s.grad.sum() for s in stacks if s.grad is not None) == ours[0].numel()


def test_matrices_of_a_frozen_or_sharded_stack():
    layer = make()
    layer.experts.down_proj.requires_grad_(False)
    experts, *_ = moe_ext.parameter_groups(layer, expert_matrices=True)
    assert len(experts["params"]) == 2 * E

    class Sharded(nn.Parameter):
        pass

    layer.experts.down_proj = Sharded(layer.experts.down_proj.detach())
    with pytest.raises(
        TypeError, match="parameter_groups: expert_matrices needs down_proj as a plain"
    ):
        moe_ext.parameter_groups(layer, expert_matrices=True)


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
