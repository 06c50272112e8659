"""The peers' results as text, as the documentation's short table, and as a page of all processors'."""

import json
import statistics

import harness
import peers
from reporting import PAGE, machine_and_versions, markdown, milliseconds, put_between, when_and_at

ALL_ROWS = harness.RESULTS / "peers.md"
FEW = 16  # tokens, up to which a model decodes


def path_for(instruction_set):
    name = instruction_set.lower().replace("-", "").replace(" ", "_")
    return harness.RESULTS / f"peers_{name}.json"


def describe(about):
    return machine_and_versions(about["machine"])


def title(peer):
    return peers.modules([peer])[0].TITLE


def sizes(case):
    return ", ".join(str(case[n]) for n in ("hidden", "intermediate", "num_experts", "top_k"))


def lines(case):
    """A case as it is printed while the benchmark runs."""

    def side(name):
        against = f" {case['against'][name]:.2f}x" if name in case["against"] else ""
        return f"{name} {milliseconds(case['seconds'][name])}{against} ({case['errors'][name]:.1e})"

    text = [f"{sizes(case)}; T {case['tokens']}, {case['dtype']}, {case['rounds']} rounds"]
    text += ["  " + ", ".join(side(name) for name in case["seconds"])]
    text += [f"  without {peer}: {why}" for peer, why in case["left_out"].items()]
    return "\n".join(text)


def compared_peers(results):
    found = {peer for case in results["cases"] for peer in case["against"]}
    return [peer for peer in peers.NAMES if peer in found]


INTRODUCTION = """\
`make peers bench-peers` runs the experts alone beside other libraries that have them, with the same
weights, tokens and routing. A number is that library's time over ours, below 1 where it is faster:
the geometric mean over three layers, and the lowest. All rows, and every side's error against
float64: [peers.md](../benchmarks/results/peers.md). `benchmarks/bench_peers.py` says how it measures.
"""


def short_table(results):
    """A row a peer and dtype: its time over ours, in geomean and in the cell where it is best."""

    def cell(cases, peer):
        if not cases:
            return "-"
        against = {case["shape"]: case["against"][peer] for case in cases}
        worst = min(cases, key=lambda case: against[case["shape"]])
        return (
            f"{statistics.geometric_mean(against.values()):.2f}x,"
            f" at least {against[worst['shape']]:.2f}x ({sizes(worst)}; T {worst['tokens']})"
        )

    rows = []
    for dtype in ("bfloat16", "float32"):
        for peer in compared_peers(results):
            cases = [c for c in results["cases"] if c["dtype"] == dtype and peer in c["against"]]
            few = [case for case in cases if case["tokens"] <= FEW]
            many = [case for case in cases if case["tokens"] > FEW]
            if cases:
                rows.append([title(peer), dtype, cell(few, peer), cell(many, peer)])
    header = ["peer", "dtype", f"1 to {FEW} tokens", "more tokens"]
    return "\n".join([INTRODUCTION, *markdown(header, rows), "", note(results)])


def whole_table(results):
    """A row a case: our time, every peer's over it, and the errors."""

    def cell(case, peer):
        if peer not in case["against"]:
            return "-"
        return f"{case['against'][peer]:.2f}x ({case['errors'][peer]:.1e})"

    present = compared_peers(results)
    rows = [
        [
            sizes(case),
            str(case["tokens"]),
            case["dtype"],
            f"{milliseconds(case['seconds']['ours'])} ({case['errors']['ours']:.1e})",
            *(cell(case, peer) for peer in present),
        ]
        for case in results["cases"]
    ]
    header = ["H, I, E, K", "T", "dtype", "ours", *map(title, present)]
    return "\n".join([*markdown(header, rows), "", *reasons(results), note(results)])


def reasons(results):
    """Who is left out, and why: a line a peer and reason."""
    why = {}
    for case in results["cases"]:
        for peer, reason in case["left_out"].items():
            why.setdefault((peer, reason), []).append(case)
    return [
        f"- {title(peer)} is left out of {len(cases)} rows: {reason}"
        for (peer, reason), cases in why.items()
    ] + [""] * bool(why)


def note(results):
    pins = dict.fromkeys(results["peers"][peer] for peer in compared_peers(results))
    return f"{describe(results)}; {', '.join(pins)}. {when_and_at(results['cases'])}"


HEAD = """# Other libraries' experts beside ours

Written by `benchmarks/bench_peers.py --update-docs`; its head says how it measures. "Ours" is
our time; a peer's number is its time over ours, above 1 where we are faster; in brackets stands
the error against float64, relative to the norm of y.
"""


def all_rows():
    """All processors' results that there are, a section each."""
    sections = [HEAD]
    for path in sorted(harness.RESULTS.glob("peers_*.json")):
        results = json.loads(path.read_text())
        sections.append(f"## {results['machine']['instruction_set']}\n\n{whole_table(results)}\n")
    return "\n".join(sections)


def update_docs(path, page=PAGE):
    put_between(page, "peers_cpu", short_table(json.loads(path.read_text())))
    ALL_ROWS.write_text(all_rows())
