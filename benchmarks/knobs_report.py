"""The figure, table and sentences of `knobs.py run`, between the marks of RESULTS.md and benchmarks/reports/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from knobs import KEPT, VALUES, Value
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reslora.experiment import compare_losses
from reslora.experiment.statistics import level_of
from reslora.experiment.verdicts import coverage_in_words
from reslora.io import read_object

MODELS = {"unet": "bundled U-Net", "transformer": "bundled transformer", "text": "SmolLM2-135M on SVAMP"}
SHORT = {"unet": "U-Net", "transformer": "transformer", "text": "text"}
LITTLE = 10.0
"""A value makes little difference if its interval lies between minus and plus so many percent of the gain."""
KINDS = {"helps": "#2f9e44", "hurts": "#e03131", "makes little difference": "#1971c2", "not decided": "#868e96"}
WIDEST = 50.0
"""The figure is cut off here, in percent of the gain."""
MARGIN = 100
"""Place of the knobs' names to the left of the figure, in points."""
REFERENCE = {
    "learning rate": "x1, the chosen one", "steps": "100", "rank": "16", "optimizer": "AdamW",
    "batch size": "4 x 100 steps", "layers": "attention", "alpha": "32", "method": "LoRA", "min-SNR gamma": "1",
    "timesteps": "uniform", "schedule": "constant", "noise offset": "0", "caption dropout": "0",
    "text encoder": "frozen", "mirrored images": "no", "LoRA+ ratio": "1",
}  # fmt: skip
"""The reference's values, on images."""


class Effect(NamedTuple):
    """A value's difference to the reference, in percent of what training with the reference gains; above 0 helps."""

    value: Value
    learning_rate: float
    percent: float
    interval: tuple[float, float]
    detectable: float
    kind: str
    """One of `KINDS`."""
    stated: tuple[float, float]
    """95% prediction interval of one more seed on the same images."""

    @property
    def label(self) -> str:
        """The knob and its value."""
        return f"{self.value.knob} {self.value.value}"


class Found(NamedTuple):
    """What has run on one model."""

    model: str
    before: float
    after: float
    """The reference's mean test loss."""
    images: int
    seeds: int
    effects: list[Effect]


def records(model: str, new_seeds: bool = False) -> dict[Value, dict]:
    """Return the stored experiments of a model, the reference first; {} if that has not run."""
    values = [value for value in VALUES.values() if value.model == model and value.new_seeds is new_seeds]
    found = {value: record for value in values if (record := read_object(KEPT / f"{value.name}.json"))}
    return found if found and next(iter(found)).knob == "reference" else {}


def losses(record: Mapping) -> np.ndarray:
    """Return the test losses of an experiment, of shape (seeds, images)."""
    return np.array([record["tests"][seed] for seed in sorted(record["tests"], key=int)])


def found_on(model: str) -> Found | None:
    """Compare all values of a model with its reference; None if nothing has run."""
    stored = records(model)
    if len(stored) < 2:
        return None
    start, *others = stored
    for value in others:  # otherwise losses are not comparable
        if stored[value]["data"] != stored[start]["data"]:
            raise SystemExit(f"{value.name}: was run on other data than the reference; run it again")
    arrays = {value.name: losses(record) for value, record in stored.items()}
    before, after = np.mean(stored[start]["base"]), arrays[start.name].mean()
    percent = -after / (before - after)
    verdicts = {each["label"]: each for each in compare_losses(arrays, start.name, "reference", unit="image").verdicts}
    effects = []
    for value in others:
        verdict, rate = verdicts[value.name], stored[value]["chosen"]["learning_rate"]
        low, high = sorted(percent * end for end in verdict["interval"])
        kind = {"better": "helps", "worse": "hurts"}.get(verdict["conclusion"])
        kind = kind or ("makes little difference" if max(-low, high) < LITTLE else "not decided")
        stated = tuple(sorted(percent * end for end in verdict["rerun"]))
        detectable = abs(percent) * verdict["detectable"]
        effects.append(Effect(value, rate, percent * verdict["relative"], (low, high), detectable, kind, stated))
    seeds, images = arrays[start.name].shape
    return Found(model, before, after, images, seeds, effects)


def all_found() -> list[Found]:
    """Return what has run, by model."""
    return [found for model in MODELS if (found := found_on(model))]


def knobs_of(every: Iterable[Found]) -> dict[str, float]:
    """Return each knob of which a value has run, with its largest effect on any model, at most `WIDEST`."""
    largest: dict[str, float] = {}
    for effect in (effect for found in every for effect in found.effects):
        largest[effect.value.knob] = max(largest.get(effect.value.knob, 0), min(abs(effect.percent), WIDEST))
    return dict(sorted(largest.items(), key=lambda item: -item[1]))


# -- text --------------------------------------------------------------------------------------------------------------


def sentences(every: Iterable[Found]) -> str:
    """Return for each model what helps, hurts, makes little difference and is not decided."""
    parts = []
    for found in every:
        kinds = []
        for kind in KINDS:
            those = sorted((effect for effect in found.effects if effect.kind == kind), key=lambda e: -abs(e.percent))
            if those:
                kinds.append(f"**{kind}**: " + ", ".join(f"{e.label} ({round(e.percent):+d}%)" for e in those))
        parts.append(f"{MODELS[found.model][:1].upper()}{MODELS[found.model][1:]}: " + "; ".join(kinds) + ".")
    return "\n\n".join(parts)


def summary(every: Iterable[Found]) -> str:
    """Return which knobs matter on any model, and which make little difference wherever they have run."""
    effects: dict[str, list[Effect]] = {}
    for effect in (effect for found in every for effect in found.effects):
        effects.setdefault(effect.value.knob, []).append(effect)
    matter = {knob: those for knob in effects if (those := [e for e in effects[knob] if e.kind in ("helps", "hurts")])}
    least = [knob for knob, those in effects.items() if {e.kind for e in those} == {"makes little difference"}]
    rest = [knob for knob in effects if knob not in matter and knob not in least]
    parts = [
        "**Matter** on one model at least: "
        + "; ".join(sizes(knob, matter[knob]) for knob in knobs_of(every) if knob in matter)
    ]
    parts += [
        f"**{words}**: {', '.join(knobs)}"
        for words, knobs in (("Make little difference", least), ("Not decided", rest))
        if knobs
    ]
    return ". ".join(parts) + "."


def sizes(knob: str, effects: Iterable[Effect]) -> str:
    """Return a knob with its values and their differences on each model, such as "rank 4 (U-Net -4%)"."""
    values: dict[str, list[str]] = {}
    for effect in effects:
        words = f"{SHORT[effect.value.model]} {round(effect.percent):+d}%"
        values.setdefault(effect.value.value, []).append(words)
    return f"{knob} " + ", ".join(f"{value} ({', '.join(those)})" for value, those in values.items())


def table(every: Iterable[Found]) -> str:
    """Return a row for every value that has run, and a line about each reference."""
    every = list(every)
    head = ["knob", "value", "model", "learning rate", "difference", "interval", "MDE", "the value"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for knob in knobs_of(every):
        for found in every:
            for effect in (effect for effect in found.effects if effect.value.knob == knob):
                low, high = effect.interval
                cells = [knob, effect.value.value, MODELS[found.model], f"{effect.learning_rate:g}"]
                cells += [f"{effect.percent:+.1f}%", f"{low:+.1f} to {high:+.1f}%", f"{effect.detectable:.1f}%"]
                rows.append("| " + " | ".join([*cells, effect.kind]) + " |")
    gains = [
        f"{MODELS[found.model]}: from {found.before:.4f} to {found.after:.4f} ({found.seeds} seeds, "
        f"{found.images} test items)"
        for found in every
    ]
    return "\n".join(rows) + "\n\nThe reference lowers the test loss by 100% on this scale; " + "; ".join(gains) + "."


def planned() -> str:
    """Return the knobs that have not run completely, by model."""
    parts = []
    for model, name in MODELS.items():
        stored, knobs = records(model), dict.fromkeys(value.knob for value in VALUES.values() if value.model == model)
        open_knobs = [
            knob
            for knob in knobs
            if knob != "reference"
            and any(
                v.model == model and v.knob == knob and not v.new_seeds and v not in stored for v in VALUES.values()
            )
        ]
        if open_knobs:
            parts.append(f"{name}: {', '.join(open_knobs)}")
    again = f"; {repeated()}" if repeated() else "; the repetition with new seeds has not run"
    return ("Planned, not finished: " + "; ".join(parts) if parts else "Everything planned has run") + again + "."


def repeated() -> str:
    """Return how many differences of new seeds lie in the intervals that the first seeds predict; "" if none ran."""
    again, found = records("unet", new_seeds=True), found_on("unet")
    if len(again) < 2 or not found:
        return ""
    stated = {effect.label: effect.stated for effect in found.effects}
    (_, start), *others = again.items()
    inside, total = 0, 0
    for value, record in others:
        low, high = stated[f"{value.knob} {value.value}"]
        new = 100 * (losses(start).mean(1) - losses(record).mean(1)) / (found.before - found.after)
        inside, total = inside + int(np.sum((low <= new) & (new <= high))), total + len(new)
    return f"of new seeds, {inside} of {total} differences lie in the 95% prediction intervals of the first seeds"


# -- figure ------------------------------------------------------------------------------------------------------------


def figure(every: list[Found]) -> Figure:
    """Plot a row for each knob with its values, and a column for each model."""
    knobs = {
        knob: list(dict.fromkeys(e.value.value for found in every for e in found.effects if e.value.knob == knob))
        for knob in knobs_of(every)
    }
    places, ticks, place = {}, [], 0.0
    for knob, values in knobs.items():
        for value in values:
            places[knob, value] = place
            ticks.append((place, f"{value} steps" * (knob == "batch size") or value))
            place += 1
        place += 0.7
    across = len(every)
    size = (4 + 4 * across, 1.5 + 0.22 * place)
    ends = [abs(end) for found in every for effect in found.effects for end in effect.interval]
    widest = min(WIDEST, 10 * np.ceil(max(ends) / 10))
    drawn, axes = plt.subplots(1, across, sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axis, found in zip(axes[0], every, strict=True):
        panel(axis, found, places, widest)
    first = axes[0][0]
    first.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    first.set_ylim(place - 0.9, -0.9)
    for knob, values in knobs.items():
        middle = np.mean([places[knob, value] for value in values])
        for text, beside, style in ((knob, 6, {"fontweight": "bold"}), (f"reference: {REFERENCE[knob]}", -6, {})):
            first.annotate(text, (0, middle), (-MARGIN, beside), xycoords=first.get_yaxis_transform(), fontsize=8,
                           textcoords="offset points", ha="right", va="center", **style)  # fmt: skip
        for axis in axes[0]:
            axis.axhline(places[knob, values[-1]] + 0.85, color="#dee2e6", linewidth=0.6)
    shown = [Line2D([], [], color=color, marker="o", label=kind) for kind, color in KINDS.items()]
    shown.append(Patch(color="#e9ecef", label="could have been missed (MDE)"))
    drawn.legend(handles=shown, loc="outside upper center", ncols=5 if across > 1 else 3, frameon=False, fontsize=8)
    drawn.supxlabel(
        f"difference to the reference, in percent of what training gains\n"
        f"({coverage_in_words(level_of(1))} interval; right is better, -100% is no training at all)", fontsize=9
    )  # fmt: skip
    return drawn


def panel(axis: Axes, found: Found, places: Mapping[tuple[str, str], float], widest: float) -> None:
    """Plot the values of one model, cut off at `widest` percent."""
    for effect in found.effects:
        place, color = places[effect.value.knob, effect.value.value], KINDS[effect.kind]
        width = min(effect.detectable, 2 * widest)
        axis.barh(place, 2 * width, left=-width, height=0.8, color="#e9ecef", zorder=0)
        axis.plot(effect.interval, [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axis.plot(np.clip(effect.percent, -widest, widest), place, marker="o", color=color, markersize=5, clip_on=False)
        if abs(effect.percent) > widest:
            side = np.sign(effect.percent)
            axis.text(side * 0.95 * widest, place, f"{effect.percent:+.0f}%", fontsize=8, va="center",
                      ha="right" if side > 0 else "left", bbox={"color": "white", "pad": 0.5})  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlim(-widest, widest)
    axis.set_title(MODELS[found.model], fontsize=10)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
