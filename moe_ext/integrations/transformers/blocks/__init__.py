"""MoE blocks of transformers that do not go through its registry of experts functions.

Each family has a module here, with a subclass of every class of transformers' whose forward
becomes ours. `replace` turns a model's modules into these, in place; the routers stay
transformers' own, and with them the dropping rules and `output_router_logits`.

Not here: doge, whose experts are single vectors found by product keys, and vitpose, whose
experts are linear maps chosen by the data set: neither has feed-forward experts. JetMoe's
mixture of attention heads stays as it is; its feed-forward mixture is replaced.
"""

import importlib
import inspect

from torch import nn

from ...._checks import describe
from .._version import PROVEN
from ..observing import in_registry
from . import checkpoints
from .base import Replacement, Stacked

# The classes of transformers.models.<family>.modeling_<family> that <family>.py replaces.
FAMILIES = {
    "dbrx": ("DbrxExperts",),
    "jetmoe": ("JetMoeMoE",),
    "llama4": ("Llama4TextExperts", "Llama4TextMoe"),
    "longcat_flash": ("LongcatFlashExperts",),
    "nllb_moe": ("NllbMoeExperts",),
    "step3p7": ("Step3p7Experts",),
    "switch_transformers": ("SwitchTransformersExperts",),
}
_FAMILY = {
    f"transformers.models.{family}.modeling_{family}.{name}": family
    for family, names in FAMILIES.items()
    for name in names
}


def replace(model: nn.Module) -> dict[str, nn.Module]:
    """Runs the MoE blocks of a model outside transformers' registry on moe_ext's kernels.

        replace(model)              # in place; before an optimizer is made
        ...
        restore(model)              # the original classes and state_dict, with the weights of now

    For dbrx, jetmoe, llama4, longcat_flash, nllb_moe, step3p7 and switch_transformers; other
    models have `register` and `set_experts_implementation("moe_ext")`. Outputs, dropped tokens
    and `output_router_logits` stay what they were, and so does what `save_pretrained` writes.
    Experts that are a module each (Switch, NLLB-MoE) or flat (DBRX) become one parameter a
    matrix, `experts.up_proj (E, I, H)` and so on, until `restore`, and are frozen where they
    were; the other families keep theirs. The state_dict has the parameters of now;
    `load_state_dict` takes the original's too.

    Returns:
        {name: module} of what was replaced.

    Raises:
        TypeError: model is no module, or holds quantised experts.
        ValueError: there is nothing to replace, or some experts of a block are frozen and
            others not, which one parameter cannot be.
        RuntimeError: a block is not as in the transformers that this was proven with, or
            its forward is already that of something else (accelerate's hooks). In all
            cases the model is left unchanged.
    """
    found = _modules(model, "replace", lambda module: _path(type(module)) in _FAMILY)
    if not found:
        raise ValueError(f"replace: {_nothing(model)}")
    chosen = {name: (module, _ours(module)) for name, module in found.items()}
    for name, (module, ours) in chosen.items():
        _check(name, module, ours)
    checkpoints.install()
    for module, ours in chosen.values():
        module.__class__ = ours
        module.adopt()
    return found


def restore(model: nn.Module) -> dict[str, nn.Module]:
    """Undoes `replace`: transformers' own classes, names and shapes, with the weights of now.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in it was replaced; the model is then unchanged.
    """
    found = _modules(model, "restore", lambda module: isinstance(module, Replacement))
    if not found:
        raise ValueError(f"restore: found nothing of replace() in {type(model).__name__}")
    for module in found.values():
        module.release()
        module.__class__ = module.original_class()
    return found


def _modules(model, op, predicate):
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {describe(model)}")
    return {name: module for name, module in model.named_modules() if predicate(module)}


def _path(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def _ours(module):
    """The class of ours for a module of transformers'."""
    family = importlib.import_module(f".{_FAMILY[_path(type(module))]}", __package__)
    return family.REPLACEMENTS[type(module)](module)


def _nothing(model):
    """Why there is nothing to replace, and what would work."""
    name = type(model).__name__
    if _modules(model, "replace", lambda module: isinstance(module, Replacement)):
        return f"all MoE blocks of {name} are already replaced"
    if _modules(model, "replace", in_registry):
        return (
            f"the experts of {name} go through transformers' registry: register() and"
            ' model.set_experts_implementation("moe_ext")'
        )
    return f"found no MoE block in {name}; known are those of {', '.join(FAMILIES)}"


def _check(name, module, ours):
    """Refuses, before anything changes, what could not be replaced."""
    theirs = tuple(inspect.signature(type(module).forward).parameters)
    if theirs != ours.forward_arguments:
        raise RuntimeError(
            f"replace: the forward of {type(module).__name__} ({name}) takes"
            f" {', '.join(theirs)}, where transformers {PROVEN}, with which this was proven, has"
            f" {', '.join(ours.forward_arguments)}"
        )
    if "forward" in vars(module):
        raise RuntimeError(
            f"replace: the forward of {name} is already replaced by another library, such as"
            " accelerate's hooks: replace before these are put on"
        )
    for parameter_name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise TypeError(
                f"replace: {name}.{parameter_name} must be floating, got {describe(parameter)}:"
                " quantised experts stay as they are"
            )
    if issubclass(ours, Stacked) and (problem := ours.check(module)):
        raise ValueError(f"replace: in {name} {problem}")
