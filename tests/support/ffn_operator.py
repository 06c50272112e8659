"""The second half of what `grouped_ffn` and `moe_forward` share: their tests as operators.

opcheck, torch.compile, what is kept for backward, output masks, and bad input.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext import Activation, functional, reference
from moe_ext._load import BACKEND
from support.ffn_suite import LAYOUTS, PARAMETERS, FFNStage, needs_ops
from support.oracle import ACTIVATIONS, DTYPES, assert_within_bound, bits_equal, draw_plan, evaluate

# Marks what only the memory of a plan could tell: a GPU is not waited for.
READS_MEMORY = "the values"


class Recorder(TorchDispatchMode):
    """Every call of a moe_ext op, as (name, {argument: value})."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_ext":
            arguments = {a.name: a.default_value for a in func._schema.arguments}
            arguments |= dict(zip(arguments, args)) | (kwargs or {})
            self.calls.append((func, arguments))
        return func(*args, **(kwargs or {}))


@needs_ops
class FFNOperator(FFNStage):
    # ---- as an operator ----

    def op_arguments(self, inputs, plan, gated=True):
        weights = [inputs["weights"]] if self.weighted else []
        index = [plan.expert_offsets, plan.row_token]
        if self.weighted:
            index.append(plan.row_assignment)
        parameters = [inputs.get(name) for name in PARAMETERS]
        return [inputs["x"], *weights, *index, plan.assignment_row, *parameters]

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("bias", (False, True))
    @pytest.mark.parametrize("capacity", (None, 3))
    def test_opcheck(self, dtype, bias, capacity):
        plan = draw_plan(9, 4, 2, "sentinels", capacity)
        inputs = self.inputs(9, 8, 6, 4, 2, dtype, bias=bias)
        arguments = self.op_arguments({n: t.requires_grad_() for n, t in inputs.items()}, plan)
        torch.library.opcheck(getattr(torch.ops.moe_ext, self.stage).default, arguments)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("tokens", (2, 30))
    def test_preactivations(self, dtype, layout, tokens):
        """Output 1: x times up_proj plus its bias, in plan order and the parameters' layout."""
        plan = draw_plan(tokens, 4, 2, "sentinels")
        inputs = self.inputs(tokens, 16, 10, 4, 2, dtype, bias=True, **layout)
        options = Activation(**layout)
        op = getattr(torch.ops.moe_ext, self.stage)
        _, actual = op(*self.op_arguments(inputs, plan), *options, True)
        assert actual.shape == (tokens * 2, 20)
        up_proj = inputs["up_proj"].mT if layout.get("transposed") else inputs["up_proj"]
        last = int(plan.expert_offsets[-1])
        expert = torch.arange(4).repeat_interleave(plan.expert_offsets.diff())
        x, up_proj, bias = (
            t.double()
            for t in (
                inputs["x"][plan.row_token[:last].long()],
                up_proj[expert],
                inputs["up_bias"][expert],
            )
        )
        oracle = (up_proj @ x[..., None])[..., 0] + bias
        assert_within_bound("preactivations", actual[:last], oracle, oracle.to(dtype))
        _, none = op(*self.op_arguments(inputs, plan), *options, False)
        assert none.shape == (0,)

    @pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
    def test_compile(self, backend):
        """One graph, for every T from 2 on, with the gradients of eager mode."""
        inputs = self.inputs(64, 8, 6, 4, 2, torch.float32, bias=True)
        stage = getattr(functional, self.stage)
        compiled = torch.compile(stage, fullgraph=True, dynamic=True, backend=backend)

        def results(function, tokens):
            def call(x, weights=None, **p):
                plan = reference.capacity_scatter(experts[:tokens], 4)
                return function(x, *([] if weights is None else [weights]), plan, **p)

            own = {n: t[:tokens] if n in ("x", "weights") else t for n, t in inputs.items()}
            return evaluate(call, own, cotangents=cotangents.setdefault(tokens, {}))

        cotangents, experts = {}, torch.randint(5, (64, 2), dtype=torch.int32)
        for tokens in (7, 16, 64):
            with torch._dynamo.config.patch(error_on_recompile=tokens > 7):
                actual = results(compiled, tokens)
            assert bits_equal(actual, results(stage, tokens)), f"{tokens} tokens"

    @pytest.mark.parametrize(
        "needed", ("x", "up_proj", "down_proj", "up_bias", "down_bias", "weights")
    )
    def test_only_needed_gradients(self, needed):
        """One input requires its gradient: the backward op is asked for that one alone."""
        if needed == "weights" and not self.weighted:
            pytest.skip("grouped_ffn takes no weights")
        plan = draw_plan(12, 4, 2)
        inputs = self.inputs(12, 8, 6, 4, 2, torch.float32, bias=True)
        full = evaluate(self.bind(functional, plan), inputs, cotangents=(cotangents := {}))
        frozen = [name for name in inputs if name != needed]
        with Recorder() as recorder:
            alone = evaluate(self.bind(functional, plan), inputs, frozen, cotangents)
        order = ["x", *(["weights"] if self.weighted else []), *PARAMETERS]
        ((op, arguments),) = (call for call in recorder.calls if "output_mask" in call[1])
        assert list(arguments["output_mask"]) == [name == needed for name in order]
        assert_within_bound(
            needed, alone[f"d_{needed}"], full[f"d_{needed}"].double(), full[f"d_{needed}"]
        )
        gradients = op(**arguments)
        for name, gradient in zip(order, gradients):
            assert name == needed or gradient.shape == (0,), name

    def test_nothing_is_kept_without_a_gradient(self):
        plan = draw_plan(12, 4, 2)
        inputs = self.inputs(12, 8, 6, 4, 2, torch.float32)
        inputs["up_proj"].requires_grad_()
        for context, kept in ((torch.no_grad(), False), (contextlib.nullcontext(), True)):
            with context, Recorder() as recorder:
                self.call(inputs, plan)
            ((_, arguments),) = recorder.calls
            assert arguments["keep_preactivations"] is kept

    @pytest.mark.parametrize("activation", ("swiglu", "relu2"))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_bytes_kept_for_backward(self, activation, dtype):
        """x, the preactivation rows (2TKI elements; ungated TKI), weights and the plan: no more."""
        T, H, I, E, K = 11, 8, 6, 4, 2
        plan = draw_plan(T, E, K)
        inputs = self.inputs(T, H, I, E, K, dtype, activation=activation, bias=True)
        leaves = {name: t.requires_grad_() for name, t in inputs.items()}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.call(leaves, plan, activation=activation)
        for name in PARAMETERS[:4]:
            kept.pop(leaves[name].data_ptr(), None)
        width = (2 if activation == "swiglu" else 1) * I
        index = 4 * ((E + 1) + T * K + T * K)
        expected = T * H * dtype.itemsize + T * K * width * dtype.itemsize + index
        if self.weighted:
            expected += T * K * 4 + 4 * T * K  # the weights and row_assignment
        assert sum(kept.values()) == expected

    def test_double_backward_is_an_error(self):
        plan = draw_plan(5, 4, 2)
        inputs = self.inputs(5, 8, 6, 4, 2, torch.float32)
        inputs["x"].requires_grad_()
        (gradient,) = torch.autograd.grad(
            self.call(inputs, plan).square().sum(), inputs["x"], create_graph=True
        )
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.sum().backward()

    # ---- bad input ----

    # argument, what is wrong with it, the error, what else it may be blamed on
    BAD = (
        ("x", lambda t: t[0], ValueError),
        ("x", lambda t: t.int(), TypeError),
        ("x", lambda t: t[:, :-1], ValueError, "up_proj"),
        ("up_proj", lambda t: t.bfloat16(), TypeError),
        ("up_proj", lambda t: t[0], ValueError),
        ("up_proj", lambda t: t[:, :, :-1], ValueError),
        ("up_proj", lambda t: t[:-1], ValueError, "expert_offsets|down_proj"),
        ("up_proj", lambda t: t[:, :-1], ValueError, "down_proj"),
        ("down_proj", lambda t: t.double(), TypeError),
        ("down_proj", lambda t: t[:, :, :-1], ValueError, "up_proj"),
        ("down_proj", lambda t: t[:, :-1], ValueError),
        ("down_proj", lambda t: t[:-1], ValueError),
        ("up_bias", lambda t: t[:, :-1], ValueError),
        ("up_bias", lambda t: t.half(), TypeError),
        ("down_bias", lambda t: t[:-1], ValueError),
        ("down_bias", lambda t: t[0], ValueError),
        ("down_bias", lambda t: t.bfloat16(), TypeError),
        ("weights", lambda t: t[:-1], ValueError),
        ("weights", lambda t: t[:, :-1], ValueError),
        ("weights", lambda t: t.int(), TypeError),
        ("weights", lambda t: t.half(), TypeError),
        ("expert_offsets", lambda t: t.long(), TypeError),
        ("expert_offsets", lambda t: t[:-1], ValueError, "up_proj"),
        ("expert_offsets", lambda t: t.flip(0), ValueError, READS_MEMORY),
        ("expert_offsets", lambda t: t + 1, ValueError, READS_MEMORY),
        ("row_token", lambda t: t.float(), TypeError),
        ("row_token", lambda t: t + 12, ValueError, READS_MEMORY),
        ("row_token", lambda t: t - 12, ValueError, READS_MEMORY),
        ("row_token", lambda t: t[None], ValueError),
        ("row_assignment", lambda t: t.long(), TypeError),
        ("row_assignment", lambda t: t[:-1], ValueError),
        ("assignment_row", lambda t: t.long(), TypeError),
        ("assignment_row", lambda t: t[:-1], ValueError, "weights"),
        ("assignment_row", lambda t: t[0], ValueError),
        ("assignment_row", lambda t: t + 24, ValueError, READS_MEMORY),
    )

    @pytest.mark.parametrize("case", range(len(BAD)), ids=[case[0] for case in BAD])
    def test_bad_tensors(self, case):
        name, spoil, error, *others = self.BAD[case]
        if name in ("weights", "row_assignment") and not self.weighted:
            pytest.skip(f"grouped_ffn takes no {name}")
        if READS_MEMORY in others and BACKEND in ("cuda", "emulated"):
            pytest.skip("only the device's memory could tell")
        plan = draw_plan(12, 4, 2)
        inputs = self.inputs(12, 8, 6, 4, 2, torch.float32, bias=True)
        if name in inputs:
            inputs[name] = spoil(inputs[name])
        else:
            plan = plan._replace(**{name: spoil(getattr(plan, name))})
        with pytest.raises(error, match=rf"^{self.stage}: ({'|'.join([name, *others])}) must .*"):
            self.call(inputs, plan)

    def test_unknown_activation_lists_the_known(self):
        inputs = self.inputs(5, 8, 6, 4, 2, torch.float32)
        with pytest.raises(ValueError, match=f"^{self.stage}: activation must") as caught:
            self.call(inputs, draw_plan(5, 4, 2), activation="swish")
        assert all(name in str(caught.value) for name in (*ACTIVATIONS, "swish"))
