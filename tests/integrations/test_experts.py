"""transformers' experts on moe_ext: every layout and gate, dtype and way of running."""

import functools
import importlib
import inspect
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from support.oracle import (
    DTYPES,
    ROUTINGS,
    assert_matches,
    assert_within_bound,
    bits_equal,
    draw_experts,
    evaluate,
    relative_error,
    unit,
)

pytest.importorskip("transformers")

import transformers  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import (  # noqa: E402
    ALL_EXPERTS_FUNCTIONS,
    use_experts_implementation,
)

from moe_ext.integrations.transformers import experts as experts_module  # noqa: E402
from moe_ext.integrations.transformers import register  # noqa: E402
from moe_ext.integrations.transformers._version import check_transformers  # noqa: E402
from support import paths  # noqa: E402

T, H, I, E, K = 23, 20, 12, 5, 3

# What later releases have, and the oldest that is supported need not.
VERSION = f"transformers {transformers.__version__}"
HAS_NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters


def gate_of(name):
    """folder.ClassName's own gate, or None where this transformers has no such model."""
    folder, _, experts = name.partition(".")
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:
        return None
    return getattr(module, experts)._apply_gate


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.fixture
def taken():
    """Which way every call of the experts function went."""
    with paths.recorded() as taken:
        yield taken


# ---- experts as transformers has them ------------------------------------------------


class Experts(torch.nn.Module):
    """Experts of any layout, to be decorated; this forward is what transformers calls eager."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = E
        up, wide = ("gate_up_proj", 2 * I) if config.has_gate else ("up_proj", I)
        for name, width, fan_in in ((up, wide, H), ("down_proj", H, I)):
            shape = (E, fan_in, width) if config.is_transposed else (E, width, fan_in)
            setattr(self, name, torch.nn.Parameter(unit(*shape, fan_in=fan_in)))
            if config.has_bias:
                setattr(self, f"{name}_bias", torch.nn.Parameter(unit(E, width)))
        self.act_fn = config.act_fn
        self.limit = self.swiglu_limit = 0.7
        self.alpha = self.swiglu_alpha = 1.702
        if getattr(config, "has_post_expert_norm", False):
            self.post_expert_norm = torch.nn.RMSNorm(H)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for e in range(E):
            token, j = torch.where(top_k_index == e)
            rows = self.linear(
                "gate_up_proj" if self.has_gate else "up_proj", e, hidden_states[token]
            )
            rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
            rows = self.linear("down_proj", e, rows)
            if getattr(self, "has_post_expert_norm", False):
                rows = self.post_expert_norm(rows)
            y = y.index_add(0, token, (rows * top_k_weights[token, j, None]).to(y.dtype))
        return y

    def linear(self, name, e, x):
        weight = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.has_bias else None
        return F.linear(x, weight.T if self.is_transposed else weight, bias)


FLAGS = dict(
    is_concatenated=True, is_transposed=False, has_bias=False, has_gate=True,
    has_post_expert_norm=False,
)  # fmt: skip


def make(apply_gate=None, act_fn="silu", **flags):
    flags = FLAGS | flags
    if not HAS_NORM and flags.pop("has_post_expert_norm"):
        pytest.skip(f"{VERSION}: experts have no norm after them")
    if isinstance(apply_gate, str):
        name, apply_gate = apply_gate, gate_of(apply_gate)
        if apply_gate is None:
            pytest.skip(f"{VERSION} has no {name}")
    methods = {"_apply_gate": apply_gate} if apply_gate else {}
    experts_class = use_experts_implementation(type("Some", (Experts,), methods), **flags)
    act_fn = ACT2FN[act_fn] if isinstance(act_fn, str) else act_fn
    return experts_class(SimpleNamespace(**flags, act_fn=act_fn, _experts_implementation=None))


def running(experts, implementation):
    """The experts as a function of tensors."""

    def run(hidden_states, top_k_index, top_k_weights, **parameters):
        experts.config._experts_implementation = implementation
        args = (hidden_states, top_k_index, top_k_weights)
        return torch.func.functional_call(experts, parameters, args)

    return run


def draw(experts, dtype=torch.float32, routing="distinct", weights=None):
    """Unit-scale inputs: tokens, their routing, and the experts' parameters."""
    return dict(
        hidden_states=unit(T, H, dtype=dtype),
        top_k_index=draw_experts(T, E, K, routing).long(),
        top_k_weights=torch.rand(T, K).to(weights or dtype),
        **{name: p.detach().to(dtype) for name, p in experts.named_parameters()},
    )


def assert_as_eager(experts, inputs):
    return assert_matches(running(experts, "moe_ext"), running(experts, "eager"), inputs)


# ---- layouts, gates, dtypes ----------------------------------------------------------


def doubled(self, gate_up):
    """A gate that is not known."""
    gate, up = gate_up.chunk(2, dim=-1)
    return 2 * torch.sigmoid(gate) * up


GATES = {
    "swiglu": dict(),
    "geglu": dict(act_fn="gelu"),
    "geglu_tanh": dict(act_fn="gelu_pytorch_tanh"),
    "reglu": dict(act_fn="relu"),
    "function": dict(act_fn=F.silu),
    "gpt_oss": dict(apply_gate="gpt_oss.GptOssExperts", is_concatenated=False),
    "openai_privacy_filter": dict(apply_gate="openai_privacy_filter.OpenAIPrivacyFilterExperts"),
    "minimax_m3_vl": dict(apply_gate="minimax_m3_vl.MiniMaxM3VLExperts"),
    "glm5_next": dict(apply_gate="glm5_next.Glm5NextTextExperts"),
    "deepseek_v4": dict(apply_gate="deepseek_v4.DeepseekV4Experts", act_fn="gelu"),
    "beam": dict(apply_gate="beam.BeamExperts"),
    "relu2": dict(has_gate=False, act_fn="relu2"),
    "silu": dict(has_gate=False),
}
CALLED = {
    "unknown": dict(apply_gate=doubled),
    "unknown_act_fn": dict(act_fn="mish"),
    "unknown_ungated": dict(has_gate=False, act_fn="mish"),
    "layout_against_flag": dict(apply_gate="gpt_oss.GptOssExperts", is_concatenated=True),
    "default_against_flag": dict(is_concatenated=False),
    "no_kernel": dict(act_fn="relu2"),
}


@pytest.mark.parametrize("has_post_expert_norm", (False, True))
@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("is_transposed", (False, True))
@pytest.mark.parametrize("gate", (*GATES, *CALLED))
def test_layouts_and_gates(gate, is_transposed, has_bias, has_post_expert_norm, taken):
    experts = make(
        **(GATES | CALLED)[gate], is_transposed=is_transposed, has_bias=has_bias,
        has_post_expert_norm=has_post_expert_norm,
    )  # fmt: skip
    assert_as_eager(experts, draw(experts))
    assert taken == ["called" if gate in CALLED else "fused"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ("swiglu", "gpt_oss", "unknown", "relu2"))
def test_dtypes(gate, dtype):
    experts = make(**(GATES | CALLED)[gate], is_transposed=True, has_bias=True)
    assert_as_eager(experts, draw(experts, dtype))


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_weights_of_another_dtype(gate, weights):
    experts = make(**(GATES | CALLED)[gate])
    results = assert_as_eager(experts, draw(experts, torch.float32, weights=weights))
    assert results["output"].dtype == torch.float32
    assert results["d_top_k_weights"].dtype == weights


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_float32_weights_stay_float32(gate):
    """In a bfloat16 model: rounded weights would have rounded gradients."""
    experts = make(**(GATES | CALLED)[gate])
    inputs = draw(experts, torch.bfloat16, weights=torch.float32)
    gradient = assert_as_eager(experts, inputs)["d_top_k_weights"]
    assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("gate", ("swiglu", "gpt_oss", "unknown"))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(gate, routing):
    """Duplicates, experts without rows, and expert parallelism's sentinels, ids past E."""
    experts = make(**(GATES | CALLED)[gate], has_bias=True, has_post_expert_norm=HAS_NORM)
    inputs = draw(experts, routing=routing)
    results = assert_as_eager(experts, inputs)
    if routing == "sentinels":
        assert not results["d_top_k_weights"][inputs["top_k_index"] >= E].any()


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_nothing_but_sentinels(gate):
    experts = make(**(GATES | CALLED)[gate], has_bias=True)
    inputs = draw(experts) | dict(top_k_index=torch.full((T, K), E))
    results = evaluate(running(experts, "moe_ext"), inputs)
    assert not any(result.any() for result in results.values())


@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_no_tokens(gate):
    experts = make(**(GATES | CALLED)[gate], has_bias=True)
    inputs = draw(experts)
    inputs |= {name: inputs[name][:0] for name in ("hidden_states", "top_k_index", "top_k_weights")}
    results = evaluate(running(experts, "moe_ext"), inputs)
    assert results["output"].shape == (0, H)
    assert not results["d_down_proj"].any()


@pytest.mark.parametrize("gate", ("swiglu", "gpt_oss", "unknown"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_odd_widths(gate, dtype, monkeypatch):
    """Rows of no multiple of 16 bytes, which grouped_mm refuses."""
    monkeypatch.setitem(globals(), "H", 19)
    monkeypatch.setitem(globals(), "I", 7)
    experts = make(**(GATES | CALLED)[gate], has_bias=True)
    inputs = draw(experts, dtype)
    with pytest.raises(RuntimeError, match="16"):
        running(experts, "grouped_mm")(**inputs)
    assert_as_eager(experts, inputs)


@pytest.mark.parametrize("has_post_expert_norm", (False, True))
@pytest.mark.parametrize("gate", ("swiglu", "unknown"))
def test_autocast(gate, has_post_expert_norm):
    experts = make(
        **(GATES | CALLED)[gate], has_bias=True, has_post_expert_norm=has_post_expert_norm
    )
    inputs = draw(experts)

    def autocast(implementation):
        run = running(experts, implementation)

        def in_bfloat16(**inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return run(**inputs)

        return evaluate(in_bfloat16, inputs, cotangents={"output": cotangent})

    cotangent = unit(T, H)
    oracle = evaluate(running(experts, "eager"), inputs, cotangents={"output": cotangent})
    ours, eager = autocast("moe_ext"), autocast("eager")
    for name, expected in oracle.items():
        assert ours[name].dtype == torch.float32
        assert_within_bound(name, ours[name], expected, eager[name], dtype=torch.bfloat16)


@pytest.mark.parametrize("gate", ("swiglu", "gpt_oss", "relu2", "unknown", "unknown_act_fn"))
def test_compiles_without_a_break(gate):
    """One graph, for any number of tokens."""
    torch._dynamo.reset()
    experts = make(**(GATES | CALLED)[gate], has_bias=True, has_post_expert_norm=HAS_NORM)
    experts.config._experts_implementation = "moe_ext"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)

    def results(module, hidden_states, top_k_index, top_k_weights):
        hidden_states.requires_grad_()
        top_k_weights.requires_grad_()
        y = module(hidden_states, top_k_index, top_k_weights)
        return y, torch.autograd.grad(
            y.square().sum(), (hidden_states, top_k_weights, *experts.parameters())
        )

    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (T, 2 * T, 7):
            x, w = unit(tokens, H), torch.rand(tokens, K)
            index = draw_experts(tokens, E, K, "sentinels")
            assert bits_equal(results(compiled, x, index, w), results(experts, x, index, w))


# ---- what is not fused ---------------------------------------------------------------


def test_a_gate_of_the_module_itself_is_called(taken):
    experts = make()
    experts._apply_gate = doubled.__get__(experts)
    assert_as_eager(experts, draw(experts))
    assert taken == ["called"]


def by_a_constant(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up * 2


def by_an_attribute(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.alpha)
    up = up.clamp(min=-self.alpha, max=self.alpha)
    return self.act_fn(gate) * up


def by_an_operator(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) - up


def by_a_dimension(self, gate_up):
    gate, up = gate_up.chunk(2, dim=1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


@pytest.mark.parametrize(
    "differs", (by_a_constant, by_an_attribute, by_an_operator, by_a_dimension)
)
def test_a_gate_that_differs_is_called(differs, taken):
    """From deepseek_v4's, which is fused, a little."""
    experts = make(apply_gate=differs)
    assert_as_eager(experts, draw(experts))
    assert taken == ["called"]


def wrapped(gate):
    """Its source would be that of what it wraps."""
    return functools.wraps(gate)(lambda self, gate_up: 2 * gate(self, gate_up))


def without_source(gate):
    scope = {"gate": gate}
    exec("def sourceless(self, gate_up): return 2 * gate(self, gate_up)", scope)
    return scope["sourceless"]


def in_a_lambda(gate):
    return lambda self, gate_up: 2 * gate(self, gate_up)


@pytest.mark.parametrize("changed", (wrapped, without_source, in_a_lambda))
def test_a_changed_gate_is_called(changed, taken):
    experts = make(apply_gate=changed(gate_of("deepseek_v4.DeepseekV4Experts")))
    assert_as_eager(experts, draw(experts))
    assert taken == ["called"]


def test_a_float32_gate_is_called_in_float64(taken):
    experts = make(**GATES["beam"])
    inputs, cotangents = draw(experts, torch.float64), {}
    ours = evaluate(running(experts, "moe_ext"), inputs, cotangents=cotangents)
    eager = evaluate(running(experts, "eager"), inputs, cotangents=cotangents)
    for name, expected in eager.items():
        assert relative_error(ours[name], expected) < torch.finfo(torch.float32).eps, name
    assert taken == ["called"]


def test_a_hooked_activation_is_called(taken):
    """What watches the activation, or changes it, sees it."""
    experts = make()
    experts.act_fn.register_forward_hook(lambda module, args, output: 2 * output)
    assert_as_eager(experts, draw(experts))
    assert taken == ["called"]


def test_grouped_linear_is_an_op():
    rows, weight, bias = unit(7, 4), unit(3, 4, 5), unit(3, 5)
    a, b = unit(3, 4, 2), unit(3, 2, 5)  # of LoRA
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    for optional in ((bias, a, b), (bias, None, None), (None, a, b), (None, None, None)):
        args = [t if t is None else t.requires_grad_() for t in (rows, weight, *optional)]
        torch.library.opcheck(torch.ops.moe_ext_transformers.grouped_linear, (*args, offsets))


# ---- the registry --------------------------------------------------------------------


def test_register_twice():
    register()
    assert ALL_EXPERTS_FUNCTIONS["moe_ext"] is experts_module.experts_forward


def tiny_mixtral(**config):
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=32, num_local_experts=4, **config,
        )
    )  # fmt: skip


def test_from_pretrained(tmp_path, taken):
    tiny_mixtral().save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_ext")
    logits = model(torch.arange(7)[None]).logits
    assert taken == ["fused"] * 2
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(torch.arange(7)[None]).logits, logits)
    assert taken == ["fused"] * 2
    model.set_experts_implementation("moe_ext")
    assert torch.equal(model(torch.arange(7)[None]).logits, logits)


def test_an_unknown_name_is_refused_by_transformers():
    with pytest.raises(ValueError, match='"moe_exd".* is not supported.*"moe_ext"'):
        tiny_mixtral(experts_implementation="moe_exd")


def test_double_and_generate():
    """What a user does to a model: cast it, and generate from it."""
    model = tiny_mixtral(experts_implementation="moe_ext").double()
    prompt = dict(input_ids=torch.arange(5)[None], attention_mask=torch.ones(1, 5))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = model.generate(**prompt, **options)
    model.set_experts_implementation("eager")
    assert torch.equal(model.generate(**prompt, **options), ours)


# ---- the installed transformers ------------------------------------------------------


def decorator(**flags):
    """One like `use_experts_implementation`, with these flags."""
    parameters = ", ".join(f"{name}={default}" for name, default in flags.items())
    return eval(f"lambda experts_class=None, *, {parameters}: None")


NEWER = FLAGS | dict(has_second_gate=False)
OLDER = {name: FLAGS[name] for name in ("is_concatenated", "is_transposed")}


@pytest.mark.parametrize(
    "name, found, what",
    (
        ("transformers", None, "found none"),
        ("transformers.integrations.moe", None, f"found {transformers.__version__}.* too old"),
        ("use_experts_implementation", decorator(**OLDER), "too old"),
        ("use_experts_implementation", decorator(**NEWER), "(has_second_gate).* too new"),
    ),
    ids=("missing", "no registry", "fewer flags", "more flags"),
)
def test_a_transformers_that_does_not_fit_is_refused(name, found, what, monkeypatch):
    if found is None:
        monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.setattr(transformers.integrations.moe, name, found)
    with pytest.raises(ImportError, match=f"{what}.*pip install transformers=="):
        check_transformers()


@pytest.mark.parametrize("flags", (FLAGS, {n: v for n, v in FLAGS.items() if "norm" not in n}))
def test_a_transformers_that_fits(flags, monkeypatch):
    """The norm came late, and is not asked for."""
    moe = transformers.integrations.moe
    monkeypatch.setattr(moe, "use_experts_implementation", decorator(**flags))
    check_transformers()


def test_experts_of_a_transformers_without_the_norm():
    experts = make()
    vars(experts).pop("has_post_expert_norm", None)  # which a later transformers sets
    inputs = draw(experts)
    ours = running(experts, "moe_ext")(**inputs)
    experts.has_post_expert_norm = False
    assert torch.equal(ours, running(experts, "moe_ext")(**inputs))


def test_moe_ext_does_not_import_transformers():
    code = "import sys, moe_ext, moe_ext.integrations; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- quantised experts, which do not run here ------------------------------------------


def test_float8_experts_say_what_works_instead():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    register()
    forward = ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moe_ext", None)
    with pytest.raises(NotImplementedError, match="float8, which moe_ext does not run.*grouped_mm"):
        forward(torch.nn.Identity(), None, None, None)


@pytest.mark.parametrize("implementation", ["moe_ext", "eager"])
def test_mxfp4_experts_say_that_they_run_elsewhere(implementation):
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    register()
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_local_experts=2,
        experts_implementation=implementation,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Mxfp4GptOssExperts(config)
    texts = [str(warning.message) for warning in caught if "moe_ext" in str(warning.message)]
    assert len(texts) == (implementation == "moe_ext")
    assert all("MXFP4" in text and "dequantize=True" in text for text in texts)
