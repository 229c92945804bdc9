"""A script's errors and signals as one line and an exit status."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import pytest
import torch
from waiting import ended

from reslora.errors import InvalidArgument, RunFailed, Stopped
from reslora.runtime.script import run_script, shares_the_cpu


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InvalidArgument("--a 1", "is bad", "give 2"), 2, "script.py: error: --a 1: is bad; give 2\n"),
        (RunFailed("loss\nnan"), 1, "script.py: loss nan\n"),
        (RunFailed("\x1b[2J.png: damaged"), 1, "script.py: \\x1b[2J.png: damaged\n"),
        (OSError(28, "No space left on device"), 1, "script.py: [Errno 28] No space left on device\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "script.py: DataLoader worker (pid 7) is killed by signal: Killed; give a lower "
            "--dataloader_num_workers, or more memory; the last checkpoint is intact\n",
        ),
        (Stopped("stopped after step 3"), 130, "script.py: stopped after step 3\n"),
    ],
)
def test_a_scripts_errors_become_its_status(capsys, error, status, line):
    def main(argv, stop):
        raise error

    assert run_script("script.py", main, []) == status
    assert capsys.readouterr().err == line
    assert run_script("script.py", lambda argv, stop: None, []) == 0


def test_what_libraries_warn_each_other_of_is_not_shown():
    def main(argv, stop):
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert run_script("script.py", main, []) == 0
    assert not heard


def test_warnings_are_lines_without_places_in_the_code(capsys):
    def main(argv, stop):
        print(warnings.formatwarning(UserWarning("less\n exact"), UserWarning, "model.py", 1, "merge(model)"), end="")

    before = warnings.formatwarning
    assert run_script("script.py", main, []) == 0
    assert capsys.readouterr().out == "warning: less exact\n" and warnings.formatwarning is before


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: bytearray(2**60)])
def test_memory_that_runs_out_is_one_line(capsys, allocate):
    assert run_script("script.py", lambda argv, stop: allocate(), []) == 1
    line = capsys.readouterr().err
    assert line.startswith("script.py: memory ran out (") and line.count("\n") == 1


def test_programming_errors_are_not_hidden():
    def main(argv, stop):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        run_script("script.py", main, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_the_status(capsys, number):
    def main(argv, stop):
        assert argv == ["--flag"]
        os.kill(os.getpid(), number)
        stop.check("stopped after step 3; resume with --resume_from_checkpoint latest")
        raise AssertionError("not reached")

    assert run_script("script.py", main, ["--flag"]) == 128 + number
    assert "script.py: stopped after step 3" in capsys.readouterr().err


# Says something all the time, until it is asked to stop.
TALKS = f"""
import pathlib, sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from reslora.errors import Stopped
from reslora.runtime.script import run_script
def main(argv, stop):
    end = time.monotonic() + 600
    while stop.signal is None and time.monotonic() < end and not pathlib.Path("enough").exists():
        print("step", flush=True)
        print("step", file=sys.stderr)
        pathlib.Path("begun").touch()
    print("saving")
    pathlib.Path("saved").touch()
    stop.check("stopped after this step")
sys.exit(run_script("script.py", main))
"""


def take_terminal() -> None:
    """Make the terminal the controlling one (`preexec_fn`), so that it can hang up."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_that_closes_is_outlived(tmp_path):
    terminal, end = os.openpty()
    words = [sys.executable, "-c", TALKS]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=end, stdout=end, stderr=end, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(end)
    while not (tmp_path / "begun").exists():
        assert os.read(terminal, 4096)  # or the script waits for who reads
    os.close(terminal)
    assert ended(process) == 128 + signal.SIGTERM and (tmp_path / "saved").exists()


def test_only_one_process_of_a_machine_reports_what_all_of_them_find(monkeypatch, capsys):
    def main(argv, stop):
        raise InvalidArgument("--a 1", "is bad", "give 2")

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_script("script.py", main) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "gpu", "expected"),
    [
        ({"WORLD_SIZE": "2"}, False, True),
        ({"WORLD_SIZE": "2"}, True, False),
        ({"WORLD_SIZE": "1"}, False, False),
        ({}, False, False),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, False, False),
    ],
)
def test_several_processes_without_an_accelerator_share_the_cpu(monkeypatch, environment, gpu, expected):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    assert shares_the_cpu() is expected


def test_no_process_group_outlives_the_script(tmp_path):
    """A process that exits while gloo's threads run is sometimes aborted, more often on a busy machine."""
    error = RunFailed("loss nan")

    def main(argv, stop):
        import reslora.runtime.processes  # noqa: F401 - as scripts do once their flags are parsed

        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        if error is not None:
            raise error

    run_script("script.py", main)
    assert not torch.distributed.is_initialized()
