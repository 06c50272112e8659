"""`save_pretrained` of a model with replacements: it writes what the original would.

transformers turns the names and shapes of a loaded model back into those of its checkpoints with
one function. The parameters of `base.Stacked` are turned back before it, wherever in the model
they are, so that no checkpoint has names that only this package knows.
"""

import functools

from transformers import modeling_utils


def install():
    """Replaces that function, once; for models without replacements it does what it did."""
    if not hasattr(modeling_utils.revert_weight_conversion, "before_moe_ext"):
        modeling_utils.revert_weight_conversion = _reverting(
            modeling_utils.revert_weight_conversion
        )


def _reverting(revert):
    @functools.wraps(revert)
    def revert_weight_conversion(model, state_dict):
        return revert(model, in_original(model, state_dict))

    revert_weight_conversion.before_moe_ext = revert
    return revert_weight_conversion


def in_original(model, state_dict):
    """The state_dict of a model, or a part of it, with the original's names and shapes."""
    theirs = {
        f"{place}.{name}" if place else name: (place, name, module)
        for place, module in model.named_modules()
        if hasattr(module, "in_original")  # a `base.Stacked`
        for name in module._parameters
    }
    renamed = {}
    for key, tensor in state_dict.items():
        if key not in theirs:
            renamed[key] = tensor
            continue
        place, name, module = theirs[key]
        for part, view in module.in_original(name, tensor).items():
            renamed[f"{place}.{part}" if place else part] = view
    return renamed
