"""What is seen of an experiment, as HTML: how many arms a form makes, how far they are, and the report."""

from __future__ import annotations

from pathlib import Path

from reslora.experiment.course import Course

from .activity import duration, why_ended
from .launcher import Trainings
from .library import Experiment
from .runs import RunError, number
from .views import counted, escape, notice, status_line


def plan(trainings: Trainings, name: str, settings: dict) -> str:
    """How many arms an experiment of that name would have, in a sentence; what is wrong with its settings instead.

    Images are asked for where it starts.
    """
    images = None if trainings.goes_on(name, Experiment) else Path("images")
    try:
        course = Course(trainings.settled(trainings.command(name, settings, images, Experiment)))
    except RunError as error:
        return notice(str(error))
    facts = [counted(len(course.labels), "method"), counted(len(course.given), "learning rate")]
    facts.append(counted(len(course.seeds), "seed"))
    advice = "" if len(course.seeds) > 2 else " With fewer than three seeds little can be shown."
    return notice(f"{len(course.arms())} arms: {', '.join(facts)}.{advice}")


def summary(experiment: Experiment, status: str, said: str = "") -> str:
    """How far an experiment is, and what its trainer is doing now; why it ended, where it `said` so."""
    ended, total = experiment.progress
    facts = [f"{ended} of {counted(total, 'arm')} ended"] if total else []
    each = experiment.seconds_an_arm
    if status == "running" and each is not None and ended < total:
        at_once = max(1.0, number(experiment.config.get("arms_at_once")) or 1.0)
        facts.append(f"about {duration(each * (total - ended) / at_once)} left")
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
