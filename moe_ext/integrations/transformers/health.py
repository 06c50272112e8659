"""Is the routing healthy? Statistics by module name, warnings, and the biases that balance it.

transformers trains routers and looks at none of them; and the biases that some of its models add
to the scores for the choice alone (DeepSeek-V3's e_score_correction_bias) it never moves.
"""

import logging
import re
import warnings
from collections import defaultdict

import torch
from torch import nn
from transformers import TrainerCallback

from ..._checks import check_number, describe
from ...moe import MoE
from ...routing import move_biases, reduces
from ...stats import RoutingStats, read_all
from ...types import Route

logger = logging.getLogger("moe_ext")

# What transformers calls a bias on the choice.
BIASES = {"e_score_correction_bias", "expert_bias"}
# What is known of experts whose router is transformers'.
SEEN = (
    "load", "drop_rate", "lost_rate", "entropy", "max_violation", "dead_experts", "tokens",
    "forwards",
)  # fmt: skip


def observe(experts, top_k_index):
    """Counts a forward's choices, where a `RoutingHealth` watches these experts."""
    stats = getattr(experts, "_routing_stats", None)
    if stats is None:
        return
    with torch.no_grad():
        stats.to(top_k_index.device)
        num_experts = len(stats.counts)
        counted = top_k_index.flatten().long().clamp(max=num_experts)
        load = torch.zeros(num_experts + 1, dtype=torch.int32, device=counted.device)
        load = load.scatter_add(0, counted, torch.ones_like(counted, dtype=torch.int32))[:-1]
        assignment_row = None
        if getattr(experts, "sentinels_are_drops", False):
            dropped = top_k_index >= num_experts
            assignment_row = torch.where(dropped, -1, 0).int()
            top_k_index = top_k_index.masked_fill(dropped, 0)
        # Of the scores nothing is known here: the load stands for their sums, and logits of 0
        # for the logits.
        route = Route(None, top_k_index, load, load.double(), None)
        logits = torch.zeros(len(top_k_index), num_experts, device=load.device)
        stats.accumulate(logits, route, assignment_row, None, "softmax", experts.training)


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
        model: its experts count from now on; a later `RoutingHealth` counts for itself.
        bias_update_rate: above 0: `update_biases` moves the selection biases of transformers'
            routers by this much (loss-free balancing; DeepSeek-V3: 1e-3). The rate of an
            `MoE` is its own.
        process_group: over which counts are summed; None: the default group, where
            torch.distributed is initialised. All its ranks must make the same calls.
        min_entropy: a router has collapsed below it, or when 0.7 of its highest is lost.
        max_dead: share of the experts that may be without a token.
        max_drop_rate: above it, a drop rate twice the lowest seen is too much.

    Raises:
        TypeError: model is no module; a bias is not float32 and would lose such steps.
        ValueError: the model has no such layer, and what would give it one.
    """

    def __init__(
        self, model, *, bias_update_rate=0.0, process_group=None,
        min_entropy=0.5, max_dead=0.25, max_drop_rate=0.1,
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
        for name, (module, num_experts, device) in watched.items():
            module._routing_stats = RoutingStats(num_experts, name in self.biases, device)
        self.layers = layers | {name: module for name, (module, *_) in watched.items()}
        self.best = defaultdict(dict)  # by name: the best of each number so far
        self.warned = set()

    def stats(self, reset=False):
        """{name: the dict of `MoE.stats`} over all ranks since the last reset.

        Of experts whose router is transformers': without token_entropy and max_logit; the
        entropy is that of their load; load and drops are of the choices as they come from
        the router, which in Switch has dropped some already.
        """
        group = self.process_group
        read = read_all([_stats(m) for m in self.layers.values()], reset, reduces(group), group)
        return {
            name: stats if isinstance(module, MoE) else {key: stats[key] for key in SEEN}
            for (name, module), stats in zip(self.layers.items(), read)
        }

    def check(self):
        """`stats(reset=True)`, logged at level INFO of the logger "moe_ext".

        Warns once, for each layer and each of these, of a router that collapses, experts
        that die and drops that rise, where enough tokens were seen to tell.
        """
        stats = self.stats(reset=True)
        found = defaultdict(list)
        for name, numbers in stats.items():
            shown = (f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, float))
            logger.info("%s: %s", name, ", ".join(shown))
            if numbers["load"].sum() < 32 * len(numbers["load"]):
                continue
            best = self.best[name]
            best["entropy"] = max(numbers["entropy"], best.get("entropy", 0.0))
            best["drop_rate"] = min(numbers["drop_rate"], best.get("drop_rate", 1.0))
            for problem, text in self._problems(numbers, best):
                if (name, problem) not in self.warned:
                    self.warned.add((name, problem))
                    found[problem].append(f"{name} ({text})")
        for problem, places in found.items():
            warnings.warn(f"RoutingHealth: {problem}: {', '.join(places)}", stacklevel=2)
        return stats

    def _problems(self, now, best):
        entropy, drops, dead = now["entropy"], now["drop_rate"], int(now["dead_experts"])
        if entropy < self.min_entropy or entropy < 0.3 * best["entropy"]:
            yield "the router collapses", f"entropy {entropy:.2f}, once {best['entropy']:.2f}"
        if dead > self.max_dead * len(now["load"]):
            yield "experts die", f"{dead} of {len(now['load'])} had no token"
        if drops > self.max_drop_rate and drops > 2 * best["drop_rate"]:
            yield "drops rise", f"{drops:.0%} of the assignments, once {best['drop_rate']:.0%}"

    def update_biases(self):
        """Moves every selection bias one step against the load; once an optimizer step.

            bias_i += bias_update_rate * sign(mean(n) - n_i)

        n as in `moe_ext.update_router_biases`, which this includes.
        """
        moved = [
            (self.layers[name]._routing_stats, self.rate, getattr(router, bias_name))
            for name, (router, bias_name) in self.biases.items()
        ]
        for layer in self.layers.values():
            if isinstance(layer, MoE) and layer.bias_update_rate > 0:
                bias = layer.gate.e_score_correction_bias
                moved.append((layer._stats, layer.bias_update_rate, bias))
        move_biases(moved, self.process_group)


class RoutingCallback(TrainerCallback):
    """`RoutingHealth` in transformers' Trainer.

        Trainer(..., callbacks=[RoutingCallback(bias_update_rate=1e-3)])

    Biases move after every optimizer step. Every training log gets "moe/<name>/<number>" for
    each layer, also in `trainer.state.log_history`. Arguments are those of `RoutingHealth`.

    A Trainer calls its trackers (`report_to`) before `callbacks`. For the numbers to reach them:

        trainer.callback_handler.callbacks.insert(0, RoutingCallback())
    """

    def __init__(self, **options):
        self.options = options
        self.health = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.health = RoutingHealth(model, **self.options)

    def on_step_end(self, args, state, control, **kwargs):
        self.health.update_biases()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.health is None or not logs or any(key.startswith("eval_") for key in logs):
            return
        numbers = {
            f"moe/{name}/{key}": value
            for name, stats in self.health.check().items()
            for key, value in stats.items()
            if isinstance(value, float) and stats["forwards"]  # none before the run's summary
        }
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)


# ---- what a model has ------------------------------------------------------------------


def _stats(module):
    return module._stats if isinstance(module, MoE) else module._routing_stats


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
            watched[name] = module, num_experts, next(module.parameters()).device
        elif hasattr(module, "_is_expert_parallel"):
            elsewhere = module.config._experts_implementation
    if not (layers or watched):
        found = f"experts that run on {elsewhere!r}" if elsewhere else "no MoE layer"
        raise ValueError(
            f"RoutingHealth: found {found} in {type(model).__name__}: use moe_ext.MoE,"
            ' register() and model.set_experts_implementation("moe_ext"), or replace(model)'
        )
    return layers, watched


def runs_here(module):
    """Whether a module's forward comes to experts_forward."""
    from .blocks.base import Replacement

    if isinstance(module, Replacement):
        return module.computes_experts
    is_experts = hasattr(module, "_is_expert_parallel")
    return is_experts and module.config._experts_implementation == "moe_ext"


def _biases(model, watched):
    """{name of the experts: (the module with a bias (E) for their choice, its name there)}."""
    found = {}
    for name, (_, num_experts, _) in watched.items():
        experts = re.sub(r"(\.base_layer)+$", "", name)  # PEFT's adapters are wrapped around them
        block = model.get_submodule(experts.rpartition(".")[0])
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
