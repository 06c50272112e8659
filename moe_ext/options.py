"""The options of a layer as its attributes: setting one is checked, and governs all that it did at
construction; or it is refused.

    layer.capacity_factor = 2.0     # from the next forward on
    layer.top_k = 1                 # in the routing, the capacity and the losses
    layer.num_experts = 4           # AttributeError: the parameters were made for it
"""

import numbers

import torch

from ._checks import (
    DROP_POLICIES,
    check_flag,
    check_integer,
    check_name,
    check_number,
    check_routing_options,
)
from .routing import capacity_ratio, selection_bias_of

# These decided which parameters there are, their layout and their values.
FIXED = (
    "hidden_size", "intermediate_size", "num_experts", "activation", "limit", "alpha", "up_offset",
    "transposed", "interleaved", "bias", "gate_bias", "score_correction_bias",
    "shared_expert_intermediate_size", "router_dtype", "init_std",
)  # fmt: skip

# Of the routing: in one dict, which the router holds too.
ROUTING = (
    "top_k", "score_function", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
    "group_score",
)  # fmt: skip


def _number(name, **limits):
    return lambda layer, value: check_number("MoE", name, value, **limits)


def _integer(name, minimum):
    return lambda layer, value: check_integer("MoE", name, value, minimum=minimum)


def _name(name, *known):
    return lambda layer, value: check_name("MoE", name, value, known)


def _flag(name):
    return lambda layer, value: check_flag("MoE", name, value)


def _expert_capacity(layer, value):
    return None if value is None else check_integer("MoE", "expert_capacity", value)


def _factor(name):
    def check(layer, factor):
        if factor is not None:
            check_number("MoE", name, factor, positive=True)
        ratio = capacity_ratio(factor, layer.num_experts)
        layer._capacity_ratios = {**layer._capacity_ratios, name: ratio}
        return factor

    return check


def _bias_update_rate(layer, rate):
    rate = check_number("MoE", "bias_update_rate", rate)
    if rate > 0:
        if selection_bias_of(layer.gate) is None:
            raise ValueError(
                "MoE: bias_update_rate must be 0 for a layer that was built without"
                f" score_correction_bias=True, got {rate}"
            )
        layer._stats.count_steps()
    return rate


# What the layer reads anew in every forward.
CHANGEABLE = {
    "bias_update_rate": _bias_update_rate,
    "capacity_factor": _factor("capacity_factor"),
    "eval_capacity_factor": _factor("eval_capacity_factor"),
    "min_capacity": _integer("min_capacity", 0),
    "expert_capacity": _expert_capacity,
    "capacity_scope": _name("capacity_scope", "batch", "sequence"),
    "drop_policy": _name("drop_policy", *DROP_POLICIES),
    "renormalize_after_drop": _flag("renormalize_after_drop"),
    "aux_loss_coef": _number("aux_loss_coef"),
    "z_loss_coef": _number("z_loss_coef"),
    "inject_losses": _flag("inject_losses"),
    "jitter_eps": _number("jitter_eps", below=1.0),
    "jitter_target": _name("jitter_target", "router", "block"),
}


def _fixed(name):
    def get(layer):
        if name == "bias":  # who initialises a model takes that for a parameter
            raise AttributeError(name)
        return layer._options[name]

    def refuse(layer, value):
        raise AttributeError(
            f"MoE: {name} cannot be set on a layer that is built: its parameters depend on it"
        )

    return property(get, refuse)


def _routing(name):
    def get(layer):
        return layer._routing[name]

    def set(layer, value):
        options = {**layer._routing, name: value}
        layer._routing.update(check_routing_options(layer.num_experts, **options))

    return property(get, set)


def _changeable(name, check):
    def get(layer):
        return layer._options[name]

    def set(layer, value):
        # Another dict: a shallow copy of the layer shares this one.
        layer._options = {**layer._options, name: check(layer, value)}

    return property(get, set)


_PROPERTIES = {
    **{name: _fixed(name) for name in FIXED},
    **{name: _routing(name) for name in ROUTING},
    **{name: _changeable(name, check) for name, check in CHANGEABLE.items()},
    "num_experts_per_tok": _routing("top_k"),
}


def with_options(cls):
    """The class with a property for every option."""
    for name, option in _PROPERTIES.items():
        setattr(cls, name, option)
    return cls


def arguments_of(layer):
    """{name: value} of all that `MoE` was built with and has been set since, but device and dtype; JSON."""
    arguments = {**layer._options, **layer._routing}
    return {name: _as_json(value) for name, value in arguments.items()}


def _as_json(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return float(value)  # a Fraction, which a factor may be
    return value


def layer_of(cls, arguments):
    """The `MoE` of what `arguments_of` gave, with fresh parameters."""
    dtype = arguments["router_dtype"]
    dtype = None if dtype is None else getattr(torch, dtype)
    return cls(**{**arguments, "router_dtype": dtype})
