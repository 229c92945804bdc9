"""Plots of the results of `why.py run`: every comparison with LoRA, and loss by learning rate and method."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from why_report import Kept, to_lora

from reslora.experiment.statistics import level_of
from reslora.experiment.verdicts import coverage_in_words

SHORTCUT, ALPHA, PLACEBO, OTHER = "#e8590c", "#1971c2", "#868e96", "#2f9e44"
KINDS = {"shortcut": SHORTCUT, "larger alpha": ALPHA, "placebo": PLACEBO, "other method": OTHER}
LINES = {
    "lora": "#212529", "lora_x2": "#4dabf7", "lora_x4": "#1864ab",
    "reslora": "#9c36b5", "reslora input": "#e8590c", "reslora block(4)": "#2f9e44", "reslora middle(4)": "#9c36b5",
}  # fmt: skip
"""Labels of the second plot; an experiment without any of its shortcuts shows all of its labels."""
HIGHEST = 12.0
"""Upper limit of that plot, in percent above LoRA's lowest loss."""


def color_of(label: str) -> str:
    """Return the color of a label's kind of method."""
    kinds = (("reslora", SHORTCUT), ("lora_", ALPHA), ("is_placebo", PLACEBO), ("ms_placebo", PLACEBO))
    return next((color for start, color in kinds if label.startswith(start)), OTHER)


def forest(experiments: Sequence[Kept]) -> Figure:
    """Plot the difference to LoRA of every label, with its interval and MDE."""
    columns: list[list[Kept]] = [[], []]
    for each in experiments:
        columns["transformer" not in each.title or len(experiments) < 12].append(each)
    columns = [column for column in columns if column]
    found = [[to_lora(each.record) for each in column] for column in columns]
    rows = max(sum(len(verdicts) + 2.2 for verdicts in column) for column in found)
    figure = plt.figure(figsize=(5 * len(columns) + 2, 0.19 * rows + 1), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column, all_verdicts in zip(parts, columns, found, strict=True):
        heights = [len(verdicts) + 1.2 for verdicts in all_verdicts]
        spare = rows - sum(heights) - len(heights)  # so that rows have the same height in both columns
        ratios = {"height_ratios": [*heights, max(spare, 0.01)]}
        axes = part.subplots(len(column) + 1, 1, squeeze=False, gridspec_kw=ratios)[:, 0]
        axes[-1].axis("off")
        for axis, each, verdicts in zip(axes, column, all_verdicts, strict=False):
            forest_panel(axis, each.title, verdicts, 16 if each.unit == "examples" else 3.6)
    shown = [Patch(color=color, label=kind) for kind, color in KINDS.items()]
    shown += [
        Line2D([], [], color="black", marker="o", label="significant after correction"),
        Line2D([], [], color="black", marker="o", markerfacecolor="white", label="not significant"),
        Patch(color="#e9ecef", label="below the minimum detectable effect"),
    ]
    figure.legend(handles=shown, loc="outside upper center", ncols=2 * len(columns), frameon=False)
    readings = sorted({each.record["readings"] for column in columns for each in column})
    levels = " or ".join(coverage_in_words(level_of(reading)) for reading in readings)
    figure.supxlabel(f"test loss compared with LoRA's, in percent ({levels} confidence interval); left is better")
    return figure


def forest_panel(axis: Axes, title: str, verdicts: Sequence[dict], widest: float) -> None:
    """Plot one experiment, with the lowest loss on top, clipped at `widest` percent."""
    ordered = sorted(verdicts, key=lambda verdict: -verdict["relative"])
    for place, verdict in enumerate(ordered):
        color, (low, high) = color_of(verdict["label"]), verdict["interval"]
        if verdict["detectable"] is not None:
            effect = min(verdict["detectable"], 2 * widest)
            axis.barh(place, 2 * effect, left=-effect, height=0.8, color="#e9ecef", zorder=0)
        axis.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        face = "white" if verdict["conclusion"] == "not shown" else color
        axis.plot(verdict["relative"], place, marker="o", color=color, markerfacecolor=face, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(ordered)), [verdict["label"] for verdict in ordered], fontsize=8)
    axis.set(xlim=(-widest, widest), ylim=(-0.7, len(ordered) - 0.3))
    axis.set_title(title, fontsize=9, loc="left", pad=3)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def rates(experiments: Sequence[Kept]) -> Figure:
    """Plot the loss on the selection split by learning rate, of the first seed at its best checkpoint."""
    across = 3
    figure, axes = plt.subplots(-(-len(experiments) // across), across, figsize=(12, 15), layout="constrained")
    for axis, each in zip(axes.flat, experiments, strict=False):
        rates_panel(axis, each)
    for axis in axes.flat[len(experiments) :]:
        axis.axis("off")
    known = [Line2D([], [], color=color, label=label) for label, color in LINES.items() if label != "reslora"]
    known.append(Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="chosen"))
    figure.legend(handles=known, loc="outside upper center", ncols=7, frameon=False)
    figure.supxlabel("learning rate")
    figure.supylabel("loss on the selection split, percent above LoRA's lowest")
    return figure


def rates_panel(axis: Axes, each: Kept) -> None:
    """Plot one experiment's curves; a ring marks the learning rate that was chosen over all seeds."""
    arms, chosen = each.record["arms"], each.record["chosen"]
    curves = {label: curve_of(arms, label) for label in chosen}
    lowest = min(curves["lora"].values())
    main = [label for label in curves if label in LINES]
    shown = main if any(label.startswith("reslora") for label in main) else list(curves)
    for number, label in enumerate(shown):
        color = LINES.get(label, f"C{number}")
        rates = sorted(curves[label])
        above = {rate: 100 * (curves[label][rate] / lowest - 1) for rate in rates}
        axis.plot(
            rates, [above[rate] for rate in rates], color=color, label=label, linewidth=2 if label == "lora" else 1.2
        )
        rate = chosen[label]["learning_rate"]
        if rate in above:
            axis.plot(rate, above[rate], marker="o", color=color, markerfacecolor="none", markersize=8)
    heights = [y for line in axis.lines for y in line.get_ydata()]
    axis.set(xscale="log", ylim=(min(heights) - 0.5, min(max(3.0, max(heights) + 0.5), HIGHEST)))
    axis.set_title(each.title, fontsize=9, loc="left")
    every = sorted({rate for label in shown for rate in curves[label]})
    axis.set_xticks(every, [f"{rate:g}" for rate in every], fontsize=8, rotation=30 if len(every) > 7 else 0)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if shown is not main:
        axis.legend(fontsize=7, frameon=False, ncols=2)


def curve_of(arms: Sequence[dict], label: str) -> dict[float, float]:
    """Return the lowest loss on the selection split by learning rate, of the seed with the most learning rates."""
    by_seed: dict[int, dict[float, float]] = {}
    for arm in arms:
        losses = [loss for loss in arm["select_by_step"].values() if loss is not None and np.isfinite(loss)]
        if arm["label"] == label and losses:
            by_seed.setdefault(arm["seed"], {})[arm["learning_rate"]] = min(losses)
    return max(by_seed.values(), key=len, default={})
