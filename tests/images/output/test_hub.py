"""The files of a run that are uploaded, and the model card."""

import fnmatch
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from pipelines import image_folder
from safetensors.torch import load_file

from images.runs import failed, main, without
from reslora.images.context import ImageContext
from reslora.images.model.families import load_family
from reslora.images.output.card import TAGS, card_of
from reslora.options.images import Options

WEIGHTS = "pytorch_lora_weights.safetensors"


class Hub:
    """A stand-in for the Hub: one repository, and the uploaded files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_commit(self, repo_id: str, added: list, **_: object) -> None:
        assert repo_id == "me/run"
        for one in added:
            with one.as_file() as file:
                self.files[one.path_in_repo] = file.read()

    def file_exists(self, repo_id: str, name: str, **_: object) -> bool:
        return repo_id == "me/run" and name in self.files

    def load(self, repo_id: str, **_: object) -> ModelCard:
        return ModelCard(self.card) if repo_id == "me/run" else None

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()

    def download(self) -> None:
        """Write the repository to a relative path with its name: libraries read it as from the Hub."""
        for name, content in self.files.items():
            path = Path("me/run", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    there = Hub()
    made = type("Made", (), {"repo_id": "me/run"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr(huggingface_hub, "create_commit", there.create_commit)
    monkeypatch.setattr(huggingface_hub, "file_exists", there.file_exists)
    monkeypatch.setattr(ModelCard, "load", there.load)
    return there


def height(content: bytes) -> int:
    return Image.open(io.BytesIO(content)).height


@pytest.mark.exhaustive
def test_upload_is_tried_again_by_the_same_command(run, base_flags, hub, monkeypatch, capsys):
    """The uploaded files, the model card, and the state after a failure."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", run, "--push_to_hub"]
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "create_commit", lambda *_, **__: 1 / 0)
        assert "me/run could not be uploaded" in failed(capsys, *flags)
    assert main(*flags) == 0 and not (run / "README.md").exists()
    assert "comparison.png" in hub.card and "base_model" not in hub.card and str(run.parent) not in hub.card
    of_both = {"pytorch_lora_weights.safetensors", "kohya.safetensors", "log.jsonl", "merged/0-0.png"}
    of_both |= {"peft/adapter_config.json", "peft/adapter_model.safetensors", "samples/step-000004/1-0.png"}
    files = {"README.md", "comparison.png", "loss.png", "reslora/chains.json", "reslora/merge.json"}
    assert files | {f"{name}/{file}" for name in ("lora", "reslora") for file in of_both} <= set(hub.files)


@pytest.mark.exhaustive
def test_the_comparison_that_is_uploaded_shows_what_was_drawn_and_no_training_images(run, base_flags, hub):
    """Whatever prompts the upload of a finished run is given; the run's own figure is unchanged."""
    before = (run / "comparison.png").read_bytes()
    at = base_flags.index("--validation_prompt")
    flags = [*base_flags[:at], "--validation_prompt", "green star", *base_flags[at + 3 :]]
    flags += ["--method", "lora", "reslora", "--output_dir", run, "--push_to_hub"]
    assert main(*flags) == 0
    assert (run / "comparison.png").read_bytes() == before
    assert height(before) > height(hub.files["comparison.png"]) > 300


@pytest.mark.exhaustive
def test_settings_notes_and_what_tells_of_the_images_are_not_uploaded(brief_flags, tmp_path, hub, model):
    out = tmp_path / "out"
    data = image_folder(out / "mine")
    (out / "notes.txt").write_text("for me alone")
    flags = [*without(without(brief_flags, "--report_to"), "--train_data_dir"), "--train_data_dir", data]
    flags += ["--method", "reslora", "--validation_prompt", "red disc", "--validation_split", "0.3", "--save_best"]
    flags += ["--cache_dir", out / "kept", "--logging_dir", "seen", "--push_to_hub"]
    assert main(*flags, "--output_dir", out) == 0
    for there in (
        "reslora/calibration.safetensors",
        "images.json",
        "kept/encoded/*.safetensors",
        "seen/**/hparams.yml",
    ):
        assert list(out.glob(there)), there
    drawn = [f"{folder}/{name}" for folder in ("merged", "samples/step-*") for name in ("0-0.png", "prompts.json")]
    files = ["pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_*", "chains.json", "merge.json"]
    known = ["README.md", "comparison.png", "loss.png", files[0]]
    known += [f"reslora/{name}" for name in (*files, "log.jsonl", *drawn)]
    assert [name for name in hub.files if not any(fnmatch.fnmatchcase(name, one) for one in known)] == []
    hub.download()
    Path(model.name).symlink_to(model)
    (code,) = examples(hub.card)
    assert_loads(code, Path("me/run", WEIGHTS))  # a single method's are at the repository's root


# -- the model card ----------------------------------------------------------------------------------------------------


def examples(card: str) -> list[str]:
    """Return the Python blocks of the card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.exhaustive
def test_the_cards_lines_load_each_methods_weights(run, base_flags, hub, model):
    """Unchanged, next to the folder of the base model."""
    assert main(*base_flags, "--method", "lora", "reslora", "--output_dir", run, "--push_to_hub") == 0
    hub.download()
    Path(model.name).symlink_to(model)
    for method, code in zip(("lora", "reslora"), examples(hub.card), strict=True):
        assert_loads(code, Path("me/run", method, WEIGHTS))


def assert_loads(code: str, weights: Path) -> None:
    """Assert that the lines load these weights into the denoiser."""
    names = {}
    exec(code, names)
    loaded = {name.replace(".default_0", ""): value for name, value in names["pipeline"].unet.state_dict().items()}
    for name, value in load_file(weights).items():
        torch.testing.assert_close(loaded[name.removeprefix("unet.")], value, rtol=0, atol=0)


def described(hub: Hub, base: str = "owner/base", **more: object) -> str:
    flags = {"train_data_dir": None, "dataset_name": None, "caption_prefix": None, "hub_token": None}
    flags |= {"pretrained_model_name_or_path": base, "method": ["lora"], "train_text_encoder": False}
    model = SimpleNamespace(family=load_family("StableDiffusionPipeline"))
    return card_of("me/run", False, ImageContext(Options.of(**flags | more), model, None, None))


def test_the_card_of_a_second_upload_says_what_is_uploaded_now_and_keeps_other_text(hub):
    hub.files["README.md"] = b"---\ntags:\n- cats\n- lora\nlicense: mit\n---\n\n# My cats\n\nThese are mine.\n"
    for base, data in (("owner/one", "owner/cats"), ("owner/two", "owner/dogs")):
        hub.files["README.md"] = described(hub, base, dataset_name=data).encode() + b"\nWrite to me.\n"
    card = ModelCard(hub.card)
    assert card.data.base_model == "owner/two" and card.data.license == "mit"
    assert sorted(card.data.tags) == sorted({"cats", *TAGS})
    assert card.text.startswith("\n# My cats\n\nThese are mine.\n") and card.text.count("Write to me.") == 2
    assert "trained on owner/dogs" in card.text and "owner/one" not in hub.card and "owner/cats" not in hub.card
    assert len(examples(card.text)) == 1


def test_a_readme_of_the_users_is_uploaded_as_it_is(run, base_flags, hub, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", tmp_path / "out", "--push_to_hub"]
    assert main(*flags) == 0 and f"{tmp_path}/out/README.md is uploaded unchanged" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").read_text() == hub.card == "# Mine\n"
