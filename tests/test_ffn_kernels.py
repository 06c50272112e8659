"""Which kernel runs an expert's products, and shapes that reach its every tile and tail.

`moe_forward` is called as ever; dtype, alignment, the number of tokens and of rows an expert
decide the kernel, on an sm_80 (test_ffn_kernels_sm90.py has Hopper's). Sizes are such that k is longer than any ring of stages and no size is a
multiple of a tile. `ffn_suite` has what is true of every kernel.
"""

import pytest
import torch
import torch.nn.functional as F

from moe_ext import functional, reference
from moe_ext._load import BACKEND
from support.ffn_kernels import DECODE, SIMT, SM80, Kernels, assert_launched
from support.ffn_suite import LAYOUTS
from support.oracle import Draws, bits_equal, draw_plan, evaluate, shifted

pytestmark = pytest.mark.skipif(BACKEND not in ("cuda", "emulated"), reason="kernels of a GPU")

# By the rows of a tile: (tokens, experts).
TILES = {16: (20, 4), 32: (50, 2), 64: (100, 2), 128: (150, 2), 256: (1030, 1)}
HIDDEN, WIDTH = 264, 72
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def tf32():
    """float32 on tensor cores, as the user allows it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


WEIGHTS_SM80 = ("weight_gradient_sm80",) * 2
WEIGHT_128, WEIGHT_256 = (f"weight_gradient_sm80, {rows} rows" for rows in (128, 256))
WEIGHTS_SIMT = ("weight_gradient_simt",) * 2


class TestTensorCores(Kernels):
    def check_tile(self, tile, dtype, **layout):
        tokens, experts = TILES[tile]

        def name(k):  # a short k has shallow rings, and no tile of 256 rows
            deep = k * dtype.itemsize >= 512
            rows = tile if deep else min(tile, 128)
            return f"{SM80}, {rows} rows, {'deep' if deep else 'shallow'}"

        forward = (name(HIDDEN), name(WIDTH))
        backward = (name(HIDDEN), name(2 * WIDTH), *WEIGHTS_SM80)
        shape = (tokens, HIDDEN, WIDTH, experts, 1, dtype)
        return self.check_launched(forward, backward, *shape, **layout)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("tile", TILES)
    def test_tiles(self, layout, tile):
        self.check_tile(tile, torch.bfloat16, **layout)

    @pytest.mark.parametrize("tile", (16, 32, 64, 128))
    def test_float16(self, tile):
        self.check_tile(tile, torch.float16, transposed=tile > 32)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("tile", (16, 64, 128))
    def test_tf32(self, tf32, layout, tile):
        self.check_tile(tile, torch.float32, **layout)

    @pytest.mark.parametrize("tile", (16, 32, 64, 128))
    def test_the_depth_of_the_ring_changes_no_bit(self, tile):
        """Zeros beside k make it long enough for a deep one, and add nothing."""
        tokens, experts = TILES[tile]
        plan = draw_plan(tokens, experts, 1)
        inputs = self.inputs(tokens, 248, WIDTH, experts, 1, torch.bfloat16)
        sides = dict(x=(0, 16), up_proj=(0, 16), down_proj=(0, 0, 0, 16))
        wide = {n: F.pad(t, sides[n]) if n in sides else t for n, t in inputs.items()}
        shallow, deep = self.call(inputs, plan), self.call(wide, plan)
        assert bits_equal(deep[:, :248].contiguous(), shallow)
        name = f"{SM80}, {tile} rows"
        shallow_ones = (f"{name}, shallow",) * 2
        assert_launched(*shallow_ones, f"{name}, deep", shallow_ones[0])

    def test_float32_is_not_rounded_unasked(self):
        self.check_launched(
            (SIMT,) * 2, (SIMT,) * 2 + WEIGHTS_SIMT, 20, 40, 24, 4, 1, torch.float32
        )

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_weight_gradients_of_256_rows(self, layout):
        """Where experts have many rows, and the matrix fills the tile."""
        down = WEIGHT_128 if layout.get("transposed") else WEIGHT_256
        shape = (520, 248, 120, 1, 1, torch.bfloat16)
        self.check_launched((SM80,) * 2, (SM80,) * 2 + (WEIGHT_256, down), *shape, **layout)

    def test_the_weight_gradients_tile_changes_no_bit(self):
        plan = draw_plan(520, 1, 1)
        inputs = self.inputs(520, 40, 248, 1, 1, torch.bfloat16, activation="relu2")
        first = dict(up_proj=inputs["up_proj"][:, :120], down_proj=inputs["down_proj"][..., :120])
        few = inputs | {name: t.contiguous() for name, t in first.items()}
        function = self.bind(functional, plan, activation="relu2")
        cotangents = {}
        of_256, of_128 = (evaluate(function, i, cotangents=cotangents) for i in (inputs, few))
        assert bits_equal(of_256["d_up_proj"][:, :120].contiguous(), of_128["d_up_proj"])
        products = (SM80,) * 4
        assert_launched(*products, WEIGHT_256, WEIGHT_128, *products, WEIGHT_128, WEIGHT_128)

    @pytest.mark.parametrize("activation", ("geglu", "relu2"))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_activations(self, activation, transposed):
        options = dict(activation=activation, transposed=transposed)
        self.check(33, 72, 136, 5, 2, torch.bfloat16, bias=False, **options)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_routing_weights_of_16_bits(self, dtype):
        self.check(50, 72, 48, 3, 2, dtype, weights_dtype=dtype)

    @pytest.mark.parametrize("routing", ("skewed", "one_expert", "sentinels"))
    @pytest.mark.parametrize("capacity", (None, 7))
    def test_routings(self, routing, capacity):
        """Experts without rows, with many, and more experts than a warp has lanes."""
        self.check(60, 40, 48, 70, 3, torch.bfloat16, routing, capacity)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    def test_experts_without_rows_have_no_gradient(self, dtype):
        experts = torch.tensor([[1], [66], [66], [3]] * 40, dtype=torch.int32)
        plan = reference.capacity_scatter(experts, 70)
        inputs = self.inputs(160, 40, 48, 70, 1, dtype, bias=True)
        result = self.check_inputs(inputs, plan)
        for name in ("d_up_proj", "d_down_proj", "d_up_bias", "d_down_bias"):
            nonzero = result[name].flatten(1).any(1).nonzero().flatten()
            assert nonzero.tolist() == [1, 3, 66], name

    def test_thousands_of_experts(self):
        """More than a warp's lanes can count at 32 experts each, few of them with rows."""
        self.check(20, 8, 8, 1100, 2, torch.bfloat16)

    def test_many_tiles_of_one_expert(self):
        """Tiles walk together through the columns, kRowTilesTogether at a time, then the rest."""
        self.check(300, 264, 16, 40, 1, torch.bfloat16, "one_expert")

    @pytest.mark.parametrize("transposed", (False, True))
    def test_a_width_of_odd_chunks(self, transposed):
        """44 columns can be a tile's, and 44 terms cannot: only copies along k are of 16 bytes."""
        forward = (SIMT if transposed else SM80, SIMT)
        backward = (SM80 if transposed else SIMT, SM80, WEIGHTS_SM80[0], WEIGHTS_SIMT[0])
        shape = (60, 72, 44, 3, 1, torch.bfloat16)
        self.check_launched(forward, backward, *shape, transposed=transposed)

    @pytest.mark.parametrize("name", ("x", "up_proj", "down_proj"))
    def test_what_is_not_aligned(self, name):
        """It changes the kernel of the products that it is in, and no other."""
        plan, inputs = draw_plan(40, 3, 1), self.inputs(40, 72, 48, 3, 1, torch.bfloat16, bias=True)
        inputs[name] = shifted(inputs[name])
        draws = Draws()
        self.add(draws, inputs, plan)
        draws.assert_within_bound(torch.bfloat16)
        up = SM80 if name == "down_proj" else SIMT
        down = SIMT if name == "down_proj" else SM80
        d_rows = SIMT if name == "up_proj" else SM80
        d_up = WEIGHTS_SIMT[0] if name == "x" else WEIGHTS_SM80[0]
        assert_launched(up, down, down, d_rows, d_up, WEIGHTS_SM80[0])

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_what_is_beside_an_operand_is_not_read(self, tf32, dtype, transposed):
        """NaN past the columns of x, of the weights, and in rows without an owner."""
        plan = draw_plan(40, 4, 2, "sentinels")
        inputs = self.inputs(40, 40, 48, 4, 2, dtype, transposed=transposed)
        for name in ("x", "up_proj", "down_proj"):
            narrow = inputs[name]
            wide = torch.full((*narrow.shape[:-1], narrow.shape[-1] + 16), torch.nan, dtype=dtype)
            inputs[name] = wide[..., 8:-8].copy_(narrow)
        draws = Draws()
        self.add(draws, inputs, plan, transposed=transposed)
        assert_launched(SM80, SM80, SM80, SM80, *WEIGHTS_SM80)
        draws.assert_within_bound(torch.float16 if dtype == torch.float32 else dtype)

    @pytest.mark.parametrize("tokens", (17, 40, 150, 1100))
    def test_a_token_does_not_know_how_many_there_are(self, tokens):
        self.check_batch_invariance(tokens)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    @pytest.mark.parametrize("transposed", (False, True))
    def test_same_bits(self, tf32, dtype, transposed):
        self.check_same_bits(70, dtype, transposed)


@pytest.mark.skipif(BACKEND != "emulated", reason="a GPU is one device only")
class TestLessSharedMemory(Kernels):
    """sm_86: 100 KB, which two blocks share where a deep ring would take most of it."""

    device = "sm_86"

    @pytest.mark.parametrize("tile", TILES)
    def test_shallow_rings_of_the_same_bits(self, tile):
        tokens, experts = TILES[tile]
        inputs = self.inputs(tokens, HIDDEN, WIDTH, experts, 1, torch.bfloat16)
        plan = draw_plan(tokens, experts, 1)
        less = self.call(inputs, plan)
        up = f"{SM80}, {tile} rows, {'deep' if tile == 256 else 'shallow'}"
        down = f"{SM80}, {min(tile, 128)} rows, shallow"
        assert_launched(up, down)
        self.set_seed(0, "sm_80")
        assert bits_equal(self.call(inputs, plan), less)
        assert_launched(f"{SM80}, {tile} rows, deep", down)


class TestDecode(Kernels):
    """Up to 16 tokens: every chosen expert's weights are streamed once."""

    def check_decode(self, T, H, I, E, K, dtype, *routing, **options):
        kernel = SIMT if dtype == torch.float32 else SM80
        backward = (kernel,) * 2 + (WEIGHTS_SIMT if kernel == SIMT else WEIGHTS_SM80)
        shape = (T, H, I, E, K, dtype, *routing)
        return self.check_launched((DECODE,) * 2, backward, *shape, **options)

    @pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
    @pytest.mark.parametrize("tokens", (1, 4, 5, 16))
    @pytest.mark.parametrize("interleaved", (False, True))
    def test_tokens(self, dtype, tokens, interleaved):
        self.check_decode(tokens, 296, 72, 9, 2, dtype, interleaved=interleaved)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    @pytest.mark.parametrize("activation", ("swiglu", "gelu"))
    @pytest.mark.parametrize("hidden, width", ((33, 45), (2, 3), (300, 1), (1, 300)))
    def test_sizes(self, dtype, activation, hidden, width):
        """Tails of packs, of columns, of a warp's lanes and of a block's warps."""
        self.check(7, hidden, width, 3, 2, dtype, activation=activation)

    @pytest.mark.parametrize("tokens", (3, 16))
    @pytest.mark.parametrize("routing", ("one_expert", "duplicates", "sentinels"))
    def test_routings(self, tokens, routing):
        """An expert may have more rows than there are tokens, or none."""
        self.check(tokens, 40, 24, 40, 5, torch.bfloat16, routing)

    @pytest.mark.parametrize("name", ("x", "up_proj", "down_proj"))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    def test_alignment_changes_no_bit(self, name, dtype):
        plan, inputs = draw_plan(5, 4, 2), self.inputs(5, 280, 48, 4, 2, dtype, bias=True)
        aligned = self.call(inputs, plan)
        inputs[name] = shifted(inputs[name])
        assert bits_equal(self.call(inputs, plan), aligned)
        assert_launched(*(DECODE,) * 4)

    def test_what_is_beside_an_operand_is_not_read(self):
        plan, inputs = draw_plan(5, 4, 2), self.inputs(5, 40, 24, 4, 2, torch.bfloat16)
        expected = self.call(inputs, plan)
        for name in ("x", "up_proj", "down_proj"):
            narrow = inputs[name]
            wide = narrow.new_full((*narrow.shape[:-1], narrow.shape[-1] + 3), torch.nan)
            inputs[name] = wide[..., 1:-2].copy_(narrow)
        assert bits_equal(self.call(inputs, plan), expected)

    @pytest.mark.parametrize("why", ("17 tokens", "transposed", "float64", "batch_invariant"))
    def test_when_not(self, why):
        tokens = 17 if why == "17 tokens" else 16
        dtype = torch.float64 if why == "float64" else torch.bfloat16
        transposed = why == "transposed"
        inputs = self.inputs(tokens, 40, 24, 4, 2, dtype, transposed=transposed)
        with functional.batch_invariant(why == "batch_invariant"):
            self.call(inputs, draw_plan(tokens, 4, 2), transposed=transposed)
        assert_launched(*(SIMT if why == "float64" else SM80,) * 2)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    def test_same_bits(self, dtype):
        self.check_same_bits(16, dtype)
