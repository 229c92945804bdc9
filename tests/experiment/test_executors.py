"""Arms that several processes train at once: real processes, but arms without training."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from waiting import ended, join, start_thread, wait_until

from reslora.errors import InvalidArgument, RunFailed, Stopped
from reslora.experiment import executors
from reslora.experiment.executors import LocalExecutor, Order, Work, Worker, arms_a_device, share_of
from reslora.experiment.runner import train_arms
from reslora.experiment.schedule import ArmSchedule
from reslora.images.settings import parse_args
from reslora.io import is_running, this_process
from reslora.runtime.signals import StopRequest

from .test_schedule import leave
from .test_schedule import run as one_after_the_other


def grid(folder: Path, *flags: str) -> list[str]:
    return ["--output_dir", str(folder), "--method", "lora", "--learning_rate", "1e-4", "2e-4", "--no-racing", *flags]


class Study(SimpleNamespace):
    """What the processes of these tests open: a schedule, what arms of a given rate do, and their stop request."""

    schedule: ArmSchedule
    what: dict[float, str]
    stop: StopRequest


@contextlib.contextmanager
def opened(argv: list[str], what: dict[float, str], worker: Worker) -> Iterator[Study]:
    yield Study(schedule=ArmSchedule(parse_args(argv)), what=what, stop=worker.stop)


def do(order: Order, study: Study) -> float:
    """Write losses that fall with the rate, and the process of each arm; arms of a given rate do something else."""
    (arm,), schedule = order.job.arguments, study.schedule
    schedule.grids = order.grids
    folder = schedule.folder_of(arm)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "who").open("a") as file:
        file.write(f"{this_process()}\n")
    print(arm.rate, flush=True)
    if (name := study.what.get(arm.rate)) is not None:
        globals()[name](folder, study.stop)
    leave(schedule, arm, best=1)
    return schedule.ended(arm)["wall_seconds"]


def waits(folder: Path, stop: StopRequest) -> None:
    wait_until(lambda: stop.signal is not None, "a stop")
    (folder / "saved").touch()
    raise Stopped("stopped after step 1")


def is_killed(folder: Path, stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_killed_twice(folder: Path, stop: StopRequest) -> None:
    if len((folder / "who").read_text().split()) <= 2:
        is_killed(folder, stop)


def fails(folder: Path, stop: StopRequest) -> None:
    wait_until(lambda: list(folder.parents[1].glob("lr-0.0001/*/who")), "the other arm to begin")
    raise InvalidArgument("--train_data_dir pictures", "is empty", "add images")


def hangs(folder: Path, stop: StopRequest) -> None:
    time.sleep(3600)


def train(
    argv: list[str], size: int = 2, what: dict[float, str] | None = None, stop: StopRequest | None = None
) -> tuple[ArmSchedule, list[set]]:
    """Return the final record, and which arms ran whenever the record was written."""
    schedule, told = ArmSchedule(parse_args(argv)), []
    study = SimpleNamespace(report_progress=lambda ended, total: None)
    results = SimpleNamespace(schedule=schedule, write=lambda: told.append(set(schedule.running)), study=study)
    schedule.folder.mkdir(exist_ok=True)
    work = Work(functools.partial(opened, argv, what or {}), do, this_process(), schedule.folder)
    executor = LocalExecutor(size, work, stop or StopRequest())
    with executor.working():
        train_arms(results, executor)
    return schedule, told


def who(folder: Path) -> list[str]:
    return [line for path in folder.rglob("who") for line in path.read_text().split()]


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
def test_an_error_of_one_ends_the_others_once_they_have_saved(tmp_path):
    """It is the error that this process would have raised."""
    with pytest.raises(InvalidArgument, match=r"^--train_data_dir pictures: is empty; add images$"):
        train(grid(tmp_path), what={1e-4: "waits", 2e-4: "fails"})
    assert len(list(tmp_path.rglob("lr-0.0001/*/saved"))) == 1
    assert not any(map(is_running, who(tmp_path))) and not (tmp_path / executors.STOP).exists()


@pytest.mark.exhaustive
def test_a_run_whose_process_dies_is_submitted_again_and_fails_the_fourth_time(tmp_path, capfd):
    """The other run is trained once; the same command trains neither again."""
    what = {1e-4: "is_killed_twice", 2e-4: "is_killed"}
    schedule, _ = train(grid(tmp_path, "--learning_rate", "1e-4", "2e-4", "4e-4"), what=what)
    low, high, other = schedule.arms()
    assert schedule.ended(low)["status"] == schedule.ended(other)["status"] == "finished"
    assert len(who(schedule.folder_of(low))) == 3 and len(who(schedule.folder_of(other))) == 1
    assert len(who(schedule.folder_of(high))) == len(set(who(schedule.folder_of(high)))) == 4
    lost, out = schedule.ended(high), capfd.readouterr().out
    assert lost["status"] == "failed" and lost["reason"].startswith("lora, learning rate 0.0002, seed 0: its process")
    assert "died 4 times; remove" in lost["reason"] and lost["reason"] in out
    assert "seed 0: its process died (killed, or out of memory); submitted again, time 3 of 3" in out
    assert train(grid(tmp_path, "--learning_rate", "1e-4", "2e-4", "4e-4"))[1] == [set()]


def test_a_file_of_another_machine_is_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "SEEN_WITHIN", 0.0)
    with pytest.raises(RunFailed, match=r"arm\.json: .* not seen here after 0 s; --output_dir must be on storage that"):
        executors.wait_for_file(tmp_path / "seed-0" / "arm.json")


def test_errors_of_other_processes_can_be_read(tmp_path):
    refused = InvalidArgument("--rank 0", "is too low", "give 1")
    assert str(pickle.loads(pickle.dumps(refused))) == str(refused) == "--rank 0: is too low; give 1"

    class Odd(Exception):
        def __init__(self, one: str, other: str) -> None:
            super().__init__(f"{one} and {other}")

    with pytest.raises(RuntimeError, match=r"^Odd: this and that$"), executors.errors_picklable():
        raise Odd("this", "that")


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
