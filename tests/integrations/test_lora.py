"""PEFT's adapters on experts: what PEFT computes with a merged copy, moe_ext does without."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support.oracle import ROUTINGS, assert_within_bound, relative_error, unit

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import test_experts  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from test_conformance import FLOAT32_ERROR, FLOAT32_INSIDE  # noqa: E402

from moe_ext.integrations.transformers import experts as experts_module  # noqa: E402
from moe_ext.integrations.transformers import lora, register  # noqa: E402
from support import paths, tiny_models  # noqa: E402
from support.lora_models import (  # noqa: E402, F401
    GATES,
    Block,
    E,
    K,
    R,
    T,
    adapted,
    adapted_experts,
    assert_as_peft,
    assert_near_peft,
    draw,
    draw_factors,
    implementation,
    registered,
    results,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def handed(monkeypatch):
    """The adapters that every call of the experts function was given: (up, down), a rank each."""
    taken = []
    original = experts_module.low_rank_of

    def spy(experts, name):
        found = original(experts, name)
        taken.append((name, found and found.a.shape[2]))
        return found

    monkeypatch.setattr(experts_module, "low_rank_of", spy)
    return taken


@pytest.fixture
def taken():
    """Which way every call of the experts function went."""
    with paths.recorded() as taken:
        yield taken


# ---- the same results -----------------------------------------------------------------


@pytest.mark.parametrize("has_post_expert_norm", (False, True))
@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("is_transposed", (False, True))
@pytest.mark.parametrize("gate", GATES)
def test_layouts_and_gates(gate, is_transposed, has_bias, has_post_expert_norm, handed, taken):
    model = adapted_experts(
        **GATES[gate], is_transposed=is_transposed, has_bias=has_bias,
        has_post_expert_norm=has_post_expert_norm,
    )  # fmt: skip
    if gate == "beam":  # computes in float32, whatever the model's dtype: float64 is no oracle
        assert_near_peft(model, draw(), torch.float32, FLOAT32_ERROR)
    else:
        assert_as_peft(model, draw(), torch.float64)
    assert [rank for _, rank in handed] == [R, R]
    assert taken == ["called" if gate in test_experts.CALLED else "fused"]


@pytest.mark.parametrize("gate", ("swiglu", "gpt_oss", "relu2", "unknown"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(gate, dtype):
    assert_as_peft(adapted_experts(**GATES[gate], is_transposed=True, has_bias=True), draw(), dtype)


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(gate, routing):
    model = adapted_experts(**GATES[gate], has_bias=True)
    inputs = draw(routing)
    gradients = assert_as_peft(model, inputs)
    if routing == "sentinels":
        assert not gradients["top_k_weights"][inputs["top_k_index"] >= E].any()


MODELS = (
    "mixtral.MixtralExperts",
    "gpt_oss.GptOssExperts",
    "qwen3_moe.Qwen3MoeExperts",
    "olmoe.OlmoeExperts",
    "nemotron_h.NemotronHExperts",
    "deepseek_v3.DeepseekV3Experts",
)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, handed):
    """With adapters on the attention and the router too, which are none of ours."""
    model = adapted(tiny_models.build(name), target_modules=["q_proj", "o_proj"])
    inputs = tiny_models.inputs(model.base_model.model)
    limit = FLOAT32_ERROR if name in FLOAT32_INSIDE else 1e-12
    run = dict(run=lambda model, inputs: model(**inputs, use_cache=False)[0])
    assert_near_peft(model, inputs, torch.float64, limit, **run)
    assert len(handed) == 4 and {rank for _, rank in handed} == {R}


# ---- what PEFT can do with its adapters ------------------------------------------------


def add_adapter(model, name, **options):
    targets = model.peft_config["default"].target_parameters
    model.add_adapter(
        name, LoraConfig(target_modules=[], target_parameters=targets, **options),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    draw_factors(model)


def test_several_adapters(handed):
    model = adapted_experts(has_bias=True)
    add_adapter(model, "other", r=2, lora_alpha=3)
    model.base_model.set_adapter(["default", "other"])
    assert_as_peft(model, draw())
    assert {rank for _, rank in handed} == {R + 2}


def test_the_active_adapter_counts(handed):
    model = adapted_experts()
    add_adapter(model, "other", r=2, lora_alpha=3)
    inputs = draw()
    outputs = []
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs.append(assert_as_peft(model, inputs)["output"])
    assert relative_error(*outputs) > 0.1
    assert [rank for _, rank in handed] == [R, R, 2, 2]


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
@pytest.mark.parametrize("parameter", ("gate_up_proj", "down_proj"))
def test_one_of_both_stacks(parameter, gate, handed):
    assert_as_peft(adapted_experts_of(parameter, **GATES[gate]), draw())
    assert [name for name, rank in handed if rank] == [parameter]


def adapted_experts_of(*parameters, **options):
    return adapted(Block(test_experts.make(**options)), parameters)


@pytest.mark.parametrize("options", (dict(use_rslora=True), dict(lora_alpha=1)))
def test_scales(options):
    model = adapted(Block(test_experts.make()), **options)
    assert_as_peft(model, draw())
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.set_scale("default", 0.3)
    assert_as_peft(model, draw())


def test_disabled_adapters(handed):
    experts = test_experts.make()
    inputs = draw()
    experts.config._experts_implementation = "moe_ext"
    expected = experts(**inputs)
    model = adapted(Block(experts))
    with model.disable_adapter():
        assert torch.equal(model(**inputs), expected)
    assert relative_error(model(**inputs), expected) > 0.1
    assert [rank for _, rank in handed] == [None] * 4 + [R] * 2


def test_merging(handed):
    """A merged adapter is in the weights: nothing is handed over, and it counts once."""
    model = adapted_experts().double()
    implementation(model, "moe_ext")
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in draw().items()}
    outputs = [model(**inputs)]
    model.merge_adapter()
    outputs.append(model(**inputs))
    model.unmerge_adapter()
    outputs.append(model(**inputs))
    outputs.append(model.merge_and_unload()(**inputs))
    for output in outputs[1:]:
        assert relative_error(output, outputs[0]) < 1e-13
    assert [rank for _, rank in handed] == [R, R, None, None] * 2


def test_saving_and_loading(tmp_path):
    model = adapted(tiny_models.build("mixtral.MixtralExperts"))
    model.set_experts_implementation("moe_ext")
    inputs = tiny_models.inputs(model.base_model.model)
    expected = model(**inputs).logits
    names = list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == names
    base = copy.deepcopy(model).unload()
    base.set_experts_implementation("moe_ext")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(loaded(**inputs).logits, expected)


def test_float32_adapters_of_a_bfloat16_model():
    """As PEFT makes them: the factors are rounded to the experts' dtype, their gradients not."""

    def mixed(model, inputs):
        if inputs["hidden_states"].dtype == torch.bfloat16:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        return model(**inputs)

    gradients = assert_as_peft(adapted_experts(), draw(), torch.bfloat16, run=mixed)
    adapters = {g.dtype for name, g in gradients.items() if "lora_" in name}
    assert adapters == {torch.float32} and gradients["output"].dtype == torch.bfloat16


def test_gradient_checkpointing():
    model = adapted(tiny_models.build("qwen3_moe.Qwen3MoeExperts")).train()
    inputs = tiny_models.inputs(model.base_model.model)

    def checkpointed(model, inputs):
        model.base_model.model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
        return model(**inputs, use_cache=False)[0]

    run = dict(run=lambda model, inputs: model(**inputs, use_cache=False)[0])
    plain = results(model, inputs, "moe_ext", **run)
    again = results(model, inputs, "moe_ext", run=checkpointed)
    for name, expected in plain.items():
        assert torch.equal(again[name], expected), name


def test_a_compiled_model(handed):
    """As it is used: where Dynamo leaves a graph is PEFT's affair."""
    model = adapted(tiny_models.build("mixtral.MixtralExperts"), target_modules=["q_proj"])
    inputs = tiny_models.inputs(model.base_model.model)

    def compiled(model, inputs):
        torch.compiler.reset()
        return torch.compile(model, backend="aot_eager")(**inputs, use_cache=False)[0]

    plain = dict(run=lambda model, inputs: model(**inputs, use_cache=False)[0])
    expected = results(model, inputs, "moe_ext", torch.float64, **plain)
    handed.clear()
    actual = results(model, inputs, "moe_ext", torch.float64, run=compiled)
    assert actual.keys() == expected.keys() and {rank for _, rank in handed} == {R}
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("has_post_expert_norm", (False, True))
@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_autocast(gate, has_post_expert_norm):
    def autocast(model, inputs):
        if inputs["hidden_states"].dtype == torch.float64:  # the oracle
            return model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    model = adapted_experts(**GATES[gate], has_bias=True, has_post_expert_norm=has_post_expert_norm)
    inputs = draw()
    ours, peft_s = (results(model, inputs, n, run=autocast) for n in ("moe_ext", "eager"))
    oracle = results(model, inputs, "eager", torch.float64)
    for name, expected in oracle.items():
        assert_within_bound(name, ours[name], expected, peft_s[name], torch.bfloat16)


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
@pytest.mark.parametrize("frozen", ("lora_A", "lora_B", "base_layer.lora", "hidden_states"))
def test_what_is_frozen_has_no_gradient(frozen, gate):
    model = adapted_experts(**GATES[gate], has_bias=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)

    def run(model, inputs):
        return model(**{n: t.detach() if n == frozen else t for n, t in inputs.items()})

    gradients = assert_as_peft(model, draw(), run=run)
    assert not any(frozen in name for name in gradients)


@pytest.mark.parametrize("is_transposed", (False, True))
@pytest.mark.parametrize("gate", ("swiglu", "relu2", "unknown"))
def test_experts_that_train_too(gate, is_transposed):
    model = adapted_experts(**GATES[gate], is_transposed=is_transposed, has_bias=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    gradients = assert_as_peft(model, draw())
    assert sum("proj" in name for name in gradients) == 4


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_nothing_but_sentinels(gate):
    model = adapted_experts(**GATES[gate], has_bias=True)
    implementation(model, "moe_ext")
    output = model(**draw() | dict(top_k_index=torch.full((T, K), E)))
    output.sum().backward()
    assert not output.any()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- what is not known -----------------------------------------------------------------


def with_dropout(wrapper):
    wrapper.lora_dropout["default"] = nn.Dropout(0.0)


def with_a_bias(wrapper):
    b = wrapper.lora_B["default"]
    b.bias = nn.Parameter(torch.zeros(b.out_features), requires_grad=False)


def with_a_variant(wrapper):
    wrapper.lora_variant["default"] = object()


def of_another_kind(wrapper):
    class Other(nn.Linear):
        pass

    wrapper.lora_A["default"].__class__ = Other


def of_another_class(wrapper):
    class OtherWrapper(ParamWrapper):
        pass

    wrapper.__class__ = OtherWrapper


@pytest.mark.parametrize(
    "change, says",
    (
        (with_dropout, 'adapter "default" has dropout'),
        (with_a_bias, 'adapter "default" has a bias'),
        (with_a_variant, 'adapter "default" is a variant of LoRA'),
        (of_another_kind, 'adapter "default" has factors of an unknown kind'),
        (of_another_class, "an unknown kind of wrapper, OtherWrapper"),
    ),
)
def test_unknown_adapters_go_the_way_of_peft(change, says, handed):
    model = adapted_experts()
    change(model.base_model.model.experts)  # the wrapper of down_proj
    implementation(model, "moe_ext")
    inputs = draw()
    with pytest.warns(UserWarning, match=f"LoRA on Some.down_proj: {says}; PEFT computes it"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_as_peft(model, inputs)
    assert [name for name, rank in handed if rank] == ["gate_up_proj"] * 2


def test_adapters_of_a_bias_go_the_way_of_peft():
    model = adapted_experts_of("gate_up_proj", "down_proj_bias", has_bias=True)
    implementation(model, "moe_ext")
    with pytest.warns(UserWarning, match="down_proj_bias: not a matrix of the experts"):
        model(**draw())
    assert_as_peft(model, draw())


def test_other_implementations_are_left_to_peft(handed):
    model = adapted_experts()
    for name in ("eager", "grouped_mm"):
        implementation(model, name)
        model(**draw())
    experts = model.base_model.model.experts.get_base_layer()
    assert not handed and not any("moe_ext" in name for name in vars(experts))


# ---- the patch -------------------------------------------------------------------------


def test_register_after_everything_else(monkeypatch):
    activate = ParamWrapper._activate_lora.before_moe_ext
    monkeypatch.setattr(ParamWrapper, "_activate_lora", activate)
    model = adapted_experts()
    assert ParamWrapper._activate_lora is activate
    register()
    register()
    assert ParamWrapper._activate_lora.before_moe_ext is activate
    assert_as_peft(model, draw())


def test_nothing_stays_behind():
    """Also after an error in the experts."""
    model = adapted_experts()
    implementation(model, "moe_ext")
    experts = model.base_model.model.experts.get_base_layer()
    attributes = set(vars(experts))
    model(**draw())
    with pytest.raises((RuntimeError, ValueError)):
        model(**draw() | dict(hidden_states=unit(T, 1)))
    assert set(vars(experts)) == attributes


@pytest.mark.parametrize("rank", [0, 1])
def test_under_expert_parallelism_a_rank_takes_its_own_experts(rank, monkeypatch):
    """PEFT's factors are of all experts; the module has E / P, whose parameter's mesh says which."""
    wrapper = next(m for m in adapted_experts().modules() if isinstance(m, ParamWrapper))
    experts, half = wrapper.get_base_layer(), wrapper.num_experts // 2
    everyones = lora._low_rank(wrapper, ["default"], experts)
    assert len(everyones.a) == wrapper.num_experts

    experts.num_experts = half
    with pytest.raises(
        RuntimeError, match=f"this rank has {half}, and its parameter is no DTensor"
    ):
        lora._local(wrapper, experts)
    mesh = SimpleNamespace(
        ndim=2, mesh_dim_names=("efsdp", "ep"), get_local_rank=dict(efsdp=7, ep=rank).get
    )
    parameter = SimpleNamespace(device_mesh=mesh, dtype=wrapper.get_param().dtype)
    monkeypatch.setattr(wrapper, "get_param", lambda: parameter)
    own = lora._low_rank(wrapper, ["default"], experts)
    of_rank = slice(rank * half, (rank + 1) * half)
    assert torch.equal(own.a, everyones.a[of_rank]) and torch.equal(own.b, everyones.b[of_rank])
