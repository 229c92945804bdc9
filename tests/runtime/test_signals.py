"""Stop requests: handlers under any inherited setting, the second signal, and launchers that die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import default_sigint, ended, ignore_sigint, output_of, wait_until

from reslora.errors import Stopped
from reslora.runtime.signals import StopRequest, is_launcher

REPOSITORY = Path(__file__).resolve().parents[2]

WAIT = "while stop.signal is None and time.monotonic() < end: time.sleep(0.01)"
NOTE = "pathlib.Path('{}').write_text(str(stop.signal))"
# Says that it is ready, waits until it is asked to stop, and says by what.
CHILD = f"""
import os, pathlib, sys, time
sys.path.insert(0, {{repository!r}})
from reslora.runtime.signals import StopRequest
end = time.monotonic() + 600
with StopRequest() as stop:
    pathlib.Path("ready").write_text(str(os.getpid()))
    {WAIT}
    {NOTE.format("saved")}
    {{after}}
sys.exit(128 + stop.signal)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, 'child.py']).wait()"


HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def default_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ignore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def await_file(path: Path, process: subprocess.Popen | None = None) -> str:
    """Return the content of a file that another process writes."""
    wait_until(lambda: path.is_file() and path.read_text(), f"{path} to be written", process)
    return path.read_text()


def child(folder: Path, after: str = "pass", **options) -> subprocess.Popen:
    (folder / "child.py").write_text(CHILD.format(repository=str(REPOSITORY), after=after))
    process = subprocess.Popen([sys.executable, "child.py"], cwd=folder, stderr=subprocess.PIPE, text=True, **options)
    await_file(folder / "ready", process)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_that_inherits_ignored_signals_stops_all_the_same(tmp_path, number):
    process = child(tmp_path, preexec_fn=ignore_sigint)  # what nohup and many a runner of tests do
    process.send_signal(number)
    _, errors = output_of(process)
    assert (tmp_path / "saved").read_text() == str(int(number))
    assert process.returncode == 128 + number
    assert errors.count("stopping after this step") == 1


def test_the_second_signal_leaves_at_once(tmp_path):
    process = child(tmp_path, after="time.sleep(1_000)")
    process.send_signal(signal.SIGTERM)
    await_file(tmp_path / "saved", process)
    process.send_signal(signal.SIGINT)
    output_of(process)
    assert process.returncode == 128 + signal.SIGINT


def test_below_torchs_launcher_which_repeats_signals_the_third_leaves_at_once(tmp_path):
    process = child(
        tmp_path,
        after="os.kill(os.getpid(), 2); pathlib.Path('echoed').write_text('once'); time.sleep(1_000)",
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"},
    )
    process.send_signal(signal.SIGTERM)
    await_file(tmp_path / "echoed", process)
    process.send_signal(signal.SIGTERM)
    output_of(process)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGHUP])
def test_a_batch_system_or_a_person_may_ask_after_the_application_or_the_terminal(tmp_path, first):
    process = child(tmp_path, after="os.kill(os.getpid(), 15); pathlib.Path('kept').touch()", preexec_fn=default_sighup)
    process.send_signal(first)
    _, errors = output_of(process)
    assert (tmp_path / "kept").exists() and process.returncode == 128 + signal.SIGTERM
    assert errors.count("send the signal again to stop immediately") == 1


@pytest.mark.parametrize("ignored", [False, True])  # True: as nohup leaves it
def test_a_terminal_that_closes_asks_to_stop_unless_its_signal_is_ignored(tmp_path, ignored):
    process = child(tmp_path, preexec_fn=ignore_sighup if ignored else default_sighup)
    process.send_signal(signal.SIGHUP)
    if ignored:
        process.send_signal(signal.SIGINT)
    number = signal.SIGINT if ignored else signal.SIGTERM
    _, errors = output_of(process)
    assert process.returncode == 128 + number and ("terminal" in errors) is not ignored
    assert (tmp_path / "saved").read_text() == str(int(number))


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_child_saves_and_ends_when_its_launcher_dies(tmp_path, number):
    told = "signal"
    script = CHILD.format(repository=str(REPOSITORY), after="pass")
    (tmp_path / "child.py").write_text(script.replace(WAIT, WAIT.replace("stop.signal", f"stop.{told}")))
    (tmp_path / "accelerate").write_text(LAUNCHER)
    launcher = subprocess.Popen(
        [sys.executable, "accelerate", "launch"], cwd=tmp_path, stderr=subprocess.DEVNULL, preexec_fn=default_sigint
    )
    await_file(tmp_path / "ready", launcher)
    launcher.send_signal(number)
    ended(launcher)
    assert await_file(tmp_path / "saved") == str(int(signal.SIGTERM))


# What a library's wait for other processes is: nothing returns to Python, where a handler would run.
DEAF = """
import ctypes, pathlib, signal, sys
signal.alarm(1_000)
sys.path.insert(0, {repository!r})
from reslora.runtime.signals import StopRequest
mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
with StopRequest() as stop, stop.at_once():
    lock(mutex)
    pathlib.Path("ready").write_text("deaf")
    lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells of the launcher's death")
@pytest.mark.parametrize("launched", [False, True], ids=["SIGTERM", "launcher killed"])
def test_processes_that_wait_for_each_other_end_at_once(tmp_path, launched):
    (tmp_path / "child.py").write_text(DEAF.format(repository=str(REPOSITORY)))
    (tmp_path / "accelerate").write_text(LAUNCHER)
    words = ["accelerate", "launch"] if launched else ["child.py"]
    environment = os.environ | {"WORLD_SIZE": "2"}
    process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=subprocess.PIPE, env=environment)
    await_file(tmp_path / "ready", process)
    process.send_signal(signal.SIGKILL if launched else signal.SIGTERM)
    output_of(process)  # to the end of all that hold the pipe
    assert process.returncode == -(signal.SIGKILL if launched else signal.SIGTERM)


def test_who_was_asked_to_stop_does_not_wait_for_others(monkeypatch):
    with StopRequest() as stop:
        before = {number: signal.getsignal(number) for number in HEARD}
        for processes in ("1", "2"):
            monkeypatch.setenv("WORLD_SIZE", processes)
            with stop.at_once():
                assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is (processes == "2")
            assert before == {number: signal.getsignal(number) for number in HEARD}
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="before training began"), stop.at_once():
            raise AssertionError("not reached")
        assert before == {number: signal.getsignal(number) for number in HEARD}


def test_handlers_come_back():
    before = {number: signal.getsignal(number) for number in HEARD}
    with StopRequest() as stop:
        assert stop.signal is None
        stop.check("not asked")
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    assert before == {number: signal.getsignal(number) for number in before}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_request_is_noted_and_raised_where_asked(number):
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == (signal.SIGTERM if number == signal.SIGUSR1 else number)
        os.kill(os.getpid(), signal.SIGUSR1)  # never at once
        with pytest.raises(Stopped, match="while merging"):
            stop.check("stopped while merging")


def test_what_one_process_was_asked_can_be_shared():
    with StopRequest() as stop:
        stop.signal = signal.SIGTERM
        assert stop.signal == signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/venv/bin/python3 /venv/bin/accelerate launch train_sd.py", True),
        ("python -m accelerate.commands.accelerate_cli launch train_sd.py", True),
        ("python -u -m accelerate.commands.launch train_sd.py", True),
    ],
)
def test_launchers_are_known_by_their_command(command, expected):
    assert is_launcher(command.split(" ")) == expected


def test_a_shell_that_mentions_a_launcher_is_none():
    assert not is_launcher(["bash", "-c", "accelerate launch train_sd.py; echo done"])
