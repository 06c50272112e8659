"""Reading a dense feed-forward network: which activation, and which of its maps is which.

It is known by what it computes, not by what its parts are called: every arrangement and
activation that fits the shapes of its linear maps is compared with its own output, in float64,
for parameters drawn for the purpose. Its own would not do: under a last layer of zeros, or
weights on the meta device, all candidates are alike.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from ._checks import check_name, describe
from .reference import ACTIVATIONS, GATES, gated_activation
from .types import Activation


class Linear(NamedTuple):
    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out)

    def split(self, interleaved=False):
        """The two halves of its outputs, as views."""
        parts = [slice(0, None, 2), slice(1, None, 2)]
        if not interleaved:
            half = len(self.weight) // 2
            parts = [slice(0, half), slice(half, None)]
        return [Linear(*(None if t is None else t[part] for t in self)) for part in parts]


class Dense(NamedTuple):
    """A dense FFN: down(phi(gate x) * up x), or down(phi(up x)) without a gate."""

    activation: str
    gate: Linear | None
    up: Linear
    down: Linear

    def __call__(self, x):
        h = F.linear(x, *self.up)
        if self.gate is None:
            h = ACTIVATIONS[self.activation](h)
        else:
            h = gated_activation(F.linear(x, *self.gate), h, Activation(self.activation))
        return F.linear(h, *self.down)


class NotDenseError(ValueError):
    """A module that is not a feed-forward network we know."""


# Root mean squares of the pre-activations that are tried: where they are small, all activations
# look alike; where they are large, one that is clamped shows.
SCALES = (2.0, 50.0, 2000.0)


def read_dense(ffn, activation=None):
    """The `Dense` that computes what `ffn` does; NotDenseError where there is none, or several."""
    if not isinstance(ffn, nn.Module):
        raise TypeError(f"MoE.from_dense: ffn must be a torch.nn.Module, got {describe(ffn)}")
    if activation is not None:
        check_name("MoE.from_dense", "activation", activation, (*GATES, *ACTIVATIONS))
    with torch.enable_grad():  # so that views require it where their parameters do
        candidates = list(arrangements(linear_maps(ffn), activation))
    if not candidates:
        raise NotDenseError(
            "MoE.from_dense: ffn must be two or three linear maps H -> I -> H (nn.Linear, Conv1D)"
            f" without other parameters, got {_summary(ffn)}"
        )
    fitting, problem = [], None
    with _probe(ffn) as probe:
        # Two maps alone do not say which comes first: either side may be the hidden size.
        for hidden in dict.fromkeys(len(dense.down.weight) for dense in candidates):
            try:
                tried = [probe(hidden, scale) for scale in SCALES]
            except Exception as raised:  # whatever a module does with an input it does not take
                problem = problem or f"raised {type(raised).__name__}: {raised}"
                continue
            problem = "computes something else"
            trials = list(arrangements(tried[0][0], activation))
            fitting += [
                candidate
                for candidate, trial in zip(candidates, trials)
                if len(trial.down.weight) == hidden
                and all(_distance(trial(x), y) < 1e-5 for _, x, y in tried)
            ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(dict.fromkeys(dense.activation for dense in fitting))
        raise NotDenseError(
            f"MoE.from_dense: activation must be named where several fit ({names}): {_summary(ffn)}"
        )
    raise NotDenseError(
        "MoE.from_dense: ffn must compute down(phi(up x)) or down(phi(gate x) * up x), phi one of"
        f" {', '.join(ACTIVATIONS)}; {_summary(ffn)} {problem}"
    )


def linear_maps(ffn):
    """Its linear maps; [] when it has parameters beside them."""
    maps = []
    for module in ffn.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
        elif type(module).__name__ == "Conv1D":  # GPT-2's, (in, out)
            weight = module.weight.t()
        else:
            continue
        maps.append(Linear(weight, module.bias))
    found = sum(t.numel() for m in maps for t in m if t is not None)
    return maps if found == sum(p.numel() for p in ffn.parameters()) else []


def arrangements(maps, activation=None):
    """Every `Dense` that fits the shapes of two or three linear maps."""
    if len(maps) not in (2, 3):
        return
    for *ups, down in itertools.permutations(maps):
        hidden, width = down.weight.shape
        pairs = []
        if len(ups) == 2:
            if all(up.weight.shape == (width, hidden) for up in ups):
                pairs = [tuple(ups)]
        elif ups[0].weight.shape == (width, hidden):
            pairs = [(None, ups[0])]
        elif ups[0].weight.shape == (2 * width, hidden):  # gate and up in one map
            first, second = ups[0].split()
            pairs = [(first, second), (second, first), tuple(ups[0].split(interleaved=True))]
        for gate, up in pairs:
            names = ACTIVATIONS if gate is None else GATES
            yield from (Dense(name, gate, up, down) for name in names if activation in (None, name))


class _Maps(nn.Module):
    """The linear maps that the FFN has while its parameters are others, and its output."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return linear_maps(self.ffn), self.ffn(x)


@contextlib.contextmanager
def _probe(ffn):
    """A function (hidden, scale) -> (maps, x, ffn(x)) of the FFN with parameters drawn anew.

    In float64 and eval mode, on the CPU for an FFN on the meta device; hooks, autocast and
    compilation are off meanwhile. Afterwards the FFN is as it was.
    """
    device = next(ffn.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator("cpu").manual_seed(0)  # torch's own stays as it is

    def drawn(shape, scale):
        x = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
        return scale * x.to(device)

    state = {
        f"ffn.{name}": drawn(p.shape, max(p.shape[-1], 1) ** -0.5 if p.dim() > 1 else 0.5)
        for name, p in ffn.named_parameters()
    }
    for name, buffer in ffn.named_buffers():
        state[f"ffn.{name}"] = buffer.double() if buffer.is_floating_point() else buffer.clone()
    maps = _Maps(ffn)

    def probe(hidden, scale):
        x = drawn((1, 8, hidden), scale)
        found, y = torch.func.functional_call(maps, state, (x,))
        return found, x, y

    modes = [(module, module.training) for module in ffn.modules()]
    with (
        torch.no_grad(),
        device,  # of what a forward makes for itself
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        _without_hooks(ffn),
    ):
        ffn.eval()
        try:
            yield probe
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def _without_hooks(ffn):
    """They are for the passes of its user."""
    names = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"
    dicts = [getattr(module, f"_{name}") for module in ffn.modules() for name in names]
    dicts += [getattr(hooks_of_all, f"_global_{name}") for name in names]
    kept = [dict(hooks) for hooks in dicts]
    for hooks in dicts:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(dicts, kept):
            hooks.update(before)


def _distance(actual, expected):
    if not isinstance(expected, Tensor) or actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _summary(module):
    text = repr(module)
    return text if len(text) < 300 else type(module).__name__
