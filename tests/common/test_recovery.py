"""Checkpoints that step aside: under which name, which ones, and that transformers leaves them alone."""

from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints

from reslora.common.recovery import numbered, set_aside, set_others_aside


def folders(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps."""
    made = [folder / f"checkpoint-{step}" for step in steps]
    for path in made:
        path.mkdir(parents=True)
    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_transformers_neither_removes_nor_counts_what_is_set_aside(tmp_path):
    for _ in range(2):
        set_aside(*folders(tmp_path, 9))
    folders(tmp_path, 1, 2)
    rotate_checkpoints(str(tmp_path), save_total_limit=1)
    assert names(tmp_path) == {"checkpoint-2", "set-aside-checkpoint-9", "set-aside-checkpoint-9-2"}


def test_later_ones_step_aside_and_all_where_the_chosen_one_is_from_elsewhere(tmp_path):
    _, second, _ = folders(tmp_path / "run", 1, 2, 3)
    set_others_aside(second, numbered(tmp_path / "run"))
    assert names(tmp_path / "run") == {"checkpoint-1", "checkpoint-2", "set-aside-checkpoint-3"}
    set_others_aside(tmp_path / "run" / "set-aside-checkpoint-3", numbered(tmp_path / "run"))
    assert not numbered(tmp_path / "run")
    folders(tmp_path / "run", 1, 2)
    (elsewhere,) = folders(tmp_path / "other", 5)
    set_others_aside(elsewhere, numbered(tmp_path / "run"))
    assert not numbered(tmp_path / "run") and len(names(tmp_path / "run")) == 5 and elsewhere.is_dir()
