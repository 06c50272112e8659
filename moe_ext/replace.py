"""From dense to sparse: one feed-forward network upcycled, or all those of a model replaced."""

import fnmatch
import sys
import warnings

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ._checks import describe, one_top_k
from .dense import NotDenseError, arrangements, linear_maps, read_dense
from .moe import MoE


@torch.inference_mode(False)  # or the parameters made here could never be trained
def upcycle(ffn, num_experts=8, top_k=None, *, capacity_factor=None, activation=None, **options):
    """See `MoE.from_dense`."""
    weighs_by_score = _weighs_by_score(num_experts, top_k, options)
    if weighs_by_score:
        equal = 0.5 if options.get("score_function") == "sigmoid" else 1 / num_experts
        options |= dict(norm_topk_prob=False, routed_scaling_factor=1 / equal)
    else:
        _check_sum_of_weights(options)
    dense = read_dense(ffn, activation)
    if dense.up.weight.is_meta:
        raise ValueError(
            "MoE.from_dense: ffn must hold data, which the experts copy, got parameters on the meta"
            " device (built there, or offloaded by accelerate): load them first, or take"
            " replace_ffn(model, upcycled=False) for fresh experts"
        )
    dropout = [m.p for m in ffn.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if dropout:
        warnings.warn(
            f"MoE.from_dense: the FFN's dropout (p={dropout[0]}) is left out", stacklevel=3
        )
    layer = _layer_for(ffn, dense, num_experts, top_k, capacity_factor=capacity_factor, **options)
    _copy_to_experts(dense, layer.experts)
    with torch.no_grad():
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
    """Every expert becomes the dense FFN, in whatever layout the experts have, and trains as it does."""
    ups = [dense.up] if dense.gate is None else [dense.gate, dense.up]
    stacks = experts.weights()
    up, down, up_bias, down_bias = (None if t is None else t.detach() for t in stacks)
    if experts.options["transposed"]:
        up, down = up.mT, down.mT
    if experts.options["interleaved"]:
        places = [slice(0, None, 2), slice(1, None, 2)]
    else:
        places = [
            slice(i * len(part.weight), (i + 1) * len(part.weight)) for i, part in enumerate(ups)
        ]
    copies = [[], [], [], []]  # by stack: (the part of it, what comes there)
    for place, part in zip(places, ups):
        copies[0].append((up[:, place], part.weight))
        copies[2].append((None if up_bias is None else up_bias[:, place], part.bias))
    copies[1].append((down, dense.down.weight))
    copies[3].append((down_bias, dense.down.bias))
    for stack, parts in zip(stacks, copies):
        parts = [(place, tensor) for place, tensor in parts if tensor is not None]
        if len({tensor.requires_grad for _, tensor in parts}) > 1:
            raise ValueError(
                "MoE.from_dense: ffn must have requires_grad alike in gate and up, which become one"
                " parameter, got one frozen"
            )
        for place, tensor in parts:  # a bias that is missing stays zero
            place.copy_(tensor.detach())
            stack.requires_grad_(tensor.requires_grad)


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


# ---- replacing those of a model ------------------------------------------------------


@torch.inference_mode(False)
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
            have an `intermediate_size` of their own; the model may be on the meta device.

    Returns:
        {name: MoE} of what was swapped. A module that stood in two places is the same
        `MoE` in both.

    A model of transformers has its layers and their arguments in `model.config.moe_ext` from
    then on, which `save_pretrained` writes, and whatever is built from that config has such
    layers. So does what from_pretrained loads where moe_ext is imported; elsewhere transformers
    fills dense FFNs at random, and warns of keys that are MISSING:

        import moe_ext.integrations.transformers    # before from_pretrained
        model = AutoModelForCausalLM.from_pretrained(folder)

    Any other model is built anew by the same call, and then loads its state_dict:

        moe_ext.replace_ffn(model, 8, 2, upcycled=False)
        model.load_state_dict(state_dict)

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
            except NotDenseError as problem:
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
    _record(model)
    return places


def _record(model):
    """What there is now, in the config of each model of transformers that is in it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(
        isinstance(module, modeling.PreTrainedModel) for module in model.modules()
    ):
        return
    try:
        from .integrations.transformers.saving import record
    except ImportError as error:
        warnings.warn(
            "replace_ffn: the layers are not recorded in the model's config, so that from_pretrained"
            f" will not build them: {error}",
            stacklevel=3,
        )
        return
    record(model)


def _predicate(match):
    """(name, module) -> bool from what replace_ffn takes."""
    if match is None:
        return lambda name, module: any(True for _ in arrangements(linear_maps(module)))
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
