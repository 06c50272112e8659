"""What only a GPU can show: graphs, streams, no waiting, more than 2^31 elements, two devices.
The stages' own tests run there with `--backend cuda`."""

import contextlib
import copy
import gc

import pytest
import torch

from moe_ext import _load, functional, reference
from support.layer_suite import make
from support.oracle import assert_within_bound, bits_equal, draw_experts, unit

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _load.BUILD_INFO and _load.BUILD_INFO["cuda"]),
    reason="needs a GPU and a CUDA build",
)
MODES = {
    "capacity": dict(),
    "dropless": dict(capacity_factor=None),
    "deepseek": dict(
        score_function="sigmoid", n_group=2, topk_group=1, group_score="top2_sum",
        capacity_factor=None, bias_update_rate=0.01, shared_expert_intermediate_size=16,
    ),
    "sequence": dict(capacity_scope="sequence", drop_policy="probs", bias=True),
}  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def no_waiting():
    """Everything that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layer_of(mode, dtype, hidden=64, width=48):
    return make(hidden=hidden, width=width, seed=0, dtype=dtype, **MODES[mode]).cuda()


def train(layer, x, grad):
    y = layer(x)
    return y, torch.autograd.grad(y, [x, *layer.parameters()], grad, allow_unused=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(mode, dtype):
    layer = layer_of(mode, dtype)
    x = unit(3, 40, 64, dtype=dtype).cuda().requires_grad_()
    grad = torch.randn_like(x)
    train(layer, x, grad)  # whatever is set up once
    with no_waiting():
        train(layer, x, grad)
        with torch.no_grad():
            layer.eval()(x)
            layer(x[:1, :3])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_replays_new_values(mode, dtype):
    layer = layer_of(mode, dtype)
    layer.requires_grad_(True)
    x = unit(3, 40, 64, dtype=dtype).cuda().requires_grad_()
    grad = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(layer, x, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = train(layer, x, grad)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            grad.copy_(torch.randn_like(grad))
        graph.replay()
        expected, expected_gradients = train(layer, x, grad)
        assert bits_equal(y, expected)
        for replayed, eager in zip(gradients, expected_gradients):
            assert (replayed is None and eager is None) or bits_equal(replayed, eager)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_every_time(mode):
    layer = layer_of(mode, torch.bfloat16, hidden=512, width=384)
    x = unit(4, 1000, 512, dtype=torch.bfloat16).cuda().requires_grad_()
    grad = torch.randn_like(x)
    first = train(layer, x, grad)
    for _ in range(5):
        again = train(layer, x, grad)
        assert bits_equal(first[0], again[0])
        assert all(
            (a is None and b is None) or bits_equal(a, b) for a, b in zip(first[1], again[1])
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_cpu_gives_the_same(mode):
    """In float64, where no rounding changes a choice."""
    layer = layer_of(mode, torch.float64)
    on_cpu = copy.deepcopy(layer).cpu()
    x = unit(3, 40, 64, dtype=torch.float64).cuda().requires_grad_()
    grad = torch.randn_like(x)
    y, gradients = train(layer, x, grad)
    expected, expected_gradients = train(on_cpu, x.detach().cpu().requires_grad_(), grad.cpu())
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(gradients, expected_gradients):
        if mine is not None:
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-10, atol=1e-10)


def test_runs_on_the_current_stream():
    layer = layer_of("dropless", torch.float32)
    x = unit(3, 40, 64).cuda()
    with torch.no_grad():
        expected = layer(x)
        stream, late = torch.cuda.Stream(), torch.zeros_like(x)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # clocks: a kernel elsewhere would come too early
            late.copy_(x)
            y = layer(late)
        stream.synchronize()
    assert bits_equal(y, expected)


def test_two_devices_in_one_call():
    layer = layer_of("dropless", torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="on the parameters' cuda"):
        layer(unit(5, 64))
    plan = reference.capacity_scatter(draw_experts(6, 4, 2), 4)
    with pytest.raises(ValueError, match="^weighted_combine: .* device"):
        functional.weighted_combine(unit(12, 8).cuda(), unit(6, 2), plan)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    layer = layer_of("dropless", torch.float32)
    x = unit(5, 64).cuda()
    assert bits_equal(layer(x).cpu(), copy.deepcopy(layer).to("cuda:1")(x.to("cuda:1")).cpu())


def test_out_of_memory_is_torchs_error():
    layer = layer_of("dropless", torch.float32)
    x = unit(1, 64).cuda().expand(2**28, 64)  # its rows are 2^29, of 256 bytes each
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        layer(x)
    gc.collect()  # the error holds the frames that held tensors
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert layer(unit(5, 64).cuda()).isfinite().all()


# ---- more than 2^31 elements ----


def has_memory(gigabytes):
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes * 2**30


@pytest.mark.skipif(not has_memory(40), reason="needs 40 GB")
def test_rows_past_2_to_the_31():
    """gather_rows and weighted_combine over 2^31 + 2^21 elements, judged at both ends."""
    torch.cuda.empty_cache()
    tokens, hidden = 2**20 + 2**10, 1024
    experts = torch.stack([torch.arange(tokens) % 8, (torch.arange(tokens) + 3) % 8], 1)
    plan = functional.capacity_scatter(experts.int().cuda(), 8)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    weights = torch.rand(tokens, 2, device="cuda")
    rows = functional.gather_rows(x, plan)
    assert rows.numel() > 2**31
    for end in (slice(0, 1000), slice(-1000, None)):
        assert bits_equal(rows[end], x[plan.row_token[end].long()])
    rows.requires_grad_()
    y = functional.weighted_combine(rows, weights, plan)
    expected = x[-1000:].double() * weights[-1000:].double().sum(1, keepdim=True)
    assert_within_bound("y", y[-1000:].detach(), expected, expected.bfloat16())
    (gradient,) = torch.autograd.grad(y, rows, x)
    token, slot = plan.row_token[-1000:].long(), plan.row_assignment[-1000:].long() % 2
    expected = x[token].double() * weights[token, slot][:, None].double()
    assert_within_bound("d_rows", gradient[-1000:], expected, expected.bfloat16())


@pytest.mark.skipif(not has_memory(60), reason="needs 60 GB")
@pytest.mark.parametrize("activation", ("swiglu", "relu"))
def test_preactivations_and_weights_past_2_to_the_31(activation):
    """The last expert's weights and the last rows lie past 2^31 elements."""
    torch.cuda.empty_cache()
    experts, hidden, width = 9, 8192, 16384
    wide = 2 * width if activation == "swiglu" else width
    tokens = 2**31 // wide + 256
    options = dict(dtype=torch.bfloat16, device="cuda")
    up = torch.randn(experts, wide, hidden, **options) / hidden**0.5
    down = torch.randn(experts, hidden, width, **options) / width**0.5
    assert up.numel() > 2**31 or activation == "relu"
    ids = torch.full((tokens, 1), experts - 1, dtype=torch.int32, device="cuda")
    plan = functional.capacity_scatter(ids, experts)
    x = torch.randn(tokens, hidden, **options)
    x.requires_grad_()  # so that the preactivations are kept
    rows = functional.grouped_ffn(x, plan, up, down, activation=activation).detach()[-64:]
    x = x.detach()
    single = reference.capacity_scatter(torch.zeros(64, 1, dtype=torch.int32, device="cuda"), 1)
    last = [t[-1:].double() for t in (up, down)]
    oracle = reference.grouped_ffn(x[-64:].double(), single, *last, activation=activation)
    baseline = reference.grouped_ffn(x[-64:], single, up[-1:], down[-1:], activation=activation)
    if isinstance(oracle, tuple):
        oracle, baseline = oracle[0], baseline[0]
    assert_within_bound("rows", rows, oracle, baseline)
