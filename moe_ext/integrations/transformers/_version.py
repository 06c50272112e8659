"""Whether the installed transformers is one that this package can work with."""

import importlib
import inspect

OLDEST, PROVEN = "5.17.0", "5.24.0"  # the suite passes on both

# What the decorator of an experts class says of it, and experts.py heeds.
FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate"}
LATER_FLAGS = {"has_post_expert_norm"}
_NOT_FLAGS = {"experts_class", "experts_interface"}


def check_transformers():
    """Refuses a transformers that is missing, too old or too new, saying what would work.

    Judged by what it has, not by its number: one without the registry of experts functions, or
    whose modules do not tell their layout, is too old; one whose decorator has a flag that is
    unknown here is too new, since a function that does not heed a flag gives wrong results.

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
        flags = set()
    if not flags >= FLAGS:
        problem = f"found {version}, whose registry of experts functions is missing or older than this: too old"
        raise ImportError(_text(problem))
    if unknown := flags - FLAGS - LATER_FLAGS:
        names = ", ".join(sorted(unknown))
        problem = f"found {version}, whose experts have flags unknown here ({names}): it is too new"
        raise ImportError(_text(problem))


def _text(problem):
    return (
        f"moe_ext.integrations.transformers: {problem}; proven with transformers {OLDEST} to {PROVEN}"
        f" (pip install transformers=={PROVEN})"
    )
