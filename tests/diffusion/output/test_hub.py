"""What is uploaded of a run, and the model card that says what it is."""

import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from pipelines import image_folder

from diffusion.runs import failed, main, without


@pytest.fixture
def hub(monkeypatch) -> list[dict]:
    """A stand-in for the hub: what was to be uploaded, and as `files` which of the folder's files that would send."""
    uploaded = []

    def upload(folder_path: Path, allow_patterns: list[str], ignore_patterns: list[str], **more: object) -> None:
        (folder_path / "notes.txt").write_text("for me alone")
        there = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        sent = filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        (folder_path / "notes.txt").unlink()
        uploaded.append(more | {"files": sorted(sent)})

    made = type("Made", (), {"repo_id": "me/run"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", missing_card)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return uploaded


def test_upload_is_tried_again_by_the_same_command(run, base_flags, hub, monkeypatch, capsys):
    """What is uploaded, under what card, and what a failure leaves; images to learn from, shown before, are not."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", run, "--push_to_hub"]
    before = Image.open(run / "comparison.png").height
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "upload_folder", lambda **_: 1 / 0)
        assert "me/run could not be uploaded" in failed(capsys, *flags)
    assert main(*flags) == 0
    card = (run / "README.md").read_text()
    (run / "README.md").unlink()
    assert "comparison.png" in card and "base_model" not in card and str(run.parent) not in card
    assert hub[0]["repo_id"] == "me/run" and Image.open(run / "comparison.png").height < before
    of_both = {"pytorch_lora_weights.safetensors", "kohya.safetensors", "log.jsonl", "merged/0-0.png"}
    of_both |= {"peft/adapter_config.json", "peft/adapter_model.safetensors", "samples/step-000004/1-0.png"}
    files = {"README.md", "comparison.png", "loss.png", "reslora/chains.json", "reslora/merge.json"}
    assert files | {f"{name}/{file}" for name in ("lora", "reslora") for file in of_both} <= set(hub[0]["files"])


def test_settings_notes_and_what_tells_of_the_images_are_not_uploaded(brief_flags, tmp_path, hub):
    out = tmp_path / "out"
    data = image_folder(out / "mine")
    flags = [*without(without(brief_flags, "--report_to"), "--train_data_dir"), "--train_data_dir", data]
    flags += ["--method", "reslora", "--validation_prompt", "red disc", "--validation_split", "0.3", "--save_best"]
    flags += ["--cache_dir", out / "kept", "--logging_dir", "seen", "--push_to_hub"]
    assert main(*flags, "--output_dir", out) == 0
    for there in ("reslora/calibration.safetensors", "images.json", "kept/encoded/*.arrow", "seen/**/hparams.yml"):
        assert list(out.glob(there)), there
    drawn = [f"{folder}/{name}" for folder in ("merged", "samples/step-*") for name in ("0-0.png", "prompts.json")]
    files = ["pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_*", "chains.json", "merge.json"]
    known = ["README.md", "comparison.png", "loss.png", files[0]]
    known += [f"reslora/{name}" for name in (*files, "log.jsonl", *drawn)]
    assert [name for name in hub[0]["files"] if not any(fnmatch.fnmatchcase(name, one) for one in known)] == []


def missing_card(*_, **__):
    from huggingface_hub.errors import EntryNotFoundError

    raise EntryNotFoundError("none yet")
