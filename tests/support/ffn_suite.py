"""The tests that `grouped_ffn` and `moe_forward` share.

They run the same experts; the second also weighs and sums. A stage's test file
subclasses FFNSuite, says which stage it is, and adds what is its own.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext import Activation, ExpertParameters, functional, reference
from moe_ext._load import BACKEND
from support.oracle import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    ROUTINGS,
    Draws,
    assert_same_bits,
    assert_within_bound,
    bits_equal,
    draw_ffn,
    draw_plan,
    evaluate,
    shapes,
    strided,
    unit,
)

needs_ops = pytest.mark.skipif(BACKEND == "reference", reason="the reference has no ops")
# Wrong values in a tensor are an error on the CPU; a GPU's memory is never waited for.
ON_GPU = BACKEND in ("cuda", "emulated")
needs_values = pytest.mark.skipif(
    ON_GPU or BACKEND == "reference", reason="only the CPU's ops look at the values of indices"
)

PARAMETERS = ExpertParameters._fields
LAYOUTS = (
    dict(),
    dict(transposed=True),
    dict(interleaved=True),
    dict(transposed=True, interleaved=True),
)
# 1030: the CPU sums more than 1024 rows in several chunks.
ROWS = (1, 2, 3, 4, 12, 15, 16, 17, 31, 33, 64, 100, 300, 520) + (1030,) * (not ON_GPU)
# A limit that every dtype holds: rounding does not carry a preactivation across it.
CLAMPED = dict(limit=0.75, alpha=1.702, up_offset=1.0)


class FFNStage:
    stage = None
    weighted = False  # whether the stage takes the routing weights

    # ---- one way to call both stages ----

    def call(self, inputs, plan, **options):
        return self.bind(functional, plan, **options)(**inputs)

    def bind(self, module, plan, activation="swiglu", **fields):
        """The stage as a function of its floating inputs."""
        stage, activation = getattr(module, self.stage), Activation(activation, **fields)
        if self.weighted:
            return lambda x, weights, **p: stage(x, weights, plan, **p, activation=activation)
        return lambda x, **p: stage(x, plan, **p, activation=activation)

    def inputs(self, T, H, I, E, K, dtype, weights_dtype=torch.float32, activation="swiglu", **ffn):
        ffn = {k: v for k, v in ffn.items() if k in ("bias", "transposed")}
        gated = activation in reference.GATES
        inputs = dict(x=unit(T, H, dtype=dtype))
        if self.weighted:
            weights_dtype = torch.float64 if dtype == torch.float64 else weights_dtype
            inputs["weights"] = unit(T, K, dtype=weights_dtype)
        return inputs | draw_ffn(H, I, E, dtype, gated=gated, **ffn)

    def check(
        self, T, H, I, E, K, dtype=torch.float32, routing="distinct", capacity=None,
        weights_dtype=torch.float32, bias=True, least=1, **options,
    ):  # fmt: skip
        """Draws experts and inputs, `least` times or more often, and holds every output and
        gradient to the bound."""
        draws = Draws()
        for draw in range(16):
            plan = draw_plan(T, E, K, routing, capacity)
            inputs = self.inputs(T, H, I, E, K, dtype, weights_dtype, bias=bias, **options)
            result = self.add(draws, inputs, plan, **options)
            if draw + 1 >= least and draws.is_telling():
                break
        draws.assert_within_bound(dtype)
        return result

    def check_autocast(self):
        """x and the experts' parameters go in as bfloat16, the routing weights as they are."""
        plan = draw_plan(9, 4, 2)
        inputs = self.inputs(9, 16, 8, 4, 2, torch.float32)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            actual = self.call(inputs, plan)
        low = {name: t if name == "weights" else t.bfloat16() for name, t in inputs.items()}
        assert actual.dtype == torch.bfloat16 and bits_equal(actual, self.call(low, plan))

    def check_inputs(self, inputs, plan, **options):
        draws = Draws()
        result = self.add(draws, inputs, plan, **options)
        # float32 weights of a bfloat16 layer have a gradient made of bfloat16 numbers.
        draws.assert_within_bound(inputs["x"].dtype)
        return result

    def add(self, draws, inputs, plan, **options):
        function, oracle = (self.bind(m, plan, **options) for m in (functional, reference))
        return draws.add(function, oracle, inputs)


class FFNNumbers(FFNStage):
    # ---- against the float64 reference ----

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, dtype, activation):
        self.check(33, 24, 20, 5, 2, dtype, activation=activation)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("bias", (False, True))
    @pytest.mark.parametrize("clamp", ({}, CLAMPED))
    def test_layouts_and_clamps(self, dtype, layout, bias, clamp):
        self.check(20, 17, 24, 4, 2, dtype, bias=bias, **layout, **clamp)

    @pytest.mark.parametrize("activation", ("geglu", "geglu_tanh", "reglu"))
    def test_clamp_of_the_other_gates(self, activation):
        options = dict(activation=activation, limit=0.75, up_offset=1.0, interleaved=True)
        self.check(20, 17, 24, 4, 2, torch.bfloat16, **options)

    @pytest.mark.parametrize("transposed", (False, True))
    def test_ungated_transposed(self, transposed):
        self.check(20, 17, 24, 4, 2, torch.bfloat16, activation="relu2", transposed=transposed)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("capacity", (None, 3))
    def test_routings(self, dtype, routing, capacity):
        self.check(18, 16, 32, 6, 3, dtype, routing, capacity)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("rows", ROWS)
    def test_rows_an_expert(self, dtype, rows):
        """Two experts with `rows` each, one with one more, and one without any."""
        experts = torch.tensor([0] * rows + [1] * rows + [3] * (rows + 1), dtype=torch.int32)
        experts = experts[torch.randperm(len(experts))].view(-1, 1)
        plan = reference.capacity_scatter(experts, 4)
        inputs = self.inputs(len(experts), 40, 24, 4, 1, dtype, bias=True)
        result = self.check_inputs(inputs, plan)
        for name in PARAMETERS[:4]:
            assert not result[f"d_{name}"][2].any(), (
                f"{name}: an expert without rows has a gradient"
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "hidden, width",
        ((1, 1), (1, 40), (40, 1), (2, 3), (520, 129), (129, 530), (1050, 9), (9, 1050)),
    )
    @pytest.mark.parametrize("transposed", (False, True))
    def test_sizes(self, dtype, hidden, width, transposed):
        self.check(70, hidden, width, 3, 2, dtype, transposed=transposed)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_rows_of_one_element(self, layout):
        """A weight's strides are then 1 both along its rows and across them."""
        self.check(70, 1, 40, 3, 2, torch.float32, **layout)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("tokens", (1, 2, 3, 4, 16))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_few_tokens(self, dtype, tokens, layout):
        """Decoding: fewer rows than experts."""
        self.check(tokens, 72, 56, 9, 2, dtype, **layout)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("hidden, width", ((1050, 9), (9, 1050), (160, 288), (64, 131)))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_few_tokens_of_long_rows(self, dtype, hidden, width, transposed):
        self.check(9, hidden, width, 3, 2, dtype, transposed=transposed)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_many_experts(self, dtype):
        self.check(40, 48, 16, 64, 8, dtype, "skewed")

    @given(
        shapes(),
        st.sampled_from(DTYPES),
        st.sampled_from(ACTIVATIONS),
        st.sampled_from(LAYOUTS),
        st.booleans(),
        st.booleans(),
    )
    def test_drawn(self, shape, dtype, activation, layout, bias, clamp):
        torch.manual_seed(shape.seed)
        if activation not in reference.GATES:
            layout = layout | dict(interleaved=False)
        elif clamp:
            layout = layout | dict(limit=0.5, up_offset=1.0)
        self.check(
            *shape[:5],
            dtype,
            shape.routing,
            shape.capacity,
            bias=bias,
            activation=activation,
            **layout,
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_token(self, dtype):
        result = self.check(0, 8, 6, 3, 2, dtype)
        assert result["output"].shape == (0, 8)
        for name in PARAMETERS[:4]:
            assert not result[f"d_{name}"].any()

    @pytest.mark.parametrize("capacity", (None, 2))
    @pytest.mark.parametrize(
        "activation, options", (("swiglu", CLAMPED), ("geglu", {}), ("relu2", {}))
    )
    def test_gradcheck(self, capacity, activation, options):
        plan = draw_plan(4, 3, 2, "duplicates", capacity)
        inputs = self.inputs(4, 3, 2, 3, 2, torch.float64, activation=activation, bias=True)
        function = self.bind(functional, plan, activation=activation, **options)
        leaves = [t.requires_grad_() for t in inputs.values()]
        assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(inputs, t))), leaves)

    # ---- tensors as they come ----

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_non_contiguous(self, dtype, transposed):
        """Strides, offsets and transposed views change no bit, in inputs, gradients and plan."""
        plan = draw_plan(20, 4, 2)
        inputs = self.inputs(20, 17, 24, 4, 2, dtype, bias=True, transposed=transposed)
        function = self.bind(functional, plan, transposed=transposed)
        expected = evaluate(function, inputs, cotangents=(cotangents := {}))
        views = {name: strided(t) for name, t in inputs.items()}
        views["up_proj"] = inputs["up_proj"].mT.contiguous().mT
        plan = type(plan)(*(strided(t) for t in plan))
        cotangents = {name: strided(t) for name, t in cotangents.items()}
        function = self.bind(functional, plan, transposed=transposed)
        actual = evaluate(function, views, cotangents=cotangents)
        for name, result in actual.items():
            assert_within_bound(name, result, expected[name].double(), expected[name])
        # Unaligned storage, one element past an allocation's start.
        unaligned = {name: torch.cat((t.flatten(), t.flatten()[:1])) for name, t in inputs.items()}
        unaligned = {name: unaligned[name].roll(1)[1:].view(t.shape) for name, t in inputs.items()}
        assert bits_equal(self.call(unaligned, plan, transposed=transposed), expected["output"])

    def test_expanded_gradient(self):
        """y.sum() sends a gradient with strides of 0."""
        plan = draw_plan(9, 4, 2)
        inputs = self.inputs(9, 8, 6, 4, 2, torch.float32, bias=True)
        leaves = {name: t.requires_grad_() for name, t in inputs.items()}
        expanded = torch.autograd.grad(self.call(leaves, plan).sum(), leaves.values())
        y = self.call(leaves, plan)
        dense = torch.autograd.grad(y, leaves.values(), torch.ones_like(y))
        assert bits_equal(expanded, dense)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_was_dropped_is_never_read(self, dtype):
        """NaN in the tokens that lost all their assignments, in their weights and gradients,
        and in the gradient of the rows past the last, reaches nothing."""
        experts = torch.tensor([[0, 1], [1, 0], [0, 1], [9, 1], [1, 0], [0, 9]], dtype=torch.int32)
        plan = reference.capacity_scatter(experts, 2, 2, drop_policy="token")
        kept = (plan.assignment_row >= 0).any(1)
        assert kept.tolist() == [True, True, False, False, False, False]
        inputs = self.inputs(6, 8, 6, 2, 2, dtype, bias=True)
        clean = evaluate(self.bind(functional, plan), inputs, cotangents=(cotangents := {}))
        inputs["x"][~kept] = torch.nan
        if self.weighted:
            inputs["weights"][~kept] = torch.nan
            cotangents["output"][~kept] = torch.nan
        poisoned = evaluate(self.bind(functional, plan), inputs, cotangents=cotangents)
        for name, result in poisoned.items():
            assert bits_equal(result, clean[name]), name
        assert not poisoned["d_x"][~kept].any() and poisoned["d_x"][kept].any(1).all()
        if self.weighted:
            assert not poisoned["output"][~kept].any() and not poisoned["d_weights"][~kept].any()

    def test_a_tail_is_never_read(self):
        plan = draw_plan(12, 4, 2, "sentinels")
        assert plan.expert_offsets[-1] < len(plan.row_token)
        inputs = self.inputs(12, 8, 6, 4, 2, torch.float32, bias=True)
        clean = evaluate(self.bind(functional, plan), inputs, cotangents=(cotangents := {}))
        last = int(plan.expert_offsets[-1])
        if not self.weighted:
            assert not clean["output"][last:].any(), "the tail of the rows must be 0"
            cotangents["output"][last:] = torch.nan
        plan.row_token[last:] = 10**9
        plan.row_assignment[last:] = 10**9
        poisoned = evaluate(self.bind(functional, plan), inputs, cotangents=cotangents)
        assert bits_equal(poisoned, clean)

    def test_autocast(self):
        self.check_autocast()

    # ---- same bits ----

    @needs_ops
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize(
        "shape", ((1, 40, 24, 8, 2), (50, 40, 24, 8, 2), (50, 24, 300, 4, 2), (600, 300, 40, 3, 2))
    )
    @pytest.mark.parametrize("routing", ("distinct", "one_expert", "sentinels"))
    def test_same_bits(self, dtype, shape, routing, set_threads):
        plan = draw_plan(shape[0], shape[3], shape[4], routing)
        inputs = self.inputs(*shape, dtype, bias=True)
        assert_same_bits(self.bind(functional, plan), inputs, set_threads)

    @needs_ops
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("transposed", (False, True))
    @pytest.mark.parametrize("hidden, width", ((72, 40), (1050, 9)))
    def test_batch_invariant(self, dtype, transposed, hidden, width):
        """A token's output has the same bits alone, among a few and among many."""
        T, K = 130, 2
        inputs = self.inputs(T, hidden, width, 6, K, dtype, bias=True, transposed=transposed)
        experts = torch.stack([torch.randperm(6)[:K] for _ in range(T)]).int()
        with functional.batch_invariant():
            whole = self.of_tokens(inputs, experts, torch.arange(T), transposed)
            for tokens in (torch.arange(n) for n in (1, 2, 3, 5, 16, 17, 64)):
                part = self.of_tokens(inputs, experts, tokens, transposed)
                assert bits_equal(part, whole[tokens]), f"{len(tokens)} tokens alone"
            shuffled = torch.randperm(T)
            part = self.of_tokens(inputs, experts, shuffled, transposed)
            assert bits_equal(part, whole[shuffled]), "in another order"

    def of_tokens(self, inputs, experts, tokens, transposed):
        """The results of these tokens as a batch of their own, one a token or assignment."""
        plan = reference.capacity_scatter(experts[tokens], 6)
        own = {name: t[tokens] if name in ("x", "weights") else t for name, t in inputs.items()}
        result = self.call(own, plan, transposed=transposed)
        return result if self.weighted else result[plan.assignment_row.long()]
