"""`with moe_ext.padding(mask):` brings a padding mask to layers deep inside a model."""

import contextlib

import torch

from ._checks import describe

# A plain global: torch.compile traces it (it refuses a ContextVar), and a backward
# pass that recomputes on one of autograd's own threads sees it.
_mask = None


@contextlib.contextmanager
def padding(mask):
    """Every `MoE` called inside takes `mask`, unless its own `padding_mask` is given.

        with moe_ext.padding(attention_mask == 0):
            loss = model(input_ids, attention_mask).loss
            loss.backward()

    mask: bool, True is padding; the shape of the layers' input without its last
    dimension, or any shape of as many elements when that input is (T, H). None ends
    an outer context's mask. The mask belongs to the process, not to a thread. Where
    activations are checkpointed, `backward()` runs the layers again and has to stand
    inside too; it raises RuntimeError otherwise.

    Raises:
        TypeError: mask is not a bool tensor (from an integer attention mask take
            `attention_mask == 0`).
    """
    global _mask
    if mask is not None:
        check_mask("padding", "mask", mask)
    previous, _mask = _mask, mask
    try:
        yield
    finally:
        _mask = previous


def current_padding():
    return _mask


def check_mask(op, name, mask, shape=None):
    expected = "bool" if shape is None else f"bool of shape {tuple(shape)}"
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        hint = ""
        if isinstance(mask, torch.Tensor) and not mask.is_complex():
            hint = "; True is padding: from an attention mask take `attention_mask == 0`"
        raise TypeError(f"{op}: {name} must be {expected}, got {describe(mask)}{hint}")
    if shape is not None and mask.shape != shape:
        raise ValueError(f"{op}: {name} must be {expected}, got {describe(mask)}")
