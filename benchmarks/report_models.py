"""The published models' results as text, and as tables and a chart of the documentation."""

import json
import statistics

import harness
from reporting import (
    PAGE,
    README,
    instruction_set,
    load_pyplot,
    machine_and_versions,
    markdown,
    megabytes,
    milliseconds,
    put_between,
    save_bars,
    update,
    when_and_at,
)

TASKS = {
    "prefill": "prefill",
    "decode_1": "decode 1",
    "decode_16": "decode 16",
    "train": "training",
}
LORA = {"lora": "LoRA"}


def describe(about):
    return machine_and_versions(about["machine"])


def sizes(case):
    experts = f"{case['experts']}"
    if case["experts"] != case["experts_of_model"]:
        experts += f" of {case['experts_of_model']}"
    return f"{case['hidden']} × {case['intermediate']}, {experts} experts, top {case['top_k']}"


def best(result):
    """(the fastest peer, its time over ours in words)

    Where all were stopped: the one that keeps the least, and why it was."""
    if result["against"]:
        peer = min(result["against"], key=result["against"].get)
        return peer, f"{result['against'][peer]:.2f}x {peer}"
    saved = result["saved_bytes"]
    peer = min(saved.keys() - {"moe_ext"}, key=saved.get)
    return peer, f"{peer} {result['left_out'][peer]}"


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
    """The page's Markdown, a row a model and dtype."""

    def cell(result):
        return f"{milliseconds(result['seconds']['moe_ext'])}, {best(result)[1]}"

    def kept(result):
        peer, saved = best(result)[0], result["saved_bytes"]
        return f"{megabytes(saved['moe_ext'])} ({megabytes(saved[peer])})"

    rows, lora_rows = [], []
    for case in results["cases"]:
        tasks = case["tasks"]
        block = f"{case['checkpoint'].split('/')[1]}: {sizes(case)}"
        start = [block, case["dtype"], str(case["tokens"])]
        rows.append([*start, *(cell(tasks[task]) for task in TASKS), kept(tasks["train"])])
        if "lora" in tasks:
            lora_rows.append([*start, cell(tasks["lora"]), kept(tasks["lora"])])
    start = ["block", "dtype", "tokens"]
    return "\n".join(
        [
            *markdown([*start, *TASKS.values(), "kept for backward (peer)"], rows),
            "",
            *markdown([*start, "LoRA training", "kept for backward (PEFT)"], lora_rows),
            "",
            f"{describe(results)}. {when_and_at(results['cases'])}",
        ]
    )


def chart(results, path):
    """Bars: every peer's speed as a share of ours, a panel a task."""
    pyplot = load_pyplot()
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
    save_bars(figure, axes, [f"{case['shape']} {case['dtype']}" for case in cases], path)


def summary(files):
    """README's table: a row a processor and dtype, over the blocks of its results."""

    def speed(results):
        times = [min(result["against"].values()) for result in results if result["against"]]
        if not times:
            return f"peers {best(results[0])[1].partition(' ')[2]}"
        mean = statistics.geometric_mean(times)
        return f"{mean:.2f}x ({min(times):.2f} to {max(times):.2f})"

    def kept(results):
        shares = []
        for result in results:
            saved = result["saved_bytes"]
            shares.append(saved["moe_ext"] / saved[best(result)[0]])
        return f"{statistics.geometric_mean(shares):.0%}"

    rows = []
    for results in files:
        machine = results["machine"]
        processor = f"{machine['cpu'].partition('(')[0]}, {instruction_set(machine)}"
        for dtype in dict.fromkeys(case["dtype"] for case in results["cases"]):
            tasks = [case["tasks"] for case in results["cases"] if case["dtype"] == dtype]
            speeds = [speed([of_block[task] for of_block in tasks]) for task in TASKS]
            share = kept([of_block["train"] for of_block in tasks])
            rows.append([processor, f"{dtype}, {len(tasks)} blocks", *speeds, share])
    return "\n".join(markdown(["processor", "dtype", *TASKS.values(), "kept for backward"], rows))


def update_docs(results_path, page=PAGE):
    update(results_path, page, "Peers' speed, ours is 1", table, chart)


def update_readme(readme=README):
    files = sorted(harness.RESULTS.glob("models_cpu*.json"))
    put_between(readme, "models", summary([json.loads(path.read_text()) for path in files]))
