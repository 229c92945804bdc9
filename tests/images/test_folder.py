"""The run's folder is used by one run at a time, and files of the user stay."""

import os

import pytest
from waiting import ended, wait_until

from images.runs import RESUME, final_weights, leave_behind, main, refused
from reslora.io import read_object
from reslora.runtime.status import FILE


@pytest.mark.exhaustive
def test_a_second_run_is_refused_and_a_lock_left_behind_is_taken_over(runs, capsys, tmp_path):
    output = tmp_path / "out"
    flags = (*runs.flags, "--output_dir", output, "--max_train_steps", 10_000)
    other = runs.start(output, "--max_train_steps", "10000", "--checkpointing_steps", "1")
    wait_until(lambda: list(output.glob("reslora/checkpoint-*/trainer.json")), "a checkpoint", other)
    for resume in ((), RESUME):
        assert f"process {other.pid} is training in it" in refused(capsys, *flags, *resume, quiet=False)
    wait_until(lambda: "step" in read_object(output / FILE).get("phase", ""), "a step to be told", other)
    assert read_object(output / FILE)["process"] == other.pid
    other.kill()
    ended(other)
    (output / ".lock").write_text(str(os.getppid()))  # an id that was used again
    done = max(int(path.name.split("-")[1]) for path in output.glob("reslora/checkpoint-*"))
    assert main(*flags, *RESUME, "--max_train_steps", done + 1) == 0
    assert final_weights(output, step=done + 1)
    assert not (output / ".lock").exists() and not (output / FILE).exists()


def test_a_refused_run_leaves_the_users_files(base_flags, capsys, tmp_path):
    """Temporary files of a killed run are removed; files that only look similar stay, as does an existing folder."""
    theirs = [tmp_path / "out" / ".mine.tmp", tmp_path / "out" / "notes" / ".draft.1.tmp"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    names = [("config.json",), ("lora", "peft"), ("cache", "0.safetensors")]
    own = [leave_behind((tmp_path / "out").joinpath(*name)) for name in names]
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        refused(capsys, *base_flags, "--target_modules", "to_nothing", "--output_dir", tmp_path / name)
    assert all(path.is_file() for path in theirs) and not any(path.exists() for path in own)
    assert (tmp_path / "empty").is_dir()
