"""Which way the experts function went."""

import contextlib
from unittest import mock

from moe_ext.integrations.transformers import experts

PATHS = dict(moe_forward="fused", grouped_ffn="fused", called_ffn="called")


@contextlib.contextmanager
def recorded():
    """A list that gets "fused" or "called" for every call of the experts function."""
    taken = []

    def spied(function, path):
        def spy(*args, **kwargs):
            taken.append(path)
            return function(*args, **kwargs)

        return spy

    spies = {name: spied(getattr(experts, name), path) for name, path in PATHS.items()}
    with mock.patch.multiple(experts, **spies):
        yield taken
