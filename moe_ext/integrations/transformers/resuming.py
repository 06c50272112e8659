"""A Trainer that resumes has the experts of its checkpoint.

Where a family's checkpoints have other names than its modules (Mixtral's experts, one tensor a
matrix there, all in one here), from_pretrained converts; transformers' Trainer does not, but
loads what happens to have the same name, logs the rest and trains on with experts of random
values (transformers#48805; in 5.24 still). So it does for `load_best_model_at_end`.
"""

import functools
import inspect
import warnings

import torch
from transformers import PreTrainedModel
from transformers.trainer import Trainer


def install():
    """Called on import; each method is replaced once, and does what it did where all names are the same."""
    if not hasattr(Trainer._load_from_checkpoint, "before_moe_ext"):
        Trainer._load_from_checkpoint = _converting(Trainer._load_from_checkpoint)
        Trainer._load_best_model = _converting(Trainer._load_best_model)


def _converting(load):
    signature = inspect.signature(load)

    @functools.wraps(load)
    def method(self, *args, **kwargs):
        results = []  # before the Trainer warns of them
        self._issue_warnings_after_load = results.append
        try:
            load(self, *args, **kwargs)
        finally:
            del self._issue_warnings_after_load
        arguments = signature.bind(self, *args, **kwargs).arguments
        folder = arguments.get("resume_from_checkpoint", self.state.best_model_checkpoint)
        for result in results:
            renamed = result.missing_keys and result.unexpected_keys
            if renamed and isinstance(self.model, PreTrainedModel):
                result = _restore(self.model, folder, result)
            self._issue_warnings_after_load(result)

    method.before_moe_ext = load
    return method


def _restore(model, folder, result):
    """Loads the checkpoint again, as from_pretrained does; what then is missing or left over."""
    try:
        state_dict, left_over = _converted(model, folder)
    except Exception as raised:  # whatever building another model of its class may raise
        problem = f"from_pretrained raised {type(raised).__name__}: {raised}"
        _warn(folder, result.missing_keys, problem)
        return result
    result = model.load_state_dict(state_dict, strict=False)
    result.unexpected_keys.extend(left_over)
    if missing := set(result.missing_keys) - set(model.all_tied_weights_keys):
        _warn(folder, missing, "it has no such tensors")
    return result


def _warn(folder, missing, problem):
    some = ", ".join(sorted(missing)[:3])
    warnings.warn(
        f"moe_ext: the Trainer did not restore {len(missing)} tensors from {folder}, which are"
        f" what they were before ({some} ...): {problem}. Load the model with"
        " from_pretrained(folder) before the Trainer is made",
        stacklevel=5,
    )


def _converted(model, folder):
    """({name in the model: tensor of the checkpoint}, what of the checkpoint is left over)."""
    # Wide enough for each parameter to come back exactly, in a model of several dtypes.
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    loaded, report = type(model).from_pretrained(
        folder,
        config=model.config,
        dtype=functools.reduce(torch.promote_types, dtypes),
        output_loading_info=True,
    )
    drawn = set(report["missing_keys"])
    state_dict = {name: t for name, t in loaded.state_dict().items() if name not in drawn}
    return state_dict, sorted(report["unexpected_keys"])


install()
