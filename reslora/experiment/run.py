"""An experiment's arms, one after the other or several at once, and what came of them."""

from __future__ import annotations

import time

from ..common.errors import Diverged, EndedElsewhere, Stopped
from ..common.memory import forget_peak, peak_memory
from ..common.together import decided, is_main
from .arms import Arm
from .course import Course
from .crew import Crew, train_at_once
from .results import Results
from .subject import Subject


def train_and_conclude(course: Course, subject: Subject, crew: Crew | None = None) -> None:
    """Trains what is next until nothing is, or has a crew train it, and tells what came of it."""
    results = Results(course, subject)
    for line in results.beforehand() if is_main() else ():
        print(line, flush=True)
    try:
        if crew:
            train_at_once(course, results, crew)
        while arm := decided(course.next_arm):
            course.running = {arm}
            decided(results.write)
            train(arm, course, subject)
    except Stopped as error:
        course.running = set()
        if is_main():  # alone: the others may have left otherwise
            results.write()
        what, _, _ = str(error).partition("; ")  # a plain run would go on otherwise
        raise Stopped(f"{what}; the same command goes on") from None
    course.running = set()
    decided(results.write)  # whatever ends the comparison, no arm is in training
    decided(results.conclude)


def train(arm: Arm, course: Course, subject: Subject) -> None:
    """Trains an arm and notes that it has ended; one that diverges has ended too, and the others go on."""
    started, reason = time.monotonic(), ""
    forget_peak(subject.device)
    try:
        subject.train(arm)
    except Diverged as error:
        reason = error.problem
    except EndedElsewhere as error:
        if not error.diverged:
            raise
    memory, seconds = peak_memory(subject.device), time.monotonic() - started
    decided(lambda: course.end(arm, reason, memory, seconds))
    course.longest = max(course.longest, seconds)
