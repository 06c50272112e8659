"""The pictures: loss curves, expert load over steps, drop rate and routing entropy; fine-tuning."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from report import compared  # noqa: E402
from training import VARIANTS  # noqa: E402

# Okabe and Ito's, which colour-blind readers can tell apart, grey for their yellow.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "os^vDPX*"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


def draw(results, folder):
    """Writes the pictures that the results allow into `folder`; their paths."""
    paths = []
    for name, figure in pictures(results).items():
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        paths.append(folder / name)
    return paths


def pictures(results):
    """{file name: figure}."""
    plt.rcParams.update(STYLE)
    groups = {}
    for r in results:
        groups.setdefault(r.variant, []).append(r)
    looks = {
        name: dict(label=variant.label, color=colour, marker=marker, markersize=4)
        for (name, variant), colour, marker in zip(VARIANTS.items(), COLOURS, MARKERS, strict=True)
    }  # a variant's are the same in every picture
    figures = {"loss.png": losses(groups, looks, compared(results))}
    routed = {name: runs for name, runs in groups.items() if runs[0].load}
    if routed:
        figures["load.png"] = load_heatmaps([runs[0] for runs in routed.values()])
        figures["routing.png"] = drop_and_entropy(routed, looks)
    return figures


def mean_curve(runs, series):
    """Steps, and the mean over the seeds."""
    curves = np.array([getattr(r, series) for r in runs])
    return curves[0, :, 0], curves[:, :, 1].mean(0)


def losses(groups, looks, rows):
    """Left: the validation losses over the steps. Right: the differences at the end."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, max(3.8, 1.6 + 0.55 * len(rows))), layout="constrained"
    )
    # Before a quarter of the steps all fall alike, and would flatten what follows.
    first = len(next(iter(groups.values()))[0].validation_loss) // 4
    for name, runs in groups.items():
        steps, loss = mean_curve(runs, "validation_loss")
        left.plot(steps[first:], loss[first:], linewidth=1.2, **looks[name])
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    left.set(xlabel="step", ylabel="nats per byte", title="Validation loss, mean of the seeds")
    differences(right, rows)
    return figure


def differences(axis, rows):
    """Of every comparison the seeds, their mean and its 95 % interval, beside 0."""
    for place, (_, comparison, _) in enumerate(rows):
        n = len(comparison.differences)
        axis.plot(
            comparison.differences, [place] * n, "o", markerfacecolor="none", color=COLOURS[0],
            label="a seed" if place == 0 else None,
        )  # fmt: skip
        axis.errorbar(
            comparison.mean, place + 0.2, xerr=comparison.margin if n > 1 else None, fmt="D",
            markersize=5, capsize=4, color=COLOURS[1],
            label="mean, 95 % interval" if place == 0 else None,
        )  # fmt: skip
    axis.axvline(0, color="0.5", linewidth=1)
    axis.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    axis.margins(x=0.1)
    axis.grid(alpha=0.25, axis="x")
    axis.set(xlabel="nats per byte (below 0: the first is better)", title="Difference at the end")
    if rows:
        axis.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def load_heatmaps(results):
    """One row a run, one column a layer; a cell is an expert's load over its fair share."""
    rows, layers = len(results), len(results[0].load[0][1])
    figure, axes = plt.subplots(
        rows, layers, figsize=(max(7, 4.4 * layers), 1.1 + 1.9 * rows), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for row, result in zip(axes, results):
        steps = [step for step, _ in result.load]
        load = np.array([shares for _, shares in result.load])  # (time, layers, experts)
        experts = load.shape[-1]
        for layer, axis in enumerate(row):
            axis.grid(False)
            image = axis.imshow(
                load[:, layer].T * experts, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
                extent=(0, steps[-1], experts - 0.5, -0.5), interpolation="nearest",
            )  # fmt: skip
            axis.set_title(f"{result.label}, seed {result.seed}, layer {layer + 1}", fontsize=10)
            axis.set_yticks(range(0, experts, max(1, experts // 8)))
        row[0].set_ylabel("expert")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=12 * rows, pad=0.02)
    bar.set_label("load / fair share (white: balanced)")
    return figure


def drop_and_entropy(routed, looks):
    """The drop rate of those that may drop, the entropy of all."""
    limited = {n: runs for n, runs in routed.items() if any(drop for _, drop in runs[0].drop_rate)}
    figure, axes = plt.subplots(
        1, 2 if limited else 1, figsize=(11 if limited else 6, 3.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    *left, right = axes[0]
    for axis in left:
        for name, runs in limited.items():
            steps, drop = mean_curve(runs, "drop_rate")
            axis.plot(steps, 100 * drop, markevery=10, **looks[name])
        axis.set_ylim(bottom=0)
        axis.set(xlabel="step", ylabel="dropped assignments (%)", title="Drop rate, mean of layers")
    for name, runs in routed.items():
        right.plot(*mean_curve(runs, "entropy"), markevery=10, **looks[name])
    right.set_ylim(min(0.9, right.get_ylim()[0]), 1.005)  # below 0.9 begins the collapse
    right.set(
        xlabel="step", ylabel="entropy / log(experts)",
        title="Entropy of the mean routing (1: all experts alike)",
    )  # fmt: skip
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return figure


# ---- examples/finetune_mixtral.py ------------------------------------------------


def draw_finetuning(texts, routing, entropy, path):
    """What fine-tuning does to the routing, into the file `path`.

    texts: [the name of the text it was trained on, that of the text it is fine-tuned on].
    routing: {"before fine-tuning": for each text [the numbers of every layer], "after ...": ...}.
    entropy: for each text, as it was trained on: [(step, [that of every layer])].
    """
    plt.rcParams.update(STYLE)
    rows = len(routing)
    layers = len(next(iter(routing.values()))[0])
    figure, axes = plt.subplots(
        rows + 1, 2, figsize=(11, rows * (0.9 + 0.38 * layers) + 3), layout="constrained",
        height_ratios=[0.9 + 0.38 * layers] * rows + [3],
    )  # fmt: skip
    for row, (moment, of_texts) in zip(axes, routing.items()):
        for axis, text, stats in zip(row, texts, of_texts):
            image = load_of_layers(axis, stats)
            axis.set_title(f"{text}: {moment}", fontsize=10)
    bar = figure.colorbar(image, ax=axes[:rows], extend="max", aspect=25, pad=0.02)
    bar.set_label("load / fair share (white: balanced)")

    moments = ("trained on", "fine-tuned on")
    for axis, text, moment, curve in zip(axes[rows], texts, moments, entropy):
        steps = [step for step, _ in curve]
        for layer, values in enumerate(zip(*(values for _, values in curve))):
            axis.plot(steps, values, color=COLOURS[layer % 8], label=f"layer {layer + 1}")
        axis.set(title=f"while {moment} {text}", xlabel="step", ylabel="entropy of the load")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    bottom = min(axis.get_ylim()[0] for axis in axes[rows])
    for axis in axes[rows]:
        axis.set_ylim(bottom, 1.01)
    axes[rows, 1].legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def load_of_layers(axis, stats):
    """One row a layer, one column an expert; beside them the layers' entropy."""
    share = np.array([layer["load"] / layer["load"].mean() for layer in stats])
    image = axis.imshow(share, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    layers, experts = share.shape
    if experts <= 16:
        for (layer, expert), value in np.ndenumerate(share):
            colour = "white" if abs(value - 1) > 0.65 else "black"
            axis.text(expert, layer, f"{value:.1f}", ha="center", va="center", color=colour, size=8)
    for layer, numbers in enumerate(stats):
        axis.text(experts - 0.4, layer, f"{numbers['entropy']:.2f}", va="center", size=9)
    axis.text(experts - 0.4, -0.65, "entropy", va="bottom", size=8)
    axis.set_yticks(range(layers), [f"layer {i + 1}" for i in range(layers)])
    axis.set_xticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
    axis.set_xlabel("expert")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image
