"""Whether the installed transformers is one that this package can work with."""

import importlib
import inspect

PROVEN = "5.23.0"

# What the decorator of an experts class can say of it, as far as experts.py honours it.
FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
_NOT_FLAGS = {"experts_class", "experts_interface"}


def check_transformers():
    """Refuses a transformers that is missing, too old or too new, saying what would work.

    Judged by what it has, not by its number: one without the registry of experts functions is
    too old; one whose decorator has a flag that is unknown here is too new, since a
    function that does not heed a flag gives wrong results.

    Raises:
        ImportError: as above.
    """
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError:
        raise ImportError(_text("found none")) from None
    try:
        moe = importlib.import_module("transformers.integrations.moe")
        flags = set(inspect.signature(moe.use_experts_implementation).parameters) - _NOT_FLAGS
        moe.ALL_EXPERTS_FUNCTIONS, moe._default_apply_gate  # noqa: B018
    except (ImportError, AttributeError):
        problem = f"found {version}, which has no registry of experts functions: it is too old"
        raise ImportError(_text(problem)) from None
    if flags - FLAGS:
        unknown = ", ".join(sorted(flags - FLAGS))
        problem = f"found {version}, whose experts have flags unknown here ({unknown}): too new"
        raise ImportError(_text(problem))


def _text(problem):
    return (
        f"moe_ext.integrations.transformers: {problem}; proven with transformers {PROVEN}"
        f" (pip install transformers=={PROVEN})"
    )
