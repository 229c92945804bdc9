"""Train and compare an experiment's arms, one after the other or several at once, and write its results."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import Diverged, EndedElsewhere, Stopped, StoppedEarly
from ..io import this_process
from ..options.grid import Grid
from ..runtime.peak_memory import forget_peak, peak_memory
from ..runtime.processes import broadcast_from_main, is_main
from ..runtime.signals import StopRequest
from ..runtime.stdio import ignore_broken_pipes, take_any_file_name
from .arms import Arm
from .executors import Executor, Job, LocalExecutor, Lost, Order, Work, Worker, wait_for_file
from .results import Results
from .schedule import ENDED, ArmSchedule
from .study import ExperimentStudy, race

USE_RACING = "use --racing, or at most as many --arms_at_once as methods"

Open = Callable[[Grid, StopRequest, Worker | None], contextlib.AbstractContextManager[ExperimentStudy]]
"""Function that locks the experiment's directory, and loads and encodes the data that all arms share.

With a worker, this process does jobs for another one, whose lock it shares. The function must be picklable.
"""


def run_experiment(opened: Open, grid: Grid, stop: StopRequest) -> None:
    """Train the arms that have not ended, and report which method is best."""
    options, folder = grid.base.experiment, Path(grid.base["output_dir"])
    work = Work(functools.partial(opened_in_worker, functools.partial(opened, grid)), do, this_process(), folder)
    with contextlib.ExitStack() as stack:
        if options.executor == "ray":
            from .ray_executor import RayExecutor, connected  # an extra

            stack.enter_context(connected(options, folder))
        study = stack.enter_context(opened(grid, stop, None))
        if is_main() and study.schedule.is_race_off:
            print(
                f"racing is off, because it would train the learning rates of a method one after another: {USE_RACING}"
            )
        executor: Executor | None = None
        if options.executor == "ray":
            executor = RayExecutor(options.arms_at_once or 1, work, stop, gpus=options.gpus_per_run)
        elif not options.in_this_process:
            executor = LocalExecutor(options.arms_at_once or 1, work, stop)
        train_and_conclude(study, executor)


@contextlib.contextmanager
def opened_in_worker(opened: Callable, worker: Worker) -> Iterator[ExperimentStudy]:
    """Open the study in a process that does jobs, without output; its jobs print, but no progress bars."""
    take_any_file_name()
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.ExitStack() as stack,
    ):
        with contextlib.redirect_stdout(nowhere):
            study = stack.enter_context(opened(worker.stop, worker))
        yield study


def do(order: Order, study: ExperimentStudy) -> Any:
    """Do a job in a worker process, and return its result."""
    study.schedule.grids = order.grids
    study.schedule.estimated |= not order.is_first
    job = order.job
    with ignore_broken_pipes():
        return train(job.arguments[0], study) if job.name == "train" else getattr(study, job.name)(*job.arguments)


def train_and_conclude(study: ExperimentStudy, executor: Executor | None = None) -> None:
    """Train the remaining arms, and write the results; with `executor`, other processes train, test and export."""
    schedule, results = study.schedule, Results(study.schedule, study)
    for line in results.beforehand() if is_main() else ():
        print(line, flush=True)
    with executor.working() if executor else contextlib.nullcontext():
        try:
            train_arms(results, executor)
        except Stopped as error:
            schedule.running = set()
            if is_main():  # not a collective: the other processes may have ended in another way
                results.write()
            what, _, _ = str(error).partition("; ")  # otherwise it would name the option that resumes a single run
            raise Stopped(f"{what}; run the same command to resume") from None
        broadcast_from_main(lambda: results.conclude(executor))


def train_arms(results: Results, executor: Executor | None = None) -> None:
    """Train the remaining arms in their order, in this process or in those of `executor`."""
    schedule, study = results.schedule, results.study
    broadcast_from_main(schedule.next_arm)  # adds arms by --extend_rates
    ended, total = ended_and_all(schedule)
    bar = tqdm(desc="runs", total=total, initial=ended, dynamic_ncols=True, disable=executor is None)
    with bar:
        while True:
            while len(schedule.running) < (executor.size if executor else 1):
                if (arm := broadcast_from_main(schedule.next_arm)) is None:
                    break
                schedule.running.add(arm)
                if executor:
                    executor.submit(Job("train", (arm,)), schedule.grids)
            broadcast_from_main(results.write)
            if not schedule.running:
                return
            if executor:
                study.report_progress(ended, total)
                arm = wait_for_arm(executor, schedule)
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


def wait_for_arm(executor: Executor, schedule: ArmSchedule) -> Arm:
    """Wait until any arm has ended in another process, and return it; one whose processes have died has failed."""
    try:
        ((_, (arm,)), _) = executor.wait()
    except Lost as error:
        (arm,) = error.job.arguments
        reason = f"{error.problem}; remove {schedule.folder_of(arm)}, then the run is trained again"
        print(reason, flush=True)
        schedule.end(arm, reason, None, 0.0)
    wait_for_file(schedule.folder_of(arm) / ENDED)
    return arm


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
        race(arm, study.schedule)  # an earlier process may have measured the losses that stop this arm
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
