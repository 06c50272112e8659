"""`with moe_ext.padding(mask):` brings a padding mask to layers deep inside a model."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ._checks import check_mask, describe
from ._masks import opened
from .moe import MoE

__all__ = ["padding"]


@contextlib.contextmanager
def padding(mask: Tensor | None, module: nn.Module | None = None) -> Iterator[None]:
    """Every `MoE` called inside takes `mask`, unless its own `padding_mask` is given.

        with moe_ext.padding(attention_mask == 0):
            loss = model(input_ids, attention_mask).loss
            loss.backward()

        with moe_ext.padding(source_padding, model.encoder), moe_ext.padding(
            target_padding, model.decoder
        ):
            loss = model(...)       # an encoder-decoder: a mask for each part

    Args:
        mask: bool, True is padding; the shape of the layers' input without its last dimension,
            or any shape of as many elements when that input is (T, H). None ends an outer
            context's mask. Of nested contexts the innermost that is for a layer counts.
        module: only the `MoE` inside of it take the mask; None: all that are called.

    The mask belongs to the thread or the asyncio task that opened the context (in compiled code
    to the thread). Where activations are checkpointed, `backward()` runs the layers again and
    has to stand inside too; it raises RuntimeError otherwise.

    Raises:
        TypeError: mask is not a bool tensor (from an integer attention mask take
            `attention_mask == 0`), or module no module.
        ValueError: there is no `MoE` in module.
    """
    if mask is not None:
        check_mask("padding", "mask", mask)
    with opened(mask, _layers(module)):
        yield


def _layers(module):
    """The ids of the layers in it."""
    if module is None:
        return None
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"padding: module must be a torch.nn.Module, got {describe(module)}")
    layers = frozenset(id(m) for m in module.modules() if isinstance(m, MoE))
    if not layers:
        raise ValueError(f"padding: module must hold an MoE, {type(module).__name__} has none")
    return layers
