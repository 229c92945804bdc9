"""The command line behaves as recorded in `record.json`: see `record.py`."""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

from golden.commands import REFUSALS, RUNS

RECORD = Path(__file__).with_name("record.py")
QUICK = ["refusals"]
REST = [name for name in (*REFUSALS, *RUNS) if name not in QUICK]

PARTS = 4  # of the rest, so that none comes near the time limit on a slow machine


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        *(pytest.param(REST[part::PARTS], id=f"rest-{part}", marks=pytest.mark.exhaustive) for part in range(PARTS)),
    ],
)
def test_the_command_line_does_what_is_recorded(names):
    """In its own process, which is forked for each command: pytest's process has started threads."""
    command = [sys.executable, str(RECORD), "check", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
