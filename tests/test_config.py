"""The configs: every option once, checked, frozen, and back again from a dict or JSON."""

import copy
import dataclasses
import json
import pickle
from fractions import Fraction

import pytest
import torch

import moe_ext
from moe_ext import (
    Activation,
    CapacityConfig,
    ExpertsConfig,
    LossConfig,
    MoE,
    MoEConfig,
    RouterConfig,
)
from moe_ext.config import GROUPS, PLACES
from moe_ext.presets import PRESETS
from support.layer_suite import H, I, make
from support.oracle import bits_equal, unit

NESTED = MoEConfig(
    hidden_size=H,
    intermediate_size=I,
    router=RouterConfig(
        num_experts=6, top_k=3, score_function="sigmoid", router_dtype=torch.float64
    ),
    experts=ExpertsConfig(activation=Activation("geglu", limit=2.0, transposed=True), bias=True),
    capacity=CapacityConfig(capacity_factor=Fraction(3, 2), drop_policy="probs"),
    losses=LossConfig(z_loss_coef=0.5),
    init_std=0.5,
)
FLAT = dict(
    num_experts=6, top_k=3, score_function="sigmoid", router_dtype=torch.float64,
    activation="geglu", limit=2.0, transposed=True, bias=True, capacity_factor=Fraction(3, 2),
    drop_policy="probs", z_loss_coef=0.5, init_std=0.5,
)  # fmt: skip


def test_nested_and_side_by_side_are_one():
    assert MoEConfig.of(H, I, **FLAT) == NESTED == MoE(H, I, **FLAT).config
    assert NESTED.options() == MoEConfig.of(H, I).options() | FLAT
    assert NESTED.replace(**MoEConfig.of(H, I).options()) == MoEConfig.of(H, I)


def test_a_layer_of_a_config_is_that_of_its_options():
    layers = []
    for arguments, options in ([NESTED], {}), ([H, I], FLAT):
        torch.manual_seed(0)
        layers.append(MoE(*arguments, **options, dtype=torch.float64))
    x = unit(2, 9, H, dtype=torch.float64)
    assert bits_equal(*(layer(x) for layer in layers))
    assert repr(layers[0]) == repr(layers[1])


@pytest.mark.parametrize("config", [NESTED, *PRESETS.values()], ids=["nested", *PRESETS])
def test_there_and_back(config):
    as_dict = json.loads(json.dumps(config.to_dict()))
    assert as_dict == config.to_dict()
    assert MoEConfig.from_dict(as_dict) == config == MoEConfig.from_json(config.to_json())
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(MoEConfig.from_dict(as_dict)) == hash(config)


def test_what_is_missing_takes_its_default():
    sizes = dict(hidden_size=H, intermediate_size=I)
    assert MoEConfig.from_dict(sizes | dict(router=dict(top_k=1))) == MoEConfig.of(H, I, top_k=1)


def test_no_option_has_two_places():
    leaves = [f.name for group in GROUPS.values() for f in dataclasses.fields(group)]
    own = [f.name for f in dataclasses.fields(MoEConfig) if f.name not in GROUPS]
    names = [*leaves, *own, *Activation._fields]
    assert len(names) == len(set(names)) == len(PLACES) + 1  # an Activation and its name


def test_a_change_leaves_the_rest():
    config = MoEConfig.of(H, I, activation="swiglu", limit=7.0, alpha=1.702, top_k=4)
    changed = config.replace(up_offset=1.0, num_experts_per_tok=1, aux_loss_coef=0.0)
    assert changed.experts.activation == Activation("swiglu", 7.0, 1.702, 1.0)
    assert changed.options() == config.options() | dict(up_offset=1.0, top_k=1, aux_loss_coef=0.0)
    assert config.router.top_k == 4
    whole = config.replace(losses=LossConfig(z_loss_coef=1.0), activation=Activation("relu"))
    assert whole.losses.z_loss_coef == 1.0 and whole.experts.activation.limit is None
    if hasattr(copy, "replace"):
        assert copy.replace(config, top_k=1) == config.replace(top_k=1)


@pytest.mark.parametrize(
    "config", [NESTED, NESTED.router, NESTED.experts, NESTED.capacity, NESTED.losses],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_frozen(config):
    name = dataclasses.fields(config)[0].name
    before = copy.deepcopy(config)
    with pytest.raises(AttributeError, match=rf"{name} cannot be set.*config.replace\({name}="):
        setattr(config, name, 1)
    assert config == before


@pytest.mark.parametrize(
    "error,values,text",
    [
        (TypeError, dict(top_k=2), "MoEConfig has no 'top_k'; there are hidden_size, "),
        (TypeError, dict(router=dict(topk=2)), "RouterConfig has no 'topk'; there are num_experts, top_k"),
        (TypeError, dict(experts=dict(activation=dict(beta=1))), "Activation has no 'beta'"),
        (ValueError, dict(version=9), "version must be at most 1, .* got 9"),
        (TypeError, dict(version="1"), "version must be"),
    ],
)  # fmt: skip
def test_what_from_dict_refuses(error, values, text):
    with pytest.raises(error, match=rf"^MoEConfig.from_dict: {text}"):
        MoEConfig.from_dict(dict(hidden_size=H, intermediate_size=I) | values)


@pytest.mark.parametrize(
    "error,make,text",
    [
        (ValueError, lambda: RouterConfig(num_experts=4, top_k=5), "top_k must be an integer from 1 to 4"),
        (ValueError, lambda: CapacityConfig(capacity_factor=0.0), "capacity_factor must be a positive"),
        (ValueError, lambda: LossConfig(z_loss_coef=-1), "z_loss_coef must be"),
        (ValueError, lambda: ExpertsConfig(activation="swish"), "activation must be one of swiglu"),
        (TypeError, lambda: MoEConfig(hidden_size=4, intermediate_size=4, router={}), "router must be a RouterConfig, got dict"),
        (TypeError, lambda: MoEConfig.of(4, 4, topk=1), "topk is no option; there are activation, "),
        (TypeError, lambda: NESTED.replace(losses=LossConfig(), z_loss_coef=1.0), "z_loss_coef must stand inside losses"),
        (TypeError, lambda: MoE(NESTED, top_k=1), "a config stands for all options"),
        (TypeError, lambda: MoE(NESTED, 32), "a config stands for all options"),
    ],
)  # fmt: skip
def test_bad_configs(error, make, text):
    with pytest.raises(error, match=f"^MoE: {text}"):
        make()


def test_a_config_gives_a_layer_its_options():
    layer = make(seed=1)
    config = layer.config
    layer.config = config.replace(top_k=3, capacity_factor=None, aux_loss_coef=0.0)
    assert (layer.top_k, layer.capacity_factor, layer.aux_loss_coef) == (3, None, 0.0)
    assert layer.gate.top_k == 3 and config.router.top_k == 2
    twin = make(seed=1, top_k=3, capacity_factor=None, aux_loss_coef=0.0)
    x = unit(2, 9, H, dtype=torch.float64)
    assert bits_equal(layer(x), twin(x))


@pytest.mark.parametrize("change", [dict(num_experts=16), dict(bias=True), dict(limit=1.0),
                                    dict(shared_expert_intermediate_size=8)], ids=str)  # fmt: skip
def test_a_config_for_other_parameters_is_refused(change):
    layer = make()
    before = layer.config
    with pytest.raises(AttributeError, match=f"MoE: {next(iter(change))} cannot be set"):
        layer.config = before.replace(**change)
    assert layer.config is before


def dense():
    return torch.nn.Sequential(torch.nn.Linear(H, I), torch.nn.GELU(), torch.nn.Linear(I, H))


def test_from_dense_takes_a_config():
    config = MoEConfig.of(
        H, I, num_experts=4, activation="gelu", bias=True, capacity_factor=2.0, z_loss_coef=0.1
    )
    ffn = dense()
    layer = MoE.from_dense(ffn, config)
    assert layer.config == config
    x = unit(3, H)
    assert torch.allclose(layer.eval()(x), ffn(x), atol=1e-5)
    model = torch.nn.ModuleDict({"ffn": dense()})
    assert moe_ext.replace_ffn(model, config)["ffn"].config == config


@pytest.mark.parametrize(
    "change,text",
    [(dict(hidden_size=2 * H), "hidden_size must be the FFN's"),
     (dict(intermediate_size=2 * I), "intermediate_size must be the FFN's"),
     (dict(activation="relu"), "ffn must compute")],
)  # fmt: skip
def test_from_dense_refuses_another_layers_config(change, text):
    config = MoEConfig.of(H, I, activation="gelu", bias=True).replace(**change)
    with pytest.raises(ValueError, match=f"^MoE.from_dense: {text}"):
        MoE.from_dense(dense(), config)


def test_a_preset_may_be_a_config():
    config = PRESETS["mixtral_8x7b"].replace(hidden_size=H, intermediate_size=I)
    state = MoE(config).export_state_dict("mixtral", layer=0)
    loaded = MoE.from_pretrained_block(state, 0, preset=config, z_loss_coef=0.1)
    assert loaded.config == config.replace(z_loss_coef=0.1)
