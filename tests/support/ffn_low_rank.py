"""The third part of what `grouped_ffn` and `moe_forward` share: LoRA's factors beside the matrices."""

import pytest
import torch

from moe_ext import functional, reference
from support.ffn_operator import Recorder
from support.ffn_suite import CLAMPED, LAYOUTS, ON_GPU, FFNStage, needs_ops
from support.oracle import (
    DTYPES,
    ROUTINGS,
    assert_same_bits,
    assert_within_bound,
    bits_equal,
    draw_plan,
    evaluate,
    strided,
    unit,
)

FACTORS = {"up": ("up_lora_a", "up_lora_b"), "down": ("down_lora_a", "down_lora_b")}
BOTH = ("up", "down")
# 1030: more than one product of the CPU has columns. Multiples of 8: tensor cores.
RANKS = (1, 2, 3, 5, 8, 16, 33, 72) + (1030,) * (not ON_GPU)


class LowRank(FFNStage):
    """x W_e + (x A_e) B_e for up_proj, down_proj or both of them."""

    def inputs(self, T, H, I, E, K, dtype, *args, rank=4, adapted=BOTH, **options):
        inputs = super().inputs(T, H, I, E, K, dtype, *args, **options)
        is_gated = options.get("activation", "swiglu") in reference.GATES
        sizes = dict(up=(H, 2 * I if is_gated else I), down=(I, H))
        for matrix in adapted:
            a, b = FACTORS[matrix]
            size, result = sizes[matrix]
            inputs[a] = unit(E, size, rank, dtype=dtype, fan_in=max(size, 1))
            inputs[b] = unit(E, rank, result, dtype=dtype, fan_in=rank)
        return inputs

    def bind(self, module, plan, rank=None, adapted=None, **options):
        return super().bind(module, plan, **options)


class FFNLowRank(LowRank):
    # ---- against the float64 reference ----

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("adapted", (("up",), ("down",), BOTH))
    def test_layouts(self, dtype, layout, adapted):
        self.check(20, 16, 24, 4, 2, dtype, rank=8, adapted=adapted, **layout)

    # In less precision x A is rounded, which may carry a preactivation across the limit.
    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_clamps(self, dtype, layout):
        self.check(20, 17, 24, 4, 2, dtype, bias=False, **layout, **CLAMPED)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ("geglu", "relu2"))
    def test_activations(self, dtype, activation):
        self.check(40, 24, 20, 3, 2, dtype, activation=activation)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("transposed", (False, True))
    @pytest.mark.parametrize("rank", RANKS)
    def test_ranks(self, dtype, transposed, rank):
        self.check(50, 24, 16, 3, 2, dtype, rank=rank, transposed=transposed)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("capacity", (None, 3))
    def test_routings(self, dtype, routing, capacity):
        self.check(18, 16, 32, 6, 3, dtype, routing, capacity)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("rows", (1, 4, 15, 16, 17, 33, 100) + (300,) * (not ON_GPU))
    def test_rows_an_expert(self, dtype, rows):
        """Two experts with `rows` each, one with one more, and one without any."""
        experts = torch.tensor([0] * rows + [1] * rows + [3] * (rows + 1), dtype=torch.int32)
        experts = experts[torch.randperm(len(experts))].view(-1, 1)
        plan = reference.capacity_scatter(experts, 4)
        inputs = self.inputs(len(experts), 40, 24, 4, 1, dtype, bias=True, rank=8)
        result = self.check_inputs(inputs, plan)
        for name in (*FACTORS["up"], *FACTORS["down"]):
            assert not result[f"d_{name}"][2].any(), (
                f"{name}: an expert without rows has a gradient"
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("hidden, width", ((1, 1), (1, 40), (40, 1), (520, 129), (9, 1050)))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_sizes(self, dtype, hidden, width, transposed):
        self.check(70, hidden, width, 3, 2, dtype, transposed=transposed)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("tokens, rank", ((1, 16), (3, 3), (16, 40)))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_few_tokens(self, dtype, tokens, rank, layout):
        """Decoding: fewer rows than experts. A gradient of many numbers is made of few ones, a
        rank a row: hence several draws."""
        self.check(tokens, 72, 56, 9, 2, dtype, rank=rank, least=8, **layout)

    def test_no_token(self):
        result = self.check(0, 8, 6, 3, 2, torch.float32)
        assert all(not result[f"d_{name}"].any() for name in (*FACTORS["up"], *FACTORS["down"]))

    @pytest.mark.parametrize("activation", ("swiglu", "relu2"))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_gradcheck(self, activation, transposed):
        options = dict(activation=activation, transposed=transposed)
        plan = draw_plan(4, 3, 2, "duplicates", 2)
        inputs = self.inputs(4, 3, 2, 3, 2, torch.float64, bias=True, rank=2, **options)
        function = self.bind(functional, plan, **options)
        leaves = [t.requires_grad_() for t in inputs.values()]
        assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(inputs, t))), leaves)

    # ---- tensors as they come ----

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_factors_may_lie_either_way(self, dtype, layout):
        plan = draw_plan(40, 4, 2)
        inputs = self.inputs(40, 16, 24, 4, 2, dtype, rank=8, **layout)
        function = self.bind(functional, plan, **layout)
        expected = evaluate(function, inputs, cotangents=(cotangents := {}))
        for change in (lambda t: t.mT.contiguous().mT, strided):
            views = {name: change(t) if "lora" in name else t for name, t in inputs.items()}
            actual = evaluate(function, views, cotangents=cotangents)
            for name, result in actual.items():
                assert_within_bound(name, result, expected[name].double(), expected[name])

    @pytest.mark.parametrize("tokens", (2, 40))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_factors_of_zeros_change_no_number(self, dtype, tokens):
        """One accumulator: what the factors add is added before anything is rounded."""
        plan = draw_plan(tokens, 4, 2)
        inputs = self.inputs(tokens, 16, 24, 4, 2, dtype, bias=True, rank=8)
        for _, b in FACTORS.values():
            inputs[b] = torch.zeros_like(inputs[b])
        without = {name: t for name, t in inputs.items() if "lora" not in name}
        assert torch.equal(self.call(inputs, plan), self.call(without, plan))

    def test_autocast(self):
        self.check_autocast()

    # ---- as an operator ----

    @needs_ops
    @pytest.mark.parametrize("needed", (("x",), *((f,) for pair in FACTORS.values() for f in pair)))
    def test_only_needed_gradients(self, needed):
        """What is frozen is asked for by no one, and costs no memory."""
        plan = draw_plan(12, 4, 2)
        inputs = self.inputs(12, 8, 6, 4, 2, torch.float32, bias=True)
        full = evaluate(self.bind(functional, plan), inputs, cotangents=(cotangents := {}))
        frozen = [name for name in inputs if name not in needed]
        with Recorder() as recorder:
            alone = evaluate(self.bind(functional, plan), inputs, frozen, cotangents)
        ((op, arguments),) = (call for call in recorder.calls if "output_mask" in call[1])
        names = [result.name.removeprefix("d") for result in op._schema.returns]
        assert [n for n, wanted in zip(names, arguments["output_mask"]) if wanted] == list(needed)
        for name, gradient in zip(names, op(**arguments)):
            if name in needed:
                expected = full[f"d_{name}"]
                assert_within_bound(name, alone[f"d_{name}"], expected.double(), expected)
            else:
                assert gradient.shape == (0,), name

    @needs_ops
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("adapted", (("up",), BOTH))
    def test_opcheck(self, dtype, adapted):
        plan = draw_plan(9, 4, 2, "sentinels")
        inputs = self.inputs(9, 8, 6, 4, 2, dtype, adapted=adapted)
        inputs = {name: t.requires_grad_() for name, t in inputs.items()}
        weights = [inputs.pop("weights"), plan.row_assignment] if self.weighted else []
        arguments = dict(
            x=inputs.pop("x"), expert_offsets=plan.expert_offsets, row_token=plan.row_token,
            assignment_row=plan.assignment_row, up_bias=None, down_bias=None, **inputs,
            **dict(zip(("weights", "row_assignment"), weights)),
        )  # fmt: skip
        op = getattr(torch.ops.moe_ext, self.stage).default
        torch.library.opcheck(op, (), arguments)

    @needs_ops
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize(
        "shape", ((1, 40, 24, 8, 2), (50, 24, 300, 4, 2), (600, 300, 40, 3, 2))
    )
    def test_same_bits(self, dtype, shape, set_threads):
        plan = draw_plan(shape[0], shape[3], shape[4])
        inputs = self.inputs(*shape, dtype, bias=True, rank=8)
        assert_same_bits(self.bind(functional, plan), inputs, set_threads)

    @needs_ops
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_batch_invariant(self, dtype, transposed):
        """A token's output has the same bits alone, among a few and among many."""
        inputs = self.inputs(70, 72, 40, 6, 2, dtype, rank=8, transposed=transposed)
        experts = torch.stack([torch.randperm(6)[:2] for _ in range(70)]).int()

        def of(tokens):
            plan = reference.capacity_scatter(experts[tokens], 6)
            own = {n: t[tokens] if n in ("x", "weights") else t for n, t in inputs.items()}
            result = self.call(own, plan, transposed=transposed)
            return result if self.weighted else result[plan.assignment_row.long()]

        with functional.batch_invariant():
            whole = of(torch.arange(70))
            for count in (1, 3, 17):
                assert bits_equal(of(torch.arange(count)), whole[:count]), f"{count} tokens alone"

    # argument, what is wrong with it, the error, what it may be blamed on instead
    BAD = (
        ("up_lora_a", lambda t: t[:, :-1], ValueError),
        ("up_lora_a", lambda t: t[0], ValueError),
        ("up_lora_a", lambda t: t[..., :0], ValueError),
        ("up_lora_a", lambda t: t.double(), TypeError),
        ("up_lora_b", lambda t: t[:, :-1], ValueError),
        ("up_lora_b", lambda t: t[..., :-1], ValueError),
        ("up_lora_b", lambda t: t.half(), TypeError),
        ("up_lora_b", lambda t: None, ValueError, "up_lora_a and up_lora_b"),
        ("down_lora_a", lambda t: t[:-1], ValueError),
        ("down_lora_a", lambda t: None, ValueError, "down_lora_a and down_lora_b"),
        ("down_lora_b", lambda t: t[..., :-1], ValueError),
    )

    @needs_ops
    @pytest.mark.parametrize("case", range(len(BAD)), ids=[case[0] for case in BAD])
    def test_bad_factors(self, case):
        name, spoil, error, *blamed = self.BAD[case]
        inputs = self.inputs(12, 8, 6, 4, 2, torch.float32)
        inputs[name] = spoil(inputs[name])
        with pytest.raises(error, match=rf"^{self.stage}: {(*blamed, name)[0]} must .*"):
            self.call(inputs, draw_plan(12, 4, 2))
