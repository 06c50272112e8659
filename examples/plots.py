"""The pictures: loss curves, expert load over steps, drop rate and routing entropy; fine-tuning."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLOURS = plt.get_cmap("tab10").colors
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


def draw(results, folder):
    """Writes the pictures that the results allow into `folder`; their paths."""
    plt.rcParams.update(STYLE)
    groups = {}
    for r in results:
        groups.setdefault(r.variant, []).append(r)
    labels = {name: runs[0].label for name, runs in groups.items()}
    colours = {name: COLOURS[i] for i, name in enumerate(groups)}
    pictures = {"loss.png": loss_curves(groups, labels, colours)}
    routed = {name: runs for name, runs in groups.items() if runs[0].load}
    if routed:
        pictures["load.png"] = load_heatmaps(routed, labels)
        pictures["routing.png"] = drop_and_entropy(routed, labels, colours)
    paths = []
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        paths.append(folder / name)
    return paths


def mean_curve(runs, series):
    """Steps, and the mean over the seeds."""
    curves = np.array([getattr(r, series) for r in runs])
    return curves[0, :, 0], curves[:, :, 1].mean(0)


def loss_curves(groups, labels, colours):
    """Left: the whole training. Right: the validation losses at its end, seed by seed."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained"
    )
    for name, runs in groups.items():
        steps, loss = mean_curve(runs, "train_loss")
        left.plot(steps, loss, color=colours[name], linewidth=0.8, alpha=0.4)
        steps, loss = mean_curve(runs, "validation_loss")
        left.plot(steps, loss, color=colours[name], marker="o", markersize=3.5, label=labels[name])
    left.set(
        xlabel="step", ylabel="loss (nats per byte)", title="Training (faint) and validation loss"
    )
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    left.grid(alpha=0.25, which="both")
    left.legend(frameon=False)

    # Where training begins says nothing, and would flatten all that follows.
    left.set_ylim(top=1.1 * max(r.validation_loss[0][1] for runs in groups.values() for r in runs))

    for place, (name, runs) in enumerate(groups.items()):
        final = [r.final_loss for r in runs]
        mean = sum(final) / len(final)
        right.plot(final, [place] * len(final), "o", color=colours[name], alpha=0.6)
        right.plot(mean, place, "|", color=colours[name], markersize=20, markeredgewidth=2)
        right.annotate(
            f"{mean:.3f}", (mean, place), xytext=(0, 12), textcoords="offset points", ha="center"
        )
    right.set_yticks(range(len(groups)), [labels[name] for name in groups])
    right.set_ylim(len(groups) - 0.5, -0.7)
    right.margins(x=0.15)
    right.grid(alpha=0.25, axis="x")
    right.set(xlabel="nats per byte (dots: seeds)", title="Validation loss at the end")
    return figure


def load_heatmaps(routed, labels):
    """One row a run, one column a layer; a cell is an expert's load over its fair share."""
    layers = len(routed[next(iter(routed))][0].load[0][1])
    rows = len(routed)
    figure, axes = plt.subplots(
        rows, layers, figsize=(max(7, 4.4 * layers), 1.1 + 1.9 * rows), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for row, (name, runs) in zip(axes, routed.items()):
        steps = [step for step, _ in runs[0].load]
        load = np.array([shares for _, shares in runs[0].load])  # (time, layers, experts)
        experts = load.shape[-1]
        for layer, axis in enumerate(row):
            axis.grid(False)
            image = axis.imshow(
                load[:, layer].T * experts, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
                extent=(0, steps[-1], experts - 0.5, -0.5), interpolation="nearest",
            )  # fmt: skip
            axis.set_title(f"{labels[name]}, layer {layer + 1}", fontsize=10)
            axis.set_yticks(range(0, experts, max(1, experts // 8)))
        row[0].set_ylabel("expert")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=12 * rows, pad=0.02)
    bar.set_label("load / fair share (white: balanced)")
    return figure


def drop_and_entropy(routed, labels, colours):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for name, runs in routed.items():
        steps, drop = mean_curve(runs, "drop_rate")
        left.plot(steps, 100 * drop, color=colours[name], label=labels[name])
        steps, entropy = mean_curve(runs, "entropy")
        right.plot(steps, entropy, color=colours[name], label=labels[name])
    left.set(xlabel="step", ylabel="dropped assignments (%)", title="Drop rate, mean of the layers")
    left.set_ylim(bottom=0)
    right.set_ylim(min(0.9, right.get_ylim()[0]), 1.005)  # below 0.9 begins the collapse
    right.set(
        xlabel="step", ylabel="entropy / log(experts)",
        title="Entropy of the mean routing (1: all experts alike)",
    )  # fmt: skip
    for axis in (left, right):
        axis.grid(alpha=0.25)
    right.legend(frameon=False)
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
            axis.plot(steps, values, color=COLOURS[layer % 10], label=f"layer {layer + 1}")
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
