"""Trains a small byte-level transformer on real text: dense, and as a Mixture of Experts.

    python examples/train_lm.py                    # dense beside MoE at equal active parameters
    python examples/train_lm.py --data my_texts/   # on your own text
    python examples/train_lm.py --study            # and the runs that show why the parts exist

Every run sees the same batches in the same order. The results come as a table,
as runs/results.json, and as pictures in runs/. Runs of --study:

"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import moe_ext
import plots
from data import load_corpus
from model import SwiGLU, Transformer
from report import Result, load, readable, save, table, verdict


@dataclass
class Variant:
    """One way to build the feed-forward; `moe` (arguments of MoE) is None for the dense one."""

    label: str
    shows: str
    moe: dict | None = None


# Drops in token order are causal: no later token can displace an earlier one.
MOE = dict(capacity_factor=1.25, aux_loss_coef=0.01, drop_policy="token")
DROPLESS = MOE | dict(capacity_factor=None)
LOSS_FREE = dict(score_function="sigmoid", bias_update_rate=0.002, aux_loss_coef=0.0)
VARIANTS = {
    "dense": Variant("dense", "the model to beat"),
    "moe": Variant("MoE", "balance loss 0.01, capacity factor 1.25", MOE),
    "unbalanced": Variant(
        "no balance loss", "some experts take most tokens", DROPLESS | dict(aux_loss_coef=0.0)
    ),
    "loss_free": Variant(
        "loss-free balancing", "a bias on the choice balances instead", DROPLESS | LOSS_FREE
    ),
    "capacity_1": Variant("capacity 1.0", "no slack: more drops", MOE | dict(capacity_factor=1.0)),
    "capacity_2": Variant("capacity 2.0", "ample: few drops", MOE | dict(capacity_factor=2.0)),
    "dropless": Variant("dropless", "no limit, no drops", DROPLESS),
}
DEMO = ["dense", "moe"]


def build_model(variant, args):
    def make_ffn():
        if variant.moe is None:
            return SwiGLU(args.width, args.ffn_width)
        # The shared expert and top_k routed ones are together as wide as the dense FFN.
        return moe_ext.MoE(
            args.width,
            (args.ffn_width - args.shared_width) // args.top_k,
            num_experts=args.experts,
            top_k=args.top_k,
            shared_expert_intermediate_size=args.shared_width,
            **variant.moe,
        )

    return Transformer(args.width, args.layers, args.heads, args.context, make_ffn)


def train(name, seed, corpus, args, keep):
    """One run: the model and its Result. The seed fixes weights, batches and losses.

    `keep(result)` is called after every validation, so that a cut loses little.
    """
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    model = build_model(variant, args)
    result = Result(name, variant.label, seed, *model.parameters_total_and_active())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    warmup = max(1, min(100, args.steps // 8))
    batches = torch.Generator().manual_seed(seed)
    record_every, validate_every = max(1, args.steps // 100), max(1, args.steps // 10)
    seconds, cpu_seconds, losses = 0.0, 0.0, []

    bar = tqdm(
        total=args.steps, desc=f"{variant.label}, seed {seed}", unit="step", disable=args.quiet
    )
    for step in range(1, args.steps + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:  # a linear warm-up, then linearly down to 5 %
            decay = 1 - 0.95 * (step - 1) / args.steps
            group["lr"] = args.lr * min(1.0, step / warmup) * decay
        inputs, targets = corpus.batch(args.batch_size, args.context, batches)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # here the layers add the gradient of their balance losses
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        moe_ext.update_router_biases(model)  # of the layers that balance without a loss
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started

        if not math.isfinite(losses[-1]):
            raise RuntimeError(
                f"{variant.label}: the loss is {losses[-1]} at step {step}; lower --lr"
            )
        if step % record_every == 0 or step == args.steps:
            result.train_loss.append((step, sum(losses) / len(losses)))
            losses.clear()
            record_routing(model, step, result)
        if step % validate_every == 0 or step == args.steps:
            result.validation_loss.append((step, validation_loss(model, corpus, args)))
        tokens = step * args.batch_size * args.context
        result.tokens_per_second = tokens / seconds
        result.tokens_per_cpu_second = tokens / cpu_seconds
        if result.validation_loss and result.validation_loss[-1][0] == step:
            keep(result)
        bar.set_postfix_str(describe(result), refresh=False)
        bar.update()
    bar.close()
    return model, result


def record_routing(model, step, result):
    """What the layers' routers did since the last reading."""
    stats = [layer.stats(reset=True) for layer in model.moe_layers()]
    if stats:
        result.drop_rate.append((step, sum(s["drop_rate"] for s in stats) / len(stats)))
        result.entropy.append((step, sum(s["entropy"] for s in stats) / len(stats)))
        result.load.append((step, [(s["load"] / s["load"].sum()).tolist() for s in stats]))


@torch.no_grad()
def validation_loss(model, corpus, args):
    model.eval()  # an MoE layer drops nothing in eval mode
    total = count = 0
    batches = corpus.validation_batches(args.validation_windows, args.batch_size, args.context)
    for inputs, targets in batches:
        logits = model(inputs)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    model.train()
    for layer in model.moe_layers():
        layer.stats(reset=True)  # the curves are about training
    return total / count


def describe(result):
    """The progress bar's right end."""
    parts = [f"{result.tokens_per_second:,.0f} tokens/s"]
    if result.train_loss:
        parts.insert(0, f"loss {result.train_loss[-1][1]:.3f}")
    if result.load:
        parts.append(f"drop {result.drop_rate[-1][1]:.1%}, entropy {result.entropy[-1][1]:.3f}")
    return ", ".join(parts)


def parse(argv=None):
    runs = "\n".join(f"    {name:12}{v.label}: {v.shows}" for name, v in VARIANTS.items())
    p = argparse.ArgumentParser(
        description=__doc__.rstrip() + "\n" + runs,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", metavar="FILE_OR_FOLDER", help="default: Python's standard library")
    p.add_argument("--out", metavar="FOLDER", default="runs", help="for results.json and pictures")
    p.add_argument("--study", action="store_true", help="all runs, not only dense and moe")
    p.add_argument("--runs", metavar="A,B", help="these runs only")
    p.add_argument("--resume", action="store_true", help="keep the runs that --out already has")
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds for each run (1)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--sample-bytes", type=int, default=400, metavar="N", help="0: no sample (400)")
    sizes = p.add_argument_group("sizes")
    for name, (default, text) in SIZES.items():
        sizes.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    sizes.add_argument("--lr", type=float, default=4e-3, help="AdamW's peak learning rate (4e-3)")
    args = p.parse_args(argv)
    check(p, args)
    return args


SIZES = {
    "steps": (600, "optimizer steps of each run"),
    "batch-size": (16, "sequences a step"),
    "context": (256, "bytes a sequence"),
    "width": (96, "hidden size"),
    "layers": (2, "blocks"),
    "heads": (3, "attention heads"),
    "ffn-width": (256, "of the dense FFN; what a token's experts add up to"),
    "shared-width": (128, "of the shared expert, which takes every token"),
    "experts": (16, "routed experts a layer"),
    "top-k": (2, "routed experts a token"),
    "validation-windows": (256, "sequences to validate on"),
}


def check(p, args):
    """Says what is wrong with the arguments, as argparse does."""
    for name in ["seeds", *SIZES]:
        value = getattr(args, name.replace("-", "_"))
        if value < (0 if name == "shared-width" else 1):
            p.error(f"--{name} must be positive, got {value}")
    if args.width % (2 * args.heads):
        p.error(f"--width must be a multiple of 2 x --heads, got {args.width} and {args.heads}")
    if args.top_k > args.experts:
        p.error(f"--top-k must be at most --experts, got {args.top_k} of {args.experts}")
    routed = args.ffn_width - args.shared_width
    if routed < 1 or routed % args.top_k:
        p.error(
            "--ffn-width minus --shared-width must be a positive multiple of --top-k, got"
            f" {args.ffn_width} - {args.shared_width} and {args.top_k}"
        )
    if not (0 < args.lr < math.inf):
        p.error(f"--lr must be positive, got {args.lr}")
    if args.sample_bytes < 0:
        p.error(f"--sample-bytes must be 0 or more, got {args.sample_bytes}")
    if args.study and args.runs:
        p.error("--study means all runs: give either it or --runs")
    args.runs = list(VARIANTS) if args.study else args.runs.split(",") if args.runs else DEMO
    if unknown := [name for name in args.runs if name not in VARIANTS]:
        p.error(f"--runs: unknown {', '.join(unknown)}; known: {', '.join(VARIANTS)}")


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    path = out / "results.json"
    try:
        corpus = load_corpus(args.data, args.context)
        settings = {k: getattr(args, k.replace("-", "_")) for k in [*SIZES, "lr"]}
        settings |= {"data": corpus.description, "data_digest": corpus.digest}
        results = load(path, settings) if args.resume else []
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"train_lm.py: {error}")

    done = {(r.variant, r.seed) for r in results}
    megabytes = args.steps * args.batch_size * args.context / 1e6
    print(f"Text: {corpus.description}. A run: {args.steps} steps over {megabytes:.1f} MB of it.")
    for seed in range(args.seed, args.seed + args.seeds):
        for name in args.runs:
            if (name, seed) in done:
                continue
            model, result = train(
                name, seed, corpus, args, lambda r: save(path, [*results, r], settings)
            )
            sample = model.generate(b"def ", args.sample_bytes)
            result.sample = readable(sample)
            results.append(result)
            results.sort(key=lambda r: (list(VARIANTS).index(r.variant), r.seed))
            save(path, results, settings)

    print("\n" + table(results))
    if verdict(results):
        print("\n" + verdict(results))
    for r in results:
        if r.variant in ("dense", "moe") and r.seed == args.seed and args.sample_bytes:
            print(f"\n---- what the {r.label} model writes " + "-" * 40 + f"\n{r.sample}")
    print()
    for file in [path, *plots.draw(results, out)]:
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
