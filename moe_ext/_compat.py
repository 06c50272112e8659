"""What differs between the releases of torch that are supported: see _load.TORCH."""

import torch


def smaller(a, b):
    """min, also of sizes that torch.compile knows by a symbol."""
    return min(a, b) if _are_numbers(a, b) else torch.sym_min(a, b)


def larger(a, b):
    return max(a, b) if _are_numbers(a, b) else torch.sym_max(a, b)


def _are_numbers(a, b):
    # Of two plain numbers torch 2.11's Dynamo cannot trace sym_min and sym_max.
    return isinstance(a, int) and isinstance(b, int)


def is_exporting():
    """torch.compiler.is_exporting, which in torch 2.11 is True in every graph of Dynamo's; the
    flag behind it is right."""
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")
