"""What the runs measured: the record of one run, the table, the verdict, the JSON file."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import moe_ext

LEVEL = 0.005  # nats per byte: a gap below it is within the noise of these runs


@dataclass
class Result:
    """One run. Curves are lists of (step, value); losses are in nats per byte."""

    variant: str
    label: str
    seed: int
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


def table(results):
    rows = [("model", "seed", "val loss", "tokens/s", "parameters", "active", "drop first", "last")]
    for r in results:
        drops = [f"{r.drop_rate[i][1]:.1%}" for i in (0, -1)] if r.drop_rate else ["-", "-"]
        sizes = [f"{n:,}" for n in (r.tokens_per_second, r.parameters_total, r.parameters_active)]
        sizes[0] = f"{r.tokens_per_second:,.0f}"
        rows.append((r.label, str(r.seed), f"{r.final_loss:.4f}", *sizes, *drops))
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


def verdict(results):
    """Which model is ahead, in one honest sentence; None unless both ran."""
    runs = {(r.variant, r.seed): r for r in results}
    seeds = sorted(seed for name, seed in runs if name == "dense" and ("moe", seed) in runs)
    if not seeds:
        return None
    pairs = [(runs["dense", seed], runs["moe", seed]) for seed in seeds]
    gaps = [moe.final_loss - dense.final_loss for dense, moe in pairs]
    # CPU time, not wall time: others may have used the machine during one of the two.
    speeds = [moe.tokens_per_cpu_second / dense.tokens_per_cpu_second for dense, moe in pairs]
    gap, speed = sum(gaps) / len(gaps), sum(speeds) / len(speeds)
    standing = "ahead of" if gap < -LEVEL else "behind" if gap > LEVEL else "level with"
    by_seed = f" (by seed: {', '.join(f'{g:+.4f}' for g in gaps)})" if len(gaps) > 1 else ""
    return (
        f"The MoE is {standing} the dense model: {gap:+.4f} nats per byte{by_seed} after"
        f" {pairs[0][0].validation_loss[-1][0]} steps at equal active parameters, and"
        f" {speed:.2f} times its tokens per CPU second."
    )


# ---- results.json ------------------------------------------------------------


def save(path, results, settings):
    """Provenance, settings and every run's curves; one line a run."""
    head = {**provenance(), "settings": settings, "verdict": verdict(results)}
    runs = ",\n".join(json.dumps(_rounded(asdict(r)), separators=(",", ":")) for r in results)
    text = json.dumps(head, indent=1)[:-2] + f',\n "results": [\n{runs}\n]}}\n'
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)  # a cut leaves the old file or the new one, never half of one


def load(path, settings):
    """The finished runs that an interrupted command with the same settings left behind."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise ValueError(f"--resume: {path} has runs with other settings; choose another --out")
    results = [Result(**r) for r in content["results"]]
    return [r for r in results if r.validation_loss[-1][0] == settings["steps"]]


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
        "threads": torch.get_num_threads(),
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
