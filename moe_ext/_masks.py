"""The masks that `moe_ext.padding` brought, and which of them is for a layer."""

import contextlib
import contextvars
import threading
import weakref

import torch

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
def opened(mask, layers):
    """Inside, `mask` is for the layers with these ids, or for all where it is None."""
    compiling = torch.compiler.is_compiling()
    previous = _of_thread.masks
    outer = previous if compiling else _masks.get() or ()
    masks = ((mask, layers), *outer)
    _of_thread.masks = masks
    token = None if compiling else _masks.set(masks)
    try:
        yield
    finally:
        _of_thread.masks = previous
        if token is not None:
            _masks.reset(token)


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
