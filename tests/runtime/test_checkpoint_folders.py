"""Renamed checkpoints: their names, and which ones are renamed."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from reslora.errors import InvalidArgument, RunFailed
from reslora.runtime.checkpoint_folders import (
    memory_reported,
    numbered,
    refuse_afresh,
    set_aside,
    set_others_aside,
)


def folders(folder: Path, *steps: int) -> list[Path]:
    """Write checkpoints of these steps."""
    made = [folder / f"checkpoint-{step}" for step in steps]
    for path in made:
        path.mkdir(parents=True)
    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_set_aside_is_no_checkpoint(tmp_path):
    for _ in range(2):
        set_aside(*folders(tmp_path, 9))
    assert names(tmp_path) == {"set-aside-checkpoint-9", "set-aside-checkpoint-9-2"} and not numbered(tmp_path)


def test_later_ones_step_aside_and_all_where_the_chosen_one_is_from_elsewhere(tmp_path, monkeypatch):
    """Wherever it is from, it is the newest in its folder at once: a killed process resumes from it."""
    run = tmp_path / "run"
    _, second, third = folders(run, 1, 2, 3)
    (third / "weights").write_text("third")
    (run / "log").write_text("of the second")
    set_others_aside(second, numbered(run), second, ["log", "best"])
    assert names(run) == {"checkpoint-1", "checkpoint-2", "set-aside-checkpoint-3", "log"}
    aside = run / "set-aside-checkpoint-3"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(shutil, "copytree", no_space)
        set_others_aside(aside, numbered(run), third)
    assert numbered(run) == [second, run / "checkpoint-1"]
    set_others_aside(aside, numbered(run), third, ["log", "best"])
    assert numbered(run) == [third] and (third / "weights").read_text() == (aside / "weights").read_text() == "third"
    (elsewhere,) = folders(tmp_path / "other", 3)
    (elsewhere / "weights").write_text("other")
    set_others_aside(elsewhere, [], third)  # somebody's, in its place
    assert numbered(run) == [third] and (third / "weights").read_text() == "other" and elsewhere.is_dir()
    kept = {f"set-aside-checkpoint-{name}" for name in ("1", "2", "3", "3-2")}
    assert names(run) == {"checkpoint-3", "set-aside-log"} | kept


def refused(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted", "optimizer.pt")  # without its folder, as rmtree does


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "the disk is full")


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_set_aside_last_is_named_where_nothing_else_is_left(tmp_path, finished):
    (made,) = folders(tmp_path, 7)
    refuse_afresh(tmp_path, tmp_path, finished=False)
    set_aside(made)
    place = tmp_path / "set-aside-checkpoint-7"
    line = rf"no checkpoint other than {place.name}; resume with .* {place}, choose another"
    with pytest.raises(InvalidArgument, match=line):
        refuse_afresh(tmp_path, tmp_path, finished)


def test_memory_that_runs_out_is_reported_with_the_newest_checkpoint(tmp_path):
    line = rf"^memory ran out \(.*\), and nothing on disk is lost; {tmp_path} has no checkpoint yet: start again"
    with pytest.raises(RunFailed, match=line), memory_reported(tmp_path):
        torch.empty(2**60)
    folders(tmp_path, 2, 10)
    line = rf"{tmp_path}/checkpoint-10: resume with --resume_from_checkpoint latest once memory is free"
    with pytest.raises(RunFailed, match=line), memory_reported(tmp_path):
        torch.empty(2**60)


@pytest.mark.parametrize("error", [RunFailed("--model x: memory ran out; free some"), RuntimeError("shapes")])
def test_other_errors_of_a_training_are_reported_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, memory_reported(tmp_path):
        raise error
    assert raised.value is error
