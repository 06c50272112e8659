"""The options of a layer as its attributes: setting one is checked, and governs all that it did at
construction; or it is refused.

    layer.capacity_factor = 2.0     # from the next forward on
    layer.top_k = 1                 # in the routing, the capacity and the losses
    layer.num_experts = 4           # AttributeError: the parameters were made for it
"""

import inspect
from dataclasses import fields

from .config import PLACES, ExpertsConfig, MoEConfig, option
from .types import Activation

# These decide which parameters a layer has, their layout and their values.
FIXED = frozenset(
    {
        "hidden_size", "intermediate_size", "num_experts", "gate_bias", "score_correction_bias",
        "router_dtype", "init_std", *(f.name for f in fields(ExpertsConfig)),
        *Activation._fields[1:],
    }
)  # fmt: skip


def config_of(hidden_size, intermediate_size, num_experts, top_k, options):
    """What `MoE` is told: a config, or the sizes and options of one."""
    if isinstance(hidden_size, MoEConfig):
        if (intermediate_size, num_experts, top_k, options) != (None, 8, None, {}):
            raise TypeError("MoE: a config stands for all options: config.replace(...) has others")
        return hidden_size
    return MoEConfig.of(
        hidden_size, intermediate_size, num_experts=num_experts, top_k=top_k, **options
    )


def with_options(cls):
    """A layer's class with `config` and a property for each option in it, over `_settings`.

    Setting one is checked, and governs all that it did at construction; or it is refused.
    """
    cls.config = property(_config, _change)
    for name in PLACES.keys() - {"shared_expert_gate"}:  # a module has this name
        setattr(cls, name, _property(name))
    cls.num_experts_per_tok = _property("top_k")
    cls.__init__.__signature__ = _signature(cls.__init__)
    return cls


def _config(layer) -> MoEConfig:
    """Every option, in a frozen record; setting another one gives the layer its options."""
    return layer._settings.config


def _change(layer, config):
    before, rate = layer.config, config.router.bias_update_rate
    if rate > 0:
        if not before.router.score_correction_bias:
            raise ValueError(
                "MoE: bias_update_rate must be 0 for a layer that was built without"
                f" score_correction_bias=True, got {rate}"
            )
        layer._stats.count_steps()
    for name in FIXED:
        if option(config, name) != option(before, name):
            _refuse_fixed(name)
    layer._settings.config = config


def _refuse_fixed(name):
    raise AttributeError(
        f"MoE: {name} cannot be set on a layer that is built: its parameters depend on it"
    )


def _property(name):
    def get(layer):
        if name == "bias":  # code that initialises models takes it for a parameter
            raise AttributeError(name)
        return option(layer.config, name)

    def set(layer, value):
        if name in FIXED:
            _refuse_fixed(name)
        layer.config = layer.config.replace(**{name: value})

    return property(get, set)


def _signature(function):
    """The function's with every option in the place of **options: help() and editors show it."""
    signature = inspect.signature(function)
    *known, _ = signature.parameters.values()
    names = {p.name for p in known}
    defaults = {
        **MoEConfig(hidden_size=1, intermediate_size=1).options(),
        "num_experts_per_tok": None,
    }
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
        if name not in names
    ]
    return signature.replace(parameters=[*known, *options])


def described(config):
    """A line for repr(layer): what is not as by default, and what every reader wants to know."""
    default = MoEConfig(hidden_size=1, intermediate_size=1)
    always = (
        "hidden_size",
        "intermediate_size",
        "num_experts",
        "top_k",
        "activation",
        "capacity_factor",
    )
    return ", ".join(
        f"{name}={value!r}"
        for name, value in config.options().items()
        if name in always or value != option(default, name)
    )
