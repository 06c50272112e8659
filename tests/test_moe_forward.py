"""moe_forward: grouped_ffn and weighted_combine in one."""

import pytest
import torch

from moe_ext import functional, reference
from support.ffn_low_rank import FFNLowRank
from support.ffn_operator import FFNOperator
from support.ffn_suite import FFNNumbers
from support.oracle import (
    DTYPES,
    assert_within_bound,
    draw_plan,
    evaluate,
    in_float64,
)


class TestNumbers(FFNNumbers):
    stage = "moe_forward"
    weighted = True

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("capacity", (None, 4))
    def test_is_grouped_ffn_then_weighted_combine(self, dtype, capacity):
        plan = draw_plan(40, 5, 2, "sentinels", capacity)
        inputs = self.inputs(40, 24, 16, 5, 2, dtype, bias=True)

        def two_stages(x, weights, **parameters):
            rows = functional.grouped_ffn(x, plan, **parameters)
            return functional.weighted_combine(rows, weights, plan)

        cotangents = {}
        fused = evaluate(self.bind(functional, plan), inputs, cotangents=cotangents)
        apart = evaluate(two_stages, inputs, cotangents=cotangents)
        oracle = evaluate(self.bind(reference, plan), in_float64(inputs), cotangents=cotangents)
        for name in fused:
            assert_within_bound(name, fused[name], oracle[name], apart[name], dtype)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    @pytest.mark.parametrize("tokens", (2, 50))
    def test_weights_in_the_dtype_of_x(self, dtype, tokens):
        plan = draw_plan(tokens, 5, 3)
        result = self.check_inputs(self.inputs(tokens, 24, 16, 5, 3, dtype, dtype, bias=True), plan)
        assert result["d_weights"].dtype == dtype

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weights_of_zero_have_a_gradient(self, dtype):
        """dS is taken before the weight: it neither vanishes nor divides by it."""
        plan = draw_plan(20, 5, 2)
        inputs = self.inputs(20, 24, 16, 5, 2, dtype, bias=True)
        inputs["weights"][::2] = 0
        result = self.check_inputs(inputs, plan)
        assert result["d_weights"].all() and not result["output"][::2].any()

    def test_gradient_of_dropped_weights_is_exactly_zero(self):
        plan = draw_plan(30, 4, 2, "sentinels", capacity=3)
        inputs = self.inputs(30, 24, 16, 4, 2, torch.float32, bias=True)
        result = self.check_inputs(inputs, plan)
        dropped = plan.assignment_row < 0
        assert dropped.any() and not result["d_weights"][dropped].any()
        assert result["d_weights"][~dropped].all()

    def test_many_choices(self):
        """K = E = 16: the order of a token's sum and its gradient over many rows."""
        plan = draw_plan(24, 16, 16)
        inputs = self.inputs(24, 24, 16, 16, 16, torch.bfloat16, bias=True)
        self.check_inputs(inputs, plan)


class TestOperator(FFNOperator):
    stage = "moe_forward"
    weighted = True


class TestLowRank(FFNLowRank):
    stage = "moe_forward"
    weighted = True
