"""`with moe_ext.padding(mask):` brings a padding mask to layers deep inside a model."""

import contextlib
import contextvars
import threading
import weakref

import torch

from ._checks import check_mask, describe

# [(mask, the layers that it is for, or None: all)], the innermost first. It belongs to a thread
# and, in asyncio, to a task. torch.compile refuses a ContextVar but traces a threading.local: in
# compiled code the masks are those of the thread.
_masks = contextvars.ContextVar("moe_ext.padding", default=None)


class _OfThread(threading.local):
    def __init__(self):  # once a thread
        self.masks = ()


_of_thread = _OfThread()
# Layers whose last forward took a mask of these.
_masked = contextvars.ContextVar("moe_ext.padding.masked", default=None)


@contextlib.contextmanager
def padding(mask, module=None):
    """Every `MoE` called inside takes `mask`, unless its own `padding_mask` is given.

        with moe_ext.padding(attention_mask == 0):
            loss = model(input_ids, attention_mask).loss
            loss.backward()

        with moe_ext.padding(source_padding, model.encoder), moe_ext.padding(
            target_padding, model.decoder
        ):
            loss = model(...)       # an encoder-decoder: a mask for each part

    mask: bool, True is padding; the shape of the layers' input without its last
    dimension, or any shape of as many elements when that input is (T, H). None ends
    an outer context's mask. module: only the `MoE` inside of it take the mask. Of nested
    contexts the innermost that is for a layer counts.

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
    compiling = torch.compiler.is_compiling()
    previous = _of_thread.masks
    outer = previous if compiling else _masks.get() or ()
    masks = ((mask, _layers(module)), *outer)
    _of_thread.masks = masks
    token = None if compiling else _masks.set(masks)
    try:
        yield
    finally:
        _of_thread.masks = previous
        if token is not None:
            _masks.reset(token)


def _layers(module):
    """The ids of the layers in it."""
    from .moe import MoE

    if module is None:
        return None
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"padding: module must be a torch.nn.Module, got {describe(module)}")
    layers = frozenset(id(m) for m in module.modules() if isinstance(m, MoE))
    if not layers:
        raise ValueError(f"padding: module must hold an MoE, {type(module).__name__} has none")
    return layers


def current_padding(layer):
    """The mask for this layer, or None."""
    if torch.compiler.is_compiling():
        return _mask_for(layer, _of_thread.masks)
    mask = _mask_for(layer, _read(_masks) or ())
    masked = _read(_masked)
    if mask is not None:
        if masked is None:
            _masked.set(masked := weakref.WeakSet())
        masked.add(layer)
    elif masked is not None and layer in masked:
        if _in_backward():
            raise RuntimeError(
                "MoE: a backward pass recomputes this layer without the padding mask of"
                " its forward pass: call backward() inside `with moe_ext.padding(mask)`"
            )
        masked.discard(layer)
    return mask


def _mask_for(layer, masks):
    for mask, layers in masks:
        if layers is None or id(layer) in layers:
            return mask
    return None


def _in_backward():
    return torch._C._current_graph_task_id() != -1


def _read(variable):
    """Its value; on autograd's own threads, which recompute layers, that of backward()'s caller."""
    value = variable.get()
    if value is None and _in_backward() and torch._C._is_key_in_tls("context"):
        context = torch._C._get_obj_in_tls("context")
        value = None if context is None else context.get(variable)
    return value
