"""The published models' results as text, as README's table and as its chart."""

import json
from pathlib import Path

from report_layer import megabytes, milliseconds, write_between

TASKS = {
    "prefill": "prefill",
    "decode_1": "decode 1",
    "decode_16": "decode 16",
    "train": "training",
}
LORA = {"lora": "LoRA"}


def describe(about):
    machine = about["machine"]
    where = f"{machine['gpu']}, CUDA {machine['cuda']}; " if "gpu" in machine else ""
    return (
        f"{where}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" {machine['capability']}; torch {machine['torch']},"
        f" transformers {machine['transformers']}, Python {machine['python']}"
    )


def sizes(case):
    experts = f"{case['experts']}"
    if case["experts"] != case["experts_of_model"]:
        experts += f" of {case['experts_of_model']}"
    return f"{case['hidden']} × {case['intermediate']}, {experts} experts, top {case['top_k']}"


def best(result):
    """(the fastest peer, its time over ours)"""
    peer = min(result["against"], key=result["against"].get)
    return peer, result["against"][peer]


def lines(case):
    """A case as it is printed while the benchmark runs."""
    text = [f"{case['checkpoint']} {case['dtype']}: {sizes(case)}, {case['tokens']} tokens"]
    for task, result in case["tasks"].items():
        sides = [milliseconds(result["seconds"]["moe_ext"])]
        sides += [f"{side} {times:.2f}x" for side, times in result["against"].items()]
        sides += [f"{side} {why}" for side, why in result["left_out"].items()]
        text.append(f"  {(TASKS | LORA)[task]:<9} {', '.join(sides)}  ({result['rounds']} rounds)")
        if "saved_bytes" in result:
            saved = result["saved_bytes"].items()
            sides = ", ".join(f"{side} {megabytes(size)}" for side, size in saved)
            text.append(f"  {'':<9} kept for backward: {sides}")
    return "\n".join(text)


def table(results):
    """README's markdown, a row a model and dtype."""

    def cell(result):
        peer, times = best(result)
        return f"{milliseconds(result['seconds']['moe_ext'])}, {times:.2f}x {peer}"

    def kept(result):
        peer, saved = best(result)[0], result["saved_bytes"]
        return f"{megabytes(saved['moe_ext'])} ({megabytes(saved[peer])})"

    def markdown(header, rows):
        return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]

    rows, lora_rows = [], []
    for case in results["cases"]:
        tasks = case["tasks"]
        block = f"{case['checkpoint'].split('/')[1]}: {sizes(case)}"
        start = [block, case["dtype"], str(case["tokens"])]
        rows.append([*start, *(cell(tasks[task]) for task in TASKS), kept(tasks["train"])])
        if "lora" in tasks:
            lora_rows.append([*start, cell(tasks["lora"]), kept(tasks["lora"])])
    dates = sorted({case["date"].split()[0] for case in results["cases"]})
    commits = sorted({case["commit"] for case in results["cases"]})
    note = (
        f"{describe(results)}. Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        f" at {', '.join(commits)}."
    )
    start = ["block", "dtype", "tokens"]
    return "\n".join(
        [
            *markdown([*start, *TASKS.values(), "kept for backward (peer)"], rows),
            "",
            *markdown([*start, "LoRA training", "kept for backward (PEFT)"], lora_rows),
            "",
            note,
        ]
    )


def chart(results, path):
    """Bars: every peer's speed as a share of ours, a panel a task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "moe_ext", "font.size": 8})
    from matplotlib import pyplot

    cases = results["cases"]
    colors = {"grouped_mm": "#8b949e", "batched_mm": "#afb8c1", "eager": "#d0d7de"}
    figure, axes = pyplot.subplots(
        1, len(TASKS), figsize=(10, 0.45 * len(cases) + 1), sharey=True, sharex=True
    )
    for axis, (task, title) in zip(axes, TASKS.items()):
        for row, case in enumerate(cases):
            for place, (peer, color) in enumerate(colors.items()):
                times = case["tasks"][task]["against"].get(peer)
                share = 0.0 if times is None else 1 / times
                axis.barh(row + (place - 1) * 0.27, share, 0.24, color=color, label=peer)
        axis.axvline(1.0, color="#1f6feb", linewidth=1.5)
        axis.set_title(title)
        axis.set_xlabel("speed, ours is 1")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [f"{case['shape']} {case['dtype']}" for case in cases])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique, loc="lower center", ncols=len(unique), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def update_readme(results_path, readme):
    """Writes the chart's link and the table between README's markers of the models."""
    results_path, readme = Path(results_path), Path(readme)
    results = json.loads(results_path.read_text())
    picture = results_path.with_suffix(".svg")
    chart(results, picture)
    link = picture.relative_to(readme.parent).as_posix()
    write_between(readme, "models", f"![Peers' speed, ours is 1]({link})\n\n{table(results)}")
