"""The published models' results as text, as README's table and as its chart."""

from readme import (
    load_pyplot,
    machine_and_versions,
    markdown,
    megabytes,
    milliseconds,
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
    """README's markdown, a row a model and dtype."""

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


def update_readme(results_path, readme):
    update(results_path, readme, "Peers' speed, ours is 1", table, chart)
