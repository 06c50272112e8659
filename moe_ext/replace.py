"""A model's dense feed-forward networks, each replaced by an `MoE`."""

import fnmatch
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._checks import describe
from .config import MoEConfig
from .dense import NotDenseError, arrangements, linear_maps, read_dense
from .moe import MoE
from .upcycling import layer_for, side_by_side, upcycle

__all__ = ["replace_ffn"]

Match = str | type[nn.Module] | Callable[[str, nn.Module], bool] | None


@torch.inference_mode(False)
def replace_ffn(
    model: nn.Module,
    num_experts: int | MoEConfig = 8,
    top_k: int | None = None,
    *,
    match: Match = None,
    upcycled: bool = True,
    **options: Any,
) -> dict[str, MoE]:
    """Puts an `MoE` in the place of a model's dense feed-forward networks.

        swapped = moe_ext.replace_ffn(model, num_experts=8, top_k=2)
        print(*swapped)             # layers.0.mlp layers.1.mlp ...

    Args:
        model: Changed in place.
        num_experts: E; or the `MoEConfig` of such a layer.
        top_k: K.
        match: Which modules: a pattern of their names ("layers.*.mlp"), a class, or a
            function (name, module) -> bool. None: every module that computes a dense
            FFN of two or three linear maps. What is inside an `MoE` is left alone.
        upcycled: Every expert starts as a copy of the FFN, and the model computes what
            it did (see `MoE.from_dense`). False: fresh experts, for which `options` may
            have an `intermediate_size` of their own; the model may be on the meta device.
        **options: Of `MoE`. Sizes, activation, biases, device, dtype and mode come from each
            FFN; capacity_factor is None (dropless) unless given.

    Returns:
        {name: MoE} of what was swapped. A module that stood in two places is the same
        `MoE` in both.

    A model of transformers has its layers and their arguments in `model.config.moe_ext` from
    then on, which `save_pretrained` writes, and whatever is built from that config has such
    layers. So does what from_pretrained loads where moe_ext is imported; elsewhere transformers
    fills dense FFNs at random, and warns of keys that are MISSING:

        import moe_ext.integrations.transformers    # before from_pretrained
        model = AutoModelForCausalLM.from_pretrained(folder)

    Any other model is built anew by the same call, and then loads its state_dict:

        moe_ext.replace_ffn(model, 8, 2, upcycled=False)
        model.load_state_dict(state_dict)

    Raises:
        ValueError: nothing was found, a module that `match` chose is no dense FFN, or an
            option is wrong; the model is then unchanged.
        TypeError: match is none of the above.
    """
    if upcycled and "intermediate_size" in options:
        raise ValueError(
            "replace_ffn: intermediate_size must be left out of upcycled experts, which are"
            f" copies of the FFN, got {options['intermediate_size']}"
        )
    chosen = _predicate(match)
    made: dict[nn.Module, MoE] = {}
    places: dict[str, MoE] = {}
    taken: list[str] = []
    refused: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(name.startswith(f"{prefix}.") for prefix in taken):
            continue
        if isinstance(module, MoE):
            taken.append(name)
        elif chosen(name, module):
            try:
                if module not in made:
                    if upcycled:
                        made[module] = upcycle(MoE, module, num_experts, top_k, **options)
                    else:
                        made[module] = _fresh(module, num_experts, top_k, options)
            except NotDenseError as problem:
                if match is not None:
                    raise ValueError(f"replace_ffn: {name}: {problem}") from None
                refused.append(f"{name}: {problem}")
                continue
            taken.append(name)
            places[name] = made[module]
    if not places:
        raise ValueError(
            "replace_ffn: match must choose a dense feed-forward network inside model, found none"
            + "".join(f"; {reason}" for reason in refused[:3])
        )
    for name, layer in places.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    _record(model)
    return places


def _fresh(ffn, num_experts, top_k, options):
    num_experts, top_k, options = side_by_side(num_experts, top_k, dict(options))
    dense = read_dense(ffn, options.pop("activation", None))
    return layer_for(MoE, ffn, dense, num_experts, top_k, **options)


def _record(model):
    """What there is now, in the config of each model of transformers that is in it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(
        isinstance(module, modeling.PreTrainedModel) for module in model.modules()
    ):
        return
    try:
        from .integrations.transformers.saving import record
    except ImportError as error:
        warnings.warn(
            "replace_ffn: the layers are not recorded in the model's config, so that from_pretrained"
            f" will not build them: {error}",
            stacklevel=3,
        )
        return
    record(model)


def _predicate(match):
    """(name, module) -> bool from what replace_ffn takes."""
    if match is None:
        return lambda name, module: any(True for _ in arrangements(linear_maps(module)))
    if isinstance(match, str):
        return lambda name, module: fnmatch.fnmatchcase(name, match)
    if isinstance(match, type) and issubclass(match, nn.Module):
        return lambda name, module: isinstance(module, match)
    if callable(match):
        return match
    raise TypeError(
        "replace_ffn: match must be None, a pattern of names, a module class or a function"
        f" (name, module) -> bool, got {describe(match)}"
    )
