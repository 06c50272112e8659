"""moe_ext.MoE on a GPU, beside its peers and beside the bound.

    make gpu-bench                                            # all shapes, bfloat16
    python benchmarks/bench_layer_cuda.py --shapes mixtral olmoe --repeats 30

ours   moe_ext.MoE, dropless, without losses: what the peers compute
peers  transformers' MixtralSparseMoeBlock with `grouped_mm` experts; the kernels of Liger
       and ScatterMoE behind the same router; SonicMoE with its own. A peer that cannot be
       imported, or fails, is `not compared`, with the reason
bound  a perfectly balanced dense product of the same FLOPs through cuBLAS' batched GEMM, and
       what lies between the GEMMs (activation, gather-and-sum) as bytes at the copy bandwidth

Times are the device's, between CUDA events. Before each call L2 is overwritten, and the
device is kept busy while the host enqueues, so that the host's own time does not count; a
serving shape's call is also timed as a CUDA graph's replay, where the host has no part at
all. Contestants take turns; a number is the median over the rounds. Outputs are compared
with transformers' before anything is timed. Stops taking new shapes after --seconds.

--dry goes through the same steps without a GPU, with tiny shapes and the host's clock.
"""

import argparse
import importlib
import inspect
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

import harness
import moe_ext
from moe_ext import functional
from sides import check_agreement, clear_tokens, inference, our_layer, peer_block, training


class Shape(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    kind: str = "train"  # or serve: forward only
    skewed: bool = False  # 30 % of the tokens on one expert, an eighth of the experts on none


def serving(name, *sizes):
    return {f"{name}_{T}": Shape(T, *sizes, "serve") for T in (1, 16, 64, 256, 1024, 4096)}


QWEN3_30B, MIXTRAL = (2048, 768, 128, 8), (4096, 14336, 8, 2)
SHAPES = {
    "7b_n256": Shape(24576, 1536, 256, 128, 8),
    "7b_n512": Shape(24576, 1536, 512, 64, 4),
    "7b_n1024": Shape(24576, 1536, 1024, 32, 2),
    "30b_n256": Shape(32768, 4096, 256, 256, 16),
    "30b_n512": Shape(32768, 4096, 512, 128, 8),
    "30b_n1024": Shape(32768, 4096, 1024, 64, 4),
    "120b_n512": Shape(32768, 4096, 512, 256, 16),
    "120b_n1024": Shape(32768, 4096, 1024, 128, 8),
    "120b_n2048": Shape(32768, 4096, 2048, 64, 4),
    "mixtral": Shape(8192, *MIXTRAL),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
    "olmoe_skewed": Shape(32768, 2048, 1024, 64, 8, "train", True),
    "qwen3_30b_8k": Shape(8192, *QWEN3_30B),
    "qwen3_30b_32k": Shape(32768, *QWEN3_30B),
    "qwen3_next": Shape(32768, 2048, 512, 512, 10),
    "deepseek_v3": Shape(4096, 7168, 2048, 256, 8),
    "gpt_oss_120b": Shape(8192, 2880, 2880, 128, 4),
    **serving("serve_qwen3_30b", *QWEN3_30B),
    **serving("serve_mixtral", *MIXTRAL),
}
DRY_SHAPES = {
    "dry": Shape(16, 64, 32, 8, 2),
    "dry_skewed": Shape(64, 64, 32, 8, 2, "train", True),
    "dry_serve": Shape(4, 64, 32, 8, 2, "serve"),
}


# ---- timing -----------------------------------------------------------------------


class HostClock:
    """A dry run's: what an event records is the host's time."""

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return (end.seconds - self.seconds) * 1e3


class Timer:
    """Seconds on the device for one call."""

    device = "cuda"

    def __init__(self):
        properties = torch.cuda.get_device_properties(0)
        size = max(256 << 20, 4 * properties.L2_cache_size)
        self.evict = torch.empty(size // 4, dtype=torch.int32, device="cuda")

    def event(self):
        return torch.cuda.Event(enable_timing=True)

    def prepare(self):
        self.evict.zero_()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead

    def wait(self):
        torch.cuda.synchronize()

    def graphed(self, function):
        """A function that replays what `function` launches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def __call__(self, function):
        begin, end = self.event(), self.event()
        self.prepare()
        begin.record()
        function()
        end.record()
        return begin, end

    def interleaved(self, contestants, repeats, prepare=None):
        """{name: [seconds, ...]}, round by round."""
        events = {name: [] for name in contestants}
        for round in range(-2, repeats):  # two rounds warm up
            for name, function in contestants.items():
                if prepare is not None:
                    prepare()
                pair = self(function)
                if round >= 0:
                    events[name].append(pair)
            self.wait()
        return {
            name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
            for name, pairs in events.items()
        }

    def median(self, function, repeats=20):
        return statistics.median(self.interleaved({"": function}, repeats)[""])


class DryTimer(Timer):
    device, event = "cpu", HostClock

    def __init__(self):
        pass

    def prepare(self):
        pass

    wait = prepare

    def graphed(self, function):
        return function


def dense_rate(timer, size):
    """FLOP/s of a product of square matrices, as cuBLAS has it."""
    a, b = (torch.randn(size, size, device=timer.device).bfloat16() for _ in range(2))
    return 2 * size**3 / timer.median(lambda: a @ b)


def copy_bandwidth(timer, size):
    """Bytes a second, read and written ones together."""
    source = torch.zeros(size // 4, dtype=torch.int32, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / timer.median(lambda: target.copy_(source))


# ---- contestants --------------------------------------------------------------------


class Behind(torch.nn.Module):
    """A peer's experts behind the router of transformers' block."""

    def __init__(self, block, experts):
        super().__init__()
        self.gate, self.experts, self.call = block.gate, block.experts, experts

    def forward(self, x):
        tokens = x.view(-1, x.shape[-1])
        _, weights, ids = self.gate(tokens)
        return self.call(tokens, weights.to(x.dtype), ids).view_as(x)


def liger(block, shape):
    function = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction
    experts = block.experts
    return Behind(
        block,
        lambda x, weights, ids: function.apply(
            x, experts.gate_up_proj, experts.down_proj, ids.int(), weights
        ),
    )


def scattermoe(block, shape):
    mlp = importlib.import_module("scattermoe.mlp").GLUMLP(
        input_size=shape.hidden,
        hidden_size=shape.intermediate,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        activation=torch.nn.SiLU(),
    )
    gate, up = block.experts.gate_up_proj.detach().chunk(2, 1)
    mlp.experts.weight = torch.nn.Parameter(torch.cat([up, gate], 1))  # its first half is up
    mlp.output_experts.weight = torch.nn.Parameter(block.experts.down_proj.detach())
    peer = Behind(block, lambda x, weights, ids: peer.experts(x, weights, ids))
    peer.experts = mlp.to(block.gate.weight.device)
    return peer


class SonicMoE(torch.nn.Module):
    """Its router is in its kernels. Gate and up alternate in its weights, which later releases
    want with the activation's name."""

    def __init__(self, block, shape):
        super().__init__()
        self.call = importlib.import_module("sonicmoe.functional").moe_TC_softmax_topk_layer
        self.options = ()
        if any("activation" in name for name in inspect.signature(self.call).parameters):
            self.options = (importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU,)
        self.gate, self.top_k = block.gate, shape.top_k
        gate, up = block.experts.gate_up_proj.detach().chunk(2, 1)
        self.up = torch.nn.Parameter(torch.stack([gate, up], 2).flatten(1, 2))
        self.down = torch.nn.Parameter(block.experts.down_proj.detach())

    def forward(self, x):
        up, down = self.up.permute(1, 2, 0), self.down.permute(1, 2, 0)
        stream = torch.cuda.current_stream().cuda_stream
        y, *_ = self.call(
            x.view(-1, x.shape[-1]), self.gate.weight, up, None, down, None, self.top_k, stream,
            *self.options, not torch.is_grad_enabled(),
        )  # fmt: skip
        return y.view_as(x)


PEERS = {
    "sonicmoe": SonicMoE,
    "grouped_mm": lambda block, shape: block,
    "liger": liger,
    "scattermoe": scattermoe,
}


def contestants(shape, layer, x):
    """({side: module}, {peer: why it is not compared})"""
    block = peer_block("grouped_mm", shape, layer)
    sides, absent = {"ours": layer}, {}
    for name, make in PEERS.items():
        try:
            peer = make(block, shape)
            with torch.no_grad():
                check_agreement(name, layer.eval(), peer.eval(), x)
            if shape.kind == "train":
                y = peer.train()(x.detach().requires_grad_())
                torch.autograd.grad(y.sum(), [*peer.parameters()], allow_unused=True)
            sides[name] = peer
        except Exception as error:  # whatever a peer does, the others are still compared
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]:.160}"
            torch.cuda.empty_cache()
    return sides, absent


def skewed_tokens(layer, shape, dtype, device):
    """As clear_tokens, but 30 % of the tokens choose expert 0 and none chooses
    one of the last eighth: two of the features say so."""
    candidates = torch.randn(4 * shape.tokens, shape.hidden, device=device)
    candidates[:, 0], candidates[:, 1] = 4.0, 0.0
    with torch.no_grad():
        weight = layer.gate.weight
        weight[:, :2] = 0.0
        weight[0, 1] = 4.0
        weight[-(shape.num_experts // 8) :, 0] = -8.0
    favoured = int(0.3 * shape.tokens)
    x = []
    for tokens in (favoured, shape.tokens - favoured):
        chosen, candidates = candidates[: 4 * tokens].to(dtype), candidates[4 * tokens :]
        chosen[:, 1] = 8.0 if not x else 0.0
        logits = chosen.double() @ layer.gate.weight.detach().double().T
        best = logits.topk(shape.top_k + 1).values
        clearest = (best[:, -2] - best[:, -1]).argsort(descending=True)[:tokens]
        x.append(chosen[clearest.sort().values])
    return torch.cat(x)[None]


class Bound:
    """The bound's GEMMs, forward and backward, over balanced experts."""

    def __init__(self, shape, dtype, device):
        rows = shape.tokens * shape.top_k
        experts = min(shape.num_experts, rows)
        each = -(-rows // experts)
        H, I = shape.hidden, shape.intermediate

        def random(*sizes):
            return torch.randn(experts, *sizes, dtype=dtype, device=device)

        self.x, self.act = random(each, H), random(each, I)
        self.up, self.down = random(2 * I, H), random(H, I)
        self.pre = random(each, 2 * I)
        size = dtype.itemsize
        combine = (rows + shape.tokens) * H * size
        self.forward_bytes = 3 * rows * I * size + combine
        self.backward_bytes = 6 * rows * I * size + combine

    def forward(self):
        torch.bmm(self.x, self.up.mT)
        torch.bmm(self.act, self.down.mT)

    def train(self):
        self.forward()
        torch.bmm(self.x, self.down)  # dA
        torch.bmm(self.x.mT, self.act)  # ddown
        torch.bmm(self.pre, self.up)  # dx
        torch.bmm(self.pre.mT, self.x)  # dup


# ---- a case ---------------------------------------------------------------------------


def summary(times, flops):
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    peers = [side for side in medians if side not in ("ours", "bound")]
    return {
        "seconds": medians,
        "teraflops": {side: flops / seconds / 1e12 for side, seconds in medians.items()},
        "share_of_bound": medians["bound"] / medians["ours"],
        "against": {side: medians[side] / medians["ours"] for side in peers},
    }


def bench_case(name, shape, dtype, repeats, timer, bandwidth):
    torch.manual_seed(0)
    layer = our_layer(shape, dtype, timer.device)
    if shape.skewed:
        x = skewed_tokens(layer, shape, dtype, timer.device)
    else:
        x = clear_tokens(layer, shape, dtype, timer.device)
    sides, absent = contestants(shape, layer, x)
    flops = 6 * shape.tokens * shape.top_k * shape.hidden * shape.intermediate
    with torch.no_grad():
        counts = layer(x, return_routing=True)[1].plan.expert_counts
    case = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        **shape._asdict(),
        "repeats": repeats,
        "max_load": counts.max().item() / counts.double().mean().item(),
        "not_compared": absent,
    }
    bound = Bound(shape, dtype, timer.device)
    calls = {side: inference(module.eval(), x) for side, module in sides.items()}
    times = timer.interleaved({**calls, "bound": bound.forward}, repeats)
    times["bound"] = [t + bound.forward_bytes / bandwidth for t in times["bound"]]
    case["forward"] = summary(times, flops)
    if shape.kind == "serve":
        case["graph_seconds"] = timer.median(timer.graphed(calls["ours"]), repeats)
        active = int((counts > 0).sum())
        expert = sum(p[0].numel() for p in layer.experts.parameters()) * x.element_size()
        case["weights_bytes"] = active * expert
        case["streamed"] = active * expert / case["graph_seconds"] / bandwidth
        return case
    case["stages"] = stages(shape, layer, x, timer, bandwidth)

    grad = torch.randn_like(x)
    pairs = {side: training(m.train(), x, grad) for side, m in sides.items()}

    def reset():
        for _, clear in pairs.values():
            clear()

    calls = {side: call for side, (call, _) in pairs.items()}
    times = timer.interleaved({**calls, "bound": bound.train}, repeats, prepare=reset)
    reset()
    both = bound.forward_bytes + bound.backward_bytes
    times["bound"] = [t + both / bandwidth for t in times["bound"]]
    case["forward_backward"] = summary(times, 3 * flops)
    try:
        case["kernels"] = our_kernels(calls["ours"], reset, timer)
    except Exception as error:  # a profiler may lack the right to look
        absent["kernels"] = f"{type(error).__name__}: {str(error).splitlines()[0]:.160}"
    reset()
    case["saved_bytes"] = {
        side: harness.saved_bytes(lambda m=m: m(x.detach().requires_grad_()), m.parameters())
        for side, m in sides.items()
    }
    return case


def our_kernels(call, prepare, timer, repeats=5):
    """[name, seconds] of each of our kernels, as a call launches them: predict_hopper.py holds
    them against its own."""
    if timer.device == "cpu":
        return []
    runs = []
    for _ in range(repeats):
        prepare()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            timer.wait()
        events = [
            e for e in profile.events()
            if "moe_ext" in e.name and e.device_type == torch.autograd.DeviceType.CUDA
        ]  # fmt: skip
        runs.append(sorted(events, key=lambda e: e.time_range.start))
    return [
        [same[0].name, statistics.median(e.time_range.elapsed_us() for e in same) / 1e6]
        for same in zip(*runs, strict=True)
    ]


def stages(shape, layer, x, timer, bandwidth):
    """The stages beside the GEMMs: seconds, and their bytes as a share of the copy bandwidth."""
    T, H, E, K = shape.tokens, shape.hidden, shape.num_experts, shape.top_k
    tokens, size = x.view(T, H), x.element_size()
    with torch.no_grad():
        logits = functional.router_logits(tokens, layer.gate.weight)
        route = functional.topk_route(logits, K)
        plan = functional.capacity_scatter(route.experts, E)
        rows = functional.gather_rows(tokens, plan)
        calls = {
            "router_logits": (
                lambda: functional.router_logits(tokens, layer.gate.weight),
                T * H * size + E * H * size + 4 * T * E,
            ),
            "topk_route": (lambda: functional.topk_route(logits, K), 4 * T * E + 8 * T * K),
            "capacity_scatter": (
                lambda: functional.capacity_scatter(route.experts, E),
                4 * 4 * T * K,
            ),
            "gather_rows": (lambda: functional.gather_rows(tokens, plan), (T + T * K) * H * size),
            "weighted_combine": (
                lambda: functional.weighted_combine(rows, route.weights, plan),
                (T + T * K) * H * size,
            ),
        }
        result = {}
        for stage, (call, size) in calls.items():
            seconds = timer.median(call)
            result[stage] = {"seconds": seconds, "of_copy": size / seconds / bandwidth}
    return result


# ---- what is written ---------------------------------------------------------------------


def package(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(timer):
    device = {"gpu": "none: a dry run"}
    if timer.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
        }
    return {
        **device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "built_for": moe_ext._load.BUILD_INFO["archs"],
        **{
            name: package(name)
            for name in ("transformers", "triton", "liger-kernel", "scattermoe", "sonicmoe")
        },
    }


def line(case):
    """One row a direction of the printed table."""
    text = []
    for direction in ("forward", "forward_backward"):
        if direction not in case:
            continue
        result = case[direction]
        peers = [
            f"{result['against'][peer]:.2f}x" if peer in result["against"] else "not compared"
            for peer in PEERS
        ]
        text.append(
            f"| {case['shape']} | {direction.replace('_', '+')} |"
            f" {result['seconds']['ours'] * 1e3:.3f} ms | {result['teraflops']['ours']:.0f} |"
            f" {result['share_of_bound']:.2f} | {' | '.join(peers)} |"
        )
    if "streamed" in case:
        text.append(
            f"  {case['shape']}: as a graph {case['graph_seconds'] * 1e6:.0f} us, the chosen"
            f" experts' weights at {case['streamed']:.2f} of the copy bandwidth"
        )
    for stage, result in case.get("stages", {}).items():
        text.append(
            f"  {stage}: {result['seconds'] * 1e6:.0f} us, {result['of_copy']:.2f} of the copy"
        )
    text += [f"  {peer} not compared: {why}" for peer, why in case["not_compared"].items()]
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--seconds", type=float, default=480, help="takes no new shape after these")
    parser.add_argument("--out", default=harness.RESULTS / "layer_cuda.json")
    parser.add_argument("--dry-run", action="store_true", help="write no results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, without a GPU")
    arguments = parser.parse_args()
    if not (arguments.dry or torch.cuda.is_available()):
        raise SystemExit("bench_layer_cuda.py: torch sees no GPU")
    shapes = DRY_SHAPES if arguments.dry else {name: SHAPES[name] for name in arguments.shapes}
    timer = DryTimer() if arguments.dry else Timer()

    begin = time.time()
    bandwidth = copy_bandwidth(timer, 1 << (20 if arguments.dry else 30))
    dense = dense_rate(timer, 64 if arguments.dry else 8192)
    about = dict(machine=machine(timer), copy_bandwidth=bandwidth, dense_flops=dense)
    provenance = harness.provenance()  # before results change the checkout
    print(
        f"{about['machine']}\ncopy bandwidth {bandwidth / 1e12:.2f} TB/s, dense {dense / 1e12:.0f} TFLOP/s"
    )
    print(f"| shape | | ours | TFLOP/s | of the bound | {' | '.join(PEERS)} |")
    print("| --- | --- |" + " ---: |" * (3 + len(PEERS)), flush=True)
    left_out = []
    for name, shape in shapes.items():
        for dtype in arguments.dtypes:
            if time.time() - begin > arguments.seconds:
                left_out.append(f"{name} {dtype}")
                continue
            try:
                case = bench_case(
                    name, shape, getattr(torch, dtype), arguments.repeats, timer, bandwidth
                )
            except torch.OutOfMemoryError as error:
                left_out.append(f"{name} {dtype} (out of memory: {str(error):.80})")
                torch.cuda.empty_cache()
                continue
            case.update(provenance)
            print(line(case), flush=True)
            if not arguments.dry_run:
                harness.merge_results(arguments.out, [case], **about)
            torch.cuda.empty_cache()
    if left_out:
        print("not measured: " + ", ".join(left_out))


if __name__ == "__main__":
    main()
