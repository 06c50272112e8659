"""replace() and restore(): models whose experts do not go through transformers' registry."""

import copy
import itertools
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch

from support.oracle import bits_equal, relative_error, unit

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from test_conformance import FLOAT32_ERROR  # noqa: E402

from moe_ext.integrations.transformers import replace, restore  # noqa: E402
from moe_ext.integrations.transformers.blocks import FAMILIES  # noqa: E402

SMALL = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=64, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SWITCH = dict(
    vocab_size=50, d_model=32, d_kv=8, d_ff=20, num_heads=4, num_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=6, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
NLLB = dict(
    vocab_size=50, d_model=32, encoder_ffn_dim=20, decoder_ffn_dim=20, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_sparse_step=2,
    decoder_sparse_step=2, num_experts=6, expert_capacity=13, dropout=0.0, attention_dropout=0.0,
    max_position_embeddings=64, scale_embedding=False,
)  # fmt: skip


def switch(**options):
    config = transformers.SwitchTransformersConfig(**SWITCH | options)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_moe(**options):
    return transformers.NllbMoeForConditionalGeneration(
        transformers.NllbMoeConfig(**NLLB | options)
    )


def dbrx(**options):
    ffn = dict(ffn_hidden_size=20, moe_num_experts=6, moe_top_k=3, moe_jitter_eps=None) | options
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=50, ffn_config=ffn,
        attn_config=dict(kv_n_heads=4, clip_qkv=100.0, rope_theta=1e4),
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config)


def jetmoe():
    config = transformers.JetMoeConfig(
        **SMALL, intermediate_size=20, kv_channels=8, num_local_experts=6, num_experts_per_tok=2
    )
    return transformers.JetMoeForCausalLM(config)


def llama4(**options):
    config = transformers.Llama4TextConfig(
        **SMALL | dict(intermediate_size=20, intermediate_size_mlp=24, num_local_experts=6)
        | dict(num_experts_per_tok=1, interleave_moe_layer_step=1, head_dim=8) | options
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def longcat_flash():
    config = transformers.LongcatFlashConfig(
        **{n: v for n, v in SMALL.items() if n != "num_hidden_layers"}, num_layers=2,
        ffn_hidden_size=24, expert_ffn_hidden_size=20, n_routed_experts=6, zero_expert_num=3,
        moe_topk=3, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, head_dim=8, routed_scaling_factor=2.0,
    )  # fmt: skip
    return transformers.LongcatFlashForCausalLM(config)


def step3p7(**options):
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    config = Step3p7TextConfig(
        **SMALL, head_dim=8, intermediate_size=24, moe_intermediate_size=20, share_expert_dim=12,
        n_routed_experts=6, num_experts_per_tok=3, mlp_layer_types=["sparse"] * 2,
        sliding_window=8, moe_router_scaling_factor=2.0, swiglu_limits=[0.0, 0.3],
    )  # fmt: skip
    return Step3p7TextModel(config)


MODELS = {
    "switch": switch,
    "switch_dropping": lambda: switch(expert_capacity=2),
    "switch_jitter": lambda: switch(router_jitter_noise=0.3),
    "switch_bias": lambda: switch(router_bias=True),
    "nllb_moe": nllb_moe,
    "nllb_moe_no_token_dropout": lambda: nllb_moe(moe_token_dropout=0.0),
    "dbrx": dbrx,
    "dbrx_gelu": lambda: dbrx(ffn_act_fn={"name": "gelu"}),
    "jetmoe": jetmoe,
    "llama4": llama4,
    "llama4_two": lambda: llama4(num_experts_per_tok=2),
    "longcat_flash": longcat_flash,
    "step3p7": step3p7,
}
IS_5_17 = transformers.__version__.startswith("5.17.")
# Whose router_logits no output of that release has, so that their balance loss fails too.
WITHOUT_LOGITS = [n for n in MODELS if IS_5_17 and n.startswith(("switch", "dbrx", "llama4"))]
# Drawn alike only where nothing is drawn within the experts.
TRAINED = ("switch_jitter", "nllb_moe_no_token_dropout", "dbrx", "llama4")


def make(name):
    """The model with weights that keep everything at unit scale."""
    model = MODELS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name:
            flat = parameter.dim() == 1 or "embed" in parameter_name or "shared.w" in parameter_name
            parameter.data = unit(
                *parameter.shape, fan_in=4 if flat else fan_in(parameter_name, parameter)
            )
    for _, buffer in model.named_buffers():
        if "e_score_correction_bias" in _:
            buffer.copy_(0.2 * unit(*buffer.shape))
    return model


def fan_in(name, parameter):
    transposed = "feed_forward.experts" in name or name.endswith("mlp.w2")
    return parameter.shape[-2 if transposed else -1] if not name.endswith("mlp.w2") else 20


def batch(model):
    ids = torch.randint(3, 50, (2, 11))
    if model.config.is_encoder_decoder:
        return dict(input_ids=ids, decoder_input_ids=torch.randint(3, 50, (2, 9)))
    return dict(input_ids=ids)


def run(model, inputs, **options):
    """{name: tensor}: the output, the router's logits, and every gradient by the original's names."""
    torch.manual_seed(5)
    model.zero_grad()
    output = model(**inputs, use_cache=False, **options)
    tensors = {"output": output[0]}
    for name, value in output.items():
        if "router_logits" in name:
            tensors |= {f"{name}.{i}": t for i, t in enumerate(value)}
    generator = torch.Generator().manual_seed(6)
    dy = torch.randn(output[0].shape, dtype=torch.float64, generator=generator)
    (output[0] * dy.to(output[0].dtype)).sum().backward()
    results = {name: t.detach().clone() for name, t in tensors.items()}
    # Gradients take the places of the weights, so that restore() names them.
    named = copy.deepcopy(model)
    for ours, p in zip(named.parameters(), model.parameters()):
        ours.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    if is_replaced(named):
        restore(named)
    gradients = {f"d {name}": p.detach() for name, p in named.named_parameters()}
    return pooled(results | gradients)


def pooled(results):
    """Gradients outside of the MoE blocks as one: some are 0 but for rounding, as a key's bias."""
    apart, rest = {}, []
    for name, tensor in results.items():
        if name.startswith("d ") and not re.search(r"expert|router|mlp\.|feed_forward|ffn", name):
            rest.append(tensor.flatten())
        else:
            apart[name] = tensor
    return apart | {"all other gradients": torch.cat(rest)}


def is_replaced(model):
    return any("integrations.transformers.blocks" in type(m).__module__ for m in model.modules())


def replaced(model):
    replace_quietly(model)
    assert is_replaced(model)
    return model


def replace_quietly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLLB-MoE's
        return replace(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_and_gradients(name, training):
    if training and name not in TRAINED:
        pytest.skip("draws within the experts, or trains as it evaluates")
    model = make(name).train(training)
    router_logits = {}
    if can_output_router_logits(model) and name not in WITHOUT_LOGITS:
        router_logits = dict(output_router_logits=True)
    inputs = batch(model)
    ours, theirs = {}, {}
    for dtype in (torch.float64, torch.float32):
        original = copy.deepcopy(model).to(dtype)
        theirs[dtype] = run(original, inputs, **router_logits)
        ours[dtype] = run(replaced(copy.deepcopy(model).to(dtype)), inputs, **router_logits)
    oracle = theirs[torch.float64]
    assert ours[torch.float64].keys() == ours[torch.float32].keys() == oracle.keys()
    assert len([n for n in oracle if "router_logits" in n]) >= (2 if router_logits else 0)
    for result, expected in oracle.items():
        # Some of their routers round to float32, whatever the model's dtype; and errors add up
        # over the layers.
        limit = 16 * torch.finfo(torch.float32).eps
        error = relative_error(ours[torch.float64][result], expected)
        assert error <= limit, f"{result}: {error} in float64"
        limit = max(limit, 1.5 * relative_error(theirs[torch.float32][result], expected))
        error = relative_error(ours[torch.float32][result], expected)
        assert error <= limit, f"{result}: {error} in float32, at most {limit} allowed"
    experts = [n for n in oracle if n.startswith("d ") and "expert" in n and oracle[n].any()]
    assert len(experts) >= 2, "no expert was trained"


def can_output_router_logits(model):
    recorded = (getattr(module, "_can_record_outputs", None) or {} for module in model.modules())
    return any("router_logits" in outputs for outputs in recorded)


@pytest.mark.parametrize("name", ["switch", "nllb_moe", "dbrx", "jetmoe"])
def test_balance_loss_stays(name):
    """The loss with output_router_logits=True, and what it does to the routers."""
    if name in WITHOUT_LOGITS:
        pytest.skip("the release's own fails")
    model = make(name)
    inputs = batch(model)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    options = dict(labels=labels, output_router_logits=True, use_cache=False)
    results = []
    for each in (model, replaced(copy.deepcopy(model))):
        loss = each(**inputs, **options).loss
        loss.backward()
        routers = [p.grad for n, p in each.named_parameters() if "router" in n]
        results.append((loss.detach(), torch.cat([g.flatten() for g in routers])))
    plain = model(**inputs, labels=labels, use_cache=False).loss
    assert relative_error(results[0][0], plain.double()) > 1e-4, "no balance loss"
    for ours, theirs in zip(*results[::-1]):
        assert relative_error(ours, theirs.double()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_restore(name):
    """Bit for bit what it was, under its own names; with the weights of now where they changed."""
    model = make(name)
    classes = [type(module) for module in model.modules()]
    state = copy.deepcopy(dict(model.state_dict()))
    inputs = batch(model)
    expected = model(**inputs)[0]
    assert replace_quietly(model).keys() == restore(model).keys()
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state) and bits_equal(dict(model.state_dict()), state)
    assert bits_equal(model(**inputs)[0], expected)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = {n: (2 * t if n in parameters else t).bfloat16() for n, t in state.items()}
    replaced(model)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    restore(model.bfloat16())
    assert bits_equal(dict(model.state_dict()), expected)


@pytest.mark.parametrize("name", MODELS)
def test_saves_and_loads_as_the_original(name, tmp_path):
    """While replaced, too: checkpoints of either are read by the other, and state_dicts by ours."""
    model = make(name)
    inputs = batch(model)
    original = copy.deepcopy(model)
    expected = original(**inputs)[0]
    state = dict(original.state_dict())
    replaced(model)
    model.save_pretrained(tmp_path)
    reloaded = type(original).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert bits_equal(dict(reloaded.state_dict()), state)
    # Loaded weights lie at any address, and with it some BLAS change their order of summation.
    assert relative_error(reloaded(**inputs)[0], expected.double()) < FLOAT32_ERROR

    ours, state_of_now = model(**inputs)[0], copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters.keys() <= state_of_now.keys()
    for assign, each in itertools.product((False, True), (state, state_of_now)):
        for parameter in model.parameters():
            parameter.data.zero_()
        model.load_state_dict(each, assign=assign)
        assert bits_equal(model(**inputs)[0], ours)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bits_equal(other(**inputs)[0], ours)


def safetensors_of(folder):
    return safetensors.load_file(folder / "model.safetensors")


def test_load_state_dict_says_what_does_not_fit():
    model = make("dbrx")
    state, experts = model.state_dict(), "transformer.blocks.1.ffn.experts.mlp"
    replaced(model)
    state[f"{experts}.w4"] = state.pop(f"{experts}.w2")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["transformer.blocks.1.ffn.experts.down_proj"]
    assert unexpected == [f"{experts}.w4"]
    v1 = state.pop(f"{experts}.v1")
    missing, _ = model.load_state_dict(state, strict=False)
    assert missing[1:] == [f"{experts}.v1"]
    state[f"{experts}.v1"] = v1
    state[f"{experts}.w2"] = state.pop(f"{experts}.w4").T
    with pytest.raises(RuntimeError, match=r"w2 must be of shape \(120, 32\), got \(32, 120\)"):
        model.load_state_dict(state)


def test_parameters_become_one_a_matrix():
    """Those of the families that keep a module an expert, or flat matrices; frozen ones stay so."""
    model = make("switch")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("expert" not in name)
    replaced(model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "expert" in n}
    block = "encoder.block.1.layer.1.mlp.experts"
    assert shapes[f"{block}.up_proj"] == (6, 20, 32) and shapes[f"{block}.down_proj"] == (6, 32, 20)
    assert len(shapes) == 4
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters()} - shapes.keys()
    restore(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 24 and all("expert" in n for n in frozen)


@pytest.mark.parametrize("part", ["wi", "wo"])
def test_a_frozen_matrix_stays_frozen(part):
    model = make("switch")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("expert_" not in name or part not in name)
    before = {n for n, p in model.named_parameters() if not p.requires_grad}
    replaced(model)
    matrix = {"wi": "up_proj", "wo": "down_proj"}[part]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 2 and all(n.endswith(f"experts.{matrix}") for n in frozen)
    restore(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == before


@pytest.mark.parametrize("expert", [0, 5])
def test_experts_of_which_some_are_frozen_are_refused(expert):
    model = make("switch")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            f"decoder.block.1.layer.2.mlp.experts.expert_{expert}." not in name
        )
    with pytest.raises(ValueError, match=f"False for expert_{expert}.wi.weight"):
        replace(model)
    assert not is_replaced(model)
    half_of_a_stack = make("dbrx")
    half_of_a_stack.transformer.blocks[0].ffn.experts.mlp.v1.requires_grad_(False)
    with pytest.raises(ValueError, match=r"mlp.w1, mlp.v1 become one .* False for mlp.v1"):
        replace(half_of_a_stack)


@pytest.mark.parametrize("name", ["switch", "nllb_moe", "dbrx"])
def test_distributed_checkpoint(name):
    """State of model and optimizer by torch.distributed.checkpoint, which goes by parameters' names."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = replaced(make(name))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    inputs = batch(model)
    model(**inputs)[0].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = [p.detach().clone() for p in model.parameters()]
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    for parameter in model.parameters():
        parameter.data.add_(1)
    set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert bits_equal(list(model.parameters()), expected)


def test_saving_from_another_process(tmp_path):
    """A model that was pickled while it was replaced."""
    model = make("switch")
    state = dict(model.state_dict())
    pickled = tmp_path / "model.pickle"
    pickled.write_bytes(pickle.dumps(replaced(model)))
    code = f"import pickle; pickle.load(open({str(pickled)!r}, 'rb')).save_pretrained({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert safetensors_of(tmp_path).keys() <= state.keys()


@pytest.mark.parametrize("name,p", [("switch", "dropout_rate"), ("nllb_moe", "activation_dropout")])
def test_dropout_within_experts(name, p):
    """Other draws than theirs, from the same distribution: on average what is not dropped."""
    model = switch(**{p: 0.5}) if name == "switch" else nllb_moe(**{p: 0.5}, moe_token_dropout=0.25)
    experts = next(iter(replace_quietly(model).values()))
    for parameter in experts.parameters():
        parameter.data = unit(*parameter.shape, fan_in=parameter.shape[-1])
    x, choice = unit(16, 32), torch.eye(6, dtype=torch.int64)[torch.randint(6, (16,))]
    weights = (torch.rand(16, 1),) if name == "switch" else (torch.rand(16, 6) * (choice + 0.1),)
    args = (x, choice[:, None] if name == "switch" else choice, *weights)
    expected = experts.eval()(*args)
    # In evaluation theirs counts 1 - p; in training what is left counts 1 / (1 - p).
    expected = expected / 0.75 if name == "nllb_moe" else expected
    experts.train()
    draws = torch.stack([experts(*args) for _ in range(400)]).detach().double()
    assert relative_error(draws[0], expected.detach().double()) > 0.3
    assert relative_error(draws.mean(0), expected.detach().double()) < 0.12


@pytest.mark.parametrize("name", [name for name in MODELS if "_" not in name or name in FAMILIES])
def test_compiles_in_one_graph(name):
    if IS_5_17 and name in ("switch", "nllb_moe"):
        pytest.skip("the release's own router does not")
    model = replaced(make(name))
    inputs = batch(model)
    if name == "switch":  # whose own stack does not
        model, inputs = model.encoder.block[1].layer[1].mlp, dict(hidden_states=unit(2, 7, 32))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(**inputs), model(**inputs)
    if name != "switch":
        actual, expected = actual[0], expected[0]
    assert relative_error(actual.detach(), expected.detach().double()) < 1e-6


@pytest.mark.parametrize("name", [name for name in MODELS if "_" not in name or name in FAMILIES])
def test_autocast(name):
    """As near to float32 as theirs comes; DBRX's own fails."""
    model = make(name)
    inputs = batch(model)
    expected = model(**inputs)[0].detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        limit = 0.2 if name == "dbrx" else relative_error(model(**inputs)[0].detach(), expected)
        actual = replaced(model)(**inputs)[0].detach()
    assert relative_error(actual, expected) <= max(1.5 * limit, 4 * torch.finfo(torch.bfloat16).eps)


# ---- what is refused -------------------------------------------------------------------


def mixtral():
    config = transformers.MixtralConfig(**SMALL, intermediate_size=20, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def with_int8(model):
    block = model.transformer.blocks[1].ffn.experts.mlp
    block.w1 = torch.nn.Parameter(block.w1.detach().to(torch.int8), requires_grad=False)
    return model


def with_own_forward(model):
    experts = model.transformer.blocks[1].ffn.experts
    experts.forward = experts.forward
    return model


@pytest.mark.parametrize(
    "error,make_model,text",
    [
        (ValueError, lambda: torch.nn.Linear(3, 3), "found no MoE block in Linear; known are .*dbrx"),
        (ValueError, mixtral, r'registry: register\(\) and model.set_experts_implementation'),
        (ValueError, lambda: replaced(make("dbrx")), "are already replaced"),
        (TypeError, lambda: dict(a=1), "model must be a torch.nn.Module, got dict"),
        (TypeError, lambda: with_int8(make("dbrx")), "experts.mlp.w1 must be floating, got int8"),
        (RuntimeError, lambda: with_own_forward(make("dbrx")), "already replaced by another library"),
    ],
)  # fmt: skip
def test_what_cannot_be_replaced(error, make_model, text):
    model = make_model()
    modules = getattr(model, "modules", list)
    before = [type(m) for m in modules()]
    with pytest.raises(error, match=text):
        replace(model)
    assert [type(m) for m in modules()] == before


def test_another_transformers(monkeypatch):
    model = make("dbrx")
    experts = type(model.transformer.blocks[0].ffn.experts)
    monkeypatch.setattr(experts, "forward", lambda self, x, weights, experts: x)
    with pytest.raises(RuntimeError, match="takes self, x, weights, experts, where transformers 5"):
        replace(model)
    assert not is_replaced(model)


def test_nothing_to_restore():
    with pytest.raises(ValueError, match=r"found nothing of replace\(\) in DbrxForCausalLM"):
        restore(make("dbrx"))


def test_nllb_moe_says_what_transformers_does():
    with pytest.warns(UserWarning, match="only the experts 0 and 1 of NLLB-MoE"):
        replace(make("nllb_moe"))


def test_every_family_is_tested():
    tested = {type(m).__name__ for name in MODELS for m in MODELS[name]().modules()}
    assert {name for names in FAMILIES.values() for name in names} <= tested
