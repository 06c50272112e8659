"""`MoE` layers in a model of transformers: its config says which, and its construction builds them.

    import moe_ext.integrations.transformers
    moe_ext.replace_ffn(model, 8, 2)        # or: model.model.layers[3].mlp = MoE.from_dense(...)
    model.save_pretrained(folder)           # model.config.moe_ext: {module's name: its config}
    ...
    import moe_ext.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder)

A model is built with the layers of its config before it gets any weights, so all that
from_pretrained does with a model holds for them: the meta device, dtype, device_map, keys that
are missing or left over. Their parameters are as the rest of the model's: in its dtype, and
trained.
"""

import functools
import warnings

from transformers import PreTrainedModel

from ...config import MoEConfig
from ...moe import MoE

KEY = "moe_ext"  # of a config


def install():
    """Called on import; each method is replaced once, and does what it did for all other models."""
    if not hasattr(PreTrainedModel.post_init, "before_moe_ext"):
        PreTrainedModel.post_init = _first(_build, PreTrainedModel.post_init)
        PreTrainedModel.save_pretrained = _first(record, PreTrainedModel.save_pretrained)


def _first(ours, theirs):
    @functools.wraps(theirs)
    def method(self, *args, **kwargs):
        ours(self)
        return theirs(self, *args, **kwargs)

    method.before_moe_ext = theirs
    return method


def record(model):
    """Writes the layers into the config of each outermost model of transformers in `model`."""
    outermost = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, PreTrainedModel) and not inside:
            outermost.append(name)
            _record(module)


def _record(model):
    config = model.config
    recorded = {
        name: module.config.to_dict()
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MoE)
    }
    if recorded:
        setattr(config, KEY, recorded)
        if config.to_dict().get(KEY) != recorded:
            warnings.warn(
                f"moe_ext: {type(config).__name__} does not save attributes it does not know, so"
                " from_pretrained will not build the layers of moe_ext: build the model, call"
                " replace_ffn(model, upcycled=False) as before, and load the state_dict",
                stacklevel=4,
            )
    elif hasattr(config, KEY):
        delattr(config, KEY)


def _build(model):
    """Puts the layers of its config into a model that is being constructed."""
    for name, config in getattr(model.config, KEY, {}).items():
        place = _place(model, name)
        if place is None or isinstance(model.get_submodule(place), MoE):
            continue
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, MoE(MoEConfig.from_dict(config)))


def _place(model, name):
    """The module's name here: a model with a head and the one without have it under two names."""
    prefix = f"{model.base_model_prefix}."
    for place in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(place)
        except AttributeError:
            continue
        return place
    return None  # in a part that this model does not have


install()
