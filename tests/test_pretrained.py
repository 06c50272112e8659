"""Checkpoints of published systems: the same layer, and the same bytes back."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from moe_ext import MoE
from moe_ext.presets import PRESETS
from support.oracle import bits_equal, relative_error, unit

H, I, E, K = 32, 24, 8, 3
SIZES = dict(hidden_size=H, intermediate_size=I)
TINY = {
    "mixtral_8x7b": SIZES,
    "grok_1": SIZES,
    "deepseek_v2": SIZES | dict(num_experts=16, shared_expert_intermediate_size=2 * I),
    "deepseek_v3": SIZES | dict(num_experts=16, shared_expert_intermediate_size=I),
    "switch_base_8": SIZES,
    "megablocks_dmoe_760m": SIZES,
}
FORMATS_OF = {
    "mixtral_8x7b": ("mixtral", "transformers"),
    "grok_1": ("grok", "grok_per_expert", "transformers"),
    "deepseek_v2": ("deepseek", "transformers"),
    "deepseek_v3": ("deepseek", "transformers"),
    "switch_base_8": ("switch", "transformers"),
    "megablocks_dmoe_760m": ("megablocks", "transformers"),
}
ROUND_TRIPS = [(preset, format) for preset in PRESETS for format in FORMATS_OF[preset]]


def tiny(preset, dtype=None, **options):
    return MoE(PRESETS[preset].replace(**TINY[preset] | options), dtype=dtype)


def randomise(layer):
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.copy_(unit(*tensor.shape, fan_in=tensor.shape[-1]))
    return layer


def test_presets_are_what_they_say():
    assert PRESETS.keys() == TINY.keys()
    for config in PRESETS.values():
        layer = MoE(config, device="meta", dtype=torch.bfloat16)
        assert layer.capacity_factor is None and layer.eval_capacity_factor is None
    billions = {
        name: sum(p.numel() for p in MoE(PRESETS[name], device="meta").parameters()) / 1e9
        for name in PRESETS
    }
    # 46.7, 314, 236 and 671 billion parameters are these many layers and the rest.
    assert 44 < 32 * billions["mixtral_8x7b"] < 46.7
    assert 300 < 64 * billions["grok_1"] < 314
    assert 220 < 59 * billions["deepseek_v2"] < 236
    assert 640 < 58 * billions["deepseek_v3"] < 671


@pytest.mark.parametrize("preset,format", ROUND_TRIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["file", "folder", "dict"])
def test_round_trip(preset, format, dtype, place, tmp_path):
    """Saved, loaded and saved again: the same names and bytes; the same layer in between."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    layer = randomise(tiny(preset, dtype=dtype))
    exported = layer.export_state_dict(format, layer=5)
    other = randomise(tiny(preset, dtype=dtype)).export_state_dict(format, layer=4)
    assert not exported.keys() & other.keys()
    source = exported | other | {"model.norm.weight": unit(H)}
    if place == "file":
        save_file(source, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors"
    elif place == "folder":
        save_sharded(source, tmp_path, save_file)
        source = str(tmp_path)
    loaded = MoE.from_pretrained_block(source, layer=5, preset=preset, **TINY[preset])
    assert bits_equal(dict(loaded.state_dict()), dict(layer.state_dict()))
    assert bits_equal(loaded.export_state_dict(format, layer=5), exported)
    x = unit(2, 9, H, dtype=dtype)
    assert bits_equal(loaded.eval()(x), layer.eval()(x))


def save_sharded(tensors, folder, save_file):
    """Three files and their index; the index holds every name in just one of them."""
    shards = {f"model-0000{i}-of-00003.safetensors": {} for i in (1, 2, 3)}
    for file, (name, tensor) in zip(itertools.cycle(shards), tensors.items()):
        shards[file][name] = tensor
    for file, held in shards.items():
        save_file(held, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", list(itertools.product([False, True], repeat=2)))
def test_every_layout_of_ours_gives_the_same_checkpoint(layout):
    layer = randomise(tiny("mixtral_8x7b"))
    exported = layer.export_state_dict("mixtral")
    assert torch.equal(exported["experts.2.w3.weight"], layer.experts.gate_up_proj[2, I:])
    assert torch.equal(exported["experts.2.w2.weight"], layer.experts.down_proj[2])
    options = TINY["mixtral_8x7b"] | dict(zip(("transposed", "interleaved"), layout))
    loaded = MoE.from_pretrained_block(exported, preset="mixtral_8x7b", **options)
    assert bits_equal(loaded.export_state_dict("mixtral"), exported)
    x = unit(9, H)
    assert relative_error(loaded(x).detach(), layer(x).detach().double()) < 1e-6


def test_dtypes_are_the_checkpoints():
    layer = randomise(tiny("mixtral_8x7b", dtype=torch.bfloat16))
    layer.gate.float()
    state = layer.export_state_dict("mixtral", layer="model.layers.0.block_sparse_moe")
    options = dict(preset="mixtral_8x7b", layer=0, **TINY["mixtral_8x7b"])
    loaded = MoE.from_pretrained_block(state, **options)
    assert loaded.gate.weight.dtype == torch.float32
    assert bits_equal(dict(loaded.state_dict()), dict(layer.state_dict()))
    assert loaded(unit(3, H, dtype=torch.bfloat16)).dtype == torch.bfloat16
    loaded = MoE.from_pretrained_block(state, dtype=torch.float64, **options)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


# ---- against the systems themselves ------------------------------------------------------


def assert_same(layer, block, eps):
    """Output and the gradient of x, in float64."""
    x = unit(2, 13, H, dtype=torch.float64)
    dy = unit(*x.shape, dtype=torch.float64)
    results = []
    for module in (layer, block):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for ours, theirs in zip(*results):
        assert relative_error(ours, theirs) <= eps


def transformers_block(name):
    """(block, the preset, options beside it)."""
    transformers = pytest.importorskip("transformers")
    common = dict(hidden_size=H, num_experts_per_tok=K, experts_implementation="eager")
    if name == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = transformers.MixtralConfig(intermediate_size=I, num_local_experts=E, **common)
        return MixtralSparseMoeBlock(config), "mixtral_8x7b", {}
    if name == "switch":
        if transformers.__version__.startswith("5.17."):
            pytest.skip("Switch drops nothing in that release")
        from transformers.models.switch_transformers import modeling_switch_transformers as switch

        config = transformers.SwitchTransformersConfig(
            d_model=H, d_ff=I, num_experts=E, expert_capacity=3
        )
        return switch.SwitchTransformersSparseMLP(config), "switch_base_8", dict(expert_capacity=3)
    deepseek = common | dict(moe_intermediate_size=I, n_routed_experts=16, n_group=4, topk_group=2)
    groups = dict(num_experts=16, n_group=4, topk_group=2)
    if name == "deepseek_v2":
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

        config = transformers.DeepseekV2Config(
            **deepseek, n_shared_experts=2, routed_scaling_factor=16.0, norm_topk_prob=False,
            topk_method="group_limited_greedy",
        )  # fmt: skip
        shared = dict(shared_expert_intermediate_size=2 * I)
        return DeepseekV2Moe(config), "deepseek_v2", shared | groups
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        **deepseek, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True
    )
    return DeepseekV3MoE(config), "deepseek_v3", dict(shared_expert_intermediate_size=I) | groups


def per_expert(state, old_names):
    """A fused state_dict under the names of the published checkpoints."""
    old = {}
    for name, tensor in state.items():
        if name == "experts.gate_up_proj":
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                old[f"experts.{e}.{old_names[0]}.weight"] = gate.clone()
                old[f"experts.{e}.{old_names[1]}.weight"] = up.clone()
        elif name == "experts.down_proj":
            for e, down in enumerate(tensor):
                old[f"experts.{e}.{old_names[2]}.weight"] = down.clone()
        else:
            old[name] = tensor
    return old


OLD_NAMES = {
    "mixtral": ("w1", "w3", "w2"),
    "deepseek_v2": ("gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3", "switch"])
def test_blocks_of_transformers(name):
    block, preset, options = transformers_block(name)
    randomise(block.double().eval())
    options = SIZES | options
    if name != "switch":
        options["top_k"] = K
    state = dict(block.state_dict())
    if name == "deepseek_v3":
        state["gate.e_score_correction_bias"] = state["gate.e_score_correction_bias"].float()
    layer = MoE.from_pretrained_block(state, preset=preset, **options).eval()
    # Their routers round to float32, whatever the block's dtype.
    assert_same(layer, block, 4 * torch.finfo(torch.float32).eps)
    if name in OLD_NAMES:
        old = per_expert(state, OLD_NAMES[name])
        again = MoE.from_pretrained_block(old, preset=preset, **options)
        assert bits_equal(dict(again.state_dict()), dict(layer.state_dict()))
        assert bits_equal(again.export_state_dict(name.partition("_")[0]), old)
    elif name == "switch":
        x = unit(2, 40, H, dtype=torch.float64)
        assert (layer(x) == 0).all(-1).sum() >= 2 * (40 - 3 * E), "nothing was dropped"
    exported = layer.export_state_dict("switch" if name == "switch" else "transformers")
    assert bits_equal(exported, state)


@pytest.mark.parametrize("scales_shape", ["one a column", "eight blocks"])
@pytest.mark.parametrize("format", ["grok", "grok_per_expert"])
def test_grok_1(format, scales_shape):
    """Its forward pass in a few lines, on int8 weights times their scales."""
    arrays = {"linear": (E, H, I), "linear_v": (E, H, I), "linear_1": (E, I, H)}
    weights, state = {}, {}
    for name, shape in arrays.items():
        blocks = 8 if scales_shape == "eight blocks" and name == "linear_1" else 1
        integers = torch.randint(-127, 128, shape, dtype=torch.int8)
        scales = (unit(E, blocks, shape[2]).abs() + 0.5) / (70 * shape[1] ** 0.5)
        weights[name] = (
            integers.float() * scales.repeat_interleave(shape[1] // blocks, 1)
        ).double()
        if format == "grok":
            key = f"transformer/decoder_layer_7/moe/{name}/w"
            state |= {f"{key}/weight": integers, f"{key}/scales": scales}
        else:
            for e in range(E):
                key = f"model.layers.7.moe_block.experts.{e}.{name}"
                state |= {f"{key}.weight": integers[e].T, f"{key}.scales": scales[e].T}
    router = unit(H, E, fan_in=H)
    if format == "grok":
        state["transformer/decoder_layer_7/router/w"] = router
        state["transformer/decoder_layer_7/rms_norm/scale"] = unit(H)
    else:
        state["model.layers.7.moe_block.gate.weight"] = router.T.contiguous()

    def grok(x):
        chosen, experts = (x @ router.double()).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for j, e in itertools.product(range(2), range(E)):
            gate, value = x @ weights["linear"][e], x @ weights["linear_v"][e]
            of_expert = (F.gelu(gate, approximate="tanh") * value) @ weights["linear_1"][e]
            y = y + of_expert * (chosen[..., j] * (experts[..., j] == e))[..., None]
        return y

    sizes = TINY["grok_1"]
    layer = MoE.from_pretrained_block(state, layer=7, preset="grok_1", dtype=torch.float64, **sizes)
    assert_same(layer, grok, eps=1e-12)
    low = MoE.from_pretrained_block(state, layer=7, preset="grok_1", **sizes)
    assert low.experts.down_proj.dtype == torch.bfloat16 and low.gate.weight.dtype == torch.float32
    assert torch.equal(low.experts.down_proj, weights["linear_1"].mT.bfloat16())


@pytest.mark.parametrize("gated", [False, True])
def test_megablocks(gated):
    """Its dMoE in a few lines: flat weights, the expert's rows of each."""
    names = ("w1", "v1", "w2") if gated else ("w1", "w2")
    state = {f"experts.mlp.{n}": unit(E * I, H, dtype=torch.float64, fan_in=H) for n in names}
    state["router.layer.weight"] = unit(E, H, dtype=torch.float64, fan_in=H)

    def dmoe(x):
        scores = (x @ state["router.layer.weight"].T).softmax(-1)
        weight, expert = scores.max(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(E):
            rows = slice(e * I, (e + 1) * I)
            h = F.gelu(x @ state["experts.mlp.w1"][rows].T, approximate="tanh")
            if gated:
                h = h * (x @ state["experts.mlp.v1"][rows].T)
            y = y + (h @ state["experts.mlp.w2"][rows]) * weight * (expert == e)
        return y

    options = TINY["megablocks_dmoe_760m"] | dict(num_experts=E)
    options |= dict(activation="geglu_tanh") if gated else {}
    layer = MoE.from_pretrained_block(state, preset="megablocks_dmoe_760m", **options)
    assert_same(layer.eval(), dmoe, eps=1e-12)
    assert bits_equal(layer.export_state_dict("megablocks"), state)


@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "uint8", "float32"])
def test_float8_with_scales_that_are_powers_of_two(kind):
    """Also as exponents alone, which have no sign; bit for bit what the numbers would give."""
    layer = randomise(tiny("mixtral_8x7b", hidden_size=128, intermediate_size=128))
    state = layer.export_state_dict("mixtral", layer=0)
    expected = {}
    for name in [n for n in state if "experts" in n]:
        low = state[name].to(torch.float8_e4m3fn)
        exponent = torch.randint(-9, 3, (2, 1))
        scales = torch.ldexp(torch.ones(2, 1), exponent)
        expected[name] = low.float() * scales.repeat_interleave(64, 0)
        if kind == "uint8":
            scales = (exponent + 127).to(torch.uint8)
        state |= {name: low, f"{name}_scale_inv": scales.to(getattr(torch, kind))}
    sizes = dict(hidden_size=128, intermediate_size=128)
    loaded = MoE.from_pretrained_block(
        state, 0, preset="mixtral_8x7b", dtype=torch.float32, **sizes
    )
    actual = loaded.export_state_dict("mixtral", layer=0)
    assert all(bits_equal(actual[name], expected[name]) for name in expected)
    assert min(tensor.min() for tensor in expected.values()) < 0


@pytest.mark.parametrize(
    "ending,system",
    [
        ("gate_up_proj_blocks", "MXFP4.*Mxfp4Config"),
        ("0.w1.weight.absmax", "bitsandbytes.*dequantize"),
        ("0.w1.weight.quant_state.bitsandbytes__nf4", "quantised by bitsandbytes"),
        ("0.w1.qweight", "GPTQ or AWQ"),
        ("0.w1.weight_packed", "compressed-tensors"),
    ],
)
def test_other_quantisations_are_named(ending, system):
    state = tiny("mixtral_8x7b").export_state_dict("mixtral", layer=0)
    state[f"model.layers.0.block_sparse_moe.experts.{ending}"] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=system):
        MoE.from_pretrained_block(state, 0, preset="mixtral_8x7b", **SIZES)


def test_float8_with_scales():
    """DeepSeek-V3 publishes float8, with a scale for each block of 128 by 128."""
    layer = randomise(tiny("deepseek_v3", hidden_size=256))
    state = layer.export_state_dict("deepseek", layer=3)
    expected = {}
    for name in [n for n in state if ".experts." in n]:
        low = state[name].to(torch.float8_e4m3fn)
        scales = unit(1, 2).abs() if "down" not in name else unit(2, 1).abs()
        state |= {name: low, f"{name}_scale_inv": scales}
        wide = scales.repeat_interleave(128, 0 if "down" in name else 1)
        expected[name] = (low.float() * wide).bfloat16()
    sizes = TINY["deepseek_v3"] | dict(hidden_size=256)
    loaded = MoE.from_pretrained_block(state, layer=3, preset="deepseek_v3", **sizes)
    exported = loaded.export_state_dict("deepseek", layer=3)
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


# ---- what is refused ---------------------------------------------------------------------


def without(state, name):
    return {n: t for n, t in state.items() if n != name}


PREFIX = "model.layers.5.block_sparse_moe"


@pytest.mark.parametrize(
    "error,change,options,text",
    [
        (ValueError, {}, dict(preset="mixtral"), "preset must be one of mixtral_8x7b, grok_1, "),
        (TypeError, {}, dict(preset=8), "preset must be one of mixtral_8x7b"),
        (ValueError, {}, dict(layer=6), "no MoE block of a known format at layer=6.*looked for"),
        (ValueError, {}, dict(layer=None), "no MoE block of a known format at layer=None"),
        (ValueError, {}, dict(layer=-1), "layer must be an integer of at least 0"),
        (ValueError, {}, dict(num_experts=9), r"lacks .*experts.8.w1.weight.* of the 28 tensors"),
        (ValueError, {}, dict(num_experts=7), r"has .*experts.7.w1.weight.* has no place"),
        (ValueError, {}, dict(hidden_size=H + 1), r"must be of shape \(33, 24\), got float32 \(32, 24\); name"),
        (ValueError, {}, dict(hidden_size=4096), r"w2.weight must be of shape \(4096, 24\), got"),
        (ValueError, {}, dict(shared_expert_intermediate_size=4), "has shared gate .*no name"),
        (ValueError, {}, dict(score_correction_bias=True), "has correction .*no name"),
        (ValueError, {"gate.weight": None}, {}, "lacks .*5.block_sparse_moe.gate.weight of the 25"),
        (ValueError, {"gate.bias": unit(E)}, {}, "has .*gate.bias, for which this layer has no"),
        (TypeError, {"gate.weight": torch.ones(E, H, dtype=torch.int8)}, {}, "come with scales"),
        (ValueError, {"gate.scales": unit(3, 5)}, {}, r"scales of .*gate.weight must divide"),
        (ValueError, None, {}, "which does not exist"),
        (TypeError, [], {}, "must be the path of a safetensors file or folder, or a dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(error, change, options, text):
    state = randomise(tiny("mixtral_8x7b")).export_state_dict("mixtral", layer=5)
    if isinstance(change, dict):
        state |= {f"{PREFIX}.{name}": tensor for name, tensor in change.items()}
        source = {name: tensor for name, tensor in state.items() if tensor is not None}
    else:
        source = change if change == [] else "/nowhere/model.safetensors"
    options = dict(layer=5, preset="mixtral_8x7b", **TINY["mixtral_8x7b"]) | options
    with pytest.raises(error, match=text):
        MoE.from_pretrained_block(source, **options)


def test_a_number_that_is_two_layers():
    layer = randomise(tiny("switch_base_8"))
    decoder = "decoder.block.1.layer.2.mlp"
    state = layer.export_state_dict("switch", 1) | layer.export_state_dict("switch", decoder)
    options = dict(preset="switch_base_8", **TINY["switch_base_8"])
    with pytest.raises(ValueError, match="several: encoder.block.1.layer.1.mlp., decoder.block"):
        MoE.from_pretrained_block(state, layer=1, **options)
    assert MoE.from_pretrained_block(state, layer=decoder, **options).activation == "relu"


@pytest.mark.parametrize(
    "preset,options,format,text",
    [
        ("mixtral_8x7b", {}, "gguf", "format must be one of transformers, mixtral"),
        ("deepseek_v3", {}, "mixtral", "has correction .* no name"),
        ("mixtral_8x7b", dict(bias=True), "mixtral", "has .*bias .* no name"),
        ("switch_base_8", {}, "mixtral", "has ungated up .* no name"),
    ],
)
def test_what_cannot_be_exported(preset, options, format, text):
    with pytest.raises(ValueError, match=text):
        tiny(preset, **options).export_state_dict(format)
