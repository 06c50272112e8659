"""router_logits: x times the gate's weight, in float32 whatever they are stored in."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext import functional, reference
from support.ffn_suite import needs_ops
from support.oracle import (
    DTYPES,
    assert_matches,
    assert_same_bits,
    bits_equal,
    evaluate,
    strided,
    unit,
)


def draw(tokens, hidden, num_experts, dtype=torch.float32, weight_dtype=None, bias=True):
    weight_dtype = weight_dtype or dtype
    inputs = dict(
        x=unit(tokens, hidden, dtype=dtype),
        weight=unit(num_experts, hidden, dtype=weight_dtype, fan_in=max(hidden, 1)),
    )
    if tokens * num_experts < 16:
        # A few sums may all cancel to less than their rounding; positive ones cannot.
        inputs = {name: t.abs() for name, t in inputs.items()}
    if bias:
        inputs["bias"] = unit(num_experts, dtype=weight_dtype).abs()
    return inputs


def check(*sizes, **options):
    """Logits and all gradients against float64."""
    return assert_matches(
        functional.router_logits, reference.router_logits, draw(*sizes, **options)
    )


# ---- against the float64 reference ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("bias", (False, True))
def test_dtypes(dtype, weight_dtype, bias):
    """Every pair of dtypes: logits and their sums in float32, or in float64 if one of them is."""
    result = check(20, 40, 7, dtype=dtype, weight_dtype=weight_dtype, bias=bias)
    double = torch.float64 in (dtype, weight_dtype)
    assert result["output"].dtype == (torch.float64 if double else torch.float32)
    assert result["d_x"].dtype == dtype and result["d_weight"].dtype == weight_dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (1, 15, 16, 17, 31, 33, 1023, 1024, 1025, 1040, 2500))
def test_hidden_sizes(dtype, hidden):
    """The hidden size goes in slabs of 1024, and in vectors of 16."""
    check(9, hidden, 6, dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("tokens", (1, 2, 3, 4, 5, 63, 64, 65, 130, 300))
@pytest.mark.parametrize("num_experts", (1, 3, 4, 9, 64, 70))
def test_tiles(dtype, tokens, num_experts):
    """Blocks of 64 tokens and 64 experts, tiles of 4: whole ones and their rests."""
    check(tokens, 24, num_experts, dtype=dtype)


@pytest.mark.parametrize("num_experts, tokens", ((255, 3), (257, 3), (600, 2), (3, 257), (2, 600)))
def test_backward_slabs(num_experts, tokens):
    """The backward sums go over experts and over tokens in slabs of 256."""
    check(tokens, 40, num_experts)
    check(tokens, 40, num_experts, dtype=torch.bfloat16)


def test_slabs_of_one_block():
    """Where tiles alone fill a GPU, one block goes through all of the hidden size."""
    check(3, 300, 4200)


@given(
    st.integers(0, 70),
    st.sampled_from((1, 2, 7, 16, 33, 64, 100)),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_drawn(tokens, hidden, num_experts, dtype, weight_dtype, bias, seed):
    torch.manual_seed(seed)
    check(tokens, hidden, num_experts, dtype=dtype, weight_dtype=weight_dtype, bias=bias)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in draw(4, 5, 3, torch.float64).values()]
    assert torch.autograd.gradcheck(functional.router_logits, leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_long_sums(dtype):
    """Over 30000 terms a running float32 sum would lose digits: forward and backward."""
    x, weight = unit(2, 30000, dtype=dtype).abs(), unit(2, 30000, dtype=dtype).abs()
    logits = functional.router_logits(x, weight)
    oracle = reference.router_logits(x.double(), weight.double())
    assert ((logits.double() - oracle).abs() <= 2e-6 * oracle).all()
    x, weight = unit(30000, 3).abs(), unit(2, 3).requires_grad_()
    grad = unit(30000, 2).abs()
    functional.router_logits(x, weight).backward(grad)
    oracle = grad.double().t() @ x.double()
    assert ((weight.grad.double() - oracle).abs() <= 4e-6 * oracle).all()


def test_no_token():
    result = check(0, 8, 3)
    assert result["output"].shape == (0, 3)
    assert not result["d_weight"].any() and not result["d_bias"].any()


def test_a_float32_bias_keeps_its_digits():
    """Its gradient is not rounded to the weight's dtype on the way."""
    inputs = draw(50, 16, 4, torch.bfloat16) | dict(bias=unit(4))
    result = assert_matches(functional.router_logits, reference.router_logits, inputs)
    assert result["d_bias"].dtype == torch.float32
    assert not torch.equal(result["d_bias"], result["d_bias"].bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_not_finite(dtype, value):
    """They reach the logits of their token, or of their expert, and no other."""
    inputs = draw(70, 20, 6, dtype, bias=False)
    clean = functional.router_logits(**inputs)
    inputs["x"][65, 3] = value
    inputs["weight"][4, 7] = value
    logits = functional.router_logits(**inputs)
    touched = torch.zeros_like(logits, dtype=torch.bool)
    touched[65] = touched[:, 4] = True
    assert not logits[touched].isfinite().any()
    assert bits_equal(logits[~touched], clean[~touched])


# ---- on tensor cores ----


def products():
    """The kernels of the products since the test's begin or the last call; a GPU does not tell."""
    from emulator import control

    return [name for name in control.launched() if name.startswith("router_product")]


@pytest.mark.parametrize(
    "dtype, weight_dtype, hidden, forward, backward",
    (
        (torch.bfloat16, torch.bfloat16, 40, "_sm80", "_sm80"),
        (torch.float16, torch.float16, 40, "_sm80", ""),
        (torch.bfloat16, torch.bfloat16, 36, "", ""),
        (torch.bfloat16, torch.float16, 40, "", ""),
        (torch.bfloat16, torch.float32, 40, "", ""),
        (torch.float32, torch.float32, 40, "", ""),
    ),
)
def test_which_units(dtype, weight_dtype, hidden, forward, backward):
    """The dtypes and the hidden size alone choose them."""
    check(20, hidden, 6, dtype=dtype, weight_dtype=weight_dtype)
    if functional.BACKEND == "emulated":
        assert products() == [f"router_product{units}" for units in (forward, *2 * (backward,))]


@pytest.mark.parametrize("tokens", (16, 17, 64, 65, 128, 129, 513))
@pytest.mark.parametrize("num_experts, hidden", ((8, 128), (128, 520), (137, 136), (264, 264)))
def test_tensor_tiles(tokens, num_experts, hidden):
    """Tiles of 16, 64 and 128 rows and 128 columns: whole ones and their rests, in every order."""
    check(tokens, hidden, num_experts, dtype=torch.bfloat16)


def test_gradients_keep_their_digits():
    """Where what is left of two numbers is less than bfloat16 has of either."""
    rest = 2.0**-12
    x, weight = unit(1, 16, dtype=torch.bfloat16), unit(1, 16, dtype=torch.bfloat16)
    inputs = dict(x=x.expand(2, 16), weight=weight.expand(2, 16))
    cotangents = dict(output=torch.tensor([[1 + rest, -1.0], [-1.0, 1.0]]))
    result = evaluate(functional.router_logits, inputs, cotangents=cotangents)
    assert torch.equal(result["d_x"][0], rest * weight[0]) and not result["d_x"][1].any()
    assert torch.equal(result["d_weight"][0], rest * x[0]) and not result["d_weight"][1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_gradients(dtype):
    """They stay so, and reach their own token and expert."""
    inputs = draw(20, 16, 6, dtype, bias=False)
    cotangent = unit(20, 6, dtype=torch.promote_types(dtype, torch.float32))
    cotangent[3, 1] = math.inf
    result = evaluate(functional.router_logits, inputs, cotangents=dict(output=cotangent))
    assert torch.equal(result["d_x"][3], math.inf * inputs["weight"][1].sign())
    assert torch.equal(result["d_weight"][1], math.inf * inputs["x"][3].sign())
    assert result["d_x"].isinf().sum() == result["d_weight"].isinf().sum() == 16


@needs_ops
@pytest.mark.parametrize("hidden, num_experts", ((520, 4096), (4096, 300)))
def test_a_token_does_not_depend_on_how_a_sum_is_cut(hidden, num_experts):
    """On tensor cores: few tiles are cut along K, many are not. Logits of many experts, and dx, of
    which a second slab leaves so little that bfloat16 shows the order."""
    inputs = draw(130, hidden, num_experts, torch.bfloat16, bias=False)
    cotangent = unit(130, num_experts)
    cotangent[:, 44:256] = 0
    cotangent[:, 256:300] = -(1 + 2**-12) * cotangent[:, :44]
    inputs["weight"][256:300] = inputs["weight"][:44]
    many, few = (
        evaluate(
            functional.router_logits,
            inputs | dict(x=inputs["x"][:tokens]),
            frozen=["weight"],
            cotangents=dict(output=cotangent[:tokens]),
        )
        for tokens in (130, 3)
    )
    for name in ("output", "d_x"):
        assert bits_equal(few[name], many[name][:3]), name


# ---- tensors as they come ----


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("hidden", (32, 33, 1040))
def test_non_contiguous(dtype, hidden):
    inputs = draw(20, hidden, 6, dtype)
    cotangents = {}
    expected = evaluate(functional.router_logits, inputs, cotangents=cotangents)
    for view in (
        strided,
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],  # rows farther apart
        lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),  # unaligned
    ):
        cotangents["output"] = view(cotangents["output"])
        views = {name: view(t) for name, t in inputs.items()}
        actual = evaluate(functional.router_logits, views, cotangents=cotangents)
        assert bits_equal(actual, expected)


@pytest.mark.parametrize("weight_dtype", (torch.bfloat16, torch.float32))
def test_rows_farther_apart_beside_another_weight(weight_dtype):
    """What needs no widening is read where it lies, in every block of tokens."""
    x, weight = unit(200, 1040), unit(6, 1040).to(weight_dtype)
    apart = torch.cat((x, x), -1)[:, :1040]
    assert bits_equal(functional.router_logits(apart, weight), functional.router_logits(x, weight))


def test_expanded():
    """Strides of 0, in x and in the gradient of a sum."""
    x, weight = unit(1, 16).expand(40, 16), unit(3, 16).requires_grad_()
    logits = functional.router_logits(x, weight)
    assert bits_equal(logits, functional.router_logits(x.contiguous(), weight))
    logits.sum().backward()
    torch.testing.assert_close(weight.grad, 40 * x[:3])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_same_bits(dtype, set_threads):
    assert_same_bits(functional.router_logits, draw(300, 1100, 70, dtype), set_threads)


@needs_ops
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden, num_experts", ((33, 9), (1024, 9), (1100, 9), (264, 300)))
def test_a_token_does_not_depend_on_the_others(dtype, hidden, num_experts):
    """The same bits in a batch of 1, 3 or 150, wherever in it: forward and dx."""
    inputs = draw(150, hidden, num_experts, dtype)
    cotangent = unit(
        150, num_experts, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    everything = evaluate(functional.router_logits, inputs, cotangents=dict(output=cotangent))
    for part in (slice(0, 1), slice(61, 67), slice(147, 150)):
        own = inputs | dict(x=inputs["x"][part])
        alone = evaluate(functional.router_logits, own, cotangents=dict(output=cotangent[part]))
        for name in ("output", "d_x"):
            assert bits_equal(alone[name], everything[name][part]), name


def test_only_needed_gradients():
    inputs = draw(10, 8, 3)
    full = evaluate(functional.router_logits, inputs, cotangents=(cotangents := {}))
    for name in inputs:
        frozen = [other for other in inputs if other != name]
        alone = evaluate(functional.router_logits, inputs, frozen, cotangents)
        assert bits_equal(alone[f"d_{name}"], full[f"d_{name}"])


def test_bytes_kept_for_backward():
    """x and the weight as they are: no copy in float32."""
    inputs = {name: t.requires_grad_() for name, t in draw(10, 8, 3, torch.bfloat16).items()}
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.router_logits(**inputs)
    if functional.BACKEND != "reference":
        assert sorted(kept) == sorted((inputs["x"].data_ptr(), inputs["weight"].data_ptr()))


# ---- as an operator ----


@needs_ops
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (False, True))
def test_opcheck(dtype, bias):
    leaves = [t.requires_grad_() for t in draw(9, 8, 5, dtype, torch.float32, bias).values()]
    torch.library.opcheck(torch.ops.moe_ext.router_logits.default, leaves)


@needs_ops
@pytest.mark.parametrize("mask", ((True, True, True), (True, False, False), (False, False, True)))
def test_output_mask(mask):
    x, weight, _ = draw(9, 8, 5, torch.bfloat16, torch.float32).values()
    op = torch.ops.moe_ext.router_logits_backward
    torch.library.opcheck(op.default, (unit(9, 5), x, weight, mask))
    for wanted, gradient in zip(mask, op(unit(9, 5), x, weight, mask)):
        assert wanted or gradient.shape == (0,)


def test_compile():
    """One graph for every T from 2 on, with eager mode's bits."""
    compiled = torch.compile(
        functional.router_logits, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    inputs = draw(80, 8, 5, torch.bfloat16)
    for tokens in (7, 16, 80):
        own, cotangents = inputs | dict(x=inputs["x"][:tokens]), {}
        with torch._dynamo.config.patch(error_on_recompile=tokens > 7):
            actual = evaluate(compiled, own, cotangents=cotangents)
        assert bits_equal(actual, evaluate(functional.router_logits, own, cotangents=cotangents))


@needs_ops
def test_double_backward_is_an_error():
    leaves = {name: t.requires_grad_() for name, t in draw(5, 6, 3).items()}
    logits = functional.router_logits(**leaves)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---- bad input ----

BAD = (
    ("x", lambda t: t.long(), TypeError, r"x must be .*, got int64 \(6, 8\)"),
    ("x", lambda t: t[0], ValueError, r"x must be .* of shape \(T, H\), got float32 \(8,\)"),
    ("weight", lambda t: t.bool(), TypeError, r"weight must be .* got bool \(3, 8\)"),
    ("weight", lambda t: t[:, :-1], ValueError, r"weight must be .* H = 8, got float32 \(3, 7\)"),
    ("weight", lambda t: t[0], ValueError, "weight must be"),
    ("bias", lambda t: t[:-1], ValueError, r"bias must be .*\(E,\) = \(3,\), got float32 \(2,\)"),
    ("bias", lambda t: t.int(), TypeError, "bias must be .* got int32"),
    ("bias", lambda t: t[None], ValueError, "bias must be"),
)


@needs_ops
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    name, spoil, error, text = BAD[case]
    inputs = draw(6, 8, 3)
    with pytest.raises(error, match="^router_logits: " + text):
        functional.router_logits(**inputs | {name: spoil(inputs[name])})
