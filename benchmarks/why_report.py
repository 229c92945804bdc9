"""Tables of what `why.py run` has found: the labels of each experiment, and the pairs that decide its hypotheses."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from measured import ROOT
from why import EXPERIMENTS, KEPT, Experiment

from reslora.diffusion.model.families import load_family
from reslora.diffusion.model.loading import Model
from reslora.diffusion.refusals import read_index
from reslora.experiment.statistics import rerun, tested, verdicts

SHORTCUTS = ("input", "block(4)", "middle(4)")
WIRED = ("reslora", *(f"reslora {kind}" for kind in SHORTCUTS))  # the first where an experiment has one kind alone
# Which label stands beside which, by hypothesis: a shortcut beside LoRA at its scale, its placebo, and larger alphas.
PAIRS = {
    "scale": {f"reslora {kind}": f"lora_matched {kind}" for kind in SHORTCUTS},
    "information": {"reslora input": "is_placebo", "reslora middle(4)": "ms_placebo"},
    "alpha x 2": dict.fromkeys(WIRED, "lora_x2"),
    "alpha x 4": dict.fromkeys(WIRED, "lora_x4"),
}


def why_tables() -> str:
    """A section of every experiment that has run, at least in part."""
    found = []
    for name, experiment in EXPERIMENTS.items():
        path = KEPT / f"{name}.json"
        if path.is_file():
            kind = "images" if experiment.script == "train_sd.py" else "examples"
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append(section(experiment.shows + when(experiment, record), record, kind))
    return "\n\n".join(found) or "*Not run yet.*"


def when(experiment: Experiment, record: Mapping) -> str:
    """That it was trained from a pipeline which has been exchanged since, if so."""
    used = record.get("identity", {}).get("model", "")
    bundled = [flag for flag in experiment.flags if flag.startswith("assets/pipeline")]
    return " (as it was bundled before)" if bundled and used and used != content(ROOT / bundled[0]) else ""


@functools.cache
def content(pipeline: Path) -> str:
    """What an experiment's identity says of a pipeline."""
    family = load_family(read_index(pipeline, str(pipeline))["_class_name"])
    return Model(pipeline, family, str(pipeline)).fingerprint()


def section(what: str, record: dict, kind: str = "images") -> str:
    """One experiment's labels, then its pairs; `kind`: of what it learns from."""
    arms, split = record["arms"], record["split"]
    ended = [arm for arm in arms if arm["status"] in ("finished", "failed")]
    # Earlier records of images have the whole part, of which no more were measured.
    select = min(split["select"], record["settings"].get("max_validation_images") or split["select"])
    parts = f"{split['train']} {kind} trained on, {select} that choose, {split['test']} that compare"
    lines = [f"**{what[:1].upper()}{what[1:]}.** {len(ended)} of {len(arms)} arms; {parts}."]
    tests = tested(arms, record["chosen"])
    if tests:
        lines += [label_table(record, tests), rerun_line(tests), pair_table(tests)]
    return "\n\n".join(filter(None, lines))


def label_table(record: dict, tests: dict[str, np.ndarray]) -> str:
    """Each label's chosen rate and checkpoint, its test loss, and LoRA beside it."""
    references = {label: "lora" for label in tests if label != "lora" and "lora" in tests}
    said = {verdict["label"]: verdict for verdict in verdicts(tests, references)}
    rows = [
        "| | rate | step | seeds | test loss | one more seed | beside LoRA | 95% | one more seed | could have shown |"
    ]
    rows.append("|---" * 10 + "|")
    for label, losses in sorted(tests.items(), key=lambda item: np.nanmean(item[1])):
        choice, verdict = record["chosen"][label], said.get(label)
        rate = f"{choice['learning_rate']:g}" + (" (end of the grid)" if choice["at_end"] else "")
        of_seeds = losses[np.isfinite(losses).all(1)].mean(1)
        cells = [label, rate, str(choice["step"]), str(len(of_seeds)), f"{of_seeds.mean():.4f}"]
        cells += [ends(rerun(of_seeds), ".4f"), *compared(verdict)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def rerun_line(tests: dict[str, np.ndarray]) -> str:
    """How often a seed, as a rerun, falls into what the others state for one more seed, and for the mean of all."""
    references = {label: "lora" for label in tests if label != "lora"}
    seeds = min(len(losses) for losses in tests.values())
    if "lora" not in tests or not references or seeds < 3:
        return ""
    of_mean, of_one, losses_of_one = [], [], []
    for seed in range(seeds):
        others = {label: np.delete(losses, seed, axis=0) for label, losses in tests.items()}
        for verdict in verdicts(others, references):
            again = 100 * (tests[verdict["label"]][seed].mean() / tests["lora"][seed].mean() - 1)
            if np.isfinite(again) and verdict["interval"] and verdict["rerun"]:
                of_mean.append(within(again, verdict["interval"]))
                of_one.append(within(again, verdict["rerun"]))
        for label, losses in others.items():
            stated, again = rerun(losses[np.isfinite(losses).all(1)].mean(1)), tests[label][seed].mean()
            if np.isfinite(again) and stated:
                losses_of_one.append(within(again, stated))
    return (
        f"Each seed as a rerun: {sum(losses_of_one)} of {len(losses_of_one)} test losses and {sum(of_one)} of "
        f"{len(of_one)} differences to LoRA lie within what the other seeds state for one more seed (95%); "
        f"{sum(of_mean)} differences within the interval of the mean."
    )


def within(value: float, stated: tuple[float, float]) -> bool:
    """Whether an interval holds it."""
    return bool(stated[0] <= value <= stated[1])


def ends(stated: tuple[float, float] | None, form: str) -> str:
    """An interval, or nothing."""
    return f"{stated[0]:{form}} to {stated[1]:{form}}" if stated else ""


def compared(verdict: Mapping | None) -> list[str]:
    """Difference, intervals and detectable size in percent; stars where Holm's correction leaves it standing."""
    if verdict is None:
        return [""] * 4
    star = "**" if verdict["conclusion"] in ("better", "worse") else ""
    difference = f"{star}{verdict['relative']:+.2f}%{star}"
    if verdict["interval"] is None:
        return [difference, "", ends(verdict["rerun"], "+.2f"), ""]
    stated = (ends(verdict[name], "+.2f") for name in ("interval", "rerun"))
    detectable = verdict["detectable"]
    return [difference, *stated, "" if detectable is None else f"{detectable:.2f}%"]


def pair_table(tests: dict[str, np.ndarray]) -> str:
    """The pairs that decide, those of a hypothesis corrected together."""
    rows = []
    for question, references in PAIRS.items():
        there = {ours: theirs for ours, theirs in references.items() if ours in tests and theirs in tests}
        for verdict in verdicts(tests, there):
            rows.append(
                "| " + " | ".join([question, verdict["label"], verdict["reference"], *compared(verdict)]) + " |"
            )
    if not rows:
        return ""
    head = "| question | label | beside | difference | 95% | one more seed | could have shown |"
    return "\n".join([head, "|---" * 7 + "|", *rows])
