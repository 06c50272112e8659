"""Models of transformers with `MoE` layers: saved and loaded, exported, resumed in a Trainer."""

import copy
import inspect
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext import MoE
from support.oracle import bits_equal, relative_error

transformers = pytest.importorskip("transformers")

from moe_ext.integrations.transformers import export_mixtral, saving  # noqa: E402

SMALL = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
T5 = dict(
    vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=50, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2
)


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | options))


MODELS = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5_gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
}


def make(name="llama", **options):
    """A model with MoE layers whose experts and biases all differ, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    swapped = moe_ext.replace_ffn(model, 4, **options)
    for layer in swapped.values():
        for tensor in layer.state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model


def auto(model):
    if model.config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def logits(model):
    ids = torch.arange(3, 25).view(2, 11)
    inputs = dict(decoder_input_ids=ids.flip(1)) if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}


def load(model, folder, **options):
    """What auto classes load, with every tensor found and none left over."""
    loaded, report = auto(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return loaded


# ---- saved and loaded ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(dtype=torch.float32, device_map="cpu")])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_computes_the_same_bits(name, options, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    loaded = load(model, tmp_path / "one", **options)
    assert list(layers(loaded)) == list(layers(model)) == list(model.config.moe_ext)
    assert bits_equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "two")
    assert bits_equal(logits(load(model, tmp_path / "two", **options)), logits(model))


def test_in_bfloat16(tmp_path):
    model = make(score_correction_bias=True).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path, dtype=torch.bfloat16)
    assert bits_equal(logits(loaded), logits(model))
    assert layers(loaded)["model.layers.0.mlp"].gate.e_score_correction_bias.dtype == torch.float32


def test_in_another_process(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
        import torch, transformers
        import moe_ext.integrations.transformers
        model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        found = model(input_ids=torch.arange(3, 25).view(2, 11)).logits
        assert torch.equal(found, torch.load({str(tmp_path / "logits.pt")!r}))
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], check=True)


def test_a_loaded_model_trains_as_the_saved_one(tmp_path):
    model = make(capacity_factor=1.0, aux_loss_coef=0.5)
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    ids = torch.arange(3, 25).view(2, 11)
    for each in (model, loaded):
        moe_ext.set_loss_scale(each, 1.0)
        each.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = dict(model.named_parameters())
    assert all(bits_equal(p.grad, gradients[n].grad) for n, p in loaded.named_parameters())
    assert [m.stats() for m in layers(loaded).values()] == [
        m.stats() for m in layers(model).values()
    ]


# Every option that is not the default's, in two layers that may have them together.
OPTIONS = [
    dict(
        top_k=3, limit=7.0, alpha=1.702, up_offset=1.0, transposed=True, interleaved=True, bias=True,
        gate_bias=True, score_function="sigmoid", norm_topk_prob=False, routed_scaling_factor=2.5,
        n_group=2, topk_group=2, group_score="top2_sum", bias_update_rate=1e-3, init_std=0.3,
        score_correction_bias=True, capacity_factor=1.5, eval_capacity_factor=1.75, min_capacity=2,
        capacity_scope="sequence", drop_policy="probs", renormalize_after_drop=True,
        aux_loss_coef=0.5, z_loss_coef=0.25, inject_losses=False, jitter_eps=0.125,
        jitter_target="block", shared_expert_intermediate_size=8, shared_expert_gate=True,
        router_dtype=torch.float64, num_experts=6, intermediate_size=10,
    ),
    dict(expert_capacity=5, num_experts=6, intermediate_size=10),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_all_options_come_back(options, tmp_path):
    model = llama().eval()
    swapped = moe_ext.replace_ffn(model, upcycled=False, **options)
    config = swapped["model.layers.0.mlp"].config
    assert config.options() | options == config.options()
    recorded = config.to_dict()
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert loaded.config.moe_ext == model.config.moe_ext
    assert all(layer.config.to_dict() == recorded for layer in layers(loaded).values())
    assert bits_equal(logits(loaded), logits(model))


def test_every_argument_of_a_layer_is_recorded():
    arguments = set(inspect.signature(MoE).parameters) - {"num_experts_per_tok", "device", "dtype"}
    assert MoE(8, 8).config.options().keys() == arguments
    told = {"hidden_size", "activation", *(name for options in OPTIONS for name in options)}
    assert told == arguments  # and tried above


@pytest.mark.parametrize("factor", [Fraction(3, 2), 2])
def test_any_kind_of_number(factor, tmp_path):
    model = make(capacity_factor=factor)
    model.save_pretrained(tmp_path)
    assert layers(load(model, tmp_path))["model.layers.0.mlp"].capacity_factor == factor


def test_with_the_head_and_without(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "head")
    base, report = transformers.AutoModel.from_pretrained(
        tmp_path / "head", output_loading_info=True
    )
    assert report["unexpected_keys"] == {"lm_head.weight"} and not report["missing_keys"]
    assert list(layers(base)) == ["layers.0.mlp", "layers.1.mlp"]
    base.save_pretrained(tmp_path / "base")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert report["missing_keys"] == {"lm_head.weight"} and not report["unexpected_keys"]
    again.lm_head = model.lm_head
    assert bits_equal(logits(again), logits(model))


def test_a_part_of_the_layers(tmp_path):
    model = make("t5", match="encoder.*DenseReluDense")
    model.save_pretrained(tmp_path)
    assert bits_equal(logits(load(model, tmp_path)), logits(model))
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert list(layers(encoder)) == list(layers(model))


def test_replaced_inside_of_the_model(tmp_path):
    """Its encoder has a config of its own, which is not saved."""
    model = MODELS["t5"]().eval()
    moe_ext.replace_ffn(model.encoder, 4)
    moe_ext.replace_ffn(nn.ModuleDict({"a": model.decoder}), 4)
    model.save_pretrained(tmp_path)
    assert len(layers(model)) == 4
    assert bits_equal(logits(load(model, tmp_path)), logits(model))


def test_what_is_saved_is_what_there_is_then(tmp_path):
    model = make()
    layer = model.model.layers[0].mlp
    layer.top_k, layer.eval_capacity_factor = 3, 0.5
    model.model.layers[1].mlp = llama().model.layers[1].mlp
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert list(layers(loaded)) == ["model.layers.0.mlp"]
    assert bits_equal(logits(loaded), logits(model))
    model.model.layers[0].mlp = llama().model.layers[0].mlp
    model.save_pretrained(tmp_path)
    assert not layers(load(model, tmp_path)) and not hasattr(model.config, "moe_ext")


def test_layers_put_in_by_hand(tmp_path):
    model = llama().eval()
    model.model.layers[1].mlp = MoE.from_dense(model.model.layers[1].mlp, 4)
    model.save_pretrained(tmp_path)
    assert bits_equal(logits(load(model, tmp_path)), logits(model))


def test_beside_experts_that_transformers_converts(tmp_path):
    """Of its own experts it splits gate from up and expert from expert, by names that ours have too."""
    config = transformers.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=8, mlp_only_layers=[0],
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    moe_ext.replace_ffn(model, 6, match="*.layers.0.mlp", shared_expert_intermediate_size=4)
    for tensor in layers(model)["model.layers.0.mlp"].state_dict().values():
        tensor.add_(torch.randn_like(tensor), alpha=0.2)
    model.save_pretrained(tmp_path)
    assert bits_equal(logits(load(model, tmp_path)), logits(model))


def test_from_a_config():
    config = make(init_std=0.5).config
    fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layer = fresh.model.layers[0].mlp
    assert isinstance(layer, MoE) and layer.experts.down_proj.dtype == torch.bfloat16
    assert 0.4 < layer.experts.down_proj.std() < 0.6
    assert copy.deepcopy(fresh).config.moe_ext == config.moe_ext


class Forgetful(transformers.LlamaConfig):
    def to_dict(self):
        kept = super().to_dict()
        kept.pop("moe_ext", None)
        return kept


def test_a_config_that_cannot_hold_it():
    model = transformers.LlamaForCausalLM(Forgetful(**SMALL))
    with pytest.warns(UserWarning, match="Forgetful does not save.*upcycled=False"):
        moe_ext.replace_ffn(model, 4)


def test_a_transformers_that_does_not_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, saving.__name__, None)
    with pytest.warns(UserWarning, match="not recorded in the model's config"):
        moe_ext.replace_ffn(llama(), 4)


def test_dense_models_are_left_alone(tmp_path):
    model = llama().eval()
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "moe_ext")
    assert bits_equal(logits(load(model, tmp_path)), logits(model))
    saving.install()  # again
    assert not hasattr(transformers.PreTrainedModel.post_init.before_moe_ext, "before_moe_ext")


# ---- exported as a Mixtral -------------------------------------------------------------------

ROPE = dict(
    rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip


@pytest.mark.parametrize(
    "config,options",
    [
        ({}, {}),
        (dict(tie_word_embeddings=True), dict(top_k=3, score_function="softmax_topk")),
        (dict(head_dim=4, num_key_value_heads=1), dict(interleaved=True, transposed=True)),
        (dict(rope_parameters=ROPE, rms_norm_eps=1e-3), dict(capacity_factor=1.0, jitter_eps=0.1)),
    ],
)
def test_exported_as_a_mixtral(config, options, tmp_path):
    model = llama(**config).eval()
    swapped = moe_ext.replace_ffn(model, 4, **options)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.max_new_tokens = 7
    expected = logits(model)
    export_mixtral(model, tmp_path, max_shard_size="20KB")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(loaded) is transformers.MixtralForCausalLM and not any(report.values())
    assert relative_error(logits(loaded), expected.double()) < 1e-5
    assert loaded.generation_config.max_new_tokens == 7 and not layers(loaded)
    # Neither the model nor its config became another.
    assert layers(model) == {name: layer for name, layer in swapped.items()}
    assert bits_equal(logits(model), expected)


def test_an_exported_mixtral_keeps_its_dtype(tmp_path):
    model = make().bfloat16()
    export_mixtral(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert relative_error(logits(loaded).double(), logits(model).double()) < 0.05


@pytest.mark.parametrize(
    "options,text",
    [
        (dict(top_k=1), "routed_scaling_factor must be 1.0, got 4.0"),
        (dict(score_function="sigmoid"), "got 'sigmoid' and True"),
        (dict(bias=True), "bias must be False, got True"),
        (dict(gate_bias=True), "gate_bias must be False"),
        (dict(bias_update_rate=1e-3), "score_correction_bias must be False"),
        (dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size must be 0"),
        (dict(eval_capacity_factor=1.5), "eval_capacity_factor must be None, got 1.5"),
        (dict(expert_capacity=3), "expert_capacity must be None, got 3"),
        (dict(n_group=2, topk_group=1), "n_group must be 1, got 2"),
        (dict(match="model.layers.1.mlp"), "layers.0.mlp must be a moe_ext.MoE.*got LlamaMLP"),
    ],
)
def test_what_mixtral_cannot_hold(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        export_mixtral(make(**options), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options,text",
    [
        (dict(routed_scaling_factor=2.0), "routed_scaling_factor must be 1.0, got 2.0"),
        (dict(norm_topk_prob=False), "must be 'softmax' with norm_topk_prob=True.* and False"),
        (dict(limit=7.0), "limit must be None, got 7.0"),
        (dict(alpha=1.7), "alpha must be 1.0, got 1.7"),
        (dict(up_offset=1.0), "up_offset must be 0.0, got 1.0"),
    ],
)
def test_what_mixtral_cannot_hold_of_fresh_experts(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        export_mixtral(make(upcycled=False, **options), tmp_path)


def test_models_that_are_no_mixtral(tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM, got GPT2LMHeadModel"):
        export_mixtral(make("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="attention_bias must be False"):
        export_mixtral(llama(attention_bias=True), tmp_path)
    model = llama()
    moe_ext.replace_ffn(model, 4, match="*.0.mlp")
    moe_ext.replace_ffn(model, 6, match="*.1.mlp")
    with pytest.raises(ValueError, match="1.mlp: num_experts must be that of all layers, 4, got 6"):
        export_mixtral(model, tmp_path)
