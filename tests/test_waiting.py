"""Every wait in the tests has a time limit."""

import ast
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from waiting import LIMIT, default_sigint, ended, join, output_of, start_thread, wait_until

TESTS = Path(__file__).resolve().parent
SLEEPER = [sys.executable, "-c", "import time; time.sleep(1_000)"]


def endless(source: str) -> list[str]:
    """Return calls that wait, and loops that sleep, without a limit."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.While) and any(name_of(n) in ("sleep", "poll", "is_alive") for n in ast.walk(node)):
            found.append(f"line {node.lineno}: while")
        if not isinstance(node, ast.Call):
            continue
        limited = any(word.arg in ("timeout", None) for word in node.keywords)
        waits = name_of(node) in ("wait", "join", "communicate") and not node.args
        waits |= isinstance(node.func, ast.Attribute) and ast.unparse(node.func).startswith("subprocess.")
        if waits and not limited and name_of(node) != "Popen":
            found.append(f"line {node.lineno}: {name_of(node)}")
    return found


def name_of(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_every_wait_has_an_end(path):
    if path.name not in ("waiting.py", "record.py"):  # the latter imports nothing, and has waits of its own
        assert not endless(path.read_text(encoding="utf-8"))


def test_waits_without_an_end_are_found():
    for line in ("p.wait()", "t.join()", "p.communicate()", "subprocess.run(c, check=True)", "while x:\n sleep(1)"):
        assert endless(line), line
    for line in ("p.wait(5)", "t.join(5)", "p.communicate(timeout=5)", "subprocess.run(c, timeout=5)", "','.join(x)"):
        assert not endless(line), line


def test_a_condition_that_never_comes_fails_and_says_what_was_waited_for():
    with pytest.raises(AssertionError, match=r"waited 0.05 s for rain"):
        wait_until(lambda: False, "rain", limit=0.05)


def test_a_process_that_ended_is_not_waited_for():
    process = subprocess.Popen([sys.executable, "-c", ""])
    with pytest.raises(AssertionError, match="ended before rain"):
        wait_until(lambda: False, "rain", process)
    assert ended(process) == 0


@pytest.mark.parametrize("wait", [ended, output_of])
def test_a_process_that_hangs_is_killed(wait):
    process = subprocess.Popen(SLEEPER)
    with pytest.raises((AssertionError, subprocess.TimeoutExpired), match=r"Popen|timed out"):
        wait(process, limit=0.05)
    assert process.wait(LIMIT) < 0


def test_a_thread_is_waited_for():
    seen = []
    join(start_thread(lambda: (time.sleep(0.01), seen.append(threading.current_thread().daemon))))
    assert seen == [True]


@pytest.mark.parametrize("preexec_fn", [None, default_sigint])
def test_a_child_can_be_given_sigint_as_terminals_have_it(preexec_fn):
    """If this process ignores SIGINT, as below `nohup`."""
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        told = subprocess.run(
            [sys.executable, "-c", code], preexec_fn=preexec_fn, capture_output=True, text=True, timeout=LIMIT
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert told.stdout.strip() == str(preexec_fn is default_sigint)


def test_a_whole_test_has_an_end_too(pytestconfig):
    """For waits that these helpers do not cover: a server's answer, a browser."""
    assert pytestconfig.pluginmanager.hasplugin("timeout")
    assert 2 * LIMIT < float(pytestconfig.getini("timeout")) < 3600
