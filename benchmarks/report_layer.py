"""A layer benchmark's results as text, and as a table and a chart of the documentation."""

from reporting import (
    PAGE,
    load_pyplot,
    machine_and_versions,
    markdown,
    megabytes,
    milliseconds,
    save_bars,
    update,
    when_and_at,
)


def describe(about):
    return (
        f"{machine_and_versions(about['machine'])};"
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
    """The page's Markdown: training shapes, then decoding."""

    def cells(result):
        peer = f"{result['against_best_peer']:.2f}x ({result['best_peer']})"
        return [milliseconds(result["seconds"]["ours"]), f"{result['share_of_bound']:.2f}", peer]

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
            f"{describe(results)}. {when_and_at(results['cases'])}",
        ]
    )  # fmt: skip


def chart(results, path):
    """Bars: throughput of ours and of each peer as a share of the bound."""
    pyplot = load_pyplot()
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
    labels = [f"{sizes(case)}\n{case['dtype']}" for case in cases]
    save_bars(figure, axes, labels, path)


def update_docs(results_path, page=PAGE):
    update(results_path, page, "Speed as a share of the dense bound", table, chart)
