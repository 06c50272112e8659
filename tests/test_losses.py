"""The router's losses: their values, and how they reach the router in training."""

import copy
import warnings

import pytest
import torch

import moe_ext
from moe_ext import losses
from support.layer_suite import E, H, K, assert_close, make
from support.oracle import DEVICE, bits_equal, unit

COEFFICIENTS = dict(aux_loss_coef=0.3, z_loss_coef=0.02)


def balanced(tokens, num_experts, top_k):
    """Experts that all get the same load."""
    return (torch.arange(tokens * top_k) % num_experts).view(tokens, top_k).int()


# ---- values --------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_perfect_balance(top_k):
    logits, experts = torch.zeros(16, 8), balanced(16, 8, top_k)
    for name, expected in (("assignments", 1.0), ("switch", 1.0), ("hf", float(top_k))):
        if name == "switch":
            experts = balanced(16, 8, 8)[:, :top_k].roll(1, 0)
            experts[:, 0] = torch.arange(16) % 8
        loss = losses.load_balancing_loss(logits, experts, normalization=name)
        assert loss.item() == pytest.approx(expected), name


def test_collapse():
    logits = torch.full((10, 4), -100.0)
    logits[:, 2] = 100.0
    experts = torch.full((10, 1), 2)
    assert losses.load_balancing_loss(logits, experts).item() == pytest.approx(4.0)
    # Two layers that collapsed on different experts look better to the pooled loss.
    pair = ([logits, logits.roll(1, 1)], [experts, experts + 1])
    assert losses.load_balancing_loss(*pair).item() == pytest.approx(4.0)
    assert losses.load_balancing_loss(*pair, normalization="hf").item() == pytest.approx(2.0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_hf_is_what_transformers_computes(top_k, padded):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = [unit(2 * 9, E, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 9) < 0.4 if padded else None
    theirs = mixtral.load_balancing_loss_func(
        tuple(layers), E, top_k, None if mask is None else (~mask).long()
    )
    experts = [logits.topk(top_k).indices for logits in layers]
    ours = losses.load_balancing_loss(layers, experts, padding_mask=mask, normalization="hf")
    assert_close(ours, theirs, 1e-6)
    for a, b in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers)):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "softmax_topk"])
def test_the_layer_reports_the_public_losses(score_function):
    layer = make(score_function=score_function)
    x, mask = unit(3, 7, H, dtype=torch.float64), torch.rand(3, 7) < 0.3
    for padding_mask in (None, mask):
        _, routing = layer(x, padding_mask=padding_mask, return_routing=True)
        expected = losses.load_balancing_loss(
            routing.logits,
            routing.experts,
            padding_mask=padding_mask,
            score_function=score_function,
        )
        assert_close(routing.aux_loss, expected.detach())
        assert_close(routing.z_loss, losses.z_loss(routing.logits, padding_mask).detach())


def test_aux_gradient_is_the_formula():
    logits = unit(20, E, dtype=torch.float64).requires_grad_()
    experts = logits.topk(K).indices
    (gradient,) = torch.autograd.grad(losses.load_balancing_loss(logits, experts), logits)
    p = logits.detach().softmax(-1)
    f = torch.bincount(experts.flatten(), minlength=E) / (20.0 * K)
    dp = (E * f / 20).expand_as(p)
    assert_close(gradient, p * (dp - (p * dp).sum(-1, keepdim=True)), 1e-7)
    (gradient,) = torch.autograd.grad(losses.z_loss(logits), logits)
    assert_close(gradient, 2 * logits.detach().logsumexp(-1, keepdim=True) * p / 20)


def test_sums_have_a_fixed_order(set_threads):
    values = unit(100_003)
    sums = []
    for threads in (1, 2):
        set_threads(threads)
        sums.append(losses.ordered_sum(values))
    assert bits_equal(*sums)
    assert_close(sums[0].double(), values.double().sum(), 1e-5)
    assert losses.ordered_sum(values[:0]) == 0


@pytest.mark.parametrize(
    "error,change,text",
    [
        (ValueError, dict(normalization="mean"), "normalization must be one of assignments, switch, hf"),
        (ValueError, dict(score_function="relu"), "score_function must be one of"),
        (TypeError, dict(experts=torch.zeros(5, 2)), r"experts must be int32 or int64 .* float32 \(5, 2\)"),
        (ValueError, dict(experts=torch.zeros(4, 2).int()), r"T = 5, got int32 \(4, 2\)"),
        (TypeError, dict(logits=torch.zeros(5, 3).int()), "logits must be floating"),
        (ValueError, dict(logits=torch.zeros(5)), r"logits must be of shape \(T, E\)"),
        (ValueError, dict(experts=[]), "experts must be as many tensors as logits"),
        (TypeError, dict(padding_mask=torch.zeros(5)), r"padding_mask must be bool of shape \(5,\)"),
        (ValueError, dict(padding_mask=torch.zeros(4).bool()), r"padding_mask must be bool of shape \(5,\)"),
    ],
)  # fmt: skip
def test_bad_arguments(error, change, text):
    arguments = dict(logits=torch.zeros(5, 3), experts=torch.zeros(5, 2).int()) | change
    if "experts" in change and isinstance(change["experts"], list):
        arguments["logits"] = [arguments["logits"]]
    with pytest.raises(error, match=text):
        losses.load_balancing_loss(arguments.pop("logits"), arguments.pop("experts"), **arguments)


# ---- injection -----------------------------------------------------------------------


def gradients(layer, x, attached=False, padding_mask=None):
    """Of <y, 1>, with the losses injected, or added by hand."""
    layer.inject_losses = not attached
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y, routing = layer(x, padding_mask=padding_mask, return_routing=True)
    total = y.sum()
    if attached:
        total = total + layer.aux_loss_coef * routing.aux_loss + layer.z_loss_coef * routing.z_loss
    total.backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("padded", [False, True])
def test_injected_is_attached_and_added(padded):
    layer = make(**COEFFICIENTS)
    x = unit(2, 9, H, dtype=torch.float64)
    mask = torch.rand(2, 9) < 0.4 if padded else None
    injected = gradients(layer, x, padding_mask=mask)
    added = gradients(layer, x, attached=True, padding_mask=mask)
    for a, b in zip(injected, added):
        assert_close(a, b)
    layer.aux_loss_coef = layer.z_loss_coef = 0.0
    bare = gradients(layer, x, padding_mask=mask)
    assert (injected[1] - bare[1]).norm() > 1e-3 * bare[1].norm()


def test_reported_losses_are_detached_unless_asked():
    layer, x = make(**COEFFICIENTS), unit(5, H, dtype=torch.float64)
    _, routing = layer(x, return_routing=True)
    assert not routing.aux_loss.requires_grad and not routing.z_loss.requires_grad
    layer.inject_losses = False
    for mode in (True, False):
        _, routing = layer.train(mode)(x, return_routing=True)
        assert routing.aux_loss.requires_grad and routing.z_loss.requires_grad


def test_nothing_is_injected_in_eval_or_without_gradients():
    layer, x = make(**COEFFICIENTS, capacity_factor=None), unit(5, H, dtype=torch.float64)
    bare = copy.deepcopy(layer)
    bare.aux_loss_coef = bare.z_loss_coef = 0.0
    for a, b in zip(gradients(layer.eval(), x), gradients(bare.eval(), x)):
        assert bits_equal(a, b)
    with torch.no_grad():
        assert not layer.train()(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer(x.requires_grad_()).sum().backward()  # a frozen router still passes its losses on to x
    assert x.grad.any()


def test_loss_scale_multiplies_the_losses_alone():
    layer = make(**COEFFICIENTS)
    x = unit(9, H, dtype=torch.float64)
    once = gradients(layer, x)
    coefficients = layer.aux_loss_coef, layer.z_loss_coef
    layer.aux_loss_coef = layer.z_loss_coef = 0.0
    bare = gradients(layer, x)
    layer.aux_loss_coef, layer.z_loss_coef = coefficients
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(layer))
    for scale in (8.0, torch.tensor(8.0), torch.tensor([8], dtype=torch.float64)):
        moe_ext.set_loss_scale(model, scale)
        for a, b, c in zip(gradients(layer, x), once, bare):
            assert_close(a, c + 8 * (b - c))
        moe_ext.set_loss_scale(model, 1.0)
    assert "loss_scale" not in layer.state_dict()


def test_loss_scale_stays_what_it_is():
    layer = make()
    moe_ext.set_loss_scale(layer, 0.25)
    layer.half().bfloat16().to(torch.float64).to("cpu")
    assert layer.loss_scale.dtype == torch.float64 and layer.loss_scale == 0.25


@pytest.mark.parametrize(
    "error,scale", [(TypeError, "2"), (ValueError, float("nan")), (ValueError, -1.0),
                    (ValueError, float("inf")), (ValueError, torch.ones(2)), (TypeError, None)]
)  # fmt: skip
def test_bad_loss_scale(error, scale):
    layer = make()
    with pytest.raises(error, match="set_loss_scale: scale must be"):
        moe_ext.set_loss_scale(layer, scale)
    assert layer.loss_scale == 1.0


def test_gradient_accumulation_is_the_mean_of_its_parts():
    """Two half batches at scale 1/2 train the router as their two losses' mean."""
    layer = make(**COEFFICIENTS)
    halves = unit(2, 6, H, dtype=torch.float64)
    layer.zero_grad()
    moe_ext.set_loss_scale(layer, 0.5)
    for x in halves:
        (layer(x).sum() / 2).backward()
    accumulated = layer.gate.weight.grad.clone()
    moe_ext.set_loss_scale(layer, 1.0)
    separate = [gradients(layer, x)[1] for x in halves]
    assert_close(accumulated, (separate[0] + separate[1]) / 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_training_without_a_scale_warns_once(autocast, monkeypatch):
    monkeypatch.setattr(losses, "_warned", set())
    layer = make(dtype=torch.float32 if autocast else torch.float16)
    x = unit(4, H, dtype=torch.float32 if autocast else torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(x)
        make(dtype=torch.bfloat16)(x.bfloat16())
    layer.train()
    with torch.autocast(DEVICE.type, dtype=torch.float16, enabled=autocast):
        with pytest.warns(UserWarning, match="set_loss_scale"):
            layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x)
            monkeypatch.setattr(losses, "_warned", set())
            moe_ext.set_loss_scale(layer, 1.0)
            layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_without_a_scale_warns_once(dtype, monkeypatch):
    monkeypatch.setattr(losses, "_warned", set())
    x = unit(4, H, dtype=dtype)

    def micro_batches(layer):
        layer.zero_grad()
        for _ in range(2):
            layer(x).sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told, plain = make(dtype=dtype), make(dtype=dtype)
        moe_ext.set_loss_scale(told, 0.5)
        micro_batches(told)
        micro_batches(make(dtype=dtype, aux_loss_coef=0.0))
        for fused in (False, True):
            optimizer = torch.optim.SGD(plain.parameters(), fused=fused)
            for kept in (False, True, True):  # a step each
                optimizer.zero_grad(set_to_none=not kept)
                plain(x).sum().backward()
                optimizer.step()
    with pytest.warns(UserWarning, match="accumulating gradients .*set_loss_scale"):
        micro_batches(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        micro_batches(plain)


def test_padding_may_hold_nan():
    mask = torch.tensor([False, True, False])
    logits = unit(3, E, dtype=torch.float64)
    logits[1] = float("nan")
    logits.requires_grad_()
    experts = logits.detach().topk(2).indices
    for loss in (
        losses.z_loss(logits, mask),
        losses.load_balancing_loss(logits, experts, padding_mask=mask),
        losses.load_balancing_loss(logits, experts, padding_mask=mask, score_function="sigmoid"),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[0].any() and gradient.isfinite().all() and not gradient[1].any()
