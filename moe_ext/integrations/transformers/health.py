"""Is the routing healthy? Statistics by module name, warnings, and the biases that balance it.

transformers trains routers and looks at none of them; and the biases that some of its models add
to the scores for the choice alone (DeepSeek-V3's e_score_correction_bias) it never moves.
"""

import functools
import itertools
import logging
import math
import re
import warnings
import weakref
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn

from ..._checks import check_number, describe
from ...groups import group_of, is_distributed
from ...moe import MoE
from ...stats import Numbers, RoutingStats, counting, read_all
from ...training import move_biases
from .blocks.base import Replacement
from .observing import count_call, in_registry

logger = logging.getLogger("moe_ext")

# What transformers calls a bias on the choice.
BIASES = {"e_score_correction_bias", "expert_bias"}
# What is known of experts whose router is transformers'.
SEEN = (
    "drop_rate", "lost_rate", "entropy", "max_violation", "dead_experts", "tokens",
    "forwards",
)  # fmt: skip


class RoutingHealth:
    """Watches the routing of every MoE layer of a model.

        health = RoutingHealth(model, bias_update_rate=1e-3)
        for step, batch in enumerate(batches):
            ...
            optimizer.step()
            health.update_biases()
            if step % 100 == 0:
                stats = health.check()      # {"model.layers.0.mlp.experts": {"entropy": ...}, ...}

    Layers are `moe_ext.MoE`, experts that run through `experts_implementation="moe_ext"`,
    and blocks of `replace`. `RoutingCallback` does all this in transformers' Trainer.

    Args:
        model: its experts count from now on, for each `RoutingHealth` apart, and apart from
            `MoE.stats`.
        bias_update_rate: above 0: `update_biases` moves the selection biases of transformers'
            routers by this much (loss-free balancing; DeepSeek-V3: 1e-3). The rate of an
            `MoE` is its own.
        process_group: over which counts are summed. None: where torch.distributed is
            initialised, the ranks that hold the same layers and have tokens of their own, which
            the first `stats` or `update_biases` finds out; all ranks must call it.
        min_entropy: a router has collapsed below it, or when 0.7 of its highest is lost.
        max_dead: share of the experts that may be without a token.
        max_drop_rate: above it, a drop rate twice the lowest seen is too much.

    Raises:
        TypeError: model is no module; a bias is not float32 and would lose such steps.
        ValueError: the model has no such layer, and what would give it one.
    """

    def __init__(
        self, model: nn.Module, *, bias_update_rate: float = 0.0,
        process_group: dist.ProcessGroup | None = None, min_entropy: float = 0.5,
        max_dead: float = 0.25, max_drop_rate: float = 0.1,
    ):  # fmt: skip
        self.rate = check_number("RoutingHealth", "bias_update_rate", bias_update_rate)
        self.process_group = process_group
        self.min_entropy = check_number("RoutingHealth", "min_entropy", min_entropy)
        self.max_dead = check_number("RoutingHealth", "max_dead", max_dead)
        self.max_drop_rate = check_number("RoutingHealth", "max_drop_rate", max_drop_rate)
        layers, watched = _layers(model)
        self.biases = _biases(model, watched) if self.rate > 0 else {}
        if watched and self.rate > 0 and not self.biases:
            raise ValueError(
                "RoutingHealth: bias_update_rate must be 0 for routers without a selection bias"
                f" ({', '.join(sorted(BIASES))}) over all experts, got {bias_update_rate}"
            )
        self.model = model
        self.layers = layers | {name: module for name, (module, *_) in watched.items()}
        self.counted: dict[
            str, tuple[RoutingStats, RoutingStats]
        ] = {}  # by name: the RoutingStats in training, and in evaluation
        for name, layer in layers.items():
            self._watch(name, layer, layer.num_experts, next(layer.gate.parameters()).device)
        for name, (module, num_experts, device) in watched.items():
            self._watch(name, module, num_experts, device)
        self.best: defaultdict[str, dict[str, float]] = defaultdict(
            dict
        )  # by name: the best of each number so far
        self.warned: set[tuple[str, str]] = set()

    def _watch(self, name, module, num_experts, device):
        """For as long as this object lives."""
        with_step_counts = name in self.biases
        pair = (
            RoutingStats(num_experts, with_step_counts, device),
            RoutingStats(num_experts, False, device),
        )
        self.counted[name] = pair
        if getattr(module, "_is_expert_parallel", False):
            hook = functools.partial(count_call, [pair])
            remove = module.register_forward_pre_hook(hook, with_kwargs=True).remove
        else:
            watchers = vars(module).setdefault("_routing_watchers", [])
            watchers.append(pair)
            remove = functools.partial(_remove, watchers, pair)
        weakref.finalize(self, remove).atexit = False

    def _group(self):
        routers = {name: _router_parameter(self.model, name, m) for name, m in self.layers.items()}
        return group_of("RoutingHealth", self.model, routers, self.process_group)

    def stats(self, reset: bool = False, training: bool | None = None) -> dict[str, Numbers]:
        """{name: what `MoE.stats` gives} over all ranks since the last reset.

        Of experts whose router is transformers': without token_entropy and max_logit; the
        entropy is that of their load; load and drops are of the choices as they come from
        the router, which in Switch has dropped some already.

        Args:
            reset: start again from zero after reading; no one else's counts change.
            training: True or False: only what was seen in training, or in evaluation.
        """
        group = self._group()
        if not self.layers:  # of this pipeline stage
            return {}
        pairs = self.counted.values()
        if training is None:
            counted = [in_training.plus(in_evaluation) for in_training, in_evaluation in pairs]
        else:
            counted = counting(pairs, training)
        read = read_all(counted, False, *group)
        if reset:
            for stats in itertools.chain(*pairs) if training is None else counted:
                stats.reset()
        return {
            name: stats
            if isinstance(module, MoE)
            else Numbers({key: stats[key] for key in SEEN}, stats.load)
            for (name, module), stats in zip(self.layers.items(), read)
        }

    def summary(self, stats: dict[str, Numbers]) -> dict[str, float]:
        """{name: float} of the worst of all layers, and which one that is.

        worst_entropy, worst_max_violation, worst_drop_rate, and dead_experts of all layers
        together; beside each, under its name and "_layer", the place in `layers` (0, 1, ...) of
        the layer with the worst; tokens. {} where nothing was seen.
        """
        found = {}
        for key, (name, worst, total) in WORST.items():
            values = [
                (
                    math.inf * worst if math.isnan(numbers[key]) else numbers[key],
                    place,
                    numbers[key],
                )
                for place, numbers in enumerate(stats.values())
                if numbers["forwards"]
            ]
            if not values:
                return {}
            _, place, value = max(values, key=lambda v: worst * v[0])
            found[name] = sum(v for *_, v in values) if total else value
            found[f"{name}_layer"] = float(place)
        return found | {"tokens": max(numbers["tokens"] for numbers in stats.values())}

    def check(self, training: bool | None = None) -> dict[str, Numbers]:
        """`stats(reset=True)`, of which the logger "moe_ext" gets the summary at level INFO.

        At level DEBUG it gets every layer. Warns once, for each layer and each of these, of
        scores that are NaN or infinite, of a router that collapses, experts that die and drops
        that rise; of the last three where enough tokens were seen to tell.
        """
        stats = self.stats(reset=True, training=training)
        found = defaultdict(list)
        for name, numbers in stats.items():
            logger.debug("%s: %s", name, _shown(numbers))
            for problem, text in self._problems(name, numbers):
                if (name, problem) not in self.warned:
                    self.warned.add((name, problem))
                    found[problem].append(f"{name} ({text})")
        if summary := self.summary(stats):
            names = list(stats)
            logger.info(
                "%s",
                ", ".join(
                    f"{key} {summary[key]:.4g} ({names[int(summary[f'{key}_layer'])]})"
                    for key, *_ in WORST.values()
                ),
            )
        for problem, places in found.items():
            warnings.warn(f"RoutingHealth: {problem}: {', '.join(places)}", stacklevel=2)
        return stats

    def _problems(self, name, now):
        entropy, drops, dead = now["entropy"], now["drop_rate"], int(now["dead_experts"])
        largest = now.get("max_logit", 0.0)
        if not (math.isfinite(entropy) and math.isfinite(largest)):
            yield (
                "scores are NaN or infinite",
                f"entropy {entropy:.3g}, largest logit {largest:.3g}",
            )
        if now.load.sum() < 32 * len(now.load):
            return
        best = self.best[name]
        best["drop_rate"] = min(drops, best.get("drop_rate", 1.0))
        if math.isfinite(entropy):
            best["entropy"] = max(entropy, best.get("entropy", 0.0))
            if entropy < self.min_entropy or entropy < 0.3 * best["entropy"]:
                yield "the router collapses", f"entropy {entropy:.2f}, once {best['entropy']:.2f}"
        if dead > self.max_dead * len(now.load):
            yield "experts die", f"{dead} of {len(now.load)} had no token"
        if drops > self.max_drop_rate and drops > 2 * best["drop_rate"]:
            yield "drops rise", f"{drops:.0%} of the assignments, once {best['drop_rate']:.0%}"

    def update_biases(self) -> None:
        """Moves every selection bias one step against the load; once an optimizer step.

            bias_i += bias_update_rate * sign(mean(n) - n_i)

        n as in `moe_ext.update_router_biases`, which this includes.
        """
        moved = [
            (self.counted[name][0], self.rate, getattr(router, bias_name))
            for name, (router, bias_name) in self.biases.items()
        ]
        for layer in self.layers.values():
            rate = layer.config.router.bias_update_rate if isinstance(layer, MoE) else 0
            if rate > 0:
                moved.append((layer._stats, rate, layer.gate.e_score_correction_bias))
        move_biases(moved, *self._group())


# What a summary has of a number: its name there, the sign of what is worse, and whether it is
# that of all layers together.
WORST = {
    "entropy": ("worst_entropy", -1, False),
    "max_violation": ("worst_max_violation", 1, False),
    "dead_experts": ("dead_experts", 1, True),
    "drop_rate": ("worst_drop_rate", 1, False),
}


def _shown(numbers):
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def _remove(watchers, pair):
    watchers[:] = [other for other in watchers if other is not pair]


# ---- what a model has ------------------------------------------------------------------


def _router_parameter(model, name, module):
    """One that tells a layer from others, of its router where that is to be found."""
    if isinstance(module, MoE):
        return next(module.gate.parameters())
    block = model.get_submodule(_experts_name(name).rpartition(".")[0])
    experts = {id(p) for p in module.parameters()}
    matrices = [p for p in block.parameters() if p.dim() > 1]
    return next((p for p in matrices if id(p) not in experts), next(module.parameters()))


def _experts_name(name):
    return re.sub(r"(\.base_layer)+$", "", name)  # PEFT's adapters are wrapped around them


def _layers(model):
    """({name: MoE}, {name: (experts, how many, their device)}), the latter on experts_forward."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"RoutingHealth: model must be a torch.nn.Module, got {describe(model)}")
    layers, watched, elsewhere = {}, {}, None
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            layers[name] = module
        elif runs_here(module):
            num_experts = getattr(module, "total_experts", module.num_experts)  # LongCat's
            if getattr(module, "_is_expert_parallel", False):  # num_experts is this rank's
                num_experts = module.down_proj.shape[0]
            watched[name] = module, num_experts, next(module.parameters()).device
        elif in_registry(module):
            elsewhere = module.config._experts_implementation
    if not (layers or watched or is_distributed()):  # a pipeline stage may have none
        found = f"experts that run on {elsewhere!r}" if elsewhere else "no MoE layer"
        raise ValueError(
            f"RoutingHealth: found {found} in {type(model).__name__}: use moe_ext.MoE,"
            ' register() and model.set_experts_implementation("moe_ext"), or replace(model)'
        )
    return layers, watched


def runs_here(module):
    """Whether a module's forward comes to experts_forward."""
    if isinstance(module, Replacement):
        return module.computes_experts
    return in_registry(module) and module.config._experts_implementation == "moe_ext"


def _biases(model, watched):
    """{name of the experts: (the module with a bias (E) for their choice, its name there)}."""
    found = {}
    for name, (_, num_experts, _) in watched.items():
        block = model.get_submodule(_experts_name(name).rpartition(".")[0])
        for router in block.modules():
            tensors = router._buffers | router._parameters
            for bias_name in BIASES & tensors.keys():
                bias = tensors[bias_name]
                if bias is None or bias.numel() != num_experts:
                    continue
                if bias.dtype != torch.float32:
                    raise TypeError(
                        f"RoutingHealth: {bias_name} beside {name} must be float32, or steps of"
                        f" bias_update_rate are lost, got {describe(bias)}; convert it: .float()"
                    )
                found[name] = router, bias_name
    return found
