"""The command line behaves as recorded in `record.json`: see `record.py`."""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

from golden.commands import REFUSALS, RUNS

RECORD = Path(__file__).with_name("record.py")
QUICK = ["refusals", "killed"]
REST = [name for name in (*REFUSALS, *RUNS) if name not in QUICK]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(REST, id="rest", marks=pytest.mark.exhaustive),
    ],
)
def test_the_command_line_does_what_is_recorded(names):
    """In its own process, which is forked for each command: pytest's process has started threads."""
    command = [sys.executable, str(RECORD), "check", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
