"""Render an experiment as HTML: how many runs the form's settings make, the progress, and the report."""

import math

from reslora.experiment.report import titled
from reslora.experiment.schedule import ArmSchedule
from reslora.formatting import enumerated, pluralize
from reslora.methods.registry import METHODS
from reslora.options.grid import Grid

from .activity import duration, why_ended
from .jobs import Jobs
from .library import Experiment
from .runs import number
from .views import escape, notice, status_line

NONE = "There is no experiment yet: give several learning rates or seeds under Train."

HEIGHT = """<script>
new ResizeObserver(() => parent.postMessage({reportHeight: document.documentElement.offsetHeight}, "*"))
    .observe(document.documentElement);
</script>"""
"""Script in the report's frame that sends the height of the report to the page."""


def plan(jobs: Jobs, name: str, settings: dict, folder: str | None = None) -> tuple:
    """Return a sentence with the number of runs that the settings make, as HTML, the command's arguments, and the
    options as the trainer resolves them. Raises `RunError` for invalid settings.
    """
    words, found = jobs.command(name, settings, folder)
    if not isinstance(found, Grid):
        methods, steps = found.adapter.method, found.training.max_train_steps
        titles = enumerated(METHODS[method].title for method in methods)
        each = f", {pluralize(steps, 'step')}{' each' if len(methods) > 1 else ''}" if steps else ""
        return notice(f"1 run: {titles}{each}. Several learning rates or seeds make an experiment."), words, found
    schedule, advice = ArmSchedule(found), []
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
