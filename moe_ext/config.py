"""Every option of a layer, once: a frozen record, made of the groups in option_groups.py.

    config = moe_ext.MoEConfig(
        hidden_size=512,
        intermediate_size=1792,
        router=moe_ext.RouterConfig(num_experts=16, top_k=4),
        losses=moe_ext.LossConfig(z_loss_coef=1e-3),
    )
    layer = moe_ext.MoE(config)     # or MoE(512, 1792, num_experts=16, top_k=4, z_loss_coef=1e-3)
    layer.config = layer.config.replace(top_k=2, capacity_factor=2.0)
    layer.top_k = 2                 # the same for one option
    MoEConfig.from_dict(layer.config.to_dict()) == layer.config

No two groups share a name, so that an option needs no path: `MoE` and `replace` take them all
side by side.
"""

import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch

from ._checks import check_integer, check_number
from ._compat import larger, smaller
from .option_groups import (
    CapacityConfig,
    Checked,
    ExpertsConfig,
    LossConfig,
    RouterConfig,
    record,
)
from .types import Activation

__all__ = [
    "Activation",
    "CapacityConfig",
    "ExpertsConfig",
    "LossConfig",
    "MoEConfig",
    "RouterConfig",
]

VERSION = 1  # of what `to_dict` writes; it goes up when an older moe_ext would misread that


@record
class MoEConfig(Checked):
    """A layer without its parameters.

    Attributes:
        hidden_size: H.
        intermediate_size: I of each expert.
        router: A `RouterConfig`.
        experts: An `ExpertsConfig`.
        capacity: A `CapacityConfig`.
        losses: A `LossConfig`.
        init_std: Standard deviation of all matrices at the start; biases are 0.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what came.
    """

    hidden_size: int
    intermediate_size: int
    router: RouterConfig = RouterConfig()
    experts: ExpertsConfig = ExpertsConfig()
    capacity: CapacityConfig = CapacityConfig()
    losses: LossConfig = LossConfig()
    init_std: float = 0.02

    # (numerator, denominator) of a capacity factor over E, in eval and in training.
    _ratios: ClassVar[tuple[tuple[int, int] | None, ...]]

    def __post_init__(self):
        self._check(check_integer, "hidden_size", "intermediate_size")
        self._check(check_number, "init_std")
        for name, cls in GROUPS.items():
            if not isinstance(getattr(self, name), cls):
                raise TypeError(
                    f"MoE: {name} must be a {cls.__name__}, got {type(getattr(self, name)).__name__}"
                )
        # Now: torch.compile would trace the fractions of every forward.
        factors = self.capacity.eval_capacity_factor, self.capacity.capacity_factor
        self._put("_ratios", tuple(_ratio(f, self.router.num_experts) for f in factors))

    @classmethod
    def of(cls, hidden_size: int, intermediate_size: int, **options: Any) -> "MoEConfig":
        """The config of sizes and options side by side, as `MoE` takes them.

        Args:
            hidden_size: H.
            intermediate_size: I of each expert.
            **options: Any of the other options, by name.
        """
        return cls(hidden_size=hidden_size, intermediate_size=intermediate_size).replace(**options)

    def replace(self, **options: Any) -> "MoEConfig":
        """The same with other options, each by its name: config.replace(top_k=1, z_loss_coef=1e-3).

        A group is an option too: config.replace(losses=LossConfig()). `num_experts_per_tok` is
        another name of `top_k`.

        Args:
            **options: The options that change, by name.

        Raises:
            TypeError, ValueError: an unknown or a wrong option.
        """
        changes = _by_group(options)
        for name in GROUPS:
            if isinstance(changes.get(name), dict):
                changes[name] = _replaced(getattr(self, name), changes[name])
        return dataclasses.replace(self, **changes)

    __replace__ = replace  # copy.replace, from Python 3.13 on

    def options(self) -> dict[str, Any]:
        """{name: value} of every option, side by side."""
        return {name: option(self, name) for name in PLACES}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the `version` of the format."""
        return {"version": VERSION, **_as_json(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MoEConfig":
        """What `to_dict` gave. Options that are missing take their defaults.

        Args:
            values: A dict of JSON's types.

        Raises:
            TypeError, ValueError: an unknown key or a wrong value; or a later version.
        """
        values = dict(values)
        version = values.pop("version", VERSION)
        if check_integer("MoEConfig.from_dict", "version", version) > VERSION:
            raise ValueError(
                f"MoEConfig.from_dict: version must be at most {VERSION}, which this moe_ext knows,"
                f" got {version}: a later moe_ext wrote it"
            )
        return _from_json(cls, values)

    def to_json(self) -> str:
        """`to_dict` as a text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "MoEConfig":
        """`from_dict` of a text.

        Args:
            text: What `to_json` gave.
        """
        return cls.from_dict(json.loads(text))

    def room(self, shape: Sequence[int], training: bool) -> tuple[int | None, int]:
        """What `capacity_scatter` is told of the room in the experts.

        Args:
            shape: Of x, (..., H).
            training: Whether the layer is in training mode.

        Returns:
            (capacity, num_sequences); the capacity is None where nothing is dropped.
        """
        if self.capacity.capacity_scope == "sequence":
            shape = (1, *shape)[-max(len(shape), 2) :]  # one token is a sequence
            tokens, num_sequences = shape[-2], max(math.prod(shape[:-2]), 1)
        else:
            tokens, num_sequences = math.prod(shape[:-1]), 1
        return self.rows_per_expert(tokens, training), num_sequences

    def rows_per_expert(self, tokens: int, training: bool) -> int | None:
        """C, the most rows of an expert, or None where nothing is dropped.

        Exact integers, and symbolic ones for torch.compile.

        Args:
            tokens: T, or those of a sequence.
            training: Whether the layer is in training mode.
        """
        if self.capacity.expert_capacity is not None:
            return smaller(self.capacity.expert_capacity, tokens)
        ratio = self._ratios[1 if training else 0]  # torch 2.11's Dynamo indexes with no bool
        if ratio is None:
            return None
        numerator, denominator = ratio
        rows = -(-(tokens * numerator * self.router.top_k) // denominator)
        return smaller(larger(rows, self.capacity.min_capacity), tokens)


def _ratio(factor, num_experts):
    """(numerator, denominator) of factor / E, or None: dropless.

    The factor is the fraction nearest to it with a denominator of at most a million.
    """
    if factor is None:
        return None
    # A factor of E is no limit already, and keeps the integers small.
    ratio = Fraction(min(factor, num_experts)).limit_denominator(10**6) / num_experts
    return ratio.numerator, ratio.denominator


# ---- options by name -----------------------------------------------------------------

GROUPS = {
    "router": RouterConfig,
    "experts": ExpertsConfig,
    "capacity": CapacityConfig,
    "losses": LossConfig,
}


def _places():
    """{option: the attributes that lead to it from a MoEConfig}."""
    places = {}
    for field in dataclasses.fields(MoEConfig):
        if field.name not in GROUPS:
            places[field.name] = (field.name,)
            continue
        for leaf in dataclasses.fields(GROUPS[field.name]):
            places[leaf.name] = (field.name, leaf.name)
    activation = places.pop("activation")
    for name in Activation._fields:
        places["activation" if name == "name" else name] = (*activation, name)
    return places


PLACES = _places()


def option(config, name):
    """The option of that name."""
    return functools.reduce(getattr, PLACES[name], config)


def _by_group(options):
    """{field of MoEConfig: its value, or {field of the group: value}}."""
    options = _with_one_top_k(options)
    changes = {name: options.pop(name) for name in GROUPS.keys() & options.keys()}
    for name, value in options.items():
        if name not in PLACES:
            raise TypeError(f"MoE: {name} is no option; there are {', '.join(sorted(PLACES))}")
        group, *leaf = PLACES[name]
        if not leaf:
            changes[group] = value
            continue
        if not isinstance(changes.setdefault(group, {}), dict):
            raise TypeError(f"MoE: {name} must stand inside {group}, which is given too")
        if leaf[0] == "activation" and not isinstance(value, Activation):
            changes[group].setdefault(Activation, {})[leaf[1]] = value
        else:
            changes[group][leaf[0]] = value
    return changes


def _replaced(group, changes):
    of_activation = changes.pop(Activation, None)
    if of_activation:
        whole = changes.get("activation", getattr(group, "activation", None))
        changes["activation"] = whole._replace(**of_activation)
    return dataclasses.replace(group, **changes)


def _with_one_top_k(options):
    """The options, K under one of its two names."""
    options = dict(options)
    other = options.pop("num_experts_per_tok", None)
    if options.get("top_k") is None:
        options.pop("top_k", None)
        return options if other is None else {**options, "top_k": other}
    if other is not None and other != options["top_k"]:
        raise ValueError(
            "MoE: top_k and num_experts_per_tok are two names of one number, and must be equal,"
            f" got {options['top_k']!r} and {other!r}"
        )
    return options


# ---- JSON ------------------------------------------------------------------------------


def _as_json(value):
    if isinstance(value, Activation):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return float(value)  # a Fraction, which a factor may be
    return value


def _from_json(cls, values):
    known = cls._fields if cls is Activation else [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise TypeError(
                f"MoEConfig.from_dict: {cls.__name__} has no {name!r}; there are {', '.join(known)}"
            )
    values = dict(values)
    for name, group in {**GROUPS, "activation": Activation}.items():
        if isinstance(values.get(name), Mapping):
            values[name] = _from_json(group, values[name])
    if isinstance(values.get("router_dtype"), str):
        values["router_dtype"] = getattr(torch, values["router_dtype"], values["router_dtype"])
    return cls(**values)
