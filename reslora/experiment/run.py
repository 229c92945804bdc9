"""An experiment's arms, one after the other or several at once, and what came of them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable

from tqdm.auto import tqdm

from ..common.errors import Diverged, EndedElsewhere, Stopped
from ..common.memory import forget_peak, peak_memory
from ..common.signals import StopRequest
from ..common.together import decided, is_main
from ..options.grid import Grid
from .arms import Arm
from .crew import Crew, Orders, heard
from .results import Results
from .subject import Subject

Open = Callable[[Grid, StopRequest, Orders | None], contextlib.AbstractContextManager[Subject]]
"""Locks the folder, loads and encodes what all arms share; for a member of the crew, in the folder that is locked
already. Picklable."""


def run_experiment(opened: Open, grid: Grid, stop: StopRequest, orders: Orders | None = None) -> None:
    """Train the arms that have not ended yet, and report which method does best.

    With orders, this is one of --arms_at_once processes: it trains the arms that the main process gives it.
    """
    with opened(grid, stop, orders) as subject:
        if orders:
            for arm in orders.arms(subject.course):
                with heard():
                    train(arm, subject)
            return
        work, size = functools.partial(run_experiment, opened, grid), grid.base.experiment.arms_at_once or 1
        train_and_conclude(subject, Crew(size, subject.prog, work, stop) if size > 1 else None)


def train_and_conclude(subject: Subject, crew: Crew | None = None) -> None:
    """Train what is next until nothing is, and report what came of it."""
    course, results = subject.course, Results(subject.course, subject)
    for line in results.beforehand() if is_main() else ():
        print(line, flush=True)
    try:
        train_arms(results, crew)
    except Stopped as error:
        course.running = set()
        if is_main():  # alone: the others may have left otherwise
            results.write()
        what, _, _ = str(error).partition("; ")  # a plain run would go on otherwise
        raise Stopped(f"{what}; the same command goes on") from None
    decided(results.conclude)


def train_arms(results: Results, crew: Crew | None = None) -> None:
    """Train the next arms, by what is known of those that have ended, until there is none: here, or by a crew."""
    course, subject = results.course, results.subject
    decided(course.next_arm)  # which adds arms by --extend_rates
    ended, total = sum(bool(course.ended(arm)) for arm in course.arms()), len(course.arms())
    bar = tqdm(desc="arms", total=total, initial=ended, dynamic_ncols=True, disable=crew is None)
    with bar, crew.working(total - ended) if crew else contextlib.nullcontext(1) as size:
        while True:
            while len(course.running) < size and (arm := decided(course.next_arm)):
                course.running.add(arm)
                if crew:
                    crew.give(arm, course.grids)
            decided(results.write)
            if not course.running:
                return
            if crew:
                subject.goes_on(ended, total)
                arm = crew.ended()
                seconds = course.ended(arm)["wall_seconds"]
            else:
                (arm,) = course.running
                seconds = train(arm, subject)
            course.running.remove(arm)
            course.longest = max(course.longest, seconds)
            ended, total = ended + 1, len(course.arms())
            bar.total = total
            bar.update()


def train(arm: Arm, subject: Subject) -> float:
    """Train an arm, record that it has ended, and return its seconds; one that diverges has ended too."""
    started, reason = time.monotonic(), ""
    forget_peak(subject.device)
    try:
        subject.train(arm)
    except (Diverged, EndedElsewhere) as error:
        if not error.diverged:
            raise
        reason = getattr(error, "problem", "")  # which the main process has
    memory, seconds = peak_memory(subject.device), time.monotonic() - started
    decided(lambda: subject.course.end(arm, reason, memory, seconds))
    return seconds
