"""MoE against the layer written out token by token: every option, values and gradients."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ext
from moe_ext import MoE, reference
from support.layer_suite import E, H, K, assert_close, assert_step_matches, make, options, run, step
from support.naive_layer import capacity
from support.oracle import (
    DEVICE,
    DTYPES,
    HAS_OPS,
    assert_within_bound,
    bits_equal,
    redraw,
    relative_error,
    several_runs,
    unit,
)


@settings(max_examples=60)
@given(
    options=options(),
    top_k=st.sampled_from((1, 2, 3)),
    shape=st.sampled_from(((1,), (5,), (2, 4), (3, 1), (2, 2, 3), (0,))),
    padded=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_option_as_written_out(options, top_k, shape, padded, training, seed):
    layer = make(top_k=top_k, seed=seed, **options).train(training)
    x = unit(*shape, H, dtype=torch.float64)
    mask = torch.rand(shape) < 0.3 if padded else None
    assert_step_matches(layer, x, mask)


@pytest.mark.parametrize("num_experts,top_k", [(1, 1), (2, 2), (5, 5), (3, 1)])
def test_few_experts(num_experts, top_k):
    assert_step_matches(make(num_experts, top_k), unit(7, H, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_every_dtype_within_the_bound(dtype, training):
    """With the layer's own experts and drops in the oracle, as DESIGN says."""
    layer = make(dtype=dtype, shared_expert_intermediate_size=8, z_loss_coef=0.01).train(training)
    x = unit(3, 11, H, dtype=dtype)
    _, routing = layer(x, return_routing=True)
    oracle = copy.deepcopy(layer).double()

    def baseline_forward(layer, x, routing):
        tokens = x.reshape(-1, H)
        logits = reference.router_logits(tokens, layer.gate.weight)
        route = reference.topk_route(logits, K, experts=routing.experts)
        y = reference.moe_forward(
            tokens,
            route.weights,
            routing.plan,
            *layer.experts.weights(),
            activation=layer.config.experts.activation,
        )
        y = (y + layer.shared_experts(tokens)).view(x.shape)
        if not layer.training:
            return y, 0.0
        f = route.counts / (len(tokens) * K)
        aux = E * (f * route.score_sums / len(tokens)).sum()
        return y, 0.01 * aux + 0.01 * route.logsumexp.square().mean()

    again = redraw()
    results = []
    for subject, data, forward in (
        (layer, x, run),
        (layer, x, baseline_forward),
        (oracle, x.double(), run),
    ):
        again()
        results.append(step(subject, data, forward, routing=routing))
    (y, gradients), (y_base, gradients_base), (y_true, gradients_true) = results
    assert y.dtype == dtype and y.shape == x.shape
    assert_within_bound("y", y, y_true, y_base)
    for name, gradient in gradients.items():
        assert_within_bound(name, gradient, gradients_true[name], gradients_base[name], dtype)


def test_shapes_and_strides():
    layer = make()
    x = unit(2, 3, 5, H, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape and bits_equal(y.view(-1, H), layer(x.view(-1, H)))
    wide = unit(4, 6, 2 * H, dtype=torch.float64)
    assert_close(layer(wide[:, ::2, ::2]), layer(wide[:, ::2, ::2].contiguous()))
    assert layer(x[:0]).shape == (0, 3, 5, H)


# ---- capacity ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor,tokens,num_experts,top_k,minimum,expected",
    [
        (1.0, 64, 8, 2, 4, 16),
        (1.25, 64, 8, 2, 4, 20),
        (1.25, 63, 8, 2, 4, 20),  # 19.69
        (1.1, 100, 10, 1, 1, 11),  # in floats 1.1 * 100 / 10 is above 11
        (0.7, 10, 7, 1, 0, 1),
        (1.0, 8, 8, 2, 4, 4),
        (1.0, 3, 8, 2, 4, 3),  # never over T
        (1e6, 5, 2, 1, 4, 5),
        (1 / 3, 9, 3, 1, 1, 1),
        (None, 9, 3, 1, 1, None),
    ],
)
def test_capacity(factor, tokens, num_experts, top_k, minimum, expected):
    layer = MoE(4, 4, num_experts, top_k, capacity_factor=factor, min_capacity=minimum)
    assert layer.capacity(tokens) == expected
    assert layer.eval().capacity(tokens) is None
    layer.eval_capacity_factor = factor
    assert layer.capacity(tokens) == expected
    layer.capacity_factor = None
    assert layer.train().capacity(tokens) is None


@given(st.floats(1e-3, 20), st.integers(0, 5000), st.sampled_from((1, 3, 8, 60)), st.integers(0, 9))
def test_capacity_is_exact(factor, tokens, num_experts, minimum):
    layer = MoE(1, 1, num_experts, 1, capacity_factor=factor, min_capacity=minimum)
    assert layer.capacity(tokens) == capacity(layer, tokens)


def test_expert_capacity_acts_in_eval_too():
    layer = make(expert_capacity=1, top_k=1).eval()
    _, routing = layer(unit(50, H, dtype=torch.float64), return_routing=True)
    assert routing.plan.expert_offsets[-1] == (routing.plan.expert_counts > 0).sum()


def test_a_dropped_token_keeps_nothing():
    layer = make(num_experts=2, top_k=1, expert_capacity=1)
    x = unit(6, H, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    lost = (routing.plan.assignment_row < 0).all(-1)
    assert lost.sum() >= 4 and not y[lost].any() and y[~lost].any(-1).all()


# ---- padding -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(score_function="sigmoid", bias=True)])
def test_padding_is_as_if_the_tokens_were_not_there(options):
    layer = make(
        capacity_factor=None, shared_expert_intermediate_size=8, z_loss_coef=0.1, **options
    )
    x = unit(4, 6, H, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.4
    x[mask] = 1e3  # nothing of it may show
    x.requires_grad_()
    y, routing = layer(x, padding_mask=mask, return_routing=True)
    stats = layer.stats(reset=True)
    cotangent = unit(*y.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()])
    y_few, few = layer(x[~mask], return_routing=True)
    stats_few = layer.stats()
    gradients_few = torch.autograd.grad((y_few * cotangent[~mask]).sum(), [x, *layer.parameters()])
    assert not y[mask].any()
    assert_close(y[~mask], y_few)
    assert_close(routing.aux_loss, few.aux_loss)
    assert_close(routing.z_loss, few.z_loss)
    for a, b in zip(gradients, gradients_few):
        assert_close(a, b, 1e-10)
    assert torch.equal(stats.load, stats_few.load)
    assert stats == pytest.approx(stats_few)


def test_padding_takes_no_capacity():
    layer = make(top_k=1, expert_capacity=2, capacity_scope="sequence")
    x = unit(1, 8, H, dtype=torch.float64).expand(3, 8, H).clone()
    x[:, 1:] = x[:, :1]  # every token wants the same expert
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1, :5] = True
    kept = layer(x, padding_mask=mask).abs().sum(-1) > 0
    expected = torch.zeros(3, 8, dtype=torch.bool)
    expected[[0, 0, 1, 1, 2, 2], [0, 1, 5, 6, 0, 1]] = True
    assert torch.equal(kept, expected)


def test_everything_padded():
    layer = make(z_loss_coef=0.1)
    x = unit(5, H, dtype=torch.float64).requires_grad_()
    y, routing = layer(x, padding_mask=torch.ones(5, dtype=torch.bool), return_routing=True)
    y.sum().backward()
    assert not y.any() and not x.grad.any() and not layer.gate.weight.grad.any()
    assert routing.aux_loss == 0 and routing.z_loss == 0
    assert layer.stats()["tokens"] == 0 and layer.stats()["forwards"] == 1


def test_padding_context():
    layer = make()
    x, mask = unit(2, 5, H, dtype=torch.float64), torch.rand(2, 5) < 0.5
    mask[0, 0] = True
    expected = layer(x, padding_mask=mask)
    with moe_ext.padding(mask):
        assert bits_equal(layer(x), expected)
        assert bits_equal(layer(x.view(-1, H)), expected.view(-1, H))
        assert layer(x, padding_mask=~mask)[0, 0].any()
        with moe_ext.padding(None):
            assert layer(x).any(-1).all()
        assert bits_equal(layer(x), expected)
        with pytest.raises(ValueError, match=r"moe_ext.padding must be bool of shape \(5, 2\)"):
            layer(x.transpose(0, 1))
    assert layer(x).any(-1).all()
    with pytest.raises(TypeError, match="attention_mask == 0"), moe_ext.padding(mask.long()):
        pass


# ---- replay, jitter, router_dtype ----------------------------------------------------


def test_replay_takes_the_choice_and_the_drops_but_weighs_anew():
    layer = make(capacity_factor=0.6, min_capacity=1)
    x = unit(12, H, dtype=torch.float64)
    y, recorded = layer(x, return_routing=True)
    assert bits_equal(layer(x, routing=recorded), y)
    assert bits_equal(layer.eval()(x, routing=recorded), y)  # the drops of training
    layer.train()
    with torch.no_grad():
        layer.gate.weight.copy_(layer.gate.weight.flip(0))
    y_new, again = layer(x, routing=recorded, return_routing=True)
    assert torch.equal(again.experts, recorded.experts) and again.plan == recorded.plan
    scores = again.logits.softmax(-1).gather(-1, recorded.experts.long())
    assert_close(again.weights.detach(), (scores / scores.sum(-1, keepdim=True)).detach())
    gradients = step(layer, x, run, routing=recorded)[1]
    assert gradients["gate.weight"].any()
    # Without a plan, the capacity is the layer's own.
    assert bits_equal(layer(x, routing=recorded._replace(plan=None)), y_new)


@pytest.mark.parametrize("target", ["router", "block"])
def test_jitter(target):
    layer = make(jitter_eps=0.25, jitter_target=target, capacity_factor=None)
    x = unit(64, H, dtype=torch.float64)
    again = redraw()
    y, routing = layer(x, return_routing=True)
    again()
    noise = torch.empty_like(x).uniform_(0.75, 1.25)
    layer.jitter_eps = 0.0
    assert_close(routing.logits, layer(x * noise, return_routing=True)[1].logits)
    seen = x * noise if target == "block" else x  # by the experts
    expected = reference.moe_forward(
        seen,
        routing.weights,
        routing.plan,
        *layer.experts.weights(),
        activation=layer.config.experts.activation,
    )
    assert_close(y, expected)
    layer.jitter_eps = 0.25
    layer.eval()
    assert bits_equal(layer(x), layer(x))


@pytest.mark.parametrize("router_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_router_dtype(router_dtype):
    layer = make(router_dtype=router_dtype, dtype=torch.float32)
    x = unit(9, H)
    y, routing = layer(x, return_routing=True)
    logits = reference.router_logits(x.to(router_dtype), layer.gate.weight.to(router_dtype))
    assert routing.logits.dtype == (
        torch.float64 if router_dtype == torch.float64 else torch.float32
    )
    assert relative_error(routing.logits, logits.double()) < 1e-6
    assert y.dtype == torch.float32
    y.sum().backward()
    assert layer.gate.weight.grad.dtype == torch.float32


def test_num_experts_per_tok():
    assert MoE(4, 4, 8, num_experts_per_tok=3).top_k == 3
    assert MoE(4, 4, 8, 3, num_experts_per_tok=3).num_experts_per_tok == 3
    assert MoE(4, 4).top_k == 2
    with pytest.raises(ValueError, match="top_k and num_experts_per_tok"):
        MoE(4, 4, 8, 2, num_experts_per_tok=3)


# ---- bits ----------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_OPS, reason="the reference is the library's matrix products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_every_run(dtype, set_threads):
    layer = make(dtype=dtype, hidden=64, width=48, z_loss_coef=0.1, renormalize_after_drop=True)
    x = unit(3, 300, 64, dtype=dtype)
    results = []
    for _ in several_runs(set_threads):
        torch.manual_seed(0)
        layer.stats(reset=True)
        results.append((*step(layer, x, run), layer.stats()))
    for result in results[1:]:
        assert bits_equal(result, results[0])


@pytest.mark.skipif(not HAS_OPS, reason="the reference is one F.linear an expert")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance(dtype):
    layer = make(dtype=dtype, hidden=64, width=48).eval()
    x = unit(100, 64, dtype=dtype)
    with moe_ext.batch_invariant(), torch.no_grad():
        y = layer(x)
        for rows in ([0], [3, 4], range(7, 25), range(99, -1, -1)):
            assert bits_equal(layer(x[list(rows)]), y[list(rows)])


# ---- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    "error,options,text",
    [
        (ValueError, dict(hidden_size=0), "hidden_size must be an integer of at least 1, got 0"),
        (TypeError, dict(intermediate_size=8.0), "intermediate_size must be an integer"),
        (TypeError, dict(num_experts=True), "num_experts must be an integer"),
        (ValueError, dict(top_k=0), "top_k must be an integer from 1 to 8, got 0"),
        (ValueError, dict(top_k=9), "top_k must be an integer from 1 to 8, got 9"),
        (TypeError, dict(top_k="2"), "top_k must be an integer from 1 to 8, got '2'"),
        (ValueError, dict(capacity_factor=-1.0), "capacity_factor must be a positive number, got -1.0"),
        (ValueError, dict(capacity_factor=float("nan")), "capacity_factor must be .* got nan"),
        (ValueError, dict(capacity_factor=0), "capacity_factor must be a positive number, got 0"),
        (ValueError, dict(eval_capacity_factor=float("inf")), "eval_capacity_factor must be"),
        (TypeError, dict(capacity_factor="1"), "capacity_factor must be a positive number, got '1'"),
        (ValueError, dict(expert_capacity=0), "expert_capacity must be"),
        (ValueError, dict(min_capacity=-1), "min_capacity must be"),
        (ValueError, dict(n_group=3), r"n_group must divide num_experts \(8\), got 3"),
        (ValueError, dict(n_group=4, topk_group=5), "topk_group must be an integer from 1 to 4"),
        (ValueError, dict(n_group=8, topk_group=1), "top_k must be at most the 1 experts"),
        (ValueError, dict(activation="swish"), "activation must be one of swiglu, .*relu2, got 'swish'"),
        (TypeError, dict(activation=torch.relu), "activation must be one of"),
        (ValueError, dict(score_function="softmin"), "score_function must be one of softmax, sigmoid"),
        (ValueError, dict(group_score="sum"), "group_score must be one of max, top2_sum"),
        (ValueError, dict(drop_policy="random"), "drop_policy must be one of token, choice, probs"),
        (ValueError, dict(capacity_scope="token"), "capacity_scope must be one of batch, sequence"),
        (ValueError, dict(jitter_target="all"), "jitter_target must be one of router, block"),
        (ValueError, dict(jitter_eps=1.0), "jitter_eps must be a number of at least 0 and below 1"),
        (ValueError, dict(aux_loss_coef=-0.1), "aux_loss_coef must be"),
        (ValueError, dict(bias_update_rate=float("nan")), "bias_update_rate must be"),
        (ValueError, dict(limit=0.0), "limit must be a positive number"),
        (ValueError, dict(activation="relu", limit=7.0), "limit and up_offset"),
        (ValueError, dict(activation="geglu", alpha=1.7), "alpha must be 1.0"),
        (ValueError, dict(activation="relu", interleaved=True), "interleaved must be False"),
        (TypeError, dict(bias=1), "bias must be True or False, got 1"),
        (ValueError, dict(shared_expert_gate=True), "shared_expert_gate must be False"),
        (TypeError, dict(dtype="float32"), "dtype must be None, torch.float64"),
        (ValueError, dict(router_dtype=torch.int32), "router_dtype must be None, torch.float64"),
    ],
)  # fmt: skip
def test_bad_options(error, options, text):
    arguments = dict(hidden_size=4, intermediate_size=4, num_experts=8) | options
    with pytest.raises(error, match=f"^MoE: {text}"):
        MoE(**arguments)


@pytest.mark.parametrize(
    "error,arguments,text",
    [
        (TypeError, lambda x: ([1.0],), r"x must be a floating tensor of shape \(..., 16\)"),
        (TypeError, lambda x: (x.long(),), r"x must be a floating .* got int64 \(3, 16\)"),
        (ValueError, lambda x: (x[:, :8],), r"got float64 \(3, 8\)"),
        (ValueError, lambda x: (x.to("meta"),), f"x must be on the parameters' {DEVICE.type}.*, got meta"),
        (TypeError, lambda x: (x, torch.ones(3, dtype=torch.long)), "attention_mask == 0"),
        (TypeError, lambda x: (x, [True]), r"padding_mask must be bool of shape \(3,\)"),
        (ValueError, lambda x: (x, torch.ones(4, dtype=torch.bool)), r"bool of shape \(3,\), got bool \(4,\)"),
        (TypeError, lambda x: (x, None, x), "routing must be a moe_ext.Routing"),
        (ValueError, lambda x: (x, None, make()(unit(4, H, dtype=x.dtype), return_routing=True)[1]),
         r"routing.experts must be int32 or int64 of shape \(3, 2\), got int32 \(4, 2\)"),
        (ValueError, lambda x: (x, None, make(9)(x, return_routing=True)[1]), "routing.plan must be of 8 experts"),
    ],
)  # fmt: skip
def test_bad_calls_change_nothing(error, arguments, text):
    layer = make(bias_update_rate=0.1)
    before = copy.deepcopy(vars(layer._stats))
    x, mask, routing = (*arguments(unit(3, H, dtype=torch.float64)), None, None)[:3]
    with pytest.raises(error, match=f"^MoE: .*{text}"):
        layer(x, padding_mask=mask, routing=routing)
    assert bits_equal(before, vars(layer._stats))


def test_unsupported_derivatives_raise():
    layer, x = make(), unit(3, H, dtype=torch.float64)
    for transform in (
        lambda: torch.func.grad(lambda v: layer(v).sum())(x),
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.vmap(layer)(x[None]),
    ):
        with pytest.raises(RuntimeError, match="torch.func"):
            transform()
    with torch.autograd.forward_ad.dual_level():
        layer(x)  # nothing dual in it
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            layer(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.skipif(not HAS_OPS, reason="the reference is differentiable twice")
def test_double_backward_raises():
    layer, x = make(), unit(3, H, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_nan_input_is_a_documented_result():
    layer = make(dtype=torch.float32)
    x = unit(4, H)
    x[1] = float("nan")
    y, routing = layer(x, return_routing=True)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    assert ((routing.experts >= 0) & (routing.experts < E)).all()


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(capacity_factor=None, gate_bias=True, z_loss_coef=0.01),
        dict(shared_expert_intermediate_size=8, shared_expert_gate=True, bias=True),
        dict(score_function="sigmoid", drop_policy="probs", capacity_factor=0.5),
        dict(score_function="softmax_topk", jitter_eps=0.1, jitter_target="block"),
        dict(renormalize_after_drop=True, capacity_factor=0.5, capacity_scope="sequence"),
    ],
)
def test_padding_may_hold_anything(fill, options):
    """Bit for bit the results and gradients that zeros in its place give."""
    layer = make(dtype=torch.float32, **options)
    x = unit(3, 9, H)
    mask = torch.rand(3, 9) < 0.4
    results = []
    for value in (fill, 0.0):
        torch.manual_seed(0)
        inputs = x.masked_fill(mask[..., None], value).requires_grad_()
        layer.zero_grad()
        y, routing = layer(inputs, padding_mask=mask, return_routing=True)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append((y, inputs.grad, gradients, tuple(routing), layer.stats(reset=True)))
    assert bits_equal(*results)
    y, dx, gradients, _, _ = results[0]
    assert all(g.isfinite().all() for g in gradients.values()) and gradients["gate.weight"].any()
    assert not y[mask].any() and not dx[mask].any() and dx[~mask].any(-1).all()


@pytest.mark.parametrize(
    "options,warned",
    [
        (dict(top_k=1), True),
        (dict(num_experts_per_tok=1, score_function="sigmoid"), True),
        (dict(top_k=1, score_function="softmax_topk", norm_topk_prob=False), True),
        (dict(top_k=1, norm_topk_prob=False), False),
        (dict(top_k=1, num_experts=1), False),
        (dict(top_k=2), False),
    ],
)
def test_a_single_normalised_weight_is_warned_of(options, warned):
    """With one, the loop's own loss has no gradient for the router."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = MoE(
            **dict(hidden_size=H, intermediate_size=8, num_experts=E, aux_loss_coef=0.0) | options
        )
    assert [w.filename for w in caught] == [__file__] * warned
    assert all("top_k=1 nothing but the losses trains the router" in str(w.message) for w in caught)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    layer(unit(50, H)).square().sum().backward()
    learns = layer.gate.weight.grad.norm() > 1e-3
    assert learns == (not warned and layer.num_experts > 1)


def test_the_default_drop_policy_is_causal():
    """What a token gets does not depend on those after it, however full the experts are."""
    layer = make(capacity_factor=0.5, min_capacity=0)
    x = unit(40, H, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    assert (routing.plan.assignment_row < 0).any()
    changed = x.clone()
    changed[30:] = unit(10, H, dtype=torch.float64)
    assert bits_equal(layer(changed)[:30], y[:30])
    other = make(seed=0, capacity_factor=0.5, min_capacity=0, drop_policy="choice")
    assert not bits_equal(other(changed)[:30], other(x)[:30])
