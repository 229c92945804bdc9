"""What is seen of an experiment, as HTML: how many arms a form makes, how far they are, and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from reslora.experiment.hashed_split import FEW, LEAST
from reslora.experiment.schedule import Course
from reslora.experiment.statistics import REFERENCE
from reslora.formatting import pluralize
from reslora.options.grid import Grid

from .activity import duration, why_ended
from .jobs import Jobs
from .launcher import ALONE
from .library import Experiment
from .runs import RunError, number
from .views import escape, notice, status_line

LEAST_SHARE = 1e-6
"""To compare by, as far as images are counted for it."""


def plan(jobs: Jobs, name: str, settings: dict, folder: object = None, uploads: Sequence[str] = ()) -> str:
    """How many arms an experiment of that name would have, in a sentence; what is wrong with its settings instead.

    Images, of a folder on the list or uploaded, are asked for where it starts; here they are only counted.
    """
    images = None if jobs.goes_on(name, Experiment) else Path("images")
    try:
        grid = jobs.resolved(jobs.command(name, settings, images, Experiment))
        if not isinstance(grid, Grid):
            raise RunError(ALONE)
        course = Course(grid)
        advice = [] if images is None else too_few(jobs, course.grid.base.experiment.test_split or 0, folder, uploads)
    except RunError as error:
        return notice(str(error))
    except OSError as error:
        return notice(f"The folder of images cannot be read ({error.strerror}).")
    facts = [pluralize(len(course.labels), "method"), pluralize(len(course.given), "learning rate")]
    facts.append(pluralize(len(course.seeds), "seed"))
    if len(course.seeds) < 3:
        advice.append("With fewer than three seeds little can be shown.")
    if all(label.method != REFERENCE for label in course.labels.values()):
        advice.append(f"Nothing to compare with: verdicts need {REFERENCE} among the methods.")
    return notice(" ".join([f"{pluralize(len(course.arms()), 'arm')}: {', '.join(facts)}.", *advice]))


def too_few(jobs: Jobs, share: float, folder: object, uploads: Sequence[str]) -> list[str]:
    """A sentence where about so few images compare that the trainer will warn; none where no image is a file.

    How many goes by the content of the images, and of near-duplicates one compares.
    """
    images = jobs.images.count(folder, uploads, math.ceil(FEW / max(share, LEAST_SHARE)))
    least = max(min(LEAST, images - 3), 1)
    if not images or max(least, round(share * images)) >= FEW:
        return []
    spread = math.sqrt(images * share * (1 - share))  # each image is chosen by its content
    low, high = (max(least, min(round(share * images + by), images - 2)) for by in (-spread, spread))
    compare = f"{f'{low} to {high}' if low < high else low} of {pluralize(images, 'image')} will compare"
    return [f"{compare}: so few seldom show that a difference is real; give more images, or a larger test split."]


def summary(experiment: Experiment, status: str, said: str = "") -> str:
    """How far an experiment is, and what its trainer is doing now; why it ended, where it `said` so."""
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
    """The report in a frame of its own, which can do nothing to the page."""
    content = experiment.report()
    if not content:
        return notice("The report comes with the first arm.")
    title = f"Report of {escape(experiment.name)}"
    return f'<iframe title="{title}" sandbox="allow-scripts" srcdoc="{escape(content)}"></iframe>'
