"""Render an experiment as HTML: how many runs the form's settings make, the progress, and the report."""

import math

from reslora.experiment.hashed_split import FEW, LEAST
from reslora.experiment.report import titled
from reslora.experiment.schedule import ArmSchedule
from reslora.formatting import enumerated, pluralize
from reslora.options.grid import Grid

from .activity import duration, why_ended
from .jobs import Jobs
from .library import Experiment
from .runs import RunError, number
from .views import NAMES, escape, notice, status_line

NONE = "There is no experiment yet: give several learning rates or seeds under Train."

HEIGHT = """<script>
new ResizeObserver(() => parent.postMessage({reportHeight: document.documentElement.offsetHeight}, "*"))
    .observe(document.documentElement);
</script>"""
"""Script in the report's frame that sends the height of the report to the page."""
LEAST_SHARE = 1e-6
"""Smallest test fraction used when counting images; it prevents a division by zero."""


def plan(jobs: Jobs, name: str, settings: dict, folder: object = None) -> tuple:
    """Return a sentence with the number of runs that the settings make, as HTML, the command's arguments, and the
    options as the trainer resolves them.

    The images in `folder` are only counted here; they are checked when training starts. Raises `RunError` for invalid
    settings.
    """
    kind = jobs.kind_of(name, settings)
    begun = jobs.begun(name, kind)
    images = jobs.images.find(folder).path if folder and not begun else None
    words, found = jobs.planned(name, settings, images, kind)
    if not isinstance(found, Grid):
        titles, steps = enumerated(NAMES[method] for method in found.adapter.method), found.training.max_train_steps
        each = f", {pluralize(steps, 'step')}{' each' if len(found.adapter.method) > 1 else ''}" if steps else ""
        return notice(f"1 run: {titles}{each}. Several learning rates or seeds make an experiment."), words, found
    schedule = ArmSchedule(found)
    try:
        advice = [] if begun else too_few(jobs, found.base.experiment.test_split or 0, folder)
    except OSError as error:
        raise RunError(f"The folder of images cannot be read ({error.strerror}).") from None
    what = "variant" if any(label.values for label in schedule.labels.values()) else "method"
    facts = [pluralize(len(schedule.labels), what), pluralize(len(schedule.given), "learning rate")]
    facts.append(pluralize(len(schedule.seeds), "seed"))
    if len(schedule.seeds) < 3:
        advice.append("Fewer than three seeds seldom show a difference.")
    known = {*schedule.labels, *(label.method for label in schedule.labels.values())}
    if schedule.reference not in known:
        advice.append(
            f"There is nothing to compare with: verdicts need {titled(schedule.reference)} among the methods."
        )
    told = " ".join([f"Experiment of {pluralize(len(schedule.arms()), 'run')}: {', '.join(facts)}.", *advice])
    return notice(told), words, found


def too_few(jobs: Jobs, share: float, folder: object) -> list[str]:
    """Return a warning, as a list, if the test split (the fraction `share` of the images) would be small; else [].

    The warning gives a range of sizes, because each image is assigned to the split by a hash of its content. The split
    counts near-duplicates as one image, but this estimate counts each of them.
    """
    images = jobs.images.count(folder, math.ceil(FEW / max(share, LEAST_SHARE)))
    least = max(min(LEAST, images - 3), 1)
    if not images or max(least, round(share * images)) >= FEW:
        return []
    spread = math.sqrt(images * share * (1 - share))  # standard deviation: each image is assigned by its content hash
    low, high = (max(least, min(round(share * images + by), images - 2)) for by in (-spread, spread))
    compare = f"{f'{low} to {high}' if low < high else low} of {pluralize(images, 'image')} are the test split"
    return [f"{compare}: so few seldom show a difference; use more images or a larger test split."]


def summary(experiment: Experiment, status: str, said: str = "") -> str:
    """Return an experiment's progress and current work as HTML.

    `said`: the last line of the log, shown only if it explains why the experiment failed or stopped early.
    """
    ended, total = experiment.progress
    facts = [f"{ended} of {pluralize(total, 'run')} finished"] if total else []
    each = experiment.seconds_an_arm
    if status == "running" and each is not None and ended < total:
        at_once = max(1.0, number(experiment.config.get("arms_at_once")) or 1.0)
        facts.append(f"about {duration(each * math.ceil((total - ended) / at_once))} left")
    if status == "stopped" and total:
        over = experiment.time_is_over
        rest = f"{over} · Resume trains for as long again" if over else "Resume trains the rest"
        facts.append(rest if ended < total else "Resume compares them")
    if status == "failed" and total:
        facts.append("all of them failed; the report gives the reasons")
    return status_line(experiment, status, escape(" \u00b7 ".join(facts)), why_ended(experiment, status, said))


def report(experiment: Experiment) -> str:
    """Return the report in a sandboxed frame, which cannot change the page."""
    content = experiment.report()
    if not content:
        return notice("The report appears when the first run has finished.")
    title = f"Report of {escape(experiment.name)}"
    return f'<iframe title="{title}" sandbox="allow-scripts" srcdoc="{escape(content + HEIGHT)}"></iframe>'
