"""Checkpoints of published systems: into an `MoE`, and back under the names they came with.

A layer's parameters are seen as parts, the same for every layout of the layer: `gate` and
`up` are the halves of gate_up_proj, `down` is down_proj (see `parts`). A format says what
a system calls each part and how it lays it out. Both directions read that one table, so
what came in goes out bit for bit.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ._checks import FLOATS, check_integer, check_name, describe
from .config import MoEConfig
from .presets import PRESETS
from .reference import GATES

LOAD, EXPORT = "MoE.from_pretrained_block", "MoE.export_state_dict"

# ---- names ---------------------------------------------------------------------------


class Format(NamedTuple):
    """How a system names and lays out a layer."""

    prefixes: tuple[str, ...]  # of a block in a model; {layer} is its number
    names: dict[str, str]  # part: "name | axes"; {e} is an expert's number, (e i) two axes in one


_ROUTER = {"router": "gate.weight | e h", "router_bias": "gate.bias | e"}
_CORRECTION = {"correction": "gate.e_score_correction_bias | e"}
_SHARED = {
    "shared_gate": "shared_experts.gate_proj.weight | s h",
    "shared_up": "shared_experts.up_proj.weight | s h",
    "shared_down": "shared_experts.down_proj.weight | h s",
    "shared_scale": "shared_expert_gate.weight | o h",
}

FORMATS = {
    # One tensor for all experts: transformers since version 5, and this package.
    "transformers": Format(
        ("model.layers.{layer}.mlp.",),
        {
            "gate_up": "experts.gate_up_proj | e (g i) h",
            "gate_up_bias": "experts.gate_up_proj_bias | e (g i)",
            "ungated_up": "experts.up_proj | e i h",
            "ungated_up_bias": "experts.up_proj_bias | e i",
            "down": "experts.down_proj | e h i",
            "down_bias": "experts.down_proj_bias | e h",
            **_ROUTER,
            **_CORRECTION,
            **_SHARED,
        },
    ),
    "mixtral": Format(
        ("model.layers.{layer}.block_sparse_moe.",),
        {
            "gate": "experts.{e}.w1.weight | i h",
            "up": "experts.{e}.w3.weight | i h",
            "down": "experts.{e}.w2.weight | h i",
            **_ROUTER,
        },
    ),
    "deepseek": Format(
        ("model.layers.{layer}.mlp.",),
        {
            "gate": "experts.{e}.gate_proj.weight | i h",
            "up": "experts.{e}.up_proj.weight | i h",
            "down": "experts.{e}.down_proj.weight | h i",
            **_ROUTER,
            **_CORRECTION,
            **_SHARED,
        },
    ),
    # The published arrays by their paths; (in, out), as always in haiku.
    "grok": Format(
        ("transformer/decoder_layer_{layer}/",),
        {
            "gate": "moe/linear/w | e h i",
            "up": "moe/linear_v/w | e h i",
            "down": "moe/linear_1/w | e i h",
            "router": "router/w | h e",
        },
    ),
    # Those converted to PyTorch, as serving engines read them.
    "grok_per_expert": Format(
        ("model.layers.{layer}.moe_block.",),
        {
            "gate": "experts.{e}.linear.weight | i h",
            "up": "experts.{e}.linear_v.weight | i h",
            "down": "experts.{e}.linear_1.weight | h i",
            **_ROUTER,
        },
    ),
    "switch": Format(
        ("encoder.block.{layer}.layer.1.mlp.", "decoder.block.{layer}.layer.2.mlp."),
        {
            "ungated_up": "experts.expert_{e}.wi.weight | i h",
            "down": "experts.expert_{e}.wo.weight | h i",
            "router": "router.classifier.weight | e h",
            "router_bias": "router.classifier.bias | e",
        },
    ),
    # Its dMoE, flat in two dimensions; DBRX is made of it.
    "megablocks": Format(
        ("transformer.blocks.{layer}.ffn.",),
        {
            "gate": "experts.mlp.w1 | (e i) h",
            "up": "experts.mlp.v1 | (e i) h",
            "ungated_up": "experts.mlp.w1 | (e i) h",
            "down": "experts.mlp.w2 | (e i) h",
            "router": "router.layer.weight | e h",
        },
    ),
}


# ---- a layer's parts -------------------------------------------------------------------


def parts(layer):
    """{part: (a view of the layer's parameter, its axes)}, together the whole layer.

    e expert, h hidden, i intermediate, g gate or up, s the shared experts' intermediate,
    o one.
    """
    up, down, up_bias, down_bias, *_ = layer.experts.weights()
    activation = layer.config.experts.activation
    if activation.transposed:
        up, down = up.mT, down.mT
    found = {"down": (down, "e h i"), "down_bias": (down_bias, "e h")}
    for part, tensor, axes in (("up", up, "i h"), ("up_bias", up_bias, "i")):
        if activation.name not in GATES:
            found[f"ungated_{part}"] = (tensor, f"e {axes}")
        elif tensor is not None:
            interleaved = activation.interleaved
            both = tensor.unflatten(1, (-1, 2) if interleaved else (2, -1))
            both = both.transpose(1, 2) if interleaved else both
            found[f"gate_{part}"] = (both, f"e g {axes}")

    gate = layer.gate
    found["router"] = (gate.weight, "e h")
    found["router_bias"] = (gate.bias, "e")
    found["correction"] = (gate.e_score_correction_bias, "e")
    for name, axes in (("gate", "s h"), ("up", "s h"), ("down", "h s")):
        linear = getattr(layer.shared_experts, f"{name}_proj", None)
        if linear is not None:
            found[f"shared_{name}"] = (linear.weight, axes)
            found[f"shared_{name}_bias"] = (linear.bias, axes[0])
    if layer.shared_expert_gate is not None:
        found["shared_scale"] = (layer.shared_expert_gate.weight, "o h")
    return {part: (t.detach(), axes) for part, (t, axes) in found.items() if t is not None}


def entries(op, layer, format):
    """(name, view, shape) of every tensor of the format: what it holds, as the format has
    it but for axes that are two in one; and the shape with these."""
    names = FORMATS[format].names
    for part, (view, axes) in parts(layer).items():
        if part in names:
            pieces = [(part, view, axes)]
        elif part == "gate_up" and "gate" in names:
            pieces = [("gate", view[:, 0], "e i h"), ("up", view[:, 1], "e i h")]
        else:
            raise ValueError(
                f"{op}: the layer has {part.replace('_', ' ')} ({describe(view)}), for which"
                f" format {format!r} has no name"
            )
        for piece, view, axes in pieces:
            name, _, theirs = names[piece].partition(" | ")
            if "{e}" in name:
                for e, of_expert in enumerate(view):
                    yield name.format(e=e), *_arrange(of_expert, axes[2:], theirs)
            else:
                yield name, *_arrange(view, axes, theirs)


def _arrange(view, axes, theirs):
    """The view with its axes in their order, and its shape where (a b) are one axis."""
    sizes = dict(zip(axes.split(), view.shape))
    view = view.permute([axes.split().index(axis) for axis in re.findall(r"\w", theirs)])
    groups = re.findall(r"\(.+?\)|\w", theirs)
    return view, tuple(math.prod(sizes[a] for a in re.findall(r"\w", group)) for group in groups)


def export_state_dict(layer, format="transformers", prefix=None):
    """See `MoE.export_state_dict`."""
    check_name(EXPORT, "format", format, FORMATS)
    prefix = _prefixes(EXPORT, format, prefix)[0]
    return {
        prefix + name: view.reshape(shape).contiguous()
        for name, view, shape in entries(EXPORT, layer, format)
    }


# ---- checkpoints -------------------------------------------------------------------------


class Shards(Mapping):
    """The tensors of a safetensors file, or of a folder of them, read when asked for."""

    def __init__(self, path):
        path = Path(path)
        indices = sorted(path.glob("*.safetensors.index.json"))
        if path.is_file():
            files = [path]
        elif len(indices) == 1:
            files = set(json.loads(indices[0].read_text())["weight_map"].values())
            files = [path / file for file in sorted(files)]
        else:
            files = sorted(path.glob("*.safetensors"))
        if not files or len(indices) > 1:
            raise ValueError(
                f"{LOAD}: path must be a .safetensors file, or a folder of them with at most one"
                f" .safetensors.index.json, got {path}"
                + ("" if path.exists() else ", which does not exist")
            )
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise RuntimeError(
                f"{LOAD}: reading {path} needs safetensors: pip install safetensors"
            ) from error
        self.files = {}  # name: the open file that it is in
        for file in files:
            opened = safe_open(file, framework="pt")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


def _open(source):
    if isinstance(source, (str, os.PathLike)):
        return Shards(source)
    if isinstance(source, Mapping):
        return source
    raise TypeError(
        f"{LOAD}: path_or_state_dict must be the path of a safetensors file or folder, or a dict"
        f" of tensors, got {describe(source)}"
    )


def _keys(checkpoint, name):
    """[its key], or [its key, that of its scales] where it is quantised; [] if it is not there."""
    if name not in checkpoint:
        name = name.replace("shared_experts.", "shared_expert.")  # Qwen2-MoE's
    for pair in (
        (name, f"{name}_scale_inv"),  # DeepSeek-V3's float8
        (name, f"{name}_scale"),  # compressed-tensors' float8
        (name, name.removesuffix("weight") + "scales"),
        (f"{name}/weight", f"{name}/scales"),  # Grok-1's int8
    ):
        if all(key in checkpoint for key in pair):
            return pair
    return (name,) if name in checkpoint else ()


FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


def _read(checkpoint, name):
    """The tensor, multiplied with its scales, each of which counts for an equal block."""
    tensor, *scales = (checkpoint[key] for key in _keys(checkpoint, name))
    if scales:
        scale = _scales(name, tensor, *scales)
        fits = tensor.dim() == scale.dim() and not any(
            size % blocks for size, blocks in zip(tensor.shape, scale.shape)
        )
        if not fits:
            raise ValueError(
                f"{LOAD}: the scales of {name} must divide its {tuple(tensor.shape)} into equal"
                f" blocks, got {describe(scale)}"
            )
        blocks = [(n, size // n) for size, n in zip(tensor.shape, scale.shape)]
        shape, tensor = tensor.shape, tensor.to(scale.dtype)
        tensor = tensor.reshape([size for block in blocks for size in block])
        tensor = tensor * scale.reshape([size for n, _ in blocks for size in (n, 1)])
        return tensor.reshape(shape)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{LOAD}: {name} must be float64, float32, bfloat16, float16 or come with scales,"
            f" got {describe(tensor)}"
        )
    return tensor


def _scales(name, tensor, scale):
    """The scales as numbers: float32 at least, since a narrower one may not hold the product."""
    if tensor.dtype not in FLOAT8 | {torch.int8, *FLOATS}:
        raise TypeError(
            f"{LOAD}: {name}, which has scales, must be int8, float8 or wider, got {describe(tensor)}"
        )
    if scale.dtype in FLOATS:
        return scale.to(torch.promote_types(scale.dtype, torch.float32))
    if tensor.dtype in FLOAT8 and scale.dtype in (torch.float8_e8m0fnu, torch.uint8):
        # The exponent alone, with a bias of 127; 255 is NaN. Not through a cast: of torch's
        # releases some lack it.
        exponent = scale.view(torch.uint8)
        value = torch.ldexp(torch.ones(exponent.shape), exponent.to(torch.int32) - 127)
        return torch.where(exponent == 255, math.nan, value)
    raise TypeError(
        f"{LOAD}: the scales of {name} must be float64, float32, bfloat16, float16, or for float8"
        f" tensors float8_e8m0fnu or uint8 (exponents), got {describe(scale)}"
    )


# What the keys of other quantisations end in, and how their tensors become ones that are read.
_OTHERS = {
    "_blocks": ("MXFP4", "Mxfp4Config(dequantize=True)"),
    ".absmax": ("bitsandbytes", None),
    ".quant_state": ("bitsandbytes", None),
    ".SCB": ("bitsandbytes", None),
    ".qweight": ("GPTQ or AWQ", None),
    ".weight_packed": ("compressed-tensors", "CompressedTensorsConfig(run_compressed=False)"),
}


def _refuse_other_quantisations(checkpoint, prefix):
    for key in checkpoint:
        for ending, (system, config) in _OTHERS.items():
            if key.startswith(prefix) and (key.endswith(ending) or f"{ending}." in key):
                way = (
                    "load the unquantised checkpoint, or call model.dequantize(), save_pretrained and"
                    " read that"
                    if config is None
                    else f"from_pretrained with quantization_config={config}, save_pretrained and"
                    " read that"
                )
                raise ValueError(
                    f"{LOAD}: {key} is quantised by {system}, which is not read here (float8 and"
                    f" int8 with scales are); with transformers {way}"
                )


# ---- loading -----------------------------------------------------------------------------


def from_pretrained_block(cls, source, layer=None, *, preset=None, device=None, dtype=None, **options):  # fmt: skip
    """See `MoE.from_pretrained_block`."""
    config = _config(preset, options)
    checkpoint = _open(source)
    for prefix in {p for format in FORMATS for p in _prefixes(LOAD, format, layer)}:
        _refuse_other_quantisations(checkpoint, prefix)
    format, prefix = _locate(checkpoint, layer)
    down = _keys(checkpoint, prefix + _anchor(format))
    target = dtype or (torch.bfloat16 if len(down) == 2 else checkpoint[down[0]].dtype)
    block = cls(config, device="meta", dtype=target)

    wanted = {prefix + name: shape for name, _, shape in entries(LOAD, block, format)}
    _check_names(checkpoint, wanted, format, prefix)
    block.to_empty(device=device or "cpu")
    if dtype is None:  # a router may be float32 beside experts in bfloat16
        router = prefix + FORMATS[format].names["router"].partition(" | ")[0]
        block.gate.to(_read(checkpoint, router).dtype)
    for name, view, shape in entries(LOAD, block, format):
        tensor = _read(checkpoint, prefix + name)
        if tensor.shape != shape:
            raise ValueError(
                f"{LOAD}: {prefix}{name} must be of shape {shape}, got {describe(tensor)};"
                " name another preset, or the sizes beside it (hidden_size=...)"
            )
        view.copy_(tensor.detach().reshape(view.shape))
    return block


def _config(preset, options):
    """What `MoE` is made of: a preset's options, and others in their place."""
    if isinstance(preset, MoEConfig):
        return preset.replace(**options)
    if preset is None or isinstance(preset, Mapping):
        return MoEConfig.of(**{**(preset or {}), **options})
    return PRESETS[check_name(LOAD, "preset", preset, PRESETS)].replace(**options)


def _anchor(format):
    """A name that no other format has, and every checkpoint of this one."""
    return FORMATS[format].names["down"].partition(" | ")[0].format(e=0)


def _prefixes(op, format, layer):
    """What may stand before the names: of the model's layer of this number, or as given."""
    prefixes = FORMATS[format].prefixes
    if layer is None:
        return [""]
    if isinstance(layer, str):
        return [layer.rstrip("./") + prefixes[0][-1]]
    number = check_integer(op, "layer", layer, minimum=0)
    return [prefix.format(layer=number) for prefix in prefixes]


def _locate(checkpoint, layer):
    """(format, prefix), known by the names alone."""
    looked = {
        prefix + _anchor(format): (format, prefix)
        for format in FORMATS
        for prefix in _prefixes(LOAD, format, layer)
    }
    found = [key for key in looked if _keys(checkpoint, key)]
    if len(found) == 1:
        return looked[found[0]]
    if found:
        raise ValueError(
            f"{LOAD}: layer must be the prefix of one block, {layer!r} is that of several:"
            f" {_some([looked[key][1] for key in found])}"
        )
    raise ValueError(
        f"{LOAD}: no MoE block of a known format at layer={layer!r} (a number, or the names'"
        f" prefix); looked for {_some(looked, 8)}; the checkpoint has {_some(checkpoint)}"
    )


_HEADS = {re.split(r"[./]", n)[0] for f in FORMATS.values() for n in f.names.values()}
_HEADS.add("shared_expert")


def _check_names(checkpoint, wanted, format, prefix):
    """Nothing is missing, and nothing of the block is left over."""
    keys = {name: _keys(checkpoint, name) for name in wanted}
    missing = [name for name, found in keys.items() if not found]
    if missing:
        raise ValueError(
            f"{LOAD}: the checkpoint lacks {_some(missing)} of the {len(wanted)} tensors of this"
            f" layer in format {format!r}"
        )
    taken = {key for found in keys.values() for key in found}
    rest = [key for key in checkpoint if key.startswith(prefix) and key not in taken]
    rest = [key for key in rest if re.split(r"[./]", key[len(prefix) :])[0] in _HEADS]
    if rest:
        raise ValueError(
            f"{LOAD}: the checkpoint has {_some(rest)}, for which this layer has no place; name"
            " another preset, or options beside it (num_experts=...)"
        )


def _some(names, limit=3):
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
