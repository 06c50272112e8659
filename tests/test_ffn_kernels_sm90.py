"""Hopper's kernels, and shapes that reach every tile, tail and turn of theirs.

As test_ffn_kernels.py, on an sm_90: more than 64 rows an expert, 16-bit types. A tile has 128 rows
and 256 columns, a stage 64 of k; a block of the emulator's three goes through several tiles.
"""

import pytest
import torch

from moe_ext import reference
from moe_ext._load import BACKEND
from support.ffn_kernels import SIMT, SM80, SM90, Kernels, assert_launched
from support.ffn_low_rank import LowRank
from support.ffn_suite import LAYOUTS
from support.oracle import Draws, bits_equal, draw_plan, shifted

pytestmark = pytest.mark.skipif(
    BACKEND != "emulated"
    and not (BACKEND == "cuda" and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs --backend emulated, or a GPU of compute capability 9.0",
)

HALVES = (torch.bfloat16, torch.float16)
GRADIENT = "weight_gradient_sm90"
ALL = (SM90,) * 2, (SM90,) * 2 + (GRADIENT,) * 2  # of a forward and a backward pass


class OnHopper(Kernels):
    device = "sm_90"

    def check_hopper(self, *shape, **options):
        return self.check_launched(*ALL, *shape, **options)


class TestHopper(OnHopper):
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, dtype):
        """A tile that is full, one with a few rows, one whose second half is missing."""
        self.check_hopper(300, 264, 136, 2, 1, dtype, **layout)

    @pytest.mark.parametrize("hidden, width", ((8, 8), (520, 64), (64, 264), (72, 520)))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_sizes(self, hidden, width, transposed):
        """Tails of k, of columns, of a slice, and experts' matrices of several tiles."""
        self.check_hopper(150, hidden, width, 2, 1, torch.bfloat16, transposed=transposed)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_several_turns(self, layout):
        """More tiles than blocks: stages, buffers and parities go on from one to the next."""
        self.check_hopper(700, 520, 264, 3, 1, torch.bfloat16, "one_expert", **layout)

    @pytest.mark.parametrize(
        "activation", ("geglu", "geglu_tanh", "reglu", "silu", "gelu", "relu2")
    )
    @pytest.mark.parametrize("transposed", (False, True))
    def test_activations(self, activation, transposed):
        shape = (150, 72, 136, 2, 1, torch.bfloat16)
        self.check_hopper(*shape, activation=activation, transposed=transposed)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_clamps(self, layout):
        clamped = dict(limit=0.75, alpha=1.702, up_offset=1.0)
        self.check(150, 40, 72, 2, 1, torch.bfloat16, bias=True, **layout, **clamped)

    @pytest.mark.parametrize("routing", ("skewed", "sentinels", "duplicates"))
    @pytest.mark.parametrize("capacity", (None, 90))
    def test_routings(self, routing, capacity):
        self.check(200, 40, 48, 4, 3, torch.bfloat16, routing, capacity)

    @pytest.mark.parametrize("weights_dtype", (torch.bfloat16, torch.float32))
    def test_weights_of_any_dtype(self, weights_dtype):
        self.check(150, 40, 48, 3, 2, torch.bfloat16, weights_dtype=weights_dtype)

    @pytest.mark.parametrize("transposed", (False, True))
    def test_experts_without_rows_have_no_gradient(self, transposed):
        experts = torch.tensor([[1], [6], [6], [3]] * 150, dtype=torch.int32)
        plan = reference.capacity_scatter(experts, 8)
        inputs = self.inputs(600, 40, 48, 8, 1, torch.bfloat16, bias=True, transposed=transposed)
        result = self.check_inputs(inputs, plan, transposed=transposed)
        assert_launched(*ALL[0], *ALL[1])
        for name in ("d_up_proj", "d_down_proj", "d_up_bias", "d_down_bias"):
            nonzero = result[name].flatten(1).any(1).nonzero().flatten()
            assert nonzero.tolist() == [1, 3, 6], name

    @pytest.mark.parametrize("transposed", (False, True))
    def test_what_is_beside_an_operand_is_not_read(self, transposed):
        """NaN past the columns of x and of the weights, and in rows without an owner."""
        plan = draw_plan(150, 3, 2, "sentinels")
        inputs = self.inputs(150, 40, 48, 3, 2, torch.bfloat16, transposed=transposed)
        for name in ("x", "up_proj", "down_proj"):
            narrow = inputs[name]
            wide = narrow.new_full((*narrow.shape[:-1], narrow.shape[-1] + 16), torch.nan)
            inputs[name] = wide[..., 8:-8].copy_(narrow)
        draws = Draws()
        self.add(draws, inputs, plan, transposed=transposed)
        assert_launched(*ALL[0], *ALL[1])
        draws.assert_within_bound(torch.bfloat16)

    def test_another_experts_nan_stays_its_own(self):
        """Rows of a tile beyond the expert's are its neighbour's: no result of the expert, and no
        gradient of its weights, may know of them."""
        experts = torch.arange(2, dtype=torch.int32).repeat_interleave(140).view(-1, 1)
        plan = reference.capacity_scatter(experts, 2)
        inputs = self.inputs(280, 40, 48, 2, 1, torch.bfloat16)
        clean = self.gradients(inputs, plan)
        inputs["x"][140:] = torch.nan
        spoiled = self.gradients(inputs, plan)
        assert_launched(*(ALL[0] + ALL[1]) * 2)
        assert bits_equal(clean["y"][:140], spoiled["y"][:140])
        for name in ("up_proj", "down_proj"):
            assert bits_equal(clean[name][0], spoiled[name][0]), name

    def gradients(self, inputs, plan):
        inputs = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        y = self.call(inputs, plan)
        y.backward(torch.ones_like(y))
        return {"y": y.detach()} | {n: t.grad for n, t in inputs.items()}

    @pytest.mark.parametrize("name", ("x", "up_proj", "down_proj"))
    def test_what_is_not_aligned(self, name):
        """It changes the kernel of the products that it is in, and no other."""
        plan = draw_plan(150, 2, 1)
        inputs = self.inputs(150, 72, 48, 2, 1, torch.bfloat16, bias=True)
        inputs[name] = shifted(inputs[name])
        draws = Draws()
        self.add(draws, inputs, plan)
        draws.assert_within_bound(torch.bfloat16)
        up = SM90 if name == "down_proj" else SIMT
        down = SIMT if name == "down_proj" else SM90
        d_rows = SIMT if name == "up_proj" else SM90
        d_up = "weight_gradient_simt" if name == "x" else GRADIENT
        assert_launched(up, down, down, d_rows, d_up, GRADIENT)

    @pytest.mark.parametrize(
        "shape, kernel",
        (
            ((128, 40, 48, 2, 1, torch.bfloat16), SM80),  # 64 rows an expert
            ((150, 40, 44, 2, 1, torch.bfloat16), None),  # results of no whole 16 bytes
            ((150, 40, 48, 2, 1, torch.float32), SIMT),
        ),
    )
    def test_when_not(self, shape, kernel):
        if kernel is None:
            self.check(*shape)
            return
        gradient = kernel.replace("rows_gemm", "weight_gradient")
        self.check_launched((kernel,) * 2, (kernel,) * 2 + (gradient,) * 2, *shape)

    @pytest.mark.skipif(BACKEND != "emulated", reason="no driver refuses for a test")
    def test_a_driver_that_makes_no_maps(self, monkeypatch):
        """The kernels for sm_80 run, and the diagnosis says so; of another GPU it says nothing."""
        from emulator import control
        from moe_ext.__main__ import facts

        products = (SM80,) * 2, (SM80,) * 2 + ("weight_gradient_sm80",) * 2
        told = {}
        for name in control.DEVICES:
            for refused in (False, True):
                control.set(device=control.DEVICES.index(name), refuse_maps=refused)
                told[name, refused] = [text for about, text in facts() if about == "no maps"]
                if (name, refused) == ("sm_90", True):
                    monkeypatch.setattr(control, "set", lambda *_, **__: None)
                    self.check_launched(*products, 150, 72, 48, 2, 1, torch.bfloat16)
                    monkeypatch.undo()
        (text,) = told.pop(("sm_90", True))
        assert "sm_80" in text and not any(told.values())

    def test_more_experts_than_offsets_have_room_for(self):
        inputs = self.inputs(70 * 513, 8, 8, 513, 1, torch.bfloat16)
        experts = (torch.arange(70 * 513, dtype=torch.int32) % 513).view(-1, 1)
        self.call(inputs, reference.capacity_scatter(experts, 513))
        assert_launched(SM80, SM80)

    @pytest.mark.parametrize("tokens", (17, 150, 300))
    def test_a_token_does_not_know_how_many_there_are(self, tokens):
        """Always by these kernels, however few there are."""
        self.check_batch_invariance(tokens)
        assert_launched(*(SM90,) * 4)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_same_bits(self, layout):
        self.check_same_bits(150, torch.bfloat16, **layout)


class TestHopperWithoutWeights(OnHopper):
    """grouped_ffn: the gradient's rows are not gathered."""

    stage = "grouped_ffn"
    weighted = False

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout):
        self.check_hopper(150, 72, 136, 2, 2, torch.bfloat16, **layout)


class TestHopperLoRA(LowRank, OnHopper):
    """A low-rank part is more of k, and products of its own."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("rank", (8, 72))
    def test_layouts(self, layout, rank):
        self.check(150, 40, 72, 2, 1, torch.bfloat16, rank=rank, **layout)
        if BACKEND == "emulated":
            from emulator import control

            names = control.launched()
            assert any(name == SM90 for name in names)
            assert not any(name.startswith((SM80, SIMT)) for name in names)
