"""Write `report.html`, the self-contained report of an experiment. All text from files and users is escaped."""

import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..formatting import enumerated, is_or_are, pluralize
from ..io import replacing
from ..methods.registry import METHODS
from ..options.values import listed
from ..plots.charts import MINUS, Axes, Row, Series, chart, escape, forest
from .choice import is_chosen
from .record import ENDED_AS, ONE_RATE, Arm, Best, Experiment, Verdict, as_of_now
from .statistics import level_of, rerun
from .theme import SCRIPT, STYLE
from .verdicts import REFERENCE, coverage_in_words, mde_in_words, mean_of, percents, tested

NOTHING = "&mdash;"
OPEN = ("Verdicts", "Images")
"""Titles of the sections that come first; all others are folded."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
READING = (
    "A difference is a method's loss minus its reference's, on {unit}s that were used neither to train nor to choose; "
    "lower is better. Both have the same seeds and {unit}s. A verdict is about the methods at their chosen learning "
    "rates. The {coverage} interval contains the mean difference for new seeds and new {unit}s of this kind in "
    "{coverage} of experiments; however often seeds are added, all intervals of a method together do so in 95%. A "
    "single new seed, on these {unit}s, is in 19 of 20 cases within the range under <i>One more seed</i>. A method is "
    "better or worse if p is below 0.05; p is corrected for all pairs that were ever compared (Holm), and for the "
    "number of evaluations on the test split. If a difference is not significant, there may still be one within the "
    "interval: one as large as the minimum detectable effect (MDE) is found in 4 of 5 such experiments; a few seeds "
    "determine it only roughly. Significant differences are too large on average, because only large ones become "
    "significant: <i>Expected</i> is what new experiments will find. <i>Of the gain</i> is the difference as a "
    "percentage of what training gains over the model before it."
)
UNCERTAIN = {
    "better": "It is better than {reference}: chance makes such a difference in at most 5 of 100 experiments.",
    "worse": "It is worse than {reference} on the test {unit}s, although the selection split chose it.",
    "not shown": "This experiment does not show whether it is better than {reference}: add seeds to find out.",
    "cannot tell": "It cannot be told from {reference}: that needs two or more seeds and test {unit}s.",
}
"""Sentence about the best run, by the conclusion of its method's verdict."""


@dataclass(frozen=True)
class About:
    """The parts of a report that differ between images and texts."""

    unit: str
    """Word for the item that a loss belongs to: image or example."""
    columns: Mapping[str, tuple[str, str]]
    """Title and description of each metric that is measured in addition to the test loss, by name."""
    uses: Mapping[str, str]
    """How to use each file of the best arm, by name, most useful first; `{folder}` is the experiment's directory."""
    sections: Callable[[Experiment, Path], Sequence[tuple[str, str]]] = lambda *_: ()
    """Return the titles and HTML of additional sections, from the experiment and its directory."""
    losses: str = ""
    """Sentence that explains why the report's losses differ from those that the trainer prints."""
    steps: str = ""
    """Option for the number of steps of a single run."""
    script: str = ""
    """Script that accepts --config; empty if there is none."""


def write_report(experiment: Experiment, folder: Path, about: About) -> None:
    """Write `report.html` into the experiment's directory, atomically; it embeds the arms' samples."""
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page(experiment, folder, about), encoding="utf-8")


def page(experiment: Experiment, folder: Path, about: About) -> str:
    """Return the complete HTML document."""
    experiment, unit = as_of_now(experiment), about.unit
    as_of = experiment.get("as_of")
    headline = escape(headline_of(experiment, unit))
    sections = (
        ("Verdicts", verdict_table(experiment, unit)),
        ("What to use", what_to_use(experiment, about)),
        ("What is missing", missing(experiment)),
        ("Chosen on the selection split", chosen_table(experiment)),
        ("Runs", arm_table(experiment, about)),
        ("Loss on the selection split", select_charts(experiment, about.losses)),
        *about.sections(experiment, folder),
        ("Settings and versions", settings_of(experiment)),
    )
    told = (with_titles(experiment, note) for note in experiment["notes"])
    notes = in_lines([*told, *of_two_seeds(experiment)])
    notes = f"<p>As of {pluralize(as_of, 'run')}:</p>{notes}" if as_of and notes else notes
    split = experiment["split"]
    arms = pluralize(len(experiment["arms"]), "run")
    parts = f"{split['train']} {unit}s to train on, {split['select']} to select by, {split['test']} to test with"
    header = f"<p>Experiment: {arms}, {parts}</p><h1>{headline}</h1>{notes}{lead(experiment, unit)}"
    return document(headline, header, sections)


def document(title: str, header: str, sections: Iterable[tuple[str, str]], shown: Sequence[str] = OPEN) -> str:
    """Return a complete HTML document of a header and sections with titles; empty sections are left out.

    The sections `shown` come first; all others are folded. Everything but the names in `shown` is HTML.
    """
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>" if name in shown else folded(f"<h2>{name}</h2>", content)
        for name, content in sorted(sections, key=lambda section: section[0] not in shown)
        if content
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><header>{header}</header>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


# -- verdicts ----------------------------------------------------------------------------------------------------------


def headline_of(experiment: Experiment, unit: str) -> str:
    """Return the main result as one sentence."""
    verdicts, total = experiment["verdicts"], len(experiment["arms"])
    ended = sum(arm["status"] in ENDED_AS for arm in experiment["arms"])
    so_far = f"So far, with {ended} of {total} runs: " if ended < total else ""
    if verdicts and "as_of" in experiment:
        so_far = f"As of {pluralize(experiment['as_of'], 'run')}, with {ended} of {total} ended: "
    if not verdicts:
        finished = any(arm["status"] == "finished" for arm in experiment["arms"])
        none = "Nothing is compared yet" if finished and not experiment["chosen"] else "There is nothing to compare"
        if len(experiment["chosen"]) == 1 and len(labels_of(experiment)) == 1:
            ((label, choice),) = experiment["chosen"].items()
            none = f"{titled(label)} does best at learning rate {rate(choice['learning_rate'])}, step {choice['step']}"
        return f"{so_far}nothing to compare yet" if so_far else none
    if ranking := experiment.get("ranking"):
        return so_far + ranking_in_words(ranking["best"], [each["label"] for each in ranking["worse"]])
    return so_far + summary_of(verdicts)


def ranking_in_words(best: Sequence[str], worse: Sequence[str]) -> str:
    """Return which methods are the best and which are worse; many of them are counted."""
    if len(best) == 1:
        return f"{titled(best[0])} is better than {few(worse)}"
    rest = f"; {few(worse)} {'is' if len(worse) == 1 else 'are'} worse" if worse else ""
    return f"{few(best)} could not be told apart{rest}"


def few(labels: Sequence[str]) -> str:
    """Return up to four names of methods, or how many there are."""
    return enumerated(map(titled, labels)) if len(labels) <= 4 else pluralize(len(labels), "method")


def titled(label: str) -> str:
    """Return a label with the name of its method as it is written in texts, such as ResLoRA block(4)."""
    method, space, variant = label.partition(" ")
    return f"{METHODS[method].title}{space}{variant}" if method in METHODS else label


def with_titles(experiment: Experiment, text: str) -> str:
    """Return a sentence of the experiment's file with the names of methods as they are written in texts."""
    labels = sorted(map(re.escape, labels_of(experiment)), key=len, reverse=True)
    found = rf"(?<!--method )(?<![\w/.-])({'|'.join(labels)})(?![\w/.-])"
    return re.sub(found, lambda match: titled(match[1]), text) if labels else text


def summary_of(verdicts: Sequence[Verdict]) -> str:
    """Return a sentence about verdicts without a ranking: with one seed, or in an older file."""
    kinds = dict.fromkeys(verdict["reference"] for verdict in verdicts)
    if len(kinds) > 1:
        shown = [verdict for verdict in verdicts if verdict["conclusion"] in ("better", "worse")]
        if len(shown) == 1:
            (each,) = shown
            return f"{titled(each['label'])} is {each['conclusion']} than {titled(each['reference'])}"
        return f"{len(shown) or 'none'} of {len(verdicts)} differences {is_or_are(len(shown) or 1)} significant"
    references = few(list(kinds))
    better = [verdict["label"] for verdict in verdicts if verdict["conclusion"] == "better"]
    if better:
        return f"{few(better)} {'is' if len(better) == 1 else 'are'} better than {references}"
    return f"{few([verdict['label'] for verdict in verdicts])} and {references} could not be told apart"


def of_two_seeds(experiment: Experiment) -> list[str]:
    """Return a note that two seeds show only large differences, if no verdict has more."""
    most = max((verdict["seeds"] for verdict in experiment["verdicts"]), default=0)
    return ["two seeds show only large differences: add one or more, now or by a later start"] if most == 2 else []


def verdict_table(experiment: Experiment, unit: str, explanation: str = READING) -> str:
    """Return the verdicts as a forest plot and, folded, as sentences and a table; HTML.

    `explanation`: how to read the table, with places for the coverage of the intervals and the word for a test item.
    """
    verdicts = experiment["verdicts"]
    rows = []
    for verdict in verdicts:
        expected, gain = verdict.get("expected"), verdict.get("of_gain")
        p = verdict["p_holm"]
        rows.append(
            [
                escape(titled(verdict["label"])),
                badge(verdict["conclusion"]),
                f"{signed(verdict['relative'])}%",
                between(verdict["interval"]),
                f"{signed(expected)}%" if expected is not None else NOTHING,
                f"{signed(gain)}%" if gain is not None else NOTHING,
                between(verdict["rerun"]),
                NOTHING if p is None else f"{p:.3f}" if p >= 0.001 else "&lt; 0.001",
                mde_in_words(verdict).removeprefix("about ") or "not known",
                f"{verdict['seeds']} &times; {verdict['images']}",
            ]
        )
    coverage = coverage_of(experiment)
    names = ["Method", "Verdict", "Difference", f"{coverage} interval", "Expected", "Of the gain", "One more seed"]
    names += ["p (corrected)", "MDE", f"Seeds &times; {unit}s"]
    sentences, reading = (
        in_lines(with_titles(experiment, verdict["sentence"]) for verdict in verdicts),
        explanation.format(unit=unit, coverage=coverage),
    )
    kinds = dict.fromkeys(arm["method"] for arm in experiment["arms"])
    methods = in_lines(f"{titled(kind)}: {METHODS[kind].help}" for kind in kinds if kind in METHODS)
    numbers = f"{sentences}{methods}<p>{reading}</p>{table('Verdicts', names, rows, cards=True)}"
    return verdict_plot(experiment) + (folded("All numbers, and how to read them", numbers) if verdicts else "")


def folded(title: str, content: str) -> str:
    """Return a part of the report that is hidden until a click on its title; HTML."""
    return f"<details><summary>{title}</summary>{content}</details>"


def coverage_of(experiment: Experiment) -> str:
    """Return the coverage of the verdicts' intervals as text; earlier versions did not store it with the verdicts."""
    levels = (verdict.get("level") for verdict in experiment["verdicts"])
    return coverage_in_words(next(filter(None, levels), level_of(max(1, experiment.get("readings", 1)))))


def verdict_plot(experiment: Experiment) -> str:
    """Return a forest plot of the difference of each method, and of the model before training, from the reference."""
    verdicts = experiment["verdicts"]
    references = list(dict.fromkeys(verdict["reference"] for verdict in verdicts))
    places = {label: number for number, label in enumerate(labels_of(experiment))}
    rows = []
    for verdict in verdicts:
        value, *ends = with_signs(verdict["relative"], *verdict["interval"] or ())
        text = f"{value}%" + (f" ({' to '.join(ends)}%)" if ends else "")
        name = titled(verdict["label"]) + ("" if len(references) == 1 else f" / {titled(verdict['reference'])}")
        rows.append(Row(name, places.get(verdict["label"], 0), verdict["relative"], verdict["interval"], text))
    losses, base = tested(experiment["arms"], experiment["chosen"]), mean_of(experiment.get("base"))
    if rows and base is not None and references[0] in losses:
        theirs = losses[references[0]].mean(1)  # NaN if a loss is not finite
        more = 100 * (base / np.nanmean(theirs) - 1)
        name = f"{start_in_words(experiment['settings'])}, before training"
        rows.append(Row(name, len(places), more, None, f"{with_signs(more)[0]}%"))
    title = f"Test loss compared with {few(references)}, with {coverage_of(experiment)} intervals"
    return f'<div class="charts">{forest(title, rows, "percent; left of 0 is better")}</div>' if rows else ""


def start_in_words(settings: Mapping[str, Any]) -> str:
    """Return what the arms are trained from: the base model, or base model plus the LoRA of --init_lora."""
    return "initial LoRA" if settings.get("init_lora") else "base model"


def best_in_words(best: Best) -> str:
    """Return a line that names the exported files, and the arm from which they were exported."""
    files = enumerated(map(with_slash, best["files"])) + (" are those" if len(best["files"]) > 1 else " is that")
    return f"{files} of {best['folder']} at step {best['step']}, which does best on the selection split"


def with_slash(name: str) -> str:
    """Return a file's name, with a slash if it is a directory, which has no suffix."""
    return name if Path(name).suffix else f"{name}/"


def lead(experiment: Experiment, unit: str) -> str:
    """Return a paragraph with the best run and how certain it is to be the best; empty until it is known; HTML."""
    best = experiment.get("best")
    if not best:
        return ""
    of_best = f"{titled(best['label'])} at learning rate {rate(best['learning_rate'])}, {best['step']} steps"
    tied = len((experiment.get("ranking") or {"best": []})["best"]) > 1
    what = f"No clear winner: the files are those of {of_best}" if tied else f"Use {of_best}"
    said = certainty(experiment, best["label"], unit)
    if any(note.startswith(ONE_RATE) for note in experiment["notes"]):
        said += " All methods had this learning rate only: at their own best rates they may compare otherwise."
    if len({arm["seed"] for arm in experiment["arms"]}) > 1:
        return f'<p class="lead"><b>{escape(what)}.</b> {escape(said)}</p>'
    return f'<p class="lead">{escape(what)}. {escape(said)}</p>'


def what_to_use(experiment: Experiment, about: About) -> str:
    """Return how to use each file of the best run, and the command that repeats the run on all data; HTML."""
    best = experiment.get("best")
    if not best:
        return ""
    folder = Path(experiment["settings"].get("output_dir", ".")).absolute()
    found = f"<p>{escape(best_in_words(best))}:</p>"
    files = (
        f"<li><b>{escape(with_slash(file))}</b>: {escape(use.format(folder=folder))} {copied(str(folder / file))}</li>"
        for file, use in about.uses.items()
        if file in best["files"]
    )
    found += f"<ul>{''.join(files)}</ul>"
    if command := command_of(best, folder, about):
        found += (
            f"<p>The {about.unit}s of the selection and test splits were not trained on. To train the same on all "
            f"{about.unit}s:</p>{copied(command)}"
        )
        settings = experiment["settings"] | best["options"]
        scheduler, planned = settings.get("lr_scheduler", "constant"), settings.get("max_train_steps")
        if not scheduler.startswith("constant") and planned not in (None, best["step"]):
            found += (
                f"<p>The {escape(scheduler)} schedule of the learning rate ends at step {best['step']} there; in the "
                f"experiment, it would have ended at step {planned}.</p>"
            )
    elif average := best.get("average"):
        option = f"--average_checkpoints {average}"
        found += f"<p>A single run makes such an average with {escape(option)} and --save_best.</p>"
    return found


def certainty(experiment: Experiment, label: str, unit: str) -> str:
    """Return a sentence about how certain it is that a method is the best; empty if nothing is compared."""
    ranking = experiment.get("ranking")
    best = ranking["best"] if ranking else []
    others = [name for name in best if name != label]
    if others and label in best:
        return (
            f"It has the lowest loss on the selection split; this experiment does not show a difference from "
            f"{few(others)}."
        )
    for verdict in experiment["verdicts"]:
        if verdict["label"] == label:
            said = UNCERTAIN.get(verdict["conclusion"], "")
            return said.format(reference=titled(verdict["reference"]), unit=unit)
    return "It is better than every other method." if best == [label] else ""


def command_of(best: Best, folder: Path, about: About) -> str:
    """Return the command that repeats the best run on all data; empty if there is none."""
    if not about.script or "options" not in best or "average" in best:
        return ""
    words = ["accelerate", "launch", about.script, "--config", str(folder / "config.json")]
    for name, value in best["options"].items():
        switch = isinstance(value, bool)
        words += [f"--no-{name}" if value is False else f"--{name}"] + ([] if switch else list(map(str, listed(value))))
    words += [about.steps, str(best["step"]), "--output_dir", f"{folder}-all"]
    return shlex.join(words)


def copied(text: str) -> str:
    """Return a line of code with a button that copies it; HTML."""
    button = f'<button type="button" data-copy="{escape(text)}">Copy</button>'
    return f'<span class="copied"><code>{escape(text)}</code>{button}</span>'


def signed(percent: float) -> str:
    """Return a percentage with its sign; HTML."""
    return f"{'&minus;' if percent < 0 else '+'}{percents(percent)[0]}" if percent else "0"


def with_signs(*values: float) -> list[str]:
    """Return numbers as text with their signs and the decimal places that `percents` gives them."""
    signs = (MINUS if value < 0 else "+" if value else "" for value in values)
    return [sign + size for sign, size in zip(signs, percents(*values), strict=True)]


def between(ends: tuple[float, float] | None, in_words: Callable[[float], str] = lambda end: f"{signed(end)}%") -> str:
    """Return an interval as text, by default in percent; HTML."""
    return " to ".join(map(in_words, ends)) if ends else NOTHING


# -- tables ------------------------------------------------------------------------------------------------------------


def chosen_table(experiment: Experiment) -> str:
    """Return the table of each method's chosen learning rate and checkpoint, with their losses; HTML."""
    arms = {arm["label"]: arm for arm in experiment["arms"]}
    tests = {label: losses.mean(1) for label, losses in tested(experiment["arms"], experiment["chosen"]).items()}
    rows = []
    for label, choice in experiment["chosen"].items():
        at_end = ""
        if choice["at_end"]:
            which = {"low": "lowest", "high": "highest"}[choice["at_end"]]
            at_end = which + (f"; next: {rate(choice['next'])}" if choice["next"] else "")
        arm = arms.get(label)
        wired = (arm["shortcut"] if arm else None) or NOTHING
        numbers = [rate(choice["learning_rate"]), str(choice["step"]), number(choice["loss"])]
        losses = finite(tests.get(label, ()))
        numbers += [number(statistics.fmean(losses)) if losses else NOTHING, between(rerun(losses, least=0), number)]
        kind = [str(arm["rank"]) if arm else NOTHING, wired]
        rows.append([escape(titled(label)), *numbers, *kind, *costs_of(experiment, label), at_end])
    base = mean_of(experiment.get("base"))
    if rows and base is not None:
        selected = number(experiment.get("base_select"))
        rows.append([start_in_words(experiment["settings"]), NOTHING, "0", selected, number(base), *[NOTHING] * 6, ""])
    names = ["Method", "Learning rate", "Step", "Selection loss", "Test loss", "One more seed", "Rank", "Shortcut"]
    names += ["Time", "Memory", "File", "Rate at the end of the range"]
    note = (
        "<p>For each method, the learning rate and step with the lowest mean loss, over seeds, on the selection split, "
        "on which no method was trained. Time: until that step, mean over seeds. Memory: the most of any seed. File: "
        "the exported LoRA.</p>"
    )
    return (note if rows else "") + table("Chosen on the selection split", names, rows)


def costs_of(experiment: Experiment, label: str) -> list[str]:
    """Return time, memory and file size of a method at its chosen learning rate and step, as text."""
    arms = [arm for arm in experiment["arms"] if arm["label"] == label and is_chosen(arm, experiment["chosen"])]
    step = str(experiment["chosen"][label]["step"])
    times = [time for arm in arms if (time := arm.get("seconds_by_step", {}).get(step)) is not None]
    memory = max((arm["memory_bytes"] or 0 for arm in arms), default=0)
    size = max((arm.get("file_bytes") or 0 for arm in arms), default=0)
    return [
        duration(statistics.fmean(times)) if times else NOTHING,
        f"{memory / 2**30:.2f} GiB" if memory else NOTHING,
        f"{size / 2**20:.3g} MiB" if size else NOTHING,
    ]


def arm_table(experiment: Experiment, about: About) -> str:
    """Return the table of all arms with their losses, time and memory; HTML."""
    rows: list[list[str]] = []
    marked = set()
    measured = {name for arm in experiment["arms"] for name in beside_loss(arm)}
    shown = [name for name in about.columns if name in measured]
    for arm in experiment["arms"]:
        if is_chosen(arm, experiment["chosen"]):
            marked.add(len(rows))
        reason = f'<div class="reason">{escape(arm["reason"])}</div>' if arm["reason"] else ""
        memory, figures = arm["memory_bytes"], beside_loss(arm)
        rows.append(
            [
                escape(titled(arm["label"])),
                rate(arm["learning_rate"]),
                str(arm["seed"]),
                badge(arm["status"]) + reason,
                number(min(finite(arm["select_by_step"].values()), default=math.nan)),
                number(mean_of(arm["test"])),
                str(arm["steps"]),
                duration(arm["seconds"]),
                f"{memory / 2**30:.2f} GiB" if memory else NOTHING,
                *(number(figures.get(name)) for name in shown),
            ]
        )
    names = ["Method", "Learning rate", "Seed", "Status", "Lowest selection loss", "Test loss", "Steps", "Time"]
    names += ["Memory"]
    found = table("Runs", [*names, *(about.columns[name][0] for name in shown)], rows, marked)
    meanings = in_lines(f"{title}: {meaning}" for title, meaning in (about.columns[name] for name in shown))
    shaded = " Shaded: at the chosen rate." if marked else ""
    note = f"<p>A run is one training: a method with one learning rate and one seed.{shaded}</p>"
    return (note + times_of(experiment) if rows else "") + found + meanings


def times_of(experiment: Experiment) -> str:
    """Return a paragraph with the time of training, measurements, tests and exports; empty until known; HTML."""
    known = [arm for arm in experiment["arms"] if arm.get("measuring_seconds") is not None]
    if not known:
        return ""
    training, measuring = (sum(arm[name] or 0 for arm in known) for name in ("seconds", "measuring_seconds"))
    times = [("training", training), ("measuring", measuring), ("tests and exports", experiment.get("test_seconds", 0))]
    return f"<p>Time: {', '.join(f'{name} {duration(seconds)}' for name, seconds in times)}.</p>"


def beside_loss(arm: Arm) -> dict[str, float]:
    """Return the metrics of an arm on the test split other than the loss."""
    test = arm["test"]
    return test.get("similarities", {}) | test.get("figures", {}) if test else {}


def table(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], marked: Iterable[int] = (), cards: bool = False
) -> str:
    """Return a table that scrolls horizontally if it is too wide; the cells are HTML. Empty without rows.

    With `cards`, each row is a list on a narrow screen.
    """
    if not rows:
        return ""
    marked, kind = set(marked), " class=cards" * cards
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(
        f'<tr{" class=chosen" * (place in marked)}><th scope="row">{first}</th>'
        + "".join(
            f"<td{' class=long' * (len(cell) > 60 and '<' not in cell)} data-name='{name}'>{cell}</td>"
            for name, cell in zip(names[1:], rest, strict=True)
        )
        + "</tr>"
        for place, (first, *rest) in enumerate(rows)
    )
    return (
        f'<div class="scroll tall" role="region" aria-label="{escape(title)}" tabindex="0"><table{kind}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def badge(word: str) -> str:
    """Return a status or conclusion as a colored badge; HTML."""
    text = "not significant" if word == "not shown" else word
    return f'<span class="badge {escape(word)}">{escape(text)}</span>'


def rate(value: float) -> str:
    """Return a learning rate as text, as in the names of folders."""
    return f"{value:g}"


def number(loss: float | None) -> str:
    """Return a loss as text; a dash if it is missing or not finite."""
    return f"{loss:.5f}" if loss is not None and math.isfinite(loss) else NOTHING


def duration(seconds: float) -> str:
    """Return a duration as text in at most two of hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes > 59:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the finite values."""
    return [value for value in values if value is not None and math.isfinite(value)]


# -- curves ------------------------------------------------------------------------------------------------------------


def labels_of(experiment: Experiment) -> list[str]:
    """Return all methods in the given order."""
    return list(dict.fromkeys(arm["label"] for arm in experiment["arms"]))


def select_charts(experiment: Experiment, losses: str = "") -> str:
    """Return two charts of the loss on the selection split; HTML.

    The first shows the loss by learning rate, at the step with the lowest mean over seeds. The second shows the loss by
    step, at the chosen learning rate. Learning rates at which a seed failed are left out: they cannot be chosen,
    although their losses may be lower. An arm that was stopped early is a dot at its last loss. `losses`: a sentence to
    add to the note below the charts.
    """
    by_rate, by_step, stopped = [], [], False
    for place, label in enumerate(labels_of(experiment)):
        arms = [arm for arm in experiment["arms"] if arm["label"] == label]
        failed = {arm["learning_rate"] for arm in arms if arm["status"] == "failed"}
        arms = [arm for arm in arms if arm["select_by_step"] and arm["learning_rate"] not in failed]
        choice = experiment["chosen"].get(label)
        tried, steps = Series(titled(label), place), Series(titled(label), place)
        for learning_rate in sorted({arm["learning_rate"] for arm in arms}):
            here = [arm for arm in arms if arm["learning_rate"] == learning_rate]
            curves = [curve_of(arm) for arm in here if arm["status"] != "stopped"]
            short = [curve_of(arm) for arm in here if arm["status"] == "stopped"]
            tried.dots += [(learning_rate, curve[max(curve)]) for curve in short]
            stopped = stopped or bool(short)
            if not curves:
                continue
            common = sorted(set(curves[0]).intersection(*curves))
            means = {step: statistics.fmean(curve[step] for curve in curves) for step in common}
            means = {step: mean for step, mean in means.items() if math.isfinite(mean)}
            if not means:
                continue
            best = min(means, key=means.__getitem__)  # of equal losses the first
            tried.line.append((learning_rate, means[best]))
            tried.dots += [(learning_rate, curve[best]) for curve in curves]
            if choice and choice["learning_rate"] == learning_rate:
                tried.chosen = learning_rate, choice["loss"]
                steps.chosen = choice["step"], choice["loss"]
                steps.line = list(means.items())
                steps.dots = [point for curve in curves for point in curve.items()]
        by_rate.append(tried)
        by_step.append(steps)
    rates = sorted({x for series in by_rate for x, _ in (*series.line, *series.dots)})
    base, place = experiment.get("base_select"), len(by_rate)
    if base is not None and rates:
        line, start = [(tried, base) for tried in rates], start_in_words(experiment["settings"])
        by_rate.append(Series(start, place, line, line))
        by_step += [Series(start, place, [(0, base)], [(0, base)])] if any(series.line for series in by_step) else []
    rate_axes = Axes("By learning rate, each at its best step", "learning rate", "loss", rates, rate)
    found = chart(by_rate, rate_axes) + chart(by_step, Axes("By step, at the chosen rate", "step", "loss"))
    note = "A line is the mean over seeds, a dot one seed (hollow: above the edge), a ring what was chosen."
    if any(arm["status"] == "failed" for arm in experiment["arms"]):
        note += " Rates at which a seed failed are left out."
    if stopped:
        note += " A dot off the line is a run that was stopped early, at its last loss."
    note += f" {losses}" * bool(losses)
    return f'<div class="charts">{found}</div><p>{note}</p>' if found else ""


def curve_of(arm: Arm) -> dict[int, float]:
    """Return an arm's loss on the selection split by step, with NaN for non-finite losses."""
    return {int(step): math.nan if loss is None else loss for step, loss in arm["select_by_step"].items()}


# -- the rest ----------------------------------------------------------------------------------------------------------


def settings_of(experiment: Experiment) -> str:
    """Return collapsed tables of options, versions and split sizes; HTML."""
    told = experiment["settings"].items()
    settings = {name: value for name, value in told if value is not False and value not in (None, "", [])}
    found = ""
    for title, content in (
        ("Settings", settings),
        ("Versions", experiment["versions"]),
        ("Split", experiment["split"]),
    ):
        rows = [[escape(name), escape(in_words(value))] for name, value in content.items()]
        if rows:
            found += f"<details><summary>{title}</summary>{table(title, ('Name', 'Value'), rows)}</details>"
    return found


def in_words(value: object) -> str:
    """Return an option's value as text; of an absolute path outside the working directory only the last component."""
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    path = Path(str(value))
    if not path.is_absolute():
        return str(value)
    return str(path.relative_to(Path.cwd())) if Path.cwd() in path.parents else path.name


def missing(experiment: Experiment) -> str:
    """Return a list of arms that have failed or not ended, and of methods that are not compared; HTML."""
    lines: list[str] = []
    for status, what in (("running", "in training"), ("waiting", "not trained yet"), ("failed", "failed")):
        counted = Counter(arm["label"] for arm in experiment["arms"] if arm["status"] == status)
        lines += [f"{titled(label)}: {pluralize(arms, 'run')} {what}" for label, arms in counted.items()]
    compared = {verdict["label"] for verdict in experiment["verdicts"]}
    references = {verdict["reference"] for verdict in experiment["verdicts"]}
    compared |= references or set(experiment.get("references", [REFERENCE]))
    lines += [f"{titled(label)}: not compared" for label in labels_of(experiment) if label not in compared]
    return in_lines(lines)


def in_lines(lines: Iterable[str]) -> str:
    """Return lines as an HTML list; empty without any."""
    entries = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{entries}</ul>" if entries else ""
