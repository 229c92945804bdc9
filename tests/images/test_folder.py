"""The run's folder is used by one run at a time, and files of the user stay."""

import os

import pytest
from waiting import ended, wait_until

from images.runs import RESUME, final_weights, main, refused
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
