"""Train and compare an experiment's arms, one after the other or several at once, and write its results."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from ..errors import Diverged, EndedElsewhere, Stopped, StoppedEarly
from ..options.grid import Grid
from ..runtime.peak_memory import forget_peak, peak_memory
from ..runtime.processes import broadcast_from_main, is_main
from ..runtime.signals import StopRequest
from .arms import Arm
from .results import Results
from .schedule import ArmSchedule
from .study import ExperimentStudy, race
from .worker_pool import Job, Orders, WorkerPool, print_workers

USE_RACING = "use --racing, or at most as many --arms_at_once as methods"

Open = Callable[[Grid, StopRequest, Orders | None], contextlib.AbstractContextManager[ExperimentStudy]]
"""Function that locks the experiment's directory, and loads and encodes the data that all arms share.

In a worker process, the function shares the lock that the main process has. It must be picklable.
"""


def run_experiment(opened: Open, grid: Grid, stop: StopRequest, orders: Orders | None = None) -> None:
    """Train the arms that have not ended, and report which method is best.

    With `orders`, this process is a worker of --arms_at_once: it does only the jobs that the main process assigns.
    """
    with opened(grid, stop, orders) as study:
        if orders:
            for job in orders.jobs(study.schedule):
                with print_workers():
                    result = do(job, study)
                orders.report(result)
            return
        if is_main() and study.schedule.is_race_off:
            print(f"racing is off, because it trains one learning rate of a method at a time: {USE_RACING}")
        work, size = functools.partial(run_experiment, opened, grid), grid.base.experiment.arms_at_once or 1
        train_and_conclude(study, WorkerPool(size, study.prog, work, stop) if size > 1 else None)


def train_and_conclude(study: ExperimentStudy, pool: WorkerPool | None = None) -> None:
    """Train the remaining arms, and write the results; with `pool`, its workers train, test and export."""
    schedule, results = study.schedule, Results(study.schedule, study)
    for line in results.beforehand() if is_main() else ():
        print(line, flush=True)
    with pool.working() if pool else contextlib.nullcontext():
        try:
            train_arms(results, pool)
        except Stopped as error:
            schedule.running = set()
            if is_main():  # not a collective: the other processes may have ended in another way
                results.write()
            what, _, _ = str(error).partition("; ")  # otherwise it would name the option that resumes a single run
            raise Stopped(f"{what}; run the same command to resume") from None
        broadcast_from_main(lambda: results.conclude(pool))


def do(job: Job, study: ExperimentStudy) -> Any:
    """Do a job in a worker, and return its result."""
    return train(job.arguments[0], study) if job.name == "train" else getattr(study, job.name)(*job.arguments)


def train_arms(results: Results, pool: WorkerPool | None = None) -> None:
    """Train the remaining arms in their order, in this process or in the workers of `pool`."""
    schedule, study = results.schedule, results.study
    broadcast_from_main(schedule.next_arm)  # adds arms by --extend_rates
    ended, total = ended_and_all(schedule)
    bar = tqdm(desc="runs", total=total, initial=ended, dynamic_ncols=True, disable=pool is None)
    with bar:
        while True:
            while len(schedule.running) < (pool.size if pool else 1):
                if (arm := broadcast_from_main(schedule.next_arm)) is None:
                    break
                schedule.running.add(arm)
                if pool:
                    pool.give(Job("train", (arm,)), schedule.grids)
            broadcast_from_main(results.write)
            if not schedule.running:
                return
            if pool:
                study.report_progress(ended, total)
                ((_, (arm,)), _) = pool.ended()
            else:
                (arm,) = schedule.running
                if is_main():
                    minutes = schedule.minutes_left()
                    left = f", about {max(1, round(minutes))} min left" if minutes is not None else ""
                    print(f"run {ended + 1} of {schedule.total_in_words}{left}: {schedule.name_of(arm)}", flush=True)
                train(arm, study)
            schedule.running.remove(arm)
            schedule.has_trained = True
            ended, total = ended_and_all(schedule)
            bar.total = total
            bar.update(ended - bar.n)


def ended_and_all(schedule: ArmSchedule) -> tuple[int, int]:
    """Return the number of arms that have ended, and of all arms.

    An arm that has ended may no longer count: an average, if another learning rate is chosen because an arm failed.
    """
    arms = schedule.arms()
    return sum(bool(schedule.ended(arm)) for arm in arms), len(arms)


def train(arm: Arm, study: ExperimentStudy) -> None:
    """Train an arm, and record that it has ended.

    An arm that diverged or that racing stopped early counts as ended.
    """
    started, measured, reason, stopped = time.monotonic(), study.schedule.measuring, "", False
    forget_peak(study.device)
    try:
        race(arm, study.schedule)  # a process that was killed may have measured what stops it
        study.train(arm)
    except StoppedEarly as error:
        reason, stopped = str(error), True
        if is_main():
            print(f"{study.schedule.name_of(arm)}: {reason}", flush=True)
    except (Diverged, EndedElsewhere) as error:
        if not error.diverged:
            raise
        reason = getattr(error, "problem", "")  # known only to the main process
    memory, seconds = peak_memory(study.device), time.monotonic() - started
    to_conclude, measuring = study.seconds_to_conclude(), study.schedule.measuring - measured
    broadcast_from_main(lambda: study.schedule.end(arm, reason, memory, seconds, to_conclude, stopped, measuring))
