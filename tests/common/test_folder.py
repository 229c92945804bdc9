"""A run's folder is kept from a second run, whatever temporary folder either has."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waiting import ended, wait_until

from reslora.common.errors import InvalidArgument
from reslora.common.folder import locked
from reslora.files import this_process

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDS = f"""
import pathlib, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from reslora.common.folder import locked
with locked(pathlib.Path(sys.argv[1])):
    pathlib.Path(sys.argv[1], "held").touch()
    time.sleep(600)
"""


def take(folder: Path) -> None:
    with locked(folder):
        assert (folder / ".lock").read_text().partition("\n")[0] == str(os.getpid())


@pytest.fixture
def other_temporary_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def test_a_living_owner_is_seen_with_another_temporary_folder(tmp_path, other_temporary_folder):
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)])
    try:
        wait_until((folder / "held").exists, "the lock", process)
        for _ in range(2):  # who is refused leaves the owner's lock
            with pytest.raises(InvalidArgument, match=f"process {process.pid} is training in it"):
                take(folder)
    finally:
        process.kill()
    ended(process)
    take(folder)
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("owner", ["", "{pid}", "{pid}\n", "{pid}\nffffffff-{pid}-{start}", "{pid}\n{host}-{pid}-1"])
def test_a_lock_of_who_is_gone_or_cannot_be_asked_is_taken_over(tmp_path, owner):
    """Of an earlier version, of another machine, or of an earlier process that had the id of one that runs."""
    host, _, start = this_process().split("-")
    (tmp_path / ".lock").write_text(owner.format(host=host, pid=os.getppid(), start=start))
    take(tmp_path)
