"""Render an experiment as HTML: the number of runs that its settings make, its progress, and its report."""

import math
from collections.abc import Sequence
from pathlib import Path

from reslora.experiment.hashed_split import FEW, LEAST
from reslora.experiment.schedule import ArmSchedule
from reslora.formatting import pluralize

from .activity import duration, why_ended
from .jobs import Jobs
from .library import Experiment
from .runs import RunError, number
from .views import escape, notice, status_line

LEAST_SHARE = 1e-6
"""Smallest test fraction used when counting images; it prevents a division by zero."""


def plan(jobs: Jobs, name: str, settings: dict, folder: object = None, uploads: Sequence[str] = ()) -> str:
    """Return a sentence with the number of runs (arms) of an experiment, or with what is wrong with its settings.

    The images (in `folder`, or uploaded) are only counted here; they are checked when the experiment starts.
    """
    images = None if jobs.begun(name, Experiment) else Path("images")
    try:
        schedule = ArmSchedule(jobs.resolved(jobs.command(name, settings, images, Experiment)))
        advice = [] if images is None else too_few(jobs, schedule.grid.base.experiment.test_split or 0, folder, uploads)
    except RunError as error:
        return notice(str(error))
    except OSError as error:
        return notice(f"The folder of images cannot be read ({error.strerror}).")
    facts = [pluralize(len(schedule.labels), "method"), pluralize(len(schedule.given), "learning rate")]
    facts.append(pluralize(len(schedule.seeds), "seed"))
    if len(schedule.seeds) < 3:
        advice.append("With fewer than three seeds little can be shown.")
    known = {*schedule.labels, *(label.method for label in schedule.labels.values())}
    if schedule.reference not in known:
        advice.append(f"Nothing to compare with: verdicts need {schedule.reference} among the methods.")
    return notice(" ".join([f"{pluralize(len(schedule.arms()), 'arm')}: {', '.join(facts)}.", *advice]))


def too_few(jobs: Jobs, share: float, folder: object, uploads: Sequence[str]) -> list[str]:
    """Return a warning if the test split, a fraction `share` of the images, would be small; else an empty list.

    The warning gives a range, because each image is assigned to the split by a hash of its content. Near-duplicates
    count as one image in the split, but are not detected here.
    """
    images = jobs.images.count(folder, uploads, math.ceil(FEW / max(share, LEAST_SHARE)))
    least = max(min(LEAST, images - 3), 1)
    if not images or max(least, round(share * images)) >= FEW:
        return []
    spread = math.sqrt(images * share * (1 - share))  # standard deviation: each image is assigned by its content hash
    low, high = (max(least, min(round(share * images + by), images - 2)) for by in (-spread, spread))
    compare = f"{f'{low} to {high}' if low < high else low} of {pluralize(images, 'image')} will compare"
    return [f"{compare}: so few seldom show that a difference is real; give more images, or a larger test split."]


def summary(experiment: Experiment, status: str, said: str = "") -> str:
    """Return an experiment's progress and current work as HTML.

    `said`: the last line of the log, which is shown if it explains why the experiment failed or stopped early.
    """
    ended, total = experiment.progress
    facts = [f"{ended} of {pluralize(total, 'arm')} ended"] if total else []
    each = experiment.seconds_an_arm
    if status == "running" and each is not None and ended < total:
        at_once = max(1.0, number(experiment.config.get("arms_at_once")) or 1.0)
        facts.append(f"about {duration(each * math.ceil((total - ended) / at_once))} left")
    if status == "stopped" and total:
        over = experiment.time_is_over
        rest = f"{over} · Go on trains for as long again" if over else "Go on trains the rest"
        facts.append(rest if ended < total else "Go on compares them")
    if status == "failed" and total:
        facts.append("none of them well, as the report says")
    return status_line(experiment, status, escape(" \u00b7 ".join(facts)), why_ended(experiment, status, said))


def report(experiment: Experiment) -> str:
    """Return the report in a sandboxed frame, which cannot change the page."""
    content = experiment.report()
    if not content:
        return notice("The report comes with the first arm.")
    title = f"Report of {escape(experiment.name)}"
    return f'<iframe title="{title}" sandbox="allow-scripts" srcdoc="{escape(content)}"></iframe>'
