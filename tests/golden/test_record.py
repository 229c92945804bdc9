"""The command line does what it did when `record.json` was written: see `record.py`."""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

from golden.commands import REFUSALS, RUNS

RECORD = Path(__file__).with_name("record.py")
QUICK = ["refusals", "configuration", "killed", "glue"]
EXHAUSTIVE = [name for name in (*REFUSALS, *RUNS) if name not in QUICK]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(EXHAUSTIVE, marks=pytest.mark.exhaustive)], ids=["quick", "rest"]
)
def test_the_command_line_does_what_is_recorded(names):
    done = subprocess.run(
        [sys.executable, RECORD, "check", "--only", *names], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout + done.stderr
