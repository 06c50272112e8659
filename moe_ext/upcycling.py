"""A layer whose experts start as copies of a dense feed-forward network."""

import warnings

import torch
from torch.nn.modules.dropout import _DropoutNd

from .config import MoEConfig
from .dense import read_dense


@torch.inference_mode(False)  # or the parameters made here could never be trained
def upcycle(cls, ffn, num_experts=8, top_k=None, **options):
    """See `MoE.from_dense`; cls is `MoE`."""
    num_experts, top_k, options = side_by_side(num_experts, top_k, options)
    weighs_by_score = _weighs_by_score(num_experts, top_k, options)
    if weighs_by_score:
        equal = 0.5 if options.get("score_function") == "sigmoid" else 1 / num_experts
        options |= dict(norm_topk_prob=False, routed_scaling_factor=1 / equal)
    else:
        _check_sum_of_weights(options)
    dense = read_dense(ffn, options.pop("activation", None))
    width = len(dense.up.weight)
    if options.get("intermediate_size", width) != width:
        raise ValueError(
            f"MoE.from_dense: intermediate_size must be the FFN's, {width}, of which the experts are"
            f" copies, got {options['intermediate_size']}"
        )
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
    layer = layer_for(cls, ffn, dense, num_experts, top_k, **options)
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


def side_by_side(num_experts, top_k, options):
    """(num_experts, top_k, the other options), of which a config may have told all."""
    if not isinstance(num_experts, MoEConfig):
        return num_experts, top_k, options
    if top_k is not None:
        options = {**options, "top_k": top_k}
    options = {**num_experts.options(), **options}
    return options.pop("num_experts"), options.pop("top_k"), options


def layer_for(
    cls, ffn, dense, num_experts, top_k, *, hidden_size=None, intermediate_size=None, **options
):
    """A layer of the FFN's size, activation, biases, place, dtype and mode."""
    weight = dense.up.weight
    width, hidden = weight.shape
    if hidden_size not in (None, hidden):
        raise ValueError(
            f"MoE.from_dense: hidden_size must be the FFN's, {hidden}, got {hidden_size}"
        )
    options.setdefault("bias", any(part and part.bias is not None for part in dense[1:]))
    options.setdefault("capacity_factor", None)
    options.setdefault("device", weight.device)
    options.setdefault("dtype", weight.dtype)
    size = intermediate_size or width
    layer = cls(hidden, size, num_experts, top_k, activation=dense.activation, **options)
    return layer.train(ffn.training)


def _copy_to_experts(dense, experts):
    """Every expert becomes the dense FFN, in whatever layout the experts have, and trains as it does."""
    ups = [dense.up] if dense.gate is None else [dense.gate, dense.up]
    stacks = experts.weights()
    up, down, up_bias, down_bias, *_ = (None if t is None else t.detach() for t in stacks)
    if experts.activation.transposed:
        up, down = up.mT, down.mT
    if experts.activation.interleaved:
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
    one = 1 in (top_k, options.get("num_experts_per_tok"))
    return one and num_experts > 1 and options.get("score_function") != "softmax_topk" and not told


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
