"""What the benchmarks' reports share: numbers as text, tables, charts, places in the documentation."""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"


def milliseconds(seconds):
    return f"{seconds * 1e3:.3g} ms" if seconds < 100e-3 else f"{seconds * 1e3:.0f} ms"


def megabytes(size):
    return f"{size / 1e6:.3g} MB" if size < 999.5e6 else f"{size / 1e9:.3g} GB"


def instruction_set(machine):
    return machine.get("instruction_set", machine["capability"])


def machine_and_versions(machine):
    where = f"{machine['gpu']}, CUDA {machine['cuda']}; " if "gpu" in machine else ""
    return (
        f"{where}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" {instruction_set(machine)}; torch {machine['torch']},"
        f" transformers {machine['transformers']}, Python {machine['python']}"
    )


def when_and_at(cases):
    """The days and the commits of the measurements, as a sentence."""
    dates = sorted({case["date"].split()[0] for case in cases})
    commits = sorted({case["commit"] for case in cases})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"Measured {days} at {', '.join(commits)}."


def markdown(header, rows):
    """The lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def load_pyplot():
    """matplotlib for pictures that are the same bytes each time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "moe_ext", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def save_bars(figure, axes, labels, path):
    """Panels of horizontal bars beside each other, labelled once, over one legend."""
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    unique = dict(zip(names, handles))
    figure.legend(unique.values(), unique, loc="lower center", ncols=len(unique), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def put_between(page, marker, text):
    """Writes text between a page's markers of that name."""
    page = Path(page)
    new, count = re.subn(
        rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)",
        lambda match: f"{match[1]}{text}\n{match[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{page} must have one pair of {marker} markers, found {count}")
    page.write_text(new)


def update(results_path, page, title, table, chart):
    """Draws chart(results, path) beside the results; writes its link and table(results) between
    the page's markers of the results' name."""
    results_path, page = Path(results_path).resolve(), Path(page).resolve()
    results = json.loads(results_path.read_text())
    picture = results_path.with_suffix(".svg")
    chart(results, picture)
    link = Path(os.path.relpath(picture, page.parent)).as_posix()
    put_between(page, results_path.stem, f"![{title}]({link})\n\n{table(results)}")
