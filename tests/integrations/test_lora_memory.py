"""LoRA on experts: what is kept for the backward pass, and the largest tensor on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.oracle import draw_experts, unit

pytest.importorskip("transformers")
pytest.importorskip("peft")

import test_experts  # noqa: E402

from support.lora_models import (  # noqa: E402, F401
    GATES,
    Block,
    adapted,
    adapted_experts,
    draw,
    implementation,
    registered,
)


def kept_bytes(model, inputs, name):
    """Of the tensors that autograd keeps for the backward pass, parameters and inputs aside."""
    implementation(model, name)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs.values())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)
    kept = sum(s.nbytes() for pointer, s in storages.items() if pointer not in own)
    assert output.requires_grad
    return kept


# At their proportions: hidden, intermediate, experts, tokens, top_k, rank.
PROPORTIONS = {
    "an eighth of Mixtral, 2048 tokens, r=16": (512, 1792, 8, 256, 2, 2),
    "a quarter of Qwen3-30B-A3B, 2048 tokens, r=16": (512, 192, 128, 512, 8, 4),
}


@pytest.fixture(params=PROPORTIONS.values(), ids=PROPORTIONS)
def real_model(request, monkeypatch):
    hidden, intermediate, num_experts, tokens, top_k, rank = request.param
    for name, size in dict(H=hidden, I=intermediate, E=num_experts).items():
        monkeypatch.setattr(test_experts, name, size)
    inputs = dict(
        hidden_states=unit(tokens, hidden).requires_grad_(),
        top_k_index=draw_experts(tokens, num_experts, top_k).long(),
        top_k_weights=torch.rand(tokens, top_k).requires_grad_(),
    )
    return adapted(Block(test_experts.make()), r=rank), inputs


def test_kept_bytes(real_model):
    ours, peft_s = (kept_bytes(*real_model, name) for name in ("moe_ext", "grouped_mm"))
    assert ours < peft_s / 10


class LargestTensor(TorchDispatchMode):
    """Of all that any op makes, the most elements; views of the parameters are not made."""

    def __init__(self, model):
        super().__init__()
        self.numel = 0
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.own:
                self.numel = max(self.numel, t.numel())
        return result


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_nothing_of_a_stacks_size_is_made(gate):
    """Forward and backward: no merged copy, no gradient of what is frozen."""
    model = adapted_experts(**GATES[gate])
    inputs = {n: t[:1] for n, t in draw().items()}
    sizes = {}
    for name in ("moe_ext", "eager"):
        implementation(model, name)
        with LargestTensor(model) as largest:
            model(**inputs).sum().backward()
        sizes[name] = largest.numel
    stacks = [t.numel() for n, t in model.named_parameters() if n.endswith("proj")]
    assert sizes["moe_ext"] < min(stacks) < max(stacks) <= sizes["eager"]
