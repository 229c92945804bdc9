"""Arms that several processes train at once: real processes, but arms without training."""

import functools
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from waiting import ended, join, start_thread, wait_until

from reslora.errors import RunFailed, Stopped
from reslora.experiment.runner import train_arms
from reslora.experiment.schedule import ArmSchedule
from reslora.experiment.worker_pool import Orders, WorkerPool, arms_a_device, print_workers, share_of
from reslora.images.settings import parse_args
from reslora.io import is_running, this_process
from reslora.runtime.script import run_script
from reslora.runtime.signals import StopRequest

from .test_schedule import leave
from .test_schedule import run as one_after_the_other


def grid(folder: Path, *flags: str) -> list[str]:
    return ["--output_dir", str(folder), "--method", "lora", "--learning_rate", "1e-4", "2e-4", "--no-racing", *flags]


def work(argv: list[str], what: dict[float, str], stop: StopRequest, orders: Orders) -> None:
    """Write losses that fall with the rate, and the process of each arm; arms of a given rate do something else."""
    schedule = ArmSchedule(parse_args(argv))
    for job in orders.jobs(schedule):
        (arm,) = job.arguments
        folder = schedule.folder_of(arm)
        folder.mkdir(parents=True)
        (folder / "who").write_text(this_process())
        print("not heard", flush=True)
        with print_workers():
            print(arm.rate, flush=True)
        if (name := what.get(arm.rate)) is not None:
            globals()[name](folder, stop)
        leave(schedule, arm, best=1)
        orders.report(schedule.ended(arm)["wall_seconds"])


def waits(folder: Path, stop: StopRequest) -> None:
    wait_until(lambda: stop.signal is not None, "a stop")
    (folder / "saved").touch()
    raise Stopped("stopped after step 1")


def wait_for_the_other(folder: Path) -> None:
    wait_until(lambda: list(folder.parents[1].glob("lr-0.0001/*/who")), "the other arm to begin")


def is_killed(folder: Path, stop: StopRequest) -> None:
    wait_for_the_other(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(folder: Path, stop: StopRequest) -> None:
    time.sleep(3600)


def train(
    argv: list[str], size: int = 2, what: dict[float, str] | None = None, stop: StopRequest | None = None
) -> tuple[ArmSchedule, list[set]]:
    """Return the final record, and which arms ran whenever the record was written."""
    schedule, told = ArmSchedule(parse_args(argv)), []
    study = SimpleNamespace(report_progress=lambda ended, total: None)
    results = SimpleNamespace(schedule=schedule, write=lambda: told.append(set(schedule.running)), study=study)
    pool = WorkerPool(size, "train_sd.py", functools.partial(work, argv, what or {}), stop or StopRequest())
    with pool.working():
        train_arms(results, pool)
    return schedule, told


def who(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.rglob("who")]


@pytest.mark.exhaustive
def test_arms_are_handed_out_until_none_is_next(tmp_path, capfd):
    """The grid grows meanwhile; no arm is left out or trained twice, and all processes have ended at the end."""
    argv = grid(tmp_path / "out", "--extend_rates")
    schedule, told = train(argv)
    alone = ArmSchedule(parse_args(grid(tmp_path / "alone", "--extend_rates")))
    assert {arm.rate for arm in one_after_the_other(alone, best=1)} == {arm.rate for arm in schedule.arms()}
    assert len(schedule.arms()) == 5 and schedule.next_arm() is None and schedule.has_trained
    assert len(told[0]) == 2 and told[-1] == set() and max(map(len, told)) == 2
    processes = who(tmp_path / "out")
    assert len(processes) == 5 and len(set(processes)) == 2 and not any(map(is_running, processes))
    printed = capfd.readouterr().out.split()
    assert sorted(map(float, printed)) == sorted(arm.rate for arm in schedule.arms())
    assert train(argv)[1] == [set()]  # nothing is left to do, and nobody is started


@pytest.mark.exhaustive
def test_one_that_ends_ends_the_others_once_they_have_saved(tmp_path):
    with pytest.raises(RunFailed, match="a process of --arms_at_once was killed by signal 9; run the same command"):
        train(grid(tmp_path), what={1e-4: "waits", 2e-4: "is_killed"})
    assert len(list(tmp_path.rglob("lr-0.0001/*/saved"))) == 1
    assert not any(map(is_running, who(tmp_path)))


def test_each_has_its_share_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert share_of(1, 3) == {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "3"}
    options = parse_args(["--arms_at_once", "3", "--seed", "0", "1"]).base.experiment
    cpu, gpu = map(torch.device, ("cpu", "cuda"))
    assert arms_a_device(options, cpu) == 3 and arms_a_device(replace(options, arms_at_once=None), cpu) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share_of(number, 3)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["5", "7", "5"]
    assert share_of(0, 3)["OMP_NUM_THREADS"] == "2"
    assert arms_a_device(options, gpu) == 2 and arms_a_device(options, cpu) == 3


@pytest.mark.exhaustive
def test_a_stop_is_told_to_all(tmp_path):
    stop = StopRequest()

    def ask() -> None:
        wait_until(lambda: len(who(tmp_path)) == 2, "two arms to begin")
        stop.signal = signal.SIGTERM

    asking = start_thread(ask)
    with pytest.raises(Stopped, match=r"^stopped while runs were trained$"):
        train(grid(tmp_path), what={1e-4: "waits", 2e-4: "waits"}, stop=stop)
    join(asking)
    assert not any(map(is_running, who(tmp_path))) and len(list(tmp_path.rglob("saved"))) == 2


def script(argv: list[str]) -> None:
    what = {1e-4: "waits", 2e-4: "waits"}
    sys.exit(run_script("train_sd.py", lambda _, stop: train(argv, what=what, stop=stop) and None))


@pytest.mark.exhaustive
def test_when_the_main_process_is_killed_the_others_end(tmp_path):
    """At once: the next process finds the folder unlocked."""
    main = multiprocessing.get_context("spawn").Process(
        target=train, args=(grid(tmp_path), 2, {1e-4: "hangs", 2e-4: "hangs"})
    )
    main.start()
    wait_until(lambda: len(list(tmp_path.rglob("who"))) == 2 and all(who(tmp_path)), "two arms to begin", main)
    processes = who(tmp_path)
    assert all(map(is_running, processes))
    main.kill()
    ended(main)
    wait_until(lambda: not any(map(is_running, processes)), "the end of the others")
