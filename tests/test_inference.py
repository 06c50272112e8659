"""When a layer takes moe_infer: where nothing stands between its modules, and no gradient is needed."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from moe_ext.routing import Router
from support.ffn_operator import Recorder
from support.layer_suite import H, make, statistics, through_modules
from support.oracle import HAS_OPS, bits_equal, unit

pytestmark = pytest.mark.skipif(not HAS_OPS, reason="the reference registers no ops")


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, "frozen", "set_grad_enabled"]
)
def test_taken_where_no_gradient_is_needed(mode, inferences):
    layer = make(shared_expert_intermediate_size=6).eval()
    x = unit(4, H, dtype=torch.float64)
    expected = through_modules(layer)(x)
    if mode == "frozen":
        layer.gate.requires_grad_(False), layer.experts.requires_grad_(False)
        y = layer(x)
        assert y.requires_grad  # of the shared experts
    else:
        mode = functools.partial(torch.set_grad_enabled, False) if isinstance(mode, str) else mode
        with mode():
            y = layer(x)
    assert len(inferences) == 1 and bits_equal(y.detach().clone(), expected.detach())


def test_gradients_in_eval(inferences):
    layer = make().eval()
    x = unit(5, H, dtype=torch.float64)

    def gradients(layer, x):
        y = layer(x)
        wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
        return y.detach(), torch.autograd.grad(y.square().sum(), wanted)

    for prepare in (
        lambda layer: x.clone().requires_grad_(),
        lambda layer: x,
        lambda layer: layer.experts.requires_grad_(False) and x,
        lambda layer: layer.requires_grad_(False) and x.clone().requires_grad_(),
    ):
        data = prepare(layer)
        assert bits_equal(gradients(layer, data), gradients(through_modules(layer), data))
    assert not inferences


class Watched(nn.Module):
    def forward(self, weight):
        return weight * 2


class OtherRouter(Router):
    pass


def watch(register):
    """register(layer, hook) -> a handle; how often the hook was called is counted."""

    def change(layer):
        seen = []
        handle = register(layer, lambda *_: seen.append(1))
        return handle.remove, lambda: bool(seen)

    return change


def instead(change):
    """change(layer), which is not undone."""
    return lambda layer: (lambda: None, lambda: change(layer) or True)


def forward_of_its_own(layer):
    """As accelerate puts a hook on a module."""
    seen, forward = [], layer.experts.forward
    layer.experts.forward = lambda *args: seen.append(1) or forward(*args)
    return lambda: None, lambda: bool(seen)


def parametrized(layer):
    parametrize.register_parametrization(layer.gate, "weight", Watched())
    return lambda: None, lambda: True


def another_class(layer):
    layer.gate.__class__ = OtherRouter
    return lambda: None, lambda: True


def compiled_gate(layer):
    layer.gate.compile(backend="eager")
    return torch._dynamo.reset, lambda: layer.gate._compiled_call_impl is not None


class Tagged(torch.Tensor):
    """A tensor with ways of its own, like a DTensor or a quantised one."""


def subclass(layer):
    del layer.experts.down_proj
    layer.experts.down_proj = make().experts.down_proj.detach().as_subclass(Tagged)
    return lambda: None, lambda: True


WATCHERS = {
    "forward hook on the gate": watch(lambda m, hook: m.gate.register_forward_hook(hook)),
    "forward hook on the experts": watch(lambda m, hook: m.experts.register_forward_hook(hook)),
    "pre-hook on the gate": watch(lambda m, hook: m.gate.register_forward_pre_hook(hook)),
    "pre-hook on the experts": watch(lambda m, hook: m.experts.register_forward_pre_hook(hook)),
    "global hook": watch(lambda _, hook: nn_module.register_module_forward_hook(hook)),
    "global pre-hook": watch(lambda _, hook: nn_module.register_module_forward_pre_hook(hook)),
    "forward of its own": forward_of_its_own,
    "parametrization": parametrized,
    "another class": another_class,
    "compiled gate": compiled_gate,
    "tensor subclass": subclass,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_watches_the_modules_is_called(watcher, inferences):
    layer = make().eval().requires_grad_(False)
    x = unit(4, H, dtype=torch.float64)
    layer(x)
    assert len(inferences) == 1
    undo, was_called = WATCHERS[watcher](layer)
    try:
        y = layer(x)
    finally:
        undo()
    assert was_called() and len(inferences) == 1
    if watcher not in ("parametrization", "tensor subclass"):
        assert bits_equal(y.as_subclass(torch.Tensor), make_like(layer)(x))


def make_like(layer):
    """A layer of the same parameters without hooks."""
    fresh = make().eval().requires_grad_(False)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def test_backward_hooks_are_called(inferences):
    layer, seen = make().eval(), []
    handle = layer.experts.register_full_backward_hook(lambda *_: seen.append(1))
    x = unit(4, H, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert seen and not inferences
    handle.remove()
    with torch.no_grad():
        layer(x)
    assert len(inferences) == 1


def test_hooks_around_the_layer_and_on_its_shared_experts(inferences):
    layer, seen = make(shared_expert_intermediate_size=6).eval().requires_grad_(False), []
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    layer.shared_experts.register_forward_hook(lambda *_: seen.append("shared"))
    layer(unit(4, H, dtype=torch.float64))
    assert seen == ["shared", "layer"] and len(inferences) == 1


def test_dispatch_modes_see_the_stages(inferences):
    layer = make().eval().requires_grad_(False)
    x = unit(4, H, dtype=torch.float64)
    with Recorder() as recorder:
        layer(x)
    names = [func.name() for func, _ in recorder.calls]
    assert "moe_ext::router_logits" in names and "moe_ext::moe_forward" in names
    with FlopCounterMode(display=False):
        layer(x)
    assert not inferences


@pytest.mark.parametrize(
    "options", [dict(router_dtype=torch.float32), dict(renormalize_after_drop=True)]
)
def test_options_that_it_has_not(options, inferences):
    layer = make(dtype=torch.bfloat16, eval_capacity_factor=0.6, min_capacity=1, **options).eval()
    x = unit(9, H, dtype=torch.bfloat16)
    with torch.no_grad():
        assert bits_equal(layer(x), through_modules(layer)(x))
    assert not inferences


def test_what_only_the_modules_do(inferences):
    """Training, a routing to record or to replay."""
    layer = make().requires_grad_(False)
    x = unit(7, H, dtype=torch.float64)
    layer(x)
    layer.eval()
    y, routing = layer(x, return_routing=True)
    assert bits_equal(layer(x, routing=routing), y)
    assert not inferences
    assert bits_equal(layer(x), y) and len(inferences) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, inferences):
    layer = make(dtype=torch.float32).eval()
    twin = through_modules(layer)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        for x in (unit(9, H), unit(9, H, dtype=dtype)):
            y = layer(x)
            assert y.dtype == x.dtype and bits_equal(y, twin(x))
    assert not inferences and bits_equal(statistics(layer), statistics(twin))


def test_transforms_are_refused():
    layer = make().eval().requires_grad_(False)
    x = unit(3, 4, H, dtype=torch.float64)
    for transformed in (torch.func.vmap(layer), torch.func.grad(lambda x: layer(x).sum())):
        with pytest.raises(RuntimeError, match="the transforms of torch.func"):
            transformed(x)
