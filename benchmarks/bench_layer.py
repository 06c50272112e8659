"""moe_ext.MoE beside transformers' block and beside the bound, in one run.

    python benchmarks/bench_layer.py                    # all shapes, both dtypes
    python benchmarks/bench_layer.py --shapes coarse decode_fine_1 --dtypes float32
    python benchmarks/bench_layer.py --update-docs      # also the table and the chart

ours   moe_ext.MoE, dropless, without losses: what the peers compute
peers  transformers' MixtralSparseMoeBlock over the same parameters, its experts
       `eager`, `grouped_mm`, and for at most 16 tokens `batched_mm`
bound  a dense SwiGLU of the same FLOPs through F.linear: T*K rows through one
       expert; for training plus one fresh write of every expert's gradient

Contestants are timed in turn, round by round (calls below 20 ms several in a row); a
number is the median over the rounds, a share or ratio the median of the rounds' own
ratios. Forward is inference (no_grad); forward+backward takes the gradient of x and of
all parameters, which are set to None between the calls. The tokens are such that every
side chooses the same experts, and outputs are compared before anything is timed.

On a GPU bench_layer_cuda.py stands in its place: other shapes, other clocks.

Decoding is timed with the weights out of the caches, and counted in bytes of
weights of the chosen experts a second, as a share of the machine's read bandwidth,
which is measured in every round.
"""

import argparse
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F

import harness
import report_layer
from sides import (
    TOLERANCE,
    check_agreement,
    clear_tokens,
    inference,
    our_layer,
    peer_block,
    training,
)


class Shape(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    kind: str  # train: forward and forward+backward; decode: forward with cold caches


SHAPES = {
    "coarse": Shape(1024, 1024, 3584, 8, 2, "train"),
    "fine": Shape(1024, 1024, 512, 64, 8, "train"),
    "finest": Shape(512, 1024, 384, 128, 8, "train"),
    "decode_coarse_1": Shape(1, 1024, 3584, 8, 2, "decode"),
    "decode_coarse_16": Shape(16, 1024, 3584, 8, 2, "decode"),
    "decode_finest_1": Shape(1, 1024, 384, 128, 8, "decode"),
    "decode_finest_16": Shape(16, 1024, 384, 128, 8, "decode"),
    "overhead": Shape(16, 64, 128, 8, 2, "train"),
}


class Dense(torch.nn.Module):
    """The bound: T*K rows through one expert."""

    def __init__(self, shape, dtype):
        super().__init__()
        kwargs = dict(bias=False, dtype=dtype)
        self.gate_up_proj = torch.nn.Linear(shape.hidden, 2 * shape.intermediate, **kwargs)
        self.down_proj = torch.nn.Linear(shape.intermediate, shape.hidden, **kwargs)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def bench_case(name, shape, dtype, repeats, read):
    """One case of the results file: every side's times, and what they mean."""
    torch.manual_seed(0)
    layer = our_layer(shape, dtype, "cpu")
    x = clear_tokens(layer, shape, dtype, "cpu")
    implementations = ["eager", "grouped_mm"] + ["batched_mm"] * (shape.tokens <= 16)
    sides = {"ours": layer}
    for implementation in implementations:
        sides[implementation] = peer_block(implementation, shape, layer)
        with torch.no_grad():
            check_agreement(implementation, layer.eval(), sides[implementation].eval(), x)
    dense = Dense(shape, dtype)
    rows = x[0].repeat_interleave(shape.top_k, 0)
    with torch.no_grad():
        counts = layer(x, return_routing=True)[1].plan.expert_counts
    case = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        **{f: v for f, v in shape._asdict().items() if f != "kind"},
        "kind": shape.kind,
        "repeats": repeats,
        "max_load": counts.max().item() / counts.double().mean().item(),
    }

    calls = {side: inference(module.eval(), x) for side, module in sides.items()}
    calls["bound"] = inference(dense, rows)
    if shape.kind == "decode":
        calls["read"] = read
        times = harness.interleaved(calls, repeats, prepare=read, turn=0.0)
        reads = times.pop("read")
        case["forward"] = summary(times)
        active = int((counts > 0).sum())
        expert = sum(p[0].numel() for p in layer.experts.parameters())
        weights = (active * expert + layer.gate.weight.numel()) * x.element_size()
        case["weights_bytes"] = weights
        case["streamed"] = {
            side: harness.ratio(reads, seconds) * weights / read.bytes
            for side, seconds in times.items()
            if side != "bound"
        }
        return case

    case["forward"] = summary(harness.interleaved(calls, repeats))
    grad = torch.randn_like(x)
    pairs = {side: training(module.train(), x, grad) for side, module in sides.items()}
    pairs["bound"] = training(dense, rows, torch.randn_like(rows))
    calls = {side: call for side, (call, _) in pairs.items()}
    # What training cannot avoid: fresh memory for the experts' gradients, written once.
    written = []
    calls["write"] = lambda: written.extend(
        torch.empty_like(p).fill_(1.0) for p in layer.experts.parameters()
    )

    def reset():
        written.clear()
        for _, clear in pairs.values():
            clear()

    times = harness.interleaved(calls, repeats, prepare=reset)
    reset()
    case["write_seconds"] = statistics.median(times["write"])
    times["bound"] = [b + w for b, w in zip(times["bound"], times.pop("write"))]
    case["forward_backward"] = summary(times)
    x = x.detach().requires_grad_()
    case["saved_bytes"] = {
        side: harness.saved_bytes(lambda module=module: module(x), module.parameters())
        for side, module in sides.items()
    }
    return case


def summary(times):
    """Medians in seconds, ours as a share of the bound and against each peer."""
    result = harness.compared(times)
    share = result["against"].pop("bound")
    best = min(result["against"], key=result["seconds"].get)
    return {
        "seconds": result["seconds"],
        "fastest_seconds": result["fastest_seconds"],
        "share_of_bound": share,
        "best_peer": best,
        "against_best_peer": result["against"][best],
        "against": result["against"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, for a first look")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--out", help="results file (default benchmarks/results/layer_cpu.json)")
    parser.add_argument("--dry-run", action="store_true", help="write no results")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.out or harness.RESULTS / "layer_cpu.json"
    read = harness.MemoryRead()
    about = dict(
        machine=harness.machine(),
        read_bandwidth=read.bandwidth(),
        import_seconds=harness.import_seconds(),
    )
    provenance = harness.provenance()  # before results change the checkout
    print(report_layer.describe(about), flush=True)
    for name in arguments.shapes:
        for dtype in arguments.dtypes:
            case = bench_case(
                name,
                SHAPES[name],
                getattr(torch, dtype),
                3 if arguments.quick else arguments.repeats,
                read,
            )
            case.update(provenance)
            print(report_layer.lines(case), flush=True)
            if not arguments.dry_run:
                harness.merge_results(path, [case], **about)
    if arguments.update_docs:
        report_layer.update_docs(path)


if __name__ == "__main__":
    main()
