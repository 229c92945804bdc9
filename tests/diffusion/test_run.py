"""The run as a whole: what is refused before it begins, what it finds in its folder, and who else is in it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion.runs import RESUME, final_weights, main, refused, without


def test_finished_run_does_nothing(run, base_flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(*base_flags, "--method", "lora", "reslora", "--output_dir", run) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_steps_and_epochs_are_told_apart(run, base_flags, capsys):
    """A run that `--max_train_steps` ended is not the run of so many epochs, and not one of fewer steps."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", run]
    assert "unfinished run" in refused(capsys, *without(flags, "--max_train_steps"), "--num_train_epochs", 2)
    line = refused(capsys, *flags, "--max_train_steps", 2)
    assert "--max_train_steps 2" in line and "4" in line


def test_unfinished_run_is_not_overwritten(run, base_flags, capsys, tmp_path):
    checkpoint = tmp_path / "lora" / "checkpoint-2"
    checkpoint.parent.mkdir()
    checkpoint.symlink_to(run / "lora" / "checkpoint-2")
    flags = [*base_flags, "--method", "lora", "--output_dir", tmp_path]
    assert "--resume_from_checkpoint latest" in refused(capsys, *flags)


# -- the folder of the run -------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_a_lock_left_behind_is_taken_over(runs, capsys, tmp_path):
    output = tmp_path / "out"
    flags = (*runs.flags, "--output_dir", output, "--max_train_steps", 10_000)
    other = runs.start(output, "--max_train_steps", "10000", "--checkpointing_steps", "1")
    while not list(output.glob("reslora/checkpoint-*/trainer.json")):
        assert other.is_alive()
    for resume in ((), RESUME):
        assert f"process {other.pid} is training in it" in refused(capsys, *flags, *resume, quiet=False)
    other.kill()
    other.join()
    (output / ".lock").write_text(str(os.getppid()))  # an id that was used again
    done = max(int(path.name.split("-")[1]) for path in output.glob("reslora/checkpoint-*"))
    assert main(*flags, *RESUME, "--max_train_steps", done + 1) == 0
    assert final_weights(output, step=done + 1)
    assert not (output / ".lock").exists()


def test_a_refused_run_leaves_the_users_files(base_flags, capsys, tmp_path):
    """Leftovers of a killed run go; what merely looks alike stays, as does a folder that was there."""
    theirs = [tmp_path / "out" / ".mine.tmp", tmp_path / "out" / "notes" / ".draft.1.tmp"]
    own = [tmp_path / "out" / ".config.json.123.tmp", tmp_path / "out" / "lora" / ".peft.123.old.tmp"]
    for path in (*theirs, *own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        refused(capsys, *base_flags, "--target_modules", "to_nothing", "--output_dir", tmp_path / name)
    assert all(path.is_file() for path in theirs) and not any(path.exists() for path in own)
    assert (tmp_path / "empty").is_dir()


# -- models that cannot be trained -----------------------------------------------------------------------------------


def refused_model(capsys, base_flags, folder: Path) -> str:
    """The line with which the model is refused, before anything is encoded or written."""
    output = folder.parent / "out"
    line = refused(capsys, *base_flags, "--pretrained_model_name_or_path", folder, "--output_dir", output)
    assert f"--pretrained_model_name_or_path {folder}" in line
    assert not output.exists()
    return line


def damage_missing(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").unlink()


def damage_cut_off(unet: Path) -> None:
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def damage_other_shape(unet: Path) -> None:
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 24]}))


@pytest.mark.parametrize("damage", [damage_missing, damage_cut_off, damage_other_shape])
def test_damaged_unet_is_refused_before_anything_is_encoded(base_flags, model, capsys, tmp_path, damage):
    broken = shutil.copytree(model, tmp_path / "model")
    damage(broken / "unet")
    assert "unet" in refused_model(capsys, base_flags, broken)


@pytest.mark.parametrize("index, vae", [("[]", None), (None, "[]"), ("{", None)])
def test_damaged_model_configs_are_refused(base_flags, model, capsys, tmp_path, index, vae):
    broken = shutil.copytree(model, tmp_path / "model")
    if index:
        (broken / "model_index.json").write_text(index)
    if vae:
        (broken / "vae" / "config.json").write_text(vae)
    name = "model_index.json" if index else "vae/config.json"
    assert name in refused_model(capsys, base_flags, broken)


def test_a_missing_tokenizer_is_named(base_flags, model, capsys, tmp_path):
    broken = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(broken / "tokenizer")
    line = refused_model(capsys, base_flags, broken)
    assert str(broken / "tokenizer") in line or "no tokenizer" in line
    assert ": ;" not in line


def test_predictions_of_the_image_itself_are_refused(base_flags, model, capsys, tmp_path):
    """Trained on the noise it would unlearn what it can."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    line = refused_model(capsys, base_flags, folder)
    assert "prediction_type" in line and "sample" in line


def test_other_kinds_of_pipeline_are_refused_by_name(base_flags, model, capsys, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    line = refused_model(capsys, base_flags, folder)
    assert "KandinskyPipeline" in line and "StableDiffusionPipeline" in line


def test_a_single_file_that_cannot_be_loaded_is_refused_with_what_makes_a_folder_of_it(base_flags, capsys, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    line = refused_model(capsys, base_flags, path)
    assert "no such folder" not in line
    assert "from_single_file" in line and "save_pretrained" in line


def test_hub_that_cannot_be_reached_is_said_at_once(capsys, data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False, raising=False)
    flags = ("--pretrained_model_name_or_path", "nobody/nothing", "--train_data_dir", data, "--report_to", "none")
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "nobody/nothing" in line and "http://127.0.0.1:9 cannot be reached" in line
    assert not (tmp_path / "out").exists()
