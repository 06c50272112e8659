"""Puts finished runs of train_lm.py into benchmarks/results/ and docs/training_study.md.

python examples/train_lm.py --sweep --out runs/sweep
python examples/publish_study.py sweep=runs/sweep      # from now on the runs take its rates
python examples/train_lm.py --out runs/demo
python examples/train_lm.py --study --out runs/parts
python examples/publish_study.py dense_vs_moe=runs/demo parts=runs/parts sweep=runs/sweep
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from comparison import RULE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "training_study.md"
BEGIN, END = "<!-- study: written by examples/publish_study.py -->", "<!-- /study -->"
PICTURES = {
    "loss": "Losses and their differences",
    "load": "Expert load over steps",
    "routing": "Drops and entropy over steps",
}
COLUMNS = (
    "run | rate | validation loss | parameters | active | tokens per CPU second |"
    " dropped, first to last | entropy at the end | busiest expert"
)


def main(arguments):
    studies = dict(argument.split("=", 1) for argument in arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, folder in studies.items():
        content = json.loads((Path(folder) / "results.json").read_text())
        if not in_history(content["commit"]):
            sys.exit(f"publish_study.py: {folder}: no commit of this history: {content['commit']}")
        shutil.copy(Path(folder) / "results.json", RESULTS / f"study_{name}.json")
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, RESULTS / f"study_{name}_{picture.name}")
        sections.append(section(name, content))
    before, rest = PAGE.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + "\n\n".join([BEGIN, RULE, *sections, END]) + after)


def in_history(commit):
    """Whether others can get the sources that ran: not of "+changes", nor of a branch left behind."""
    command = ("git", "merge-base", "--is-ancestor", commit, "HEAD")
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def section(name, content):
    """One study in Markdown: what ran, what came out, the table, the pictures."""
    s = content["settings"]
    runs = {}
    for r in content["results"]:
        runs.setdefault(r["variant"], []).append(r)
    megabytes = s["steps"] * s["batch-size"] * s["context"] / 1e6
    lines = [
        f"`{content['command']}` at {content['commit']}: {s['layers']} layers, width {s['width']},"
        f" dense FFN {s['ffn-width']}; MoE: {s['experts']} experts, top {s['top-k']};"
        f" {s['steps']} steps over {megabytes:.1f} MB of {s['data']}."
    ]
    if s["rates"] == "all of the sweep":
        return "\n\n".join([*lines, sweep_table(content["results"])])
    lines.append("\n".join(f"- {verdict}" for verdict in content["verdicts"] if verdict != RULE))
    rule = " | ".join("---" if i == 0 else "---:" for i in range(COLUMNS.count("|") + 1))
    lines.append("\n".join([f"| {COLUMNS} |", f"| {rule} |", *map(row, runs.values())]))
    for what, title in PICTURES.items():
        lines.append(f"![{title}](../benchmarks/results/study_{name}_{what}.png)")
    return "\n\n".join(lines)


def sweep_table(results):
    """One row a model, one column a learning rate; the lowest loss is bold."""
    rates = sorted({r["rate"] for r in results})
    rows = [f"| validation loss at rate | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    rows.append("| --- |" + " ---: |" * len(rates))
    for label in dict.fromkeys(r["label"] for r in results):
        losses = {r["rate"]: r["validation_loss"][-1][1] for r in results if r["label"] == label}
        low = min(losses.values())
        cells = [f"**{x:.4f}**" if x == low else f"{x:.4f}" for x in map(losses.get, rates)]
        rows.append(f"| {label}, seed {results[0]['seed']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def row(runs):
    first = runs[0]
    losses = [r["validation_loss"][-1][1] for r in runs]
    loss = f"{sum(losses) / len(losses):.4f}"
    if len(losses) > 1:
        loss += f" ({', '.join(f'{x:.4f}' for x in losses)})"
    speed = sum(r["tokens_per_cpu_second"] for r in runs) / len(runs)
    routed = ["–"] * 3
    if first["load"]:
        mean = {
            (curve, i): sum(r[curve][i][1] for r in runs) / len(runs)
            for curve in ("drop_rate", "entropy")
            for i in (0, -1)
        }
        busiest = max(max(shares) * len(shares) for r in runs for shares in r["load"][-1][1])
        routed = [
            f"{mean['drop_rate', 0]:.1%} to {mean['drop_rate', -1]:.1%}",
            f"{mean['entropy', -1]:.3f}",
            f"{busiest:.1f} × its fair share",
        ]
    cells = [
        first["label"], f"{first['rate']:g}", loss, f"{first['parameters_total']:,}",
        f"{first['parameters_active']:,}", f"{speed:,.0f}", *routed,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
