"""Trains a small byte-level transformer on real text: dense, and as a Mixture of Experts.

    python examples/train_lm.py                    # dense beside MoE at equal active parameters
    python examples/train_lm.py --data my_texts/   # on your own text
    python examples/train_lm.py --study            # and the runs that show what the parts do
    python examples/train_lm.py --sweep --out runs/sweep       # the rates that the runs take

Every seed's runs see the same batches in the same order, each model at its best learning
rate of a recorded sweep. The results come as a table, as runs/results.json, and as pictures
in runs/. Runs of --study:

"""

import argparse
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import plots
from data import load_corpus
from report import (
    ROOT,
    best_rates,
    load,
    losses_by_rate,
    read_sweep,
    save,
    table,
    verdicts,
)
from training import VARIANTS, start_process, train

DEMO = ["dense", "moe"]
RATES = [2e-3, 4e-3, 8e-3, 16e-3]
SWEEP_SEED = 1000  # rates are chosen on a seed that no comparison sees
SWEEP = ROOT / "benchmarks" / "results" / "study_sweep.json"


def parse(argv=None):
    runs = "\n".join(f"    {name:14}{v.label}: {v.shows}" for name, v in VARIANTS.items())
    p = argparse.ArgumentParser(
        description=__doc__.rstrip() + "\n" + runs,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", metavar="FILE_OR_FOLDER", help="default: Python's standard library")
    p.add_argument("--out", metavar="FOLDER", default="runs", help="for results.json and pictures")
    p.add_argument("--study", action="store_true", help="all runs, not only dense and moe")
    p.add_argument("--sweep", action="store_true", help=f"at each of the rates {RATES}")
    p.add_argument("--runs", metavar="A,B", help="these runs only")
    p.add_argument("--resume", action="store_true", help="keep the runs that --out already has")
    p.add_argument("--seed", type=int, default=0, help="the first one, of weights and batches (0)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds for each run (3)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N",
                   help="runs side by side, a thread each (one a core)")  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--sample-bytes", type=int, default=400, metavar="N", help="0: no sample (400)")
    rates = p.add_mutually_exclusive_group()
    rates.add_argument("--lr", type=float, help="AdamW's peak learning rate, of all runs")
    rates.add_argument("--rates", metavar="RESULTS_JSON", type=Path, default=SWEEP,
                       help="default: a sweep's results, whose best rates the runs take")  # fmt: skip
    sizes = p.add_argument_group("sizes")
    for name, (default, text) in SIZES.items():
        sizes.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    args = p.parse_args(argv)
    check(p, args)
    return args


SIZES = {
    "steps": (1000, "optimizer steps of each run"),
    "batch-size": (16, "sequences a step"),
    "context": (128, "bytes a sequence"),
    "width": (64, "hidden size"),
    "layers": (2, "blocks"),
    "heads": (2, "attention heads"),
    "ffn-width": (256, "of the dense FFN; what a token's experts add up to"),
    "experts": (16, "routed experts a layer"),
    "top-k": (2, "routed experts a token"),
    "validation-windows": (256, "sequences to validate on"),
}


def check(p, args):
    """Says what is wrong with the arguments, as argparse does."""
    for name in ["seeds", "jobs", *SIZES]:
        if (value := getattr(args, name.replace("-", "_"))) < 1:
            p.error(f"--{name} must be positive, got {value}")
    if args.width % (2 * args.heads):
        p.error(f"--width must be a multiple of 2 x --heads, got {args.width} and {args.heads}")
    if args.top_k > args.experts:
        p.error(f"--top-k must be at most --experts, got {args.top_k} of {args.experts}")
    if args.ffn_width % (2 * args.top_k):
        p.error(
            f"--ffn-width must be a multiple of 2 x --top-k, got {args.ffn_width} and {args.top_k}"
        )
    if args.lr is not None and not (0 < args.lr < math.inf):
        p.error(f"--lr must be positive, got {args.lr}")
    if args.sample_bytes < 0:
        p.error(f"--sample-bytes must be 0 or more, got {args.sample_bytes}")
    if args.study and args.runs:
        p.error("--study means all runs: give either it or --runs")
    if args.sweep and args.lr:
        p.error("--sweep has its own rates: give either it or --lr")
    args.runs = list(VARIANTS) if args.study else args.runs.split(",") if args.runs else DEMO
    if unknown := [name for name in args.runs if name not in VARIANTS]:
        p.error(f"--runs: unknown {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    if "moe_equal_time" in args.runs and (args.sweep or args.lr):
        p.error("moe_equal_time goes by the speeds of a sweep, which neither --sweep nor --lr has")


def planned(args, best, speeds):
    """The runs that the arguments ask for: (variant, seed, learning rate, steps)."""
    if args.sweep:
        return [(name, SWEEP_SEED, rate, args.steps) for name in args.runs for rate in RATES]
    steps = dict.fromkeys(args.runs, args.steps)
    if "moe_equal_time" in steps:
        steps["moe_equal_time"] = round(args.steps * min(1, speeds["moe"] / speeds["dense"]))
    seeds = range(args.seed, args.seed + args.seeds)
    # The parts are about the MoE, and take its rate.
    return [(n, seed, best.get(n, best["moe"]), steps[n]) for seed in seeds for n in args.runs]


def train_all(runs, args):
    """Yields the runs' Results as they end, --jobs of them side by side."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    jobs = min(args.jobs, len(runs))
    for place in range(jobs):
        places.put(place)
    with ProcessPoolExecutor(jobs, context, start_process, (context.RLock(), places)) as pool:
        try:
            for ended in as_completed([pool.submit(train, *run, args) for run in runs]):
                yield ended.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    path = out / "results.json"
    try:
        corpus = load_corpus(args.data, args.context)
        settings = {k: getattr(args, k.replace("-", "_")) for k in SIZES}
        settings |= {"data": corpus.description, "data_digest": corpus.digest}
        sweep = None if args.sweep or args.lr else read_sweep(args.rates)
        best = best_rates(sweep["losses"]) if sweep else {"moe": args.lr}
        settings["rates"] = "all of the sweep" if args.sweep else best
        results = load(path, settings) if args.resume else []
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"train_lm.py: {error}")

    done = {(r.variant, r.seed, r.rate, r.steps) for r in results}
    speeds = sweep["tokens_per_cpu_second"] if sweep else {}
    runs = [run for run in planned(args, best, speeds) if run not in done]
    megabytes = args.steps * args.batch_size * args.context / 1e6
    print(f"Text: {corpus.description}. A run: {args.steps} steps over {megabytes:.1f} MB of it.")
    if runs:
        for result in train_all(runs, args):
            results.append(result)
            results.sort(key=lambda r: (list(VARIANTS).index(r.variant), r.seed, r.rate))
            save(path, results, settings, sweep)

    print("\n" + table(results))
    if args.sweep:
        print(f"\nBest rates: {best_rates(losses_by_rate(results))}\n\nwrote {path}")
        return
    for sentence in verdicts(results):
        print("\n" + sentence)
    for r in results:
        if r.variant in DEMO and r.seed == args.seed and args.sample_bytes:
            print(f"\n---- what the {r.label} model writes " + "-" * 40 + f"\n{r.sample}")
    print()
    for file in [path, *plots.draw(results, out)]:
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
