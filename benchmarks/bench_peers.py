"""A layer's experts beside other libraries that have them, each in the process it needs.

    make peers                                              # installs them, once
    python benchmarks/bench_peers.py                        # all: 9 minutes on two cores
    python benchmarks/bench_peers.py --shapes fine --tokens 1 16 --dtypes bfloat16 --dry-run
    python benchmarks/bench_peers.py --peers sglang vllm --shapes coarse --dry-run
    python benchmarks/bench_peers.py --shapes --update-docs        # only the tables

The routing is given: a call takes x (T, H), weights and experts (T, K), and returns y (T, H).
Ours is `capacity_scatter` and `moe_forward`, what `moe_ext.MoE` runs after its router; the peers
are in `benchmarks/peers/`, a file each. transformers' three are in bench_layer.py.

All sides have the same weights, tokens, routing and threads. Each has first brought the weights
into its own layout, and the tokens into its own types; that is not timed. Before each call 1 GiB
is read, so that it finds its weights in memory and not in a cache, as in a model whose other
layers ran in between. Sides take turns, round by round; those whose libraries get along share
a process, the others run in one of their own, stopped while it is not their turn. A time is the
median over the rounds, a ratio the median of the rounds' own ratios.

Each side's error, relative to the norm of y in float64, stands beside its time. One over the
tolerance ends the benchmark. A peer that is not installed or cannot run here is left out, and
the results say why.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import harness
import peers
import report_peers
from peers import ours
from peers.processes import Sides


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tokens: tuple


SHAPES = {
    "fine": Shape(2048, 768, 64, 8, (1, 4, 16, 512)),
    "finest": Shape(1024, 384, 128, 8, (1, 4, 16, 512)),
    "coarse": Shape(1024, 3584, 8, 2, (1, 4, 16, 1024)),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def make_weights(shape, dtype):
    """Unit scale: a smaller one would hide differences."""

    def random(*size):
        return torch.randn(size).mul_(size[-1] ** -0.5).to(dtype)

    H, I, E = shape.hidden, shape.intermediate, shape.num_experts
    return {"gate_up_proj": random(E, 2 * I, H), "down_proj": random(E, H, I)}


def make_tokens(shape, tokens, dtype):
    weights, experts = torch.randn(tokens, shape.num_experts).topk(shape.top_k)
    x = torch.randn(tokens, shape.hidden).to(dtype)
    return {"x": x, "weights": weights.softmax(-1), "experts": experts.int()}


def float64_result(gate_up_proj, down_proj, x, weights, experts):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in experts.unique().tolist():
        token, choice = torch.where(experts == expert)
        gate, up = F.linear(x[token].double(), gate_up_proj[expert].double()).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, down_proj[expert].double())
        y.index_add_(0, token, rows * weights[token, choice, None])
    return y


def checked_error(side, y, exact, dtype):
    """Of y, relative to the norm of the exact result."""
    if y.shape != exact.shape:
        raise RuntimeError(f"{side}: y must be {tuple(exact.shape)}, got {tuple(y.shape)}")
    error = ((y.double() - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"{side}: y is {error:.2e} of its norm away from float64's, over {TOLERANCE[dtype]}"
        )
    return error


def bench_weights(name, dtype, arguments):
    """The cases of one layer's weights, a number of tokens each."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    with (
        Sides([ours, *arguments.peers], dtype, arguments.threads) as sides,
        tempfile.TemporaryDirectory() as folder,
    ):
        weights = make_weights(shape, getattr(torch, dtype))  # while the workers start
        torch.save(weights, f"{folder}/weights")
        sides.each("prepare", f"{folder}/weights")
        for tokens in arguments.tokens or shape.tokens:
            inputs = make_tokens(shape, tokens, weights["down_proj"].dtype)
            torch.save(inputs, f"{folder}/tokens")
            sides.each("bind", f"{folder}/tokens", f"{folder}/{{}}.y")
            exact = float64_result(**weights, **inputs)
            errors = {
                side: checked_error(side, torch.load(f"{folder}/{side}.y"), exact, dtype)
                for side in sides.present
            }
            times = harness.interleaved(
                sides.calls("seconds"),
                arguments.repeats,
                measure=lambda call: call(),
                turn=0.0,
                patience=arguments.patience,
                at_least=0.0,
                at_most=arguments.seconds,
            )
            yield {
                "shape": f"{name}_{tokens}",
                "dtype": dtype,
                "tokens": tokens,
                **{field: size for field, size in shape._asdict().items() if field != "tokens"},
                **harness.compared(times),
                "errors": errors,
                "environments": dict(sides.present),
                "left_out": dict(sides.left_out),
            }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="of each shape (default: its own)")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, default=list(peers.NAMES))
    parser.add_argument("--repeats", type=int, default=21, help="rounds (default 21)")
    parser.add_argument("--seconds", type=float, default=6, help="of rounds a case (default 6)")
    parser.add_argument("--patience", type=float, default=4, help="seconds a call (default 4)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, for a first look")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--out", help="results file (default benchmarks/results/peers_ISA.json)")
    parser.add_argument("--dry-run", action="store_true", help="write no results")
    parser.add_argument("--update-docs", action="store_true")
    arguments = parser.parse_args()
    arguments.peers = peers.modules(arguments.peers)
    if arguments.quick:
        arguments.repeats, arguments.seconds = 3, 0.0

    torch.set_num_threads(arguments.threads)
    path = Path(arguments.out or report_peers.path_for(harness.instruction_set()))
    provenance = harness.provenance()  # before results change the checkout
    about = dict(machine=harness.machine(), peers=peers.pins())
    print(report_peers.describe(about), flush=True)
    for name in arguments.shapes:
        for dtype in arguments.dtypes:
            for case in bench_weights(name, dtype, arguments):
                case.update(provenance)
                print(report_peers.lines(case), flush=True)
                if not arguments.dry_run:
                    harness.merge_results(path, [case], **about)
    if arguments.update_docs:
        report_peers.update_docs(path)


if __name__ == "__main__":
    main()
