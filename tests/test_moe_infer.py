"""moe_infer: a layer's inference in one op, with the bits and statistics of its modules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import moe_ext
from support.layer_suite import E, H, make, options, statistics, through_modules
from support.oracle import DTYPES, HAS_OPS, bits_equal, several_runs, unit

pytestmark = pytest.mark.skipif(not HAS_OPS, reason="the reference registers no ops")

# What the steps of published systems' inference take: Mixtral, DeepSeek-V3, Qwen2-MoE, gpt-oss,
# and a layer with a limit.
SYSTEMS = {
    "mixtral": dict(),
    "deepseek_v3": dict(
        score_function="sigmoid", score_correction_bias=True, routed_scaling_factor=2.5,
        n_group=4, topk_group=2, group_score="top2_sum", shared_expert_intermediate_size=12,
    ),
    "qwen2_moe": dict(
        norm_topk_prob=False, shared_expert_intermediate_size=10, shared_expert_gate=True
    ),
    "gpt_oss": dict(
        score_function="softmax_topk", bias=True, gate_bias=True, transposed=True,
        interleaved=True, limit=7.0, alpha=1.702, up_offset=1.0,
    ),
    "switch": dict(activation="relu", eval_capacity_factor=0.5, min_capacity=1, drop_policy="probs"),
}  # fmt: skip


# ---- the same bits -------------------------------------------------------------------


@settings(max_examples=60)
@given(
    options=options(),
    top_k=st.sampled_from((1, 2, 3)),
    shape=st.sampled_from(((1,), (5,), (2, 4), (3, 1), (2, 2, 3), (0,))),
    padded=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_layer(options, top_k, shape, padded, dtype, seed):
    layer = make(top_k=top_k, seed=seed, dtype=dtype, **options).eval()
    twin = through_modules(layer)
    x = unit(*shape, H, dtype=dtype)
    mask = torch.rand(shape) < 0.3 if padded else None
    with torch.no_grad():
        for _ in range(2):
            assert bits_equal(layer(x, padding_mask=mask), twin(x, padding_mask=mask))
    assert bits_equal(statistics(layer), statistics(twin))


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_published_systems(system, dtype, tokens, inferences):
    layer = make(hidden=64, width=48, dtype=dtype, **SYSTEMS[system]).eval()
    twin = through_modules(layer)
    x = unit(tokens, 64, dtype=dtype)
    mask = torch.rand(tokens) < 0.3
    with torch.no_grad():
        for kwargs in (dict(), dict(padding_mask=mask)):
            assert bits_equal(layer(x, **kwargs), twin(x, **kwargs))
    assert len(inferences) == 2
    assert bits_equal(statistics(layer), statistics(twin))
    assert layer.stats()["forwards"] == 2
    assert layer.stats()["tokens"] == 2 * tokens - mask.sum()


def test_the_gate_has_a_dtype_of_its_own(inferences):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = make(dtype=torch.float16).eval().requires_grad_(False)
        layer.gate.to(dtype)
        x = unit(9, H, dtype=torch.float16)
        assert bits_equal(layer(x), through_modules(layer)(x))
    assert len(inferences) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance(dtype, inferences):
    layer = make(hidden=64, width=48, dtype=dtype).eval().requires_grad_(False)
    twin = through_modules(layer)
    x = unit(100, 64, dtype=dtype)  # enough of them for another order of the sums
    with moe_ext.batch_invariant():
        for rows in (x, x[:1], x[3:5], x[:17]):
            assert bits_equal(layer(rows), twin(rows))
            assert bits_equal(layer(rows)[:1], layer(rows[:1]))
    assert len(inferences) == 12


def test_the_same_bits_in_every_run(set_threads):
    layer = make(hidden=64, width=48, dtype=torch.bfloat16).eval().requires_grad_(False)
    x = unit(40, 64, dtype=torch.bfloat16)
    results = []
    for _ in several_runs(set_threads):
        layer.stats(reset=True)
        results.append((layer(x), statistics(copy.deepcopy(layer))))
    for result in results[1:]:
        assert bits_equal(result, results[0])


@pytest.mark.parametrize("shared", [0, 6])
def test_strides_and_leading_dimensions(shared, inferences):
    layer = make(
        capacity_scope="sequence", eval_capacity_factor=0.6, min_capacity=1,
        shared_expert_intermediate_size=shared,
    ).eval()  # fmt: skip
    twin = through_modules(layer)
    wide = unit(3, 10, 2 * H, dtype=torch.float64)
    deep = wide[None, :, :, :H]
    with torch.no_grad():
        for x in (wide[..., ::2], wide[:, ::2, H:], wide[0, :, 1 : H + 1], deep):
            assert bits_equal(layer(x), twin(x))
        mask = torch.rand(3, 10) < 0.4
        with moe_ext.padding(mask):
            for x in (deep[0], deep[0].reshape(-1, H)):
                assert bits_equal(layer(x), twin(x))
        assert bits_equal(layer(deep, padding_mask=mask[None]), twin(deep, padding_mask=mask[None]))
    assert len(inferences) == 7 and bits_equal(statistics(layer), statistics(twin))


# ---- state ---------------------------------------------------------------------------


def test_a_copy_counts_for_itself(inferences):
    layer = make().eval().requires_grad_(False)
    x = unit(4, H, dtype=torch.float64)
    layer(x)
    twin = copy.deepcopy(layer)
    assert bits_equal(twin(x), layer(x)) and len(inferences) == 3
    assert twin.stats()["forwards"] == layer.stats()["forwards"] == 2
    layer(x)
    assert twin.stats()["forwards"] == 2


def test_other_parameters_for_one_call(inferences):
    layer, other = make().eval(), make().eval()
    x = unit(4, H, dtype=torch.float64)
    with torch.no_grad():
        y = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
        assert bits_equal(y, other(x))
    assert len(inferences) == 2


def test_steps_for_loss_free_balancing_count_in_training_alone(inferences):
    layer = make(bias_update_rate=0.1).requires_grad_(False)
    x = unit(9, H, dtype=torch.float64)
    layer(x)
    counted = layer._stats.step_counts.clone()
    assert counted.sum() == 18
    layer.eval()(x)
    assert len(inferences) == 1 and torch.equal(layer._stats.step_counts, counted)


def test_a_recomputed_forward_counts_once(inferences):
    """Reentrant: the first forward pass is without gradient, the second is not."""
    layer, twin = make().eval(), make().eval()
    twin.load_state_dict(layer.state_dict())
    x = unit(6, H, dtype=torch.float64).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=True)
    y.square().sum().backward()
    assert len(inferences) == 1 and layer.stats()["forwards"] == 1
    expected = twin(x)
    gradient = torch.autograd.grad(expected.square().sum(), x)[0]
    assert bits_equal(y, expected) and bits_equal(x.grad, gradient)


def test_nothing_counts_inside_of_a_backward_pass(inferences):
    layer = make().eval().requires_grad_(False)

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx, gradient):
            return layer(*ctx.saved_tensors)

    x = unit(6, H, dtype=torch.float64).requires_grad_()
    Recompute.apply(x).sum().backward()
    assert len(inferences) == 2 and layer.stats()["forwards"] == 1


# ---- graphs --------------------------------------------------------------------------


def test_compile():
    layer = make(shared_expert_intermediate_size=6).eval()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, E, 17):
            x = unit(tokens, H, dtype=torch.float64)
            assert bits_equal(compiled(x), twin(x))
    torch._dynamo.reset()
    assert bits_equal(statistics(layer), statistics(twin))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer = make().eval().requires_grad_(False)
    sizes = dict(x={0: torch.export.Dim("tokens", max=512)})
    x = unit(5, H, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=strict)
    for tokens in (5, 1, 17):
        x = unit(tokens, H, dtype=torch.float64)
        assert bits_equal(program.module()(x), layer(x))


# ---- the op --------------------------------------------------------------------------

op = torch.ops.moe_ext.moe_infer if HAS_OPS else None


def arguments(layer, x, padding_mask=None, **more):
    """(args, kwargs) of the op."""
    gate, stats = layer.gate, copy.deepcopy(layer._stats)
    args = (x, gate.weight, gate.bias, stats.counts, stats.score_sums, stats.totals, layer.top_k)
    args += tuple(layer.experts.weights())
    config = layer.config
    activation = config.experts.activation._asdict()
    activation["activation"] = activation.pop("name")
    more |= dict(selection_bias=gate.e_score_correction_bias, padding_mask=padding_mask)
    return args, more | config.router.scoring() | activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("system", SYSTEMS)
def test_opcheck(system, dtype):
    layer = make(dtype=dtype, **SYSTEMS[system]).eval().requires_grad_(False)
    for more in (dict(), dict(capacity=2, drop_policy="token", num_sequences=3)):
        args, kwargs = arguments(layer, unit(9, H, dtype=dtype), torch.rand(9) < 0.3, **more)
        torch.library.opcheck(op.default, args, kwargs)


def test_the_op_in_a_graph():
    layer = make().eval().requires_grad_(False)
    (_, *args), kwargs = arguments(layer, None)

    def call(x, counts, score_sums, totals):
        args[2:5] = counts, score_sums, totals
        return op(x, *args, **kwargs) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    sums = [statistics(copy.deepcopy(layer)) for _ in range(2)]
    for tokens in (5, 17):
        x = unit(tokens, H, dtype=torch.float64)
        y, expected = (f(x, *s.values()) for f, s in zip((compiled, call), sums))
        assert bits_equal(y, expected)
    torch._dynamo.reset()
    assert bits_equal(*sums) and sums[0]["counts"].sum() == 2 * 22


def test_the_op_has_no_gradient():
    layer, x = make(), unit(3, H, dtype=torch.float64)
    args, kwargs = arguments(layer, x)
    with pytest.raises(
        RuntimeError, match=r"moe_infer has no gradient: call it under torch.no_grad"
    ):
        op(*args, **kwargs)
    with torch.no_grad():
        assert not op(*args, **kwargs).requires_grad


@pytest.mark.parametrize(
    "error,change,text",
    [
        (ValueError, dict(gate_weight=lambda t: t[:, 1:]), r"router_logits: weight must be .* H = 16"),
        (ValueError, dict(selection_bias=lambda t: torch.ones(3)), "topk_route: selection_bias must be"),
        (TypeError, dict(padding_mask=lambda t: torch.ones(5)), "topk_route: padding_mask must be bool"),
        (ValueError, dict(counts=lambda t: t[1:]), "accumulate_stats: counts must be int64"),
        (TypeError, dict(up_proj=lambda t: t.float()), "moe_forward: up_proj must be of x's dtype float64"),
        (ValueError, dict(down_proj=lambda t: t[1:]), "moe_forward: down_proj must be"),
        (ValueError, dict(drop_policy="best"), "capacity_scatter: drop_policy must be one of"),
        (ValueError, dict(capacity=-1), "capacity_scatter: capacity must be None or at least 0, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments(error, change, text):
    layer = make().requires_grad_(False)
    args, kwargs = arguments(layer, unit(5, H, dtype=torch.float64))
    names = [argument.name for argument in op.default._schema.arguments]
    named = dict(zip(names, args)) | kwargs
    for name, value in change.items():
        named[name] = value(named[name]) if callable(value) else value
    with pytest.raises(error, match=text):
        op(**named)
