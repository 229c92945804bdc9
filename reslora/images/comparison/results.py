"""Compare measured losses, and write the results: comparison.json, losses.csv and report.html."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...experiment.answers import COMPARISON, LOSSES
from ...experiment.losses import COLUMNS, compare_losses
from ...experiment.record import Choice, Experiment, Ranking, Verdict
from ...experiment.report import (
    document,
    headline_of,
    in_lines,
    number,
    settings_of,
    table,
    verdict_table,
    with_signs,
)
from ...experiment.statistics import LEVEL, follow
from ...experiment.verdicts import coverage_in_words
from ...formatting import pluralize, printable
from ...io import replacing, write_json
from ...plots.charts import MINUS, escape
from ..experiment.gallery import MOST_PROMPTS, gallery_of
from ..experiment.losses_by_image import by_image
from ..experiment.report_sections import timestep_chart
from ..experiment.similarity import MEANINGS
from ..experiment.split import Image
from .loras import LoraFile
from .measuring import BASE, Measured

REPORT, FORMAT = "report.html", 1
ONE_RUN = (
    "What this comparison cannot know: each file is one training run, so images are the only random effect. The result "
    "is about these very files, on images of this kind. Another run of the same method, with another seed, may rank "
    "otherwise: to compare methods, give several runs of each with --group."
)
SEVERAL_RUNS = (
    "What this comparison cannot know: how the files were trained. It is about the methods with the settings of these "
    "files; at their own best learning rates they may compare otherwise."
)
UNKNOWN = (
    "Whether a file was trained on the images is known only if its metadata say so: many files have none. A lower loss "
    "on such images shows nothing."
)
READING = (
    "A difference is the loss of a file or group minus that of the one that it is compared with; lower is better. All "
    "are measured on the same {unit}s, timesteps and noise. The {coverage} interval contains the mean difference for "
    "new {unit}s of this kind, and with groups for new seeds, in {coverage} of comparisons. A file is better or worse "
    "if p is below 0.05; p is corrected for all pairs (Holm). If a difference is not significant, there may still be "
    "one within the interval: one as large as the minimum detectable effect (MDE) is found in 4 of 5 such comparisons. "
    "Significant differences are too large on average, because only large ones become significant: <i>Expected</i> is "
    "what new {unit}s will show. These rates do not hold if you add files or change them, and compare on the same "
    "{unit}s again, until a difference is significant."
)
SHOWN = ("Verdicts", "Losses", "Images")


@dataclass(frozen=True)
class Images:
    """The images of a comparison, without near-duplicates."""

    places: list[Image]
    marks: list[str]
    """Hash of each image's content."""
    names: list[str]
    """File of each image."""
    groups: list[str]
    """Group of each image; empty without groups."""
    order: list[int]
    """Indices of the images, in the order in which the images were taken."""
    duplicates: int
    """Number of near-duplicates that were left out."""


@dataclass(frozen=True)
class Result:
    """The result of a comparison."""

    measured: Mapping[str, Sequence[Measured]]
    """Losses by label, one item for each seed."""
    images: Images
    verdicts: list[Verdict]
    ranking: Ranking | None
    notes: list[str] = field(default_factory=list)


def concluded(measured: Sequence[Measured], images: Images, reference: str | None, notes: Sequence[str]) -> Result:
    """Return the conclusions from measured losses.

    `reference`: name of the file or group that all others are compared with. None: the first file, or base if there is
    only one file.
    """
    found: dict[str, list[Measured]] = {}
    for each in measured:
        found.setdefault(each.task.label, []).append(each)
    found[BASE] = found.pop(BASE)  # the last row
    seeds, notes = max(map(len, found.values())), list(notes)
    arrays = {}
    for label, files in found.items():
        values = np.array([each.losses for each in files], float)
        if np.isfinite(values).all():
            arrays[label] = values if len(values) == seeds else np.repeat(values, seeds, 0)
        else:
            notes.append(f"{label}: not compared, because a loss is not finite")
    if len(arrays) < 2:
        return Result(found, images, [], None, [*notes, "nothing to compare"])
    first = next(label for label in arrays if reference in (None, label) or label.startswith(f"{reference} at "))
    result = compare_losses(
        arrays, first, groups=images.groups, unit="image", fixed_runs=seeds == 1,
    )  # fmt: skip
    pairs = [arrays[each["label"]] - arrays[each["reference"]] for each in result.verdicts]
    if not images.groups and any(follow(pair[:, images.order]) < LEVEL / len(pairs) for pair in pairs):
        notes.append(
            "the images look grouped: files differ alike on images that were taken one after another (by time or file "
            "name). Give their groups by a column `group` of the metadata or by --test_groups folder; without groups, "
            "too many differences are significant"
        )
    notes += [ONE_RUN if seeds == 1 else SEVERAL_RUNS, UNKNOWN]
    return Result(found, images, result.verdicts, result.ranking, notes)


def write_results(result: Result, facts: Mapping[str, Any], loras: Mapping[Path, LoraFile], folder: Path) -> None:
    """Write all results into a directory, and print the conclusions.

    `facts`: versions, timesteps and settings.
    """
    images = result.images
    write_json(
        folder / COMPARISON,
        {
            "format": FORMAT,
            **facts,
            "images": [
                {"name": name, "content": mark, **({"group": images.groups[place]} if images.groups else {})}
                for place, (name, mark) in enumerate(zip(images.names, images.marks, strict=True))
            ],
            "files": [record_of(each, loras) for files in result.measured.values() for each in files],
            "verdicts": result.verdicts,
            "ranking": result.ranking,
            "notes": result.notes,
        },
    )
    write_losses(result, folder / LOSSES)
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(page(result, facts, loras, folder), encoding="utf-8")
    print_result(result, folder)


def record_of(measured: Measured, loras: Mapping[Path, LoraFile]) -> dict[str, Any]:
    """Return the entry of comparison.json for a file."""
    task, lora = measured.task, loras.get(measured.task.path) if measured.task.path else None
    file: dict[str, Any] = {"label": task.label, "seed": task.seed}
    if lora:
        file |= {"file": str(lora.path), "strength": task.strength, "ranks": lora.ranks, "parts": lora.parts}
    loss = measured.mean if math.isfinite(measured.mean) else None
    return file | {
        "loss": loss, "losses": measured.losses, "by_timestep": measured.by_timestep,
        "similarities": measured.similarities,
    }  # fmt: skip


def write_losses(result: Result, path: Path) -> None:
    """Write the loss of each file on each image, as `compare_losses` reads it: finite losses, the reference first."""
    images, reference = result.images, {verdict["reference"] for verdict in result.verdicts}
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([*COLUMNS, *["group"] * bool(images.groups)])
        seeds = range(max(map(len, result.measured.values())))
        for label, files in sorted(result.measured.items(), key=lambda item: item[0] not in reference):
            for seed in seeds if all(math.isfinite(each.mean) for each in files) else ():
                each = files[min(seed, len(files) - 1)]  # the base model is the same for all seeds
                for place, (mark, loss) in enumerate(zip(images.marks, each.losses, strict=True)):
                    rows.writerow([label, seed, mark, loss, *images.groups[place:][:1]])


def print_result(result: Result, folder: Path) -> None:
    """Print a table of the losses, then the verdicts, the ranking and the notes."""
    verdicts = {verdict["label"]: verdict for verdict in result.verdicts}
    rows = [("", "loss", "difference", "interval", "verdict")]
    for label, files in result.measured.items():
        mean, verdict = f"{np.mean([each.mean for each in files]):.6f}", verdicts.get(label)
        if verdict is None:
            is_reference = any(each["reference"] == label for each in result.verdicts)
            rows.append((label, mean, "", "", "reference" if is_reference else ""))
            continue
        value, *ends = (
            text.replace(MINUS, "-") for text in with_signs(verdict["relative"], *verdict["interval"] or ())
        )
        word = {"not shown": "not significant"}.get(verdict["conclusion"], verdict["conclusion"])
        rows.append((label, mean, f"{value}%", " to ".join(f"{end}%" for end in ends), word))
    widths = [max(len(printable(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if level := next((verdict.get("level") for verdict in result.verdicts), None):
        print(f"difference to the reference, with {coverage_in_words(level)} intervals; lower is better")
    sentences = [verdict["sentence"] for verdict in result.verdicts]
    ranked = [result.ranking["sentence"]] if result.ranking else []
    for line in (*sentences, *ranked, *result.notes, str(folder / REPORT)):
        print(printable(line))


# -- the report --------------------------------------------------------------------------------------------------------


def page(result: Result, facts: Mapping[str, Any], loras: Mapping[Path, LoraFile], folder: Path) -> str:
    """Return the report as a complete HTML document."""
    experiment = as_experiment(result, facts)
    prompts = list(facts["settings"].get("validation_prompt", ()))[:MOST_PROMPTS]
    columns = [
        (label, files[0].task.path.name if files[0].task.path else "", files[0].samples)
        for label, files in result.measured.items()
    ]
    sections = (
        ("Verdicts", verdict_table(experiment, "image", READING)),
        ("Losses", loss_table(result, loras)),
        ("Images", gallery_of(columns, prompts, best_of(result))),
        ("Loss by timestep", timestep_chart(experiment)),
        ("Loss by image", by_image(experiment, folder)),
        ("Settings and versions", settings_of(experiment)),
    )
    headline = escape(headline_of(experiment, "image"))
    what = f"{pluralize(sum(len(files) for files in result.measured.values()) - 1, 'measurement')} of LoRA files on "
    what += pluralize(len(result.images.marks), "image")
    header = f"<p>Comparison: {what}</p><h1>{headline}</h1>{in_lines(result.notes)}"
    return document(headline, header, sections, SHOWN)


def best_of(result: Result) -> str | None:
    """Return the label with the lowest mean loss."""
    means = {label: np.mean([each.mean for each in files]) for label, files in result.measured.items()}
    return min(means, key=means.__getitem__, default=None)


def loss_table(result: Result, loras: Mapping[Path, LoraFile]) -> str:
    """Return the table of all files with their losses and similarities; HTML."""
    names = {name for files in result.measured.values() for each in files for name in each.similarities}
    shown = [name for name in MEANINGS if name in names]
    rows = []
    for label, files in result.measured.items():
        for each in files:
            lora = loras.get(each.task.path) if each.task.path else None
            ranks = " to ".join(map(str, sorted({lora.ranks[0], lora.ranks[-1]}))) if lora else ""
            file = [escape(lora.path.name), f"{each.task.strength:g}", ranks] if lora else ["", "", ""]
            rows.append([escape(label), *file, number(each.mean), *(number(each.similarities.get(n)) for n in shown)])
    found = table("Losses", ["Name", "File", "Strength", "Rank", "Loss", *(MEANINGS[n][0] for n in shown)], rows)
    return found + in_lines(f"{title}: {meaning}" for title, meaning in (MEANINGS[name] for name in shown))


def as_experiment(result: Result, facts: Mapping[str, Any]) -> Experiment:
    """Return the result as the record of an experiment, so that sections of an experiment's report can show it.

    Each file becomes a finished arm (a run of an experiment) without a method, and every label counts as chosen.
    """
    arms = [
        {
            "label": label, "method": "", "learning_rate": 0.0, "seed": seed, "status": "finished",
            "test": {"images": result.images.marks, "losses": each.losses, "by_timestep": each.by_timestep},
        }
        for label, files in result.measured.items()
        for seed, each in enumerate(files)
    ]  # fmt: skip
    chosen = {label: Choice(learning_rate=0.0, step=0, loss=0.0, at_end=None, next=None) for label in result.measured}
    found = {
        "arms": arms, "chosen": chosen, "verdicts": result.verdicts, "ranking": result.ranking, "base": None,
        "settings": facts["settings"], "versions": facts["versions"], "timesteps": facts["timesteps"],
        "split": {"test images": len(result.images.marks), "near-duplicates left out": result.images.duplicates},
    }  # fmt: skip
    return cast(Experiment, found)
