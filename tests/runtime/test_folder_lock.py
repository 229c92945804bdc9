"""A run's folder is locked against a second run, also if they have different temporary folders."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waiting import ended, wait_until

from reslora.errors import InvalidArgument, RunFailed
from reslora.io import this_process, write_json
from reslora.runtime.folder_lock import check_held, locked, sharing_lock

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDS = f"""
import pathlib, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from reslora.runtime.folder_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    pathlib.Path(sys.argv[1], "held").touch()
    time.sleep(600)
"""


def assert_locked(folder: Path) -> None:
    with locked(folder):
        assert (folder / ".lock").read_text().partition("\n")[0] == str(os.getpid())


@pytest.fixture
def other_temporary_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.mark.exhaustive
def test_a_living_owner_is_seen_with_another_temporary_folder(tmp_path, other_temporary_folder):
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)])
    try:
        wait_until((folder / "held").exists, "the lock", process)
        for _ in range(2):  # who is refused leaves the owner's lock
            with pytest.raises(InvalidArgument, match=f"process {process.pid} is training in it"):
                assert_locked(folder)
    finally:
        process.kill()
    ended(process)
    assert_locked(folder)
    assert not (folder / ".lock").exists()


def test_a_lock_leaves_no_file_behind(tmp_path, other_temporary_folder):
    with locked(tmp_path / "out"):
        assert [path.suffix for path in (tmp_path / "temporary").iterdir()] == [".lock"]
        with pytest.raises(InvalidArgument, match="is training in it"):
            assert_locked(tmp_path / "out")
        assert len(list((tmp_path / "temporary").iterdir())) == 1  # who is refused removes nothing
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("owner", ["", "{pid}\n{host}-{pid}-1"])
def test_a_lock_of_who_is_gone_or_cannot_be_asked_is_taken_over(tmp_path, owner):
    """Of another machine, of an earlier process with the id of a running one, or damaged."""
    host, _, start = this_process().split("-")
    (tmp_path / ".lock").write_text(owner.format(host=host, pid=os.getppid(), start=start))
    assert_locked(tmp_path)


@pytest.mark.parametrize("then", ["moved", "removed"])
def test_a_folder_that_is_not_there_any_more_ends_the_run(tmp_path, then):
    folder = tmp_path / "out"
    check_held()  # nothing is locked
    with locked(folder):
        check_held()
        (folder / "checkpoint-80").mkdir()
        folder.rename(tmp_path / "moved")
        if then == "removed":
            shutil.rmtree(tmp_path / "moved")
        with pytest.raises(RunFailed, match=f"^--output_dir {folder} was moved or removed during training, "):
            check_held()
    check_held()
    assert not folder.exists()
    if then == "moved":
        assert_locked(tmp_path / "moved")  # it goes on there


def test_nothing_is_written_into_a_folder_that_was_moved(tmp_path):
    """It is not created again, even by code that does not check."""
    folder = tmp_path / "out"
    with locked(folder):
        write_json(folder / "config.json", {})
        folder.rename(tmp_path / "moved")
        with pytest.raises(RunFailed, match="was moved or removed"):
            write_json(folder / "config.json", {})
        assert not folder.exists()


def test_who_deletes_the_lock_alone_ends_no_run(tmp_path):
    """`check_held` raises an error if the folder is lost."""
    with locked(tmp_path / "out"):
        (tmp_path / "out" / ".lock").unlink()
        check_held()


def test_a_process_shares_a_lock_until_its_owner_loses_it(tmp_path):
    """The owner may be on another machine; without its lock file, the folder is not on shared storage."""
    with pytest.raises(RunFailed, match=r"as seen from .*; it must be on storage that all machines share$"):
        sharing_lock(tmp_path, "0000beef-1-1").__enter__()
    (tmp_path / ".lock").write_text("1\n0000beef-1-1")
    with sharing_lock(tmp_path, "0000beef-1-1"):
        write_json(tmp_path / "arm.json", {})
        (tmp_path / ".lock").write_text("2\n0000beef-2-2")
        with pytest.raises(RunFailed, match=r"is now used by another run \(process 2\): nothing more is saved"):
            write_json(tmp_path / "arm.json", {"status": "finished"})
    assert (tmp_path / "arm.json").read_text().split() == ["{}"]
    check_held()
