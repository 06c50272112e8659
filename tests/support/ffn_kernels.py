"""Which kernel runs an expert's products: what its tests on each architecture share."""

import pytest
import torch

from moe_ext import functional, reference
from moe_ext._load import BACKEND
from support.ffn_suite import FFNStage
from support.oracle import Draws, bits_equal, draw_plan, evaluate

SM90, SM80, DECODE, SIMT = (f"rows_gemm_{name}" for name in ("sm90", "sm80", "decode", "simt"))


def assert_launched(*products):
    """Which kernels ran the products since the test's begin or the last call; a GPU does not
    tell. A kernel may stand for all of its tiles."""
    if BACKEND != "emulated":
        return
    from emulator import control

    names = [n for n in control.launched() if n.startswith(("rows_gemm", "weight_gradient"))]
    assert len(names) == len(products), names
    assert all(map(str.startswith, names, products)), names


class Kernels(FFNStage):
    stage = "moe_forward"
    weighted = True
    device = "sm_80"

    @pytest.fixture(autouse=True)
    def pretend(self, emulator_seed):
        self.set_seed(emulator_seed)

    def set_seed(self, seed, device=None):
        if BACKEND == "emulated":
            from emulator import control

            control.set(seed, device=control.DEVICES.index(device or self.device))

    def check_launched(self, forward, backward, *arguments, **options):
        """`check`, with every product of a draw on the kernels that are named."""
        T, H, I, E, K, dtype, *routing = arguments
        layout = {k: v for k, v in options.items() if k != "bias"}
        draws = Draws()
        for draw in range(4):
            inputs = self.inputs(T, H, I, E, K, dtype, **({"bias": True} | options))
            result = self.add(draws, inputs, draw_plan(T, E, K, *routing), **layout)
            if draw == 0:
                assert_launched(*forward, *backward)
            if draws.is_telling():
                break
        # tf32 has as many bits as float16; the baseline's float32 has more.
        tf32 = dtype == torch.float32 and SM80 in forward[0]
        draws.assert_within_bound(torch.float16 if tf32 else dtype)
        return result

    def check_same_bits(self, tokens, dtype, transposed=False, **options):
        """Whatever the order of threads and blocks, and whenever copies land."""
        plan = draw_plan(tokens, 3, 2)
        options["transposed"] = transposed
        inputs = self.inputs(tokens, 136, 72, 3, 2, dtype, bias=True, **options)
        function = self.bind(functional, plan, **options)
        cotangents, runs = {}, []
        for seed in range(8):
            self.set_seed(seed)
            runs.append(evaluate(function, inputs, cotangents=cotangents))
        for run in runs[1:]:
            assert bits_equal(run, runs[0])

    def check_batch_invariance(self, tokens):
        """The same bits from every tile, so also from every number of tokens."""
        experts = torch.zeros((tokens, 1), dtype=torch.int32)
        inputs = self.inputs(tokens, 136, 72, 1, 1, torch.bfloat16)
        few = {n: t[:9] if n in ("x", "weights") else t for n, t in inputs.items()}
        with functional.batch_invariant():
            all_of_them = self.call(inputs, reference.capacity_scatter(experts, 1))
            alone = self.call(few, reference.capacity_scatter(experts[:9], 1))
        assert bits_equal(all_of_them[:9], alone)
