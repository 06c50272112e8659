"""From dense to sparse: one feed-forward network upcycled, or all those of a model replaced.

A dense FFN is known by what it computes, not by what its parts are called: its two
or three linear maps are read, and every arrangement and activation that fits their
shapes is compared with the module's own output on a few tokens, in float64.
"""

import fnmatch
import itertools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_name, describe, one_top_k
from .moe import MoE
from .reference import ACTIVATIONS, GATES, gated_activation


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
            h = gated_activation(F.linear(x, *self.gate), h, self.activation)
        return F.linear(h, *self.down)


class NotDense(ValueError):
    """A module that is not a feed-forward network we know."""


def upcycle(ffn, num_experts=8, top_k=None, *, capacity_factor=None, activation=None, **options):
    """See `MoE.from_dense`."""
    weighs_by_score = _weighs_by_score(num_experts, top_k, options)
    if weighs_by_score:
        equal = 0.5 if options.get("score_function") == "sigmoid" else 1 / num_experts
        options |= dict(norm_topk_prob=False, routed_scaling_factor=1 / equal)
    else:
        _check_sum_of_weights(options)
    dense = read_dense(ffn, activation)
    dropout = [m.p for m in ffn.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if dropout:
        warnings.warn(
            f"MoE.from_dense: the FFN's dropout (p={dropout[0]}) is left out", stacklevel=3
        )
    layer = _layer_for(ffn, dense, num_experts, top_k, capacity_factor=capacity_factor, **options)
    with torch.no_grad():
        _copy_to_experts(dense, layer.experts)
        if weighs_by_score:
            weight = layer.gate.weight
            close = max(1e-5, torch.finfo(weight.dtype).eps / 16)
            weight.normal_(std=close * weight.shape[1] ** -0.5)
        if layer.shared_experts is not None:
            # They start silent, and learn from there.
            for parameter in layer.shared_experts.down_proj.parameters():
                parameter.zero_()
    return layer


def _layer_for(ffn, dense, num_experts, top_k, *, intermediate_size=None, **options):
    """An `MoE` of the FFN's size, activation, biases, place, dtype and mode."""
    weight = dense.up.weight
    options.setdefault("bias", any(part and part.bias is not None for part in dense[1:]))
    options.setdefault("capacity_factor", None)
    options.setdefault("device", weight.device)
    options.setdefault("dtype", weight.dtype)
    size = intermediate_size or len(weight)
    layer = MoE(weight.shape[1], size, num_experts, top_k, activation=dense.activation, **options)
    return layer.train(ffn.training)


def _copy_to_experts(dense, experts):
    """Every expert becomes the dense FFN, in whatever layout the experts have."""
    ups = [dense.up] if dense.gate is None else [dense.gate, dense.up]
    up, down, up_bias, down_bias = experts.weights()
    if experts.options["transposed"]:
        up, down = up.mT, down.mT
    if experts.options["interleaved"]:
        places = [slice(0, None, 2), slice(1, None, 2)]
    else:
        places = [
            slice(i * len(part.weight), (i + 1) * len(part.weight)) for i, part in enumerate(ups)
        ]
    for place, part in zip(places, ups):
        up[:, place] = part.weight
        if part.bias is not None:  # a bias that is missing stays zero
            up_bias[:, place] = part.bias
    down[:] = dense.down.weight
    if dense.down.bias is not None:
        down_bias[:] = dense.down.bias


def _weighs_by_score(num_experts, top_k, options):
    """Whether a token's one weight is its score, for the router to learn from."""
    told = {"norm_topk_prob", "routed_scaling_factor"} & options.keys()
    return (
        one_top_k(top_k, options.get("num_experts_per_tok")) == 1 < num_experts
        and options.get("score_function") != "softmax_topk"
        and not told
    )


def _check_sum_of_weights(options):
    """A token's K equal experts add up to the dense FFN if its weights add up to 1."""
    norm = options.get("norm_topk_prob", True)
    scale = options.get("routed_scaling_factor", 1.0)
    if not (norm or options.get("score_function") == "softmax_topk") or scale != 1.0:
        raise ValueError(
            "MoE.from_dense: a token's weights must sum to 1, or the layer would not start as the"
            " dense FFN: norm_topk_prob=True (or score_function='softmax_topk') and"
            f" routed_scaling_factor=1.0, got {norm} and {scale}"
        )


# ---- reading a dense FFN -----------------------------------------------------------


def read_dense(ffn, activation=None):
    """The `Dense` that computes what `ffn` does; NotDense where there is none."""
    if not isinstance(ffn, nn.Module):
        raise TypeError(f"MoE.from_dense: ffn must be a torch.nn.Module, got {describe(ffn)}")
    if activation is not None:
        check_name("MoE.from_dense", "activation", activation, (*GATES, *ACTIVATIONS))
    maps = linear_maps(ffn)
    candidates = list(_arrangements(maps, activation))
    if not candidates:
        raise NotDense(
            "MoE.from_dense: ffn must be two or three linear maps H -> I -> H (nn.Linear, Conv1D)"
            f" without other parameters, got {_summary(ffn)}"
        )
    if maps[0].weight.is_meta:
        raise ValueError("MoE.from_dense: ffn must hold data, got parameters on the meta device")
    in_float64 = [Linear(*(None if t is None else t.double() for t in m)) for m in maps]
    trials = list(_arrangements(in_float64, activation))
    problem = None
    # Two maps alone do not say which comes first: either side may be the hidden size.
    for hidden in dict.fromkeys(len(dense.down.weight) for dense in trials):
        indices = [i for i, dense in enumerate(trials) if len(dense.down.weight) == hidden]
        try:
            x, expected = _probe(ffn, trials[indices[0]].up)
        except Exception as raised:  # whatever a module does with an input it does not take
            problem = problem or f"raised {type(raised).__name__}: {raised}"
            continue
        errors = {i: _distance(trials[i](x), expected) for i in indices}
        best = min(errors, key=errors.get)
        if errors[best] < 1e-5:
            return candidates[best]
        problem = "computes something else"
    raise NotDense(
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
        maps.append(Linear(weight.detach(), None if module.bias is None else module.bias.detach()))
    found = sum(t.numel() for m in maps for t in m if t is not None)
    return maps if found == sum(p.numel() for p in ffn.parameters()) else []


def _arrangements(maps, activation=None):
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


@torch.no_grad()
def _probe(ffn, up):
    """A few tokens in float64 and the FFN's output for them, the FFN left as it was."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, up.weight.shape[1], dtype=torch.float64, generator=generator)
    x = x.to(up.weight.device)
    # Where the pre-activations are small, all activations look alike.
    x *= 2.0 / F.linear(x, *up).square().mean().sqrt().clamp(min=1e-30)
    state = {
        name: t.double() if t.is_floating_point() else t
        for name, t in itertools.chain(ffn.named_parameters(), ffn.named_buffers())
    }
    modes = [(module, module.training) for module in ffn.modules()]
    ffn.eval()
    try:
        with torch.autocast(x.device.type, enabled=False):
            y = torch.func.functional_call(ffn, state, (x,))
    finally:
        for module, training in modes:
            module.training = training
    return x, y


@torch.no_grad()
def _distance(actual, expected):
    if not isinstance(expected, Tensor) or actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _summary(module):
    text = repr(module)
    return text if len(text) < 300 else type(module).__name__


# ---- replacing those of a model ------------------------------------------------------


def replace_ffn(model, num_experts=8, top_k=None, *, match=None, upcycled=True, **options):
    """Puts an `MoE` in the place of a model's dense feed-forward networks.

        swapped = moe_ext.replace_ffn(model, num_experts=8, top_k=2)
        print(*swapped)             # layers.0.mlp layers.1.mlp ...

    Args:
        model: changed in place.
        num_experts, top_k, **options: of `MoE`. Sizes, activation, biases, device, dtype
            and mode come from each FFN; capacity_factor is None (dropless) unless given.
        match: which modules: a pattern of their names ("layers.*.mlp"), a class, or a
            function (name, module) -> bool. None: every module that computes a dense
            FFN of two or three linear maps. What is inside an `MoE` is left alone.
        upcycled: every expert starts as a copy of the FFN, and the model computes what
            it did (see `MoE.from_dense`). False: fresh experts, for which `options` may
            have an `intermediate_size` of their own.

    Returns:
        {name: MoE} of what was swapped. A module that stood in two places is the same
        `MoE` in both.

    Raises:
        ValueError: nothing was found, a module that `match` chose is no dense FFN, or an
            option is wrong; the model is then unchanged.
        TypeError: match is none of the above.
    """
    if upcycled and "intermediate_size" in options:
        raise ValueError(
            "replace_ffn: intermediate_size must be left out of upcycled experts, which are"
            f" copies of the FFN, got {options['intermediate_size']}"
        )
    chosen = _predicate(match)
    made, places, taken, refused = {}, {}, [], []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(name.startswith(f"{prefix}.") for prefix in taken):
            continue
        if isinstance(module, MoE):
            taken.append(name)
        elif chosen(name, module):
            try:
                if module not in made:
                    if upcycled:
                        made[module] = upcycle(module, num_experts, top_k, **options)
                    else:
                        dense = read_dense(module, options.get("activation"))
                        fresh = {k: v for k, v in options.items() if k != "activation"}
                        made[module] = _layer_for(module, dense, num_experts, top_k, **fresh)
            except NotDense as problem:
                if match is not None:
                    raise ValueError(f"replace_ffn: {name}: {problem}") from None
                refused.append(f"{name}: {problem}")
                continue
            taken.append(name)
            places[name] = made[module]
    if not places:
        raise ValueError(
            "replace_ffn: match must choose a dense feed-forward network inside model, found none"
            + "".join(f"; {reason}" for reason in refused[:3])
        )
    for name, layer in places.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return places


def _predicate(match):
    """(name, module) -> bool from what replace_ffn takes."""
    if match is None:
        return lambda name, module: any(True for _ in _arrangements(linear_maps(module)))
    if isinstance(match, str):
        return lambda name, module: fnmatch.fnmatchcase(name, match)
    if isinstance(match, type) and issubclass(match, nn.Module):
        return lambda name, module: isinstance(module, match)
    if callable(match):
        return match
    raise TypeError(
        "replace_ffn: match must be None, a pattern of names, a module class or a function"
        f" (name, module) -> bool, got {describe(match)}"
    )
