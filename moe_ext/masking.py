"""`with moe_ext.padding(mask):` brings a padding mask to layers deep inside a model."""

import contextlib

from ._checks import check_mask

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
