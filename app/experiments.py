"""What is seen of an experiment, as HTML: how many arms a form makes, how far they are, and the report."""

from __future__ import annotations

from reslora.diffusion.arguments import Flags, build_parser
from reslora.diffusion.settings import fill_defaults, is_experiment
from reslora.experiment.course import Course

from .activity import duration
from .launcher import ALONE, arguments, with_more
from .library import Experiment
from .runs import RunError
from .views import counted, escape, notice, status_line


def plan(settings: dict, begun: Experiment | None = None) -> str:
    """How many arms the settings make, in a sentence; what is wrong with them instead, where they make none.

    `begun`: the experiment that they are added to.
    """
    try:
        if begun is not None:
            settings = {name: begun.config.get(name) for name in settings} | with_more(begun, settings)
        flags = settled(arguments(settings))
        if not is_experiment(vars(flags)):
            return notice(ALONE)
        course = Course(flags)
        arms = course.arms()
    except (RunError, ValueError) as error:
        return notice(str(error))
    facts = [counted(len(course.labels), "method"), counted(len(course.given), "learning rate")]
    facts.append(counted(len(course.seeds), "seed"))
    advice = "" if len(course.seeds) > 2 else " With fewer than three seeds little can be shown."
    return notice(f"{len(arms)} arms: {', '.join(facts)}.{advice}")


def settled(words: list[str]) -> Flags:
    """The flags of a command with what the trainer fills in."""
    return fill_defaults(build_parser().parse_args(words))


def summary(experiment: Experiment, status: str, said: str = "") -> str:
    """How far an experiment is, and what its trainer is doing now; of one that never began, what was `said` last."""
    ended, total = experiment.progress
    facts = [f"{ended} of {counted(total, 'arm')} ended"] if total else []
    each = experiment.seconds_an_arm
    if status == "running" and each is not None and ended < total:
        facts.append(f"about {duration(each * (total - ended))} left")
    if status == "stopped" and total:
        facts.append("Go on trains the rest" if ended < total else "Go on compares them")
    if status == "failed" and total:
        facts.append("none of them well, as the report says")
    elif status == "failed":
        facts.append(said)
    return status_line(experiment, status, escape(" \u00b7 ".join(facts)))


def report(experiment: Experiment) -> str:
    """The report in a frame of its own, which can do nothing to the page."""
    content = experiment.report()
    if not content:
        return notice("The report comes with the first arm.")
    title = f"Report of {escape(experiment.name)}"
    return f'<iframe title="{title}" sandbox="allow-scripts" srcdoc="{escape(content)}"></iframe>'
