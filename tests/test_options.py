"""Options set on a layer that is built: they govern all that they do at construction, or are refused."""

import copy
import inspect
import pickle

import pytest
import torch

import moe_ext
from moe_ext import MoE
from moe_ext.config import PLACES
from moe_ext.options import FIXED
from support.layer_suite import E, H, assert_step_matches, make
from support.oracle import bits_equal, unit

CHANGES = [
    dict(top_k=1),
    dict(top_k=4),
    dict(num_experts_per_tok=3),
    dict(score_function="sigmoid"),
    dict(score_function="softmax_topk"),
    dict(norm_topk_prob=False),
    dict(routed_scaling_factor=2.5),
    dict(n_group=4, topk_group=2),
    dict(n_group=4, topk_group=1, group_score="top2_sum"),
    dict(capacity_factor=None),
    dict(capacity_factor=0.5, top_k=4, min_capacity=0),
    dict(capacity_factor=0.1, min_capacity=3),
    dict(expert_capacity=2),
    dict(expert_capacity=2, capacity_scope="sequence"),
    dict(capacity_factor=0.5, drop_policy="probs"),
    dict(capacity_factor=0.5, renormalize_after_drop=True),
    dict(aux_loss_coef=0.5, z_loss_coef=0.1),
    dict(aux_loss_coef=0.0),
    dict(eval_capacity_factor=0.5, min_capacity=1),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_set_later_is_as_set_at_construction(changes):
    built = make(
        seed=1, **{{"num_experts_per_tok": "top_k"}.get(k, k): v for k, v in changes.items()}
    )
    changed = make(seed=1)
    for name, value in changes.items():
        setattr(changed, name, value)
        assert getattr(changed, name) == value
    x = unit(2, 20, H, dtype=torch.float64)
    for layer in (built, changed):
        layer.gate.weight.grad = None
        y, routing = layer(x, return_routing=True)
        y.square().sum().backward()
        layer.result = (y, tuple(routing), layer.gate.weight.grad, layer.eval()(x), layer.stats())
        layer.train()
    assert bits_equal(built.result, changed.result)
    assert_step_matches(changed, x)
    assert repr(changed) == repr(built)


def test_every_argument_has_its_place():
    arguments = set(inspect.signature(MoE).parameters)
    assert {*PLACES, "num_experts_per_tok", "device", "dtype"} == arguments - {"self"}
    assert FIXED < PLACES.keys()


@pytest.mark.parametrize("name", sorted(FIXED - {"shared_expert_gate"}))  # a module
def test_what_the_parameters_depend_on_is_refused(name):
    layer = make()
    before = dict(vars(layer))
    with pytest.raises(AttributeError, match=f"MoE: {name} cannot be set"):
        setattr(layer, name, 2)
    assert vars(layer) == before
    assert hasattr(layer, name) == (name != "bias")  # who initialises biases asks for that


@pytest.mark.parametrize(
    "error,name,value",
    [(ValueError, "top_k", 9), (TypeError, "top_k", 1.0), (ValueError, "num_experts_per_tok", 0),
     (ValueError, "score_function", "softmin"), (TypeError, "norm_topk_prob", 1),
     (ValueError, "topk_group", 2), (ValueError, "n_group", 3), (ValueError, "capacity_factor", 0.0),
     (ValueError, "min_capacity", -1), (ValueError, "drop_policy", "random"),
     (ValueError, "aux_loss_coef", -1.0), (ValueError, "jitter_eps", 1.0),
     (ValueError, "bias_update_rate", 0.1), (TypeError, "inject_losses", 0)],
)  # fmt: skip
def test_bad_values_change_nothing(error, name, value):
    layer = make()
    before = getattr(layer, name)
    with pytest.raises(error, match="^MoE: "):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


def test_the_routers_top_k_is_the_layers():
    layer = make()
    layer.gate.top_k = 3
    assert layer.top_k == 3
    assert_step_matches(layer, unit(9, H, dtype=torch.float64))


def test_a_rate_set_later_balances():
    layer = make(score_correction_bias=True)
    before = layer.gate.e_score_correction_bias.clone()
    layer.bias_update_rate = 0.25
    layer(unit(9, H, dtype=torch.float64))
    moe_ext.update_router_biases(layer)
    moved = (layer.gate.e_score_correction_bias - before).abs()
    assert torch.allclose(moved.max(), torch.tensor(0.25))


def test_copies_have_options_of_their_own():
    layer = make()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.top_k = 1
        copied.capacity_factor = None
        assert layer.top_k == 2 and layer.capacity_factor == 1.25
        x = unit(9, H, dtype=torch.float64)
        assert copied(x, return_routing=True)[1].experts.shape == (9, 1)
        assert layer(x, return_routing=True)[1].experts.shape == (9, 2)
        assert copied.num_experts == E
