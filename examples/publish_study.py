"""Puts finished runs of train_lm.py into benchmarks/results/ and the README's study section.

python examples/train_lm.py --steps 1200 --seeds 2 --out runs/study
python examples/train_lm.py --steps 600 --study --out runs/parts
python examples/publish_study.py dense_vs_moe=runs/study parts=runs/parts
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- study: written by examples/publish_study.py -->", "<!-- /study -->"
COLUMNS = (
    "run | validation loss | parameters | active | tokens per CPU second | dropped, first to last |"
    " entropy at the end | busiest expert"
)


def main(arguments):
    studies = dict(argument.split("=", 1) for argument in arguments)
    sections = []
    for name, folder in studies.items():
        content = json.loads((Path(folder) / "results.json").read_text())
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "results.json", RESULTS / f"study_{name}.json")
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, RESULTS / f"study_{name}_{picture.name}")
        sections.append(section(name, content))
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(before + "\n\n".join([BEGIN, *sections, END]) + after)


def section(name, content):
    """One study in Markdown: what ran, what came out, the table, the pictures."""
    s = content["settings"]
    runs = {}
    for r in content["results"]:
        runs.setdefault(r["variant"], []).append(r)
    megabytes = s["steps"] * s["batch-size"] * s["context"] / 1e6
    widths = f"width {s['width']}, dense FFN {s['ffn-width']}"
    experts = f"{s['experts']} experts, top {s['top-k']}, shared expert {s['shared-width']}"
    lines = [
        f"`{content['command']}`: {s['layers']} layers, {widths}; MoE: {experts};"
        f" {s['steps']} steps over {megabytes:.1f} MB of {s['data']}.",
    ]
    if content["verdict"]:
        # Wall-clock speeds say little on a shared machine; the table has CPU time.
        lines.append(f"**{content['verdict'].split(', and ')[0]}.**")
    rule = " | ".join("---" if i == 0 else "---:" for i in range(COLUMNS.count("|") + 1))
    lines.append("\n".join([f"| {COLUMNS} |", f"| {rule} |", *map(row, runs.values())]))
    lines.append(f"![Loss curves](benchmarks/results/study_{name}_loss.png)")
    if any(r["load"] for r in content["results"]):
        lines.append(f"![Expert load over steps](benchmarks/results/study_{name}_load.png)")
    return "\n\n".join(lines)


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
        first["label"], loss, f"{first['parameters_total']:,}", f"{first['parameters_active']:,}",
        f"{speed:,.0f}", *routed,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
