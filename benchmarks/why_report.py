"""Tables of the results of `why.py run`: a summary, the labels of each experiment, and the pairs of its hypotheses."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measured import ROOT
from why import AGAIN, EXPERIMENTS, KEPT, Experiment

from reslora.experiment.record import ENDED_AS, Verdict
from reslora.experiment.statistics import judge, level_of, rerun
from reslora.experiment.verdicts import Words, coverage_in_words, tested, verdict_of
from reslora.images.model.families import load_family
from reslora.images.model.loading import Model
from reslora.images.refusals import read_index
from reslora.io import read_object

SHORTCUTS = ("input", "block(4)", "middle(4)")
WIRED = ("reslora", *(f"reslora {kind}" for kind in SHORTCUTS))  # the first if an experiment has only one kind
NOT_RUN = "*Not run yet.*"
# The reference of each label, by hypothesis: LoRA at the shortcut's scale, its placebo, and larger alphas.
PAIRS = {
    "scale": {f"reslora {kind}": f"lora_matched {kind}" for kind in SHORTCUTS},
    "information": {"reslora input": "is_placebo", "reslora middle(4)": "ms_placebo"},
    "alpha x 2": dict.fromkeys(WIRED, "lora_x2"),
    "alpha x 4": dict.fromkeys(WIRED, "lora_x4"),
}


class Kept(NamedTuple):
    """The record of an experiment that has run, at least in part."""

    name: str
    title: str
    record: dict
    unit: str
    """The training data: images or examples."""


def records() -> list[Kept]:
    """Return all records in order, each followed by that of the previous bundled pipeline, if any."""
    found = []
    for name, experiment in EXPERIMENTS.items():
        unit = "images" if experiment.script == "train_sd.py" else "examples"
        for path in (KEPT / f"{name}.json", KEPT / f"{name}-before.json"):
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
                title = experiment.shows + when(experiment, record)
                found.append(Kept(name, title[:1].upper() + title[1:], record, unit))
    return found


def why_tables(found: Sequence[Kept]) -> str:
    """Return a section for every experiment."""
    return "\n\n".join(section(*each[1:]) for each in found) or NOT_RUN


def summary_table() -> str:
    """Return a row for every experiment: its significant differences, and the shortcut with the lowest loss."""
    rows = []
    for _, title, record, _ in records():
        found = to_lora(record)
        of_shortcuts = [verdict for verdict in found if verdict["label"].startswith("reslora")]
        lowest = min(of_shortcuts, key=lambda verdict: verdict["relative"], default=None)
        ended = [arm for arm in record["arms"] if arm["status"] in ENDED_AS]
        seeds = sorted({verdict["seeds"] for verdict in found})
        cells = [title, str(len(ended)), f"{sum(arm['seconds'] for arm in ended) / 3600:.1f}", str(record["readings"])]
        cells.append(" to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))))
        for which in ("better", "worse"):
            cells.append(f"{sum(verdict['conclusion'] == which for verdict in found)} of {len(found)}")
        difference, interval, _, detectable = compared(lowest)
        interval += f" ({coverage(record)})" * bool(interval)
        cells += [lowest["label"] if lowest else "", difference, interval, detectable]
        rows.append("| " + " | ".join(cells) + " |")
    head = ["experiment", "runs", "hours", "test evaluations", "seeds", "below LoRA", "above LoRA"]
    head += ["lowest shortcut", "difference", "CI", "MDE"]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]) if rows else NOT_RUN


def counted() -> str:
    """Return two sentences: how many shortcuts differ significantly from LoRA, and the minimum detectable effects."""
    found = [
        (unit, verdict)
        for _, _, record, unit in records()
        for verdict in to_lora(record)
        if verdict["label"].startswith("reslora")
    ]
    if not found:
        return NOT_RUN
    effects, sizes = [], []
    for kind, name in (("images", "images"), ("examples", "text")):
        those = [verdict for unit, verdict in found if unit == kind]
        if detectable := [verdict["detectable"] for verdict in those if verdict["detectable"]]:
            effects.append(f"{min(detectable):.2f}% to {max(detectable):.2f}% for {name}")
        if kind == "images":
            by_shortcut = {
                shortcut: np.mean([v["relative"] for v in those if v["label"].startswith(f"reslora {shortcut}")])
                for shortcut in ("input", "block", "middle")
            }
            means = ", ".join(f"{mean:+.2f}% for `{shortcut}`" for shortcut, mean in by_shortcut.items())
            sizes.append(f"On images the shortcuts end above LoRA on average ({means})")
        above = sum(verdict["relative"] > 0 for verdict in those)
        sizes.append(f"{above} of {len(those)} estimates for {name} are above LoRA's loss")
    below, above = (sum(verdict["conclusion"] == which for _, verdict in found) for which in ("better", "worse"))
    return (
        f"In {len(found)} comparisons of a shortcut with LoRA, the shortcut ended significantly below LoRA {below} "
        f"times and significantly above LoRA {above} times. {'; '.join(sizes)}. Relative to LoRA's test loss, the "
        f"minimum detectable effect (80% power) is {' and '.join(effects)}."
    )


def again_table() -> str:
    """Return a row for every run that was trained again: its test loss, and what the earlier seeds predict."""
    rows = []
    for name, title, record, _ in records():
        predicted = {
            label: rerun(losses[np.isfinite(losses).all(1)].mean(1))
            for label, losses in tested(record["arms"], record["chosen"]).items()
        }
        known = {(arm["label"], arm["seed"]) for arm in record["arms"]}
        for run in read_object(AGAIN / f"{name}.json").get("runs", []):
            if (run["label"], run["seed"]) in known:
                continue  # not trained again, only merged
            loss, interval = exported_loss(run["table"]), predicted[run["label"]]
            cells = [
                title,
                run["label"],
                run["seed"],
                f"{loss:.4f}",
                ends(interval, ".4f"),
                "yes" if within(loss, interval) else "no",
            ]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    head = ["| experiment | method | seed | test loss | 95% PI | in the interval |", "|---" * 6 + "|"]
    return "\n".join([*head, *rows]) if rows else NOT_RUN


def exported_loss(table: Mapping[str, Mapping[str, float]]) -> float:
    """Return the loss of the adapter that a run exports: merged by the best method that there is."""
    best = next(merge for merge in ("exact", "lstsq", "unmerged") if merge in table)
    return table[best]["loss"]


def alpha_table() -> str:
    """Return a table of the learning rates chosen with LoRA's alpha, and with two and four times it."""
    labels, rows = ("lora", "lora_x2", "lora_x4"), []
    for _, title, record, _ in records():
        found = [record["chosen"][label]["learning_rate"] for label in labels if label in record["chosen"]]
        if len(found) > 1:
            cells = [f"{rate:g}" for rate in found] + [""] * (3 - len(found))
            half = "yes" if math.isclose(2 * found[1], found[0]) else "no"
            rows.append("| " + " | ".join([title, *cells, half]) + " |")
    head = ["experiment", "best learning rate of LoRA", "with twice the alpha", "with four times the alpha"]
    head.append("halved by twice the alpha")
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]) if rows else NOT_RUN


def to_lora(record: Mapping) -> list[Verdict]:
    """Compare every label of an experiment with LoRA, corrected for the number of labels."""
    tests = tested(record["arms"], record["chosen"])
    return compare(record, tests, {label: "lora" for label in tests if label != "lora" and "lora" in tests})


def compare(record: Mapping, tests: Mapping[str, np.ndarray], references: Mapping[str, str]) -> list[Verdict]:
    """Compare labels with their references, corrected for these pairs and for evaluations of the test split."""
    images = next(arm["test"]["images"] for arm in record["arms"] if arm["test"])
    words = Words(seeds=sorted({arm["seed"] for arm in record["arms"]}), units=images)
    return [verdict_of(pair, words) for pair in judge(tests, references.items(), record["readings"])]


def when(experiment: Experiment, record: Mapping) -> str:
    """Return " (previous weights)" if the bundled pipeline has been replaced since the experiment."""
    used = record.get("identity", {}).get("model", "")
    bundled = [flag for flag in experiment.flags if flag.startswith("assets/pipeline")]
    return " (previous weights)" if bundled and used and used != content(ROOT / bundled[0]) else ""


@functools.cache
def content(pipeline: Path) -> str:
    """Return a pipeline's fingerprint, as in an experiment's identity."""
    family = load_family(read_index(pipeline, str(pipeline))["_class_name"])
    return Model(pipeline, family, str(pipeline)).fingerprint()


def section(title: str, record: dict, unit: str = "images") -> str:
    """Return the tables of one experiment: its labels, then its pairs."""
    arms, split = record["arms"], record["split"]
    ended = [arm for arm in arms if arm["status"] in ENDED_AS]
    # Earlier records of images have the full selection part, of which no more than this were measured.
    select = min(split["select"], record["settings"].get("max_validation_images") or split["select"])
    parts = f"{split['train']} for training, {select} in the selection split, {split['test']} in the test split"
    lines = [f"**{title}.** {len(ended)} of {len(arms)} planned runs have ended. {unit.capitalize()}: {parts}."]
    tests = tested(arms, record["chosen"])
    if tests:
        lines += [label_table(record, tests), rerun_line(record, tests), pair_table(record, tests)]
    return "\n\n".join(filter(None, lines))


def label_table(record: dict, tests: dict[str, np.ndarray]) -> str:
    """Return a table: each label's chosen learning rate and checkpoint, its test loss and its difference."""
    found = {verdict["label"]: verdict for verdict in to_lora(record)}
    head = f"difference to LoRA | {coverage(record)} CI | 95% PI | MDE"
    rows = [f"| | learning rate | step | seeds | test loss | 95% PI | {head} |"]
    rows.append("|---" * 10 + "|")
    for label, losses in sorted(tests.items(), key=lambda item: np.nanmean(item[1])):
        choice, verdict = record["chosen"][label], found.get(label)
        rate = f"{choice['learning_rate']:g}" + (" (end of the grid)" if choice["at_end"] else "")
        of_seeds = losses[np.isfinite(losses).all(1)].mean(1)
        cells = [label, rate, str(choice["step"]), str(len(of_seeds)), f"{of_seeds.mean():.4f}"]
        cells += [ends(rerun(of_seeds), ".4f"), *compared(verdict)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def rerun_line(record: dict, tests: dict[str, np.ndarray]) -> str:
    """Return how many values of a seed lie in the intervals that the other seeds predict, for all seeds and labels."""
    references = {label: "lora" for label in tests if label != "lora"}
    seeds = min(len(losses) for losses in tests.values())
    if "lora" not in tests or not references or seeds < 3:
        return ""
    of_mean, of_one, losses_of_one = [], [], []
    for seed in range(seeds):
        others = {label: np.delete(losses, seed, axis=0) for label, losses in tests.items()}
        for verdict in compare(record | {"readings": 1}, others, references):
            again = 100 * (tests[verdict["label"]][seed].mean() / tests["lora"][seed].mean() - 1)
            if np.isfinite(again) and verdict["interval"] and verdict["rerun"]:
                of_mean.append(within(again, verdict["interval"]))
                of_one.append(within(again, verdict["rerun"]))
        for label, losses in others.items():
            stated, again = rerun(losses[np.isfinite(losses).all(1)].mean(1)), tests[label][seed].mean()
            if np.isfinite(again) and stated:
                losses_of_one.append(within(again, stated))
    return (
        f"Leave-one-out check: the prediction interval (PI) contains {sum(losses_of_one)} of "
        f"{len(losses_of_one)} test losses and {sum(of_one)} of {len(of_one)} differences to LoRA. The confidence "
        f"interval (CI) contains {sum(of_mean)} of these differences."
    )


def coverage(record: Mapping) -> str:
    """Return the coverage of an experiment's confidence intervals as text; the number of its evaluations sets it."""
    return coverage_in_words(level_of(record["readings"]))


def within(value: float, stated: tuple[float, float]) -> bool:
    """Return whether an interval contains a value."""
    return bool(stated[0] <= value <= stated[1])


def ends(stated: tuple[float, float] | None, form: str) -> str:
    """Format an interval, or return an empty string."""
    return f"{stated[0]:{form}} to {stated[1]:{form}}" if stated else ""


def compared(verdict: Mapping | None) -> list[str]:
    """Return difference, intervals and MDE in percent; bold if significant after Holm's correction."""
    if verdict is None:
        return [""] * 4
    star = "**" if verdict["conclusion"] in ("better", "worse") else ""
    difference = f"{star}{verdict['relative']:+.2f}%{star}"
    stated = (ends(verdict[name], "+.2f") for name in ("interval", "rerun"))
    return [difference, *stated, "" if verdict["detectable"] is None else f"{verdict['detectable']:.2f}%"]


def pair_table(record: dict, tests: dict[str, np.ndarray]) -> str:
    """Return a table of shortcuts compared with their controls; the pairs of a question are corrected together."""
    rows = []
    for question, references in PAIRS.items():
        there = {ours: theirs for ours, theirs in references.items() if ours in tests and theirs in tests}
        for verdict in compare(record, tests, there):
            rows.append(
                "| " + " | ".join([question, verdict["label"], verdict["reference"], *compared(verdict)]) + " |"
            )
    if not rows:
        return ""
    head = f"| question | method | compared with | difference | {coverage(record)} CI | 95% PI | MDE |"
    return "\n".join([head, "|---" * 7 + "|", *rows])
