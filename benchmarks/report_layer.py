"""A layer benchmark's results as text, as README's table and as its chart."""

import json
import re
from pathlib import Path


def milliseconds(seconds):
    return f"{seconds * 1e3:.3g} ms" if seconds < 100e-3 else f"{seconds * 1e3:.0f} ms"


def megabytes(size):
    return f"{size / 1e6:.3g} MB" if size < 999.5e6 else f"{size / 1e9:.3g} GB"


def describe(about):
    machine = about["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" {machine['capability']}; torch {machine['torch']},"
        f" transformers {machine['transformers']}, Python {machine['python']};"
        f" read bandwidth {about['read_bandwidth'] / 1e9:.1f} GB/s;"
        f" import moe_ext {about['import_seconds']:.2f} s beyond torch"
    )


def sizes(case):
    return ", ".join(
        str(case[name]) for name in ("tokens", "hidden", "intermediate", "num_experts", "top_k")
    )


def lines(case):
    """A case as it is printed while the benchmark runs."""
    text = [f"{case['shape']} ({sizes(case)}) {case['dtype']}"]
    for direction in ("forward", "forward_backward"):
        if direction not in case:
            continue
        result = case[direction]
        times = ", ".join(f"{side} {milliseconds(s)}" for side, s in result["seconds"].items())
        text.append(
            f"  {direction:<17} {result['share_of_bound']:.2f} of the bound,"
            f" {result['against_best_peer']:.2f}x {result['best_peer']}  ({times})"
        )
    if "streamed" in case:
        streamed = ", ".join(f"{side} {share:.2f}" for side, share in case["streamed"].items())
        text.append(f"  share of the read bandwidth: {streamed}")
    if "saved_bytes" in case:
        saved = ", ".join(f"{side} {megabytes(b)}" for side, b in case["saved_bytes"].items())
        text.append(f"  kept for backward: {saved}")
    return "\n".join(text)


def table(results):
    """README's markdown: training shapes, then decoding."""

    def cells(result):
        peer = f"{result['against_best_peer']:.2f}x ({result['best_peer']})"
        return [milliseconds(result["seconds"]["ours"]), f"{result['share_of_bound']:.2f}", peer]

    def markdown(header, rows):
        return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]

    train, decode = [], []
    for case in results["cases"]:
        start = [sizes(case), case["dtype"]]
        if case["kind"] == "decode":
            result = case["forward"]
            train_or_decode, row = (
                decode,
                [
                    *start,
                    milliseconds(result["seconds"]["ours"]),
                    f"{result['against_best_peer']:.2f}x ({result['best_peer']})",
                    f"{case['streamed']['ours']:.2f}",
                    f"{case['streamed'][result['best_peer']]:.2f}",
                ],
            )
        else:
            saved = case["saved_bytes"]
            best = case["forward_backward"]["best_peer"]
            kept = f"{megabytes(saved['ours'])} ({megabytes(saved[best])})"
            train_or_decode, row = (
                train,
                [*start, *cells(case["forward"]), *cells(case["forward_backward"]), kept],
            )
        train_or_decode.append(row)
    dates = sorted({case["date"].split()[0] for case in results["cases"]})
    commits = sorted({case["commit"] for case in results["cases"]})
    shape = "T, H, I, E, K"
    return "\n".join(
        [
            *markdown(
                [shape, "dtype", "forward", "of the bound", "against the best peer",
                 "forward + backward", "of the bound", "against the best peer",
                 "kept for backward (peer)"],
                train,
            ),
            "",
            *markdown(
                [shape, "dtype", "decoding", "against the best peer",
                 "of the read bandwidth", "peer's"],
                decode,
            ),
            "",
            f"{describe(results)}. Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
            f" at {', '.join(commits)}.",
        ]
    )  # fmt: skip


def chart(results, path):
    """Bars: throughput of ours and of each peer as a share of the bound."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "moe_ext", "font.size": 8})
    from matplotlib import pyplot

    cases = [case for case in results["cases"] if case["kind"] == "train"]
    sides = ["ours", "grouped_mm", "batched_mm", "eager"]
    colors = ["#1f6feb", "#8b949e", "#afb8c1", "#d0d7de"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.55 * len(cases) + 1), sharey=True)
    for axis, direction in zip(axes, ("forward", "forward_backward")):
        for row, case in enumerate(cases):
            seconds = case[direction]["seconds"]
            present = [side for side in sides if side in seconds]
            height = 0.8 / len(present)
            for place, side in enumerate(present):
                share = seconds["bound"] / seconds[side]
                y = row - 0.4 + (place + 0.5) * height
                axis.barh(y, share, height * 0.9, color=colors[sides.index(side)], label=side)
        axis.axvline(1.0, color="#24292f", linewidth=0.8)
        axis.set_title(direction.replace("_", " + "))
        axis.set_xlabel("speed, as a share of the dense bound")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [f"{sizes(case)}\n{case['dtype']}" for case in cases])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique, loc="lower center", ncols=len(unique), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def update_readme(results_path, readme):
    """Writes the table and the chart's link between README's benchmark markers."""
    results_path, readme = Path(results_path), Path(readme)
    results = json.loads(results_path.read_text())
    picture = results_path.with_suffix(".svg")
    chart(results, picture)
    link = picture.relative_to(readme.parent).as_posix()
    body = f"![Speed as a share of the dense bound]({link})\n\n{table(results)}"
    write_between(readme, "benchmark", body)


def write_between(readme, marker, body):
    """Replaces what stands between README's markers of that name."""
    text, count = re.subn(
        rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)",
        lambda match: f"{match[1]}{body}\n{match[2]}",
        readme.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{readme} must have one pair of {marker} markers, found {count}")
    readme.write_text(text)
