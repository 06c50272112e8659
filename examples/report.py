"""What the runs measured: the record of one run, the table, the verdicts, the JSON file."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import moe_ext
from comparison import RULE, Comparison

ROOT = Path(__file__).parent.parent


@dataclass
class Result:
    """One run. Curves are lists of (step, value); losses are in nats per byte."""

    variant: str
    label: str
    seed: int
    rate: float  # AdamW's, at its peak
    parameters_total: int
    parameters_active: int
    train_loss: list = field(default_factory=list)  # mean since the entry before
    validation_loss: list = field(default_factory=list)
    drop_rate: list = field(default_factory=list)  # share of the assignments, mean of the layers
    entropy: list = field(default_factory=list)  # of the mean routing over log(experts)
    load: list = field(default_factory=list)  # layers x experts: share of the layer's assignments
    tokens_per_second: float = 0.0
    tokens_per_cpu_second: float = 0.0  # bears a machine that others use too
    sample: str = ""

    @property
    def final_loss(self):
        return self.validation_loss[-1][1]

    @property
    def steps(self):
        return self.validation_loss[-1][0]


def table(results):
    rows = [
        (
            "model",
            "seed",
            "rate",
            "val loss",
            "tokens/s",
            "parameters",
            "active",
            "drop first",
            "last",
        )
    ]
    for r in results:
        drops = [f"{r.drop_rate[i][1]:.1%}" for i in (0, -1)] if r.drop_rate else ["-", "-"]
        sizes = [f"{n:,}" for n in (r.tokens_per_second, r.parameters_total, r.parameters_active)]
        sizes[0] = f"{r.tokens_per_second:,.0f}"
        rows.append((r.label, str(r.seed), f"{r.rate:g}", f"{r.final_loss:.4f}", *sizes, *drops))
    return aligned(rows)


def aligned(rows):
    """Rows of text as one table: a heading, a rule, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for label, *numbers in rows:
        cells = [n.rjust(width) for n, width in zip(numbers, widths[1:])]
        lines.append("  ".join([label.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def readable(text):
    """Bytes as text that no terminal takes for a command."""
    text = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def compared(results):
    """[(title, Comparison, sentence)]: the MoE beside the dense model, its parts beside the MoE."""
    runs = {}
    for r in results:
        runs.setdefault(r.variant, {})[r.seed] = r
    rows = []
    for name in runs:
        other = "dense" if name in ("moe", "moe_equal_time") else "moe"
        seeds = sorted(runs[name].keys() & runs.get(other, {}).keys())
        if name != "dense" and seeds:
            rows.append(compare(*([runs[n][seed] for seed in seeds] for n in (name, other))))
    return rows


def compare(ours, theirs):
    we, they = ours[0], theirs[0]
    comparison = Comparison([r.final_loss for r in ours], [r.final_loss for r in theirs])
    # Of CPU seconds, which other users of the machine do not stretch as they do the clock's.
    speeds = [a.tokens_per_cpu_second / b.tokens_per_cpu_second for a, b in zip(ours, theirs)]
    steps = f"{we.steps} steps" + (f" and {they.steps}" if they.steps != we.steps else "")
    sentence = (
        f"{we.label} {comparison.standing} {they.label}: {comparison} after {steps}, at rates"
        f" {we.rate:g} and {they.rate:g}; it trains on {sum(speeds) / len(speeds):.2f} times"
        " the tokens per CPU second."
    )
    return f"{we.label} − {they.label}", comparison, sentence


def verdicts(results):
    """The sentences of `compared`, and the rule behind them."""
    sentences = [sentence for _, _, sentence in compared(results)]
    return [*sentences, RULE] if sentences else []


# ---- learning rates ----------------------------------------------------------


def losses_by_rate(results):
    """{variant: {learning rate: validation loss}}."""
    losses = {}
    for r in results:
        losses.setdefault(r.variant, {})[r.rate] = r.final_loss
    return losses


def best_rates(losses):
    """{variant: the learning rate of its lowest loss}."""
    return {name: min(of_rate, key=of_rate.get) for name, of_rate in losses.items()}


def read_sweep(path):
    """What a results.json of --sweep says of rates and speeds; it goes into those of the runs."""
    if not path.exists():
        raise FileNotFoundError(f"--rates: no such file: {path}")
    content = json.loads(path.read_text())
    results = [Result(**r) for r in content["results"]]
    losses, speeds = losses_by_rate(results), {}
    for r in results:  # what else the machine did only made it slower
        speeds[r.variant] = max(r.tokens_per_cpu_second, speeds.get(r.variant, 0))
    if missing := {"dense", "moe"} - losses.keys():
        raise ValueError(f"--rates: {path} lacks {', '.join(sorted(missing))}")
    return {
        "commit": content["commit"], "settings": content["settings"], "losses": losses,
        "tokens_per_cpu_second": speeds,
    }  # fmt: skip


# ---- results.json ------------------------------------------------------------


def save(path, results, settings, sweep):
    """Provenance, settings, rates, verdicts and every run's curves; one line a run."""
    head = {
        **provenance(), "settings": settings, "sweep": sweep, "verdicts": verdicts(results)
    }  # fmt: skip
    runs = ",\n".join(json.dumps(_rounded(asdict(r)), separators=(",", ":")) for r in results)
    text = json.dumps(head, indent=1)[:-2] + f',\n "results": [\n{runs}\n]}}\n'
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)  # a cut leaves the old file or the new one, never half of one


def load(path, settings):
    """The runs that an interrupted command with the same settings left behind."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise ValueError(f"--resume: {path} has runs with other settings; choose another --out")
    return [Result(**r) for r in content["results"]]


def _rounded(value):
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def provenance():
    """What ran where: enough to judge a number by, and to get it again."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = (
        "+changes" if _git("status", "--porcelain", "--", "../moe_ext", "../csrc", ".") else ""
    )
    arguments = [a for a in sys.argv[1:] if a != "--resume"]  # whole or in parts: the same result
    return {
        "command": " ".join(["python", "examples/train_lm.py", *arguments]),
        "commit": commit + changed,
        "processor": _processor(),
        "threads": 1,  # of a run
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moe_ext": moe_ext.__version__,
    }


def _git(*arguments):
    try:
        done = subprocess.run(
            ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
