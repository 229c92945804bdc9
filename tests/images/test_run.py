"""A run in an existing folder: its own run, finished or not."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from pipelines import image_folder
from safetensors.torch import load_file

import train_sd
from images.runs import digests, final_weights, main, only, printed, refused, without


@pytest.fixture
def finished(run, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(run, tmp_path / "out")


def test_finished_run_does_nothing(run, base_flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(*base_flags, "--method", "lora", "reslora", "--output_dir", run) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_steps_and_epochs_are_told_apart(run, base_flags, capsys):
    """A run that `--max_train_steps` ended is not the run of a number of epochs, and not one of fewer steps."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", run]
    assert "unfinished run" in refused(capsys, *without(flags, "--max_train_steps"), "--num_train_epochs", 2)
    line = refused(capsys, *flags, "--max_train_steps", 2)
    assert "--max_train_steps 2" in line and "4" in line


@pytest.mark.exhaustive
def test_fewer_steps_or_epochs_than_were_trained_are_refused(finished, base_flags, capsys):
    """The longer training would be exported as if it were the requested one."""
    (finished / "lora" / "exports.json").unlink()
    before = digests(finished, "**/*.*")
    flags = [*base_flags, "--method", "lora", "--output_dir", finished, "--resume_from_checkpoint", "latest"]
    line = refused(capsys, *flags, "--max_train_steps", 3)
    assert "--max_train_steps 3: " in line and "was trained for 4 already" in line
    line = refused(capsys, *without(flags, "--max_train_steps"), "--num_train_epochs", 1, quiet=False)
    assert "--num_train_epochs 1 (2 steps): " in line and "checkpoint-4 was trained for 4 already" in line
    assert digests(finished, "**/*.*") == before


def test_unfinished_run_is_not_overwritten(run, base_flags, capsys, tmp_path):
    checkpoint = tmp_path / "lora" / "checkpoint-2"
    checkpoint.parent.mkdir()
    checkpoint.symlink_to(run / "lora" / "checkpoint-2")
    flags = [*base_flags, "--method", "lora", "--output_dir", tmp_path]
    assert "--resume_from_checkpoint latest" in refused(capsys, *flags)


def test_what_was_told_to_stop_while_libraries_were_imported_begins_nothing(tmp_path, capfd, monkeypatch):
    """It neither loads a model, which may take minutes, nor waits for other processes, which may never come."""
    parse = train_sd.parse_args
    monkeypatch.setattr("reslora.images.run.start_accelerator", lambda flags: pytest.fail("it waits"))

    def told(*given) -> object:
        signal.raise_signal(signal.SIGTERM)
        return parse(*given)

    monkeypatch.setattr(train_sd, "parse_args", told)
    assert main("--output_dir", tmp_path / "out", "--report_to", "none", "--seed", 0, 1) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.splitlines()[-1] == "train_sd.py: stopped before training began"
    assert not (tmp_path / "out").exists()


# -- a finished run, asked for something else --------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["with checkpoints", "without"])
@pytest.mark.parametrize(
    "flags",
    [("--rank", 8), ("--learning_rate", 0.5)],
)
def test_other_settings_are_not_what_was_trained(finished, base_flags, capsys, flags, kept):
    """The same error appears if the checkpoints were removed."""
    if not kept:
        for checkpoint in finished.glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)
    line = refused(capsys, *base_flags, "--method", "lora", "reslora", "--output_dir", finished, *flags, quiet=False)
    assert "another --output_dir" in line and (flags[0] in line or "batch size" in line)


def test_a_setting_that_is_left_out_now_was_given_then(finished, base_flags, capsys):
    for checkpoint in finished.glob("*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    for path in finished.glob("*/exports.json"):
        record = json.loads(path.read_text())
        record["settings"]["snr_gamma"] = 5.0
        path.write_text(json.dumps(record))
    line = refused(capsys, *base_flags, "--method", "lora", "reslora", "--output_dir", finished, quiet=False)
    assert "--snr_gamma 0" in line and "was trained with 5.0" in line


def test_other_images_are_not_what_was_trained_on(finished, base_flags, capsys, tmp_path):
    folder = image_folder(tmp_path / "others", caption=lambda i: "green star")
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", finished, "--train_data_dir", folder]
    line = refused(capsys, *flags, quiet=False)
    assert f"--train_data_dir {folder}" in line


@pytest.mark.exhaustive
def test_another_merge_is_made_without_training(finished, run, base_flags, tmp_path):
    """As a run that merged so from the start: the same bytes, no step, and the log as it was."""
    flags = [*base_flags, "--method", "lora", "reslora", "--merge", "weights", "--output_dir"]
    log = (finished / "reslora" / "log.jsonl").read_bytes()
    lora = {path: path.stat().st_mtime_ns for path in (finished / "lora").rglob("*")}
    only(printed(*flags, finished), "merging and exporting it anew with --merge weights")
    assert json.loads((finished / "reslora" / "merge.json").read_text())["method"] == "weights"
    assert (finished / "reslora" / "log.jsonl").read_bytes() == log
    assert {path: path.stat().st_mtime_ns for path in (finished / "lora").rglob("*")} == lora
    assert main(*flags, tmp_path / "fresh") == 0
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        one, other = (load_file(folder / "reslora" / name) for folder in (finished, tmp_path / "fresh"))
        assert all(one[key].equal(other[key]) for key in other)
    assert "nothing to do" in "".join(printed(*flags, finished))


def test_another_merge_needs_the_last_checkpoint(finished, base_flags, capsys):
    shutil.rmtree(finished / "reslora" / "checkpoint-4")
    flags = [*base_flags, "--method", "reslora", "--merge", "weights", "--output_dir", finished]
    assert "checkpoint-4, which holds the adapter, is missing" in refused(capsys, *flags)


@pytest.mark.exhaustive
def test_exports_that_are_gone_are_made_again(finished, run, base_flags):
    (finished / "lora" / "kohya.safetensors").unlink()
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", finished, "--resume_from_checkpoint", "latest"]
    assert main(*flags) == 0
    one, other = (load_file(folder / "lora" / "kohya.safetensors") for folder in (finished, run))
    assert all(one[key].equal(other[key]) for key in other)
    assert final_weights(finished, "lora").keys() == final_weights(run, "lora").keys()
