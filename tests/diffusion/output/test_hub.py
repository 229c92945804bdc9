"""What is uploaded of a run, and the model card that says what it is."""

import fnmatch
import io

import huggingface_hub
import pytest
from PIL import Image
from pipelines import image_folder

from diffusion.runs import failed, main, without


class Hub:
    """A stand-in for the hub: one repository, and what was uploaded to it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_commit(self, repo_id: str, added: list, **_: object) -> None:
        assert repo_id == "me/run"
        for one in added:
            with one.as_file() as file:
                self.files[one.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch) -> Hub:
    there = Hub()
    made = type("Made", (), {"repo_id": "me/run"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", missing_card)
    monkeypatch.setattr(huggingface_hub, "create_commit", there.create_commit)
    return there


def height(content: bytes) -> int:
    return Image.open(io.BytesIO(content)).height


def test_upload_is_tried_again_by_the_same_command(run, base_flags, hub, monkeypatch, capsys):
    """What is uploaded, under what card, and what a failure leaves."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", run, "--push_to_hub"]
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "create_commit", lambda *_, **__: 1 / 0)
        assert "me/run could not be uploaded" in failed(capsys, *flags)
    assert main(*flags) == 0
    card = (run / "README.md").read_text()
    (run / "README.md").unlink()
    assert "comparison.png" in card and "base_model" not in card and str(run.parent) not in card
    of_both = {"pytorch_lora_weights.safetensors", "kohya.safetensors", "log.jsonl", "merged/0-0.png"}
    of_both |= {"peft/adapter_config.json", "peft/adapter_model.safetensors", "samples/step-000004/1-0.png"}
    files = {"README.md", "comparison.png", "loss.png", "reslora/chains.json", "reslora/merge.json"}
    assert files | {f"{name}/{file}" for name in ("lora", "reslora") for file in of_both} <= set(hub.files)


@pytest.mark.parametrize("prompts", [["red disc", "blue box"], ["green star"], []])
def test_the_comparison_that_is_uploaded_shows_what_was_drawn_and_no_training_images(run, base_flags, hub, prompts):
    """Whatever prompts the upload of a finished run is asked for with; the run's own file stays as it is."""
    before = (run / "comparison.png").read_bytes()
    at = base_flags.index("--validation_prompt")
    flags = [*base_flags[:at], "--validation_prompt", *prompts] if prompts else base_flags[:at]
    flags += [*base_flags[at + 3 :], "--method", "lora", "reslora", "--output_dir", run, "--push_to_hub"]
    assert main(*flags) == 0
    (run / "README.md").unlink()
    assert (run / "comparison.png").read_bytes() == before
    assert height(before) > height(hub.files["comparison.png"]) > 300


def test_settings_notes_and_what_tells_of_the_images_are_not_uploaded(brief_flags, tmp_path, hub):
    out = tmp_path / "out"
    data = image_folder(out / "mine")
    (out / "notes.txt").write_text("for me alone")
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
    assert [name for name in hub.files if not any(fnmatch.fnmatchcase(name, one) for one in known)] == []


def missing_card(*_, **__):
    from huggingface_hub.errors import EntryNotFoundError

    raise EntryNotFoundError("none yet")
