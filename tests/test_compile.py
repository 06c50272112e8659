"""torch.compile and torch.export of the layer: one graph, for every number of tokens."""

import copy
import functools

import pytest
import torch
import torch._dynamo
from torch.utils.checkpoint import checkpoint

import moe_ext
from support.layer_suite import E, H, assert_close, make
from support.oracle import DEVICE, HAS_OPS, bits_equal, unit

pytestmark = pytest.mark.skipif(not HAS_OPS, reason="the reference reads from the device")


@pytest.fixture(autouse=True)
def _one_graph():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(function, layer, x, **kwargs):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(0)
    y = function(x, **kwargs)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


# T = E and T = 7 are sizes of the layer's own tensors: no reason to compile again.
FLAT = [(5, H), (E, H), (7, H), (33, H), (2, H)]
DEEP = [(2, 5, H), (3, E, H), (4, 7, H), (5, 2, H)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options,shapes",
    [
        (dict(), FLAT),
        (dict(), DEEP),
        (dict(capacity_factor=None, bias_update_rate=0.1, score_function="sigmoid"), FLAT),
        (dict(capacity_scope="sequence", eval_capacity_factor=1.0, drop_policy="probs",
              renormalize_after_drop=True), DEEP),
        (dict(expert_capacity=2, shared_expert_intermediate_size=6, shared_expert_gate=True,
              z_loss_coef=0.1, n_group=4, topk_group=2, group_score="top2_sum"), FLAT),
        (dict(jitter_eps=0.1, bias=True, gate_bias=True, activation="geglu", limit=1.0,
              transposed=True, interleaved=True, score_function="softmax_topk"), FLAT),
    ],
)  # fmt: skip
def test_one_graph_for_every_size(options, shapes, training):
    layer = make(**options).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, shape in enumerate(shapes):
        x = unit(*shape, dtype=torch.float64)
        for a, b in zip(train(compiled, layer, x), train(twin, twin, x)):
            assert_close(a, b)
        # The loss scale is data, not a constant of the graph.
        moe_ext.set_loss_scale(layer, 1.0 + i), moe_ext.set_loss_scale(twin, 1.0 + i)
    stats, expected = layer.stats(), twin.stats()
    assert torch.equal(stats.load, expected.load)
    assert stats == pytest.approx(expected)
    moe_ext.update_router_biases(layer), moe_ext.update_router_biases(twin)
    assert bits_equal(layer.state_dict(), twin.state_dict())


def test_padding_replay_and_the_record():
    layer = make()
    plain = copy.deepcopy(layer)

    def compile(function):
        return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    record = compile(functools.partial(layer, return_routing=True))
    replay = compile(lambda x, routing: layer(x, routing=routing))
    padded = compile(lambda x, mask: layer(x, padding_mask=mask))
    surrounded = compile(lambda x: layer(x) * 1)

    @compile
    def inside(x, mask):
        with moe_ext.padding(mask):
            return layer(x)

    for tokens in (5, 9, 30):
        x = unit(2, tokens, H, dtype=torch.float64)
        mask = torch.rand(2, tokens) < 0.4
        y, routing = record(x)
        expected, expected_routing = plain(x, return_routing=True)
        assert_close(y, expected)
        assert_close(routing.aux_loss, expected_routing.aux_loss)
        assert torch.equal(routing.plan.assignment_row, expected_routing.plan.assignment_row)
        assert_close(replay(x, routing), y)
        expected = plain(x, padding_mask=mask)
        assert_close(padded(x, mask), expected)
        assert_close(inside(x, mask), expected)
        with moe_ext.padding(mask):
            assert_close(surrounded(x), expected)


def test_autocast():
    layer = make(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 12):
        x = unit(tokens, H)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert bits_equal(compiled(x), layer(x))


@pytest.mark.parametrize("policy", [False, True])
def test_checkpointing_inside_of_a_graph(policy):
    layer = make(bias_update_rate=0.1)
    twin = copy.deepcopy(layer)
    more = dict(context_fn=moe_ext.checkpoint_policy) if policy else {}

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def block(x):
        return checkpoint(layer, x, use_reentrant=False, **more)

    for tokens in (5, 12):
        x = unit(tokens, H, dtype=torch.float64)
        for a, b in zip(train(block, layer, x), train(twin, twin, x)):
            assert_close(a, b)
    assert layer.stats()["forwards"] == 2
    assert torch.equal(layer._stats.step_counts, twin._stats.step_counts)


def test_sizes_that_are_numbers():
    """Without dynamic=True the first graph has no symbols."""
    layer = make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = unit(5, H, dtype=torch.float64)
    for a, b in zip(train(compiled, layer, x), train(twin, twin, x)):
        assert_close(a, b)
    assert layer.stats()["forwards"] == 1


def test_inductor():
    layer = make(dtype=torch.float32, hidden=32)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (9, 20):
        x = unit(tokens, 32)
        for a, b in zip(train(compiled, layer, x), train(twin, twin, x)):
            assert_close(a, b, 1e-5)
    assert layer.stats()["tokens"] == 29


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(eval_capacity_factor=1.0, bias_update_rate=0.1)])
def test_export(options, strict):
    layer = make(**options).eval()
    sizes = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=512)}}
    program = torch.export.export(
        layer, (unit(2, 5, H, dtype=torch.float64),), dynamic_shapes=sizes, strict=strict
    )
    for shape in ((2, 5, H), (3, 8, H), (7, 1, H)):
        x = unit(*shape, dtype=torch.float64)
        assert_close(program.module()(x), layer(x))
