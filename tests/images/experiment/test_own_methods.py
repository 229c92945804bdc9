"""Methods that a user brings, in runs and experiments: verdicts, exports, resumed runs and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from launching import forked
from peft import PeftModel
from pipelines import image_folder

from images.runs import RESUME, SCRIPT, assert_same, final_weights, main, refused, without

MODULE = """
from peft import FourierFTConfig

from examples.my_method import shared_a


def fourier(model, settings):
    return FourierFTConfig(n_frequency=6, scaling=1.0, **settings.shared)


def broken(model, settings):
    raise KeyError("a mistake")
"""
METHODS = ("lora", "peft.VeraConfig", "theirs.fourier", "theirs.shared_a")
TITLES = ("LoRA", "Vera", "fourier (theirs)", "shared a (theirs)")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a user's module; programs are started in it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "theirs.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory) -> list[str]:
    images = image_folder(tmp_path_factory.mktemp("images") / "images", count=8)
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--resolution", "32"),
        *("--max_train_steps", "2", "--checkpointing_steps", "1", "--train_batch_size", "2", "--rank", "2"),
        *("--num_validation_images", "0", "--report_to", "none", "--learning_rate", "1e-2"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]


@pytest.fixture(scope="module")
def finished(flags, place) -> Path:
    """An experiment with LoRA, two of PEFT's tuners and a variant of one's own."""
    output = place / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        split = ("--select_split", "0.25", "--test_split", "0.25", "--validation_steps", "1")
        asked = [name.replace(".", ":") for name in METHODS]
        assert main(*flags, *split, "--method", *asked, "--seed", "0", "1", "--output_dir", output) == 0
    return output


@pytest.mark.exhaustive
def test_an_experiment_has_a_verdict_of_each(finished):
    found = json.loads((finished / "experiment.json").read_text())
    page = (finished / "report.html").read_text()
    assert [(one["label"], one["reference"]) for one in found["verdicts"]] == [(name, "lora") for name in METHODS[1:]]
    assert all(title in page for title in TITLES)
    [note] = [note for note in found["notes"] if "PEFT's conversion" in note]
    assert note.startswith(
        "theirs.fourier: plain LoRA by PEFT's conversion, of rank 2: its relative error is 0."
    )  # the two others have low ranks
    assert {path.name for path in finished.iterdir() if path.is_dir()} >= set(METHODS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS[1:])
def test_its_files_are_those_of_the_method(finished, method, model):
    folder = next(path.parent for path in sorted((finished / method).rglob("exports.json")))
    width = UNet2DConditionModel.load_config(model / "unet")["cross_attention_dim"]
    inputs = {
        "sample": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), "timestep": 7,
        "encoder_hidden_states": torch.ones(1, 5, width),
    }  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    base = unet(**inputs).sample
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(folder)
    of_lora = pipeline.unet(**inputs).sample
    of_peft = PeftModel.from_pretrained(unet, next(folder.glob("peft/**/adapter_config.json")).parent)(**inputs).sample
    record = json.loads((folder / "conversion.json").read_text())
    change = (of_peft - base).norm()
    assert change > 0 and record["rank"] == 2
    if method == "theirs.fourier":  # of full rank
        assert 0.01 < record["error"] < 1 and (of_lora - of_peft).norm() < change
    else:
        assert record["error"] < 1e-5
        torch.testing.assert_close(of_lora, of_peft, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(flags, place, method, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(*flags, "--method", method, "--output_dir", whole) == 0
    shutil.copytree(whole / method / "checkpoint-1", resumed / method / "checkpoint-1")
    assert main(*flags, "--method", method, "--output_dir", resumed, *RESUME) == 0
    assert_same(final_weights(whole, method, 2), final_weights(resumed, method, 2))


@pytest.mark.exhaustive
def test_two_processes_train_one_together(flags, tmp_path):
    """Both import the module; layers share a matrix, whose gradient is summed over both processes."""
    method, one_at_a_time = "examples.my_method.shared_a", [*without(flags, "--train_batch_size"), "--train_batch_size"]
    assert main(*one_at_a_time, "2", "--method", method, "--output_dir", tmp_path / "one") == 0
    forked(SCRIPT, *one_at_a_time, "1", "--method", method, "--output_dir", str(tmp_path / "two"), folder=tmp_path)
    one, two = (final_weights(tmp_path / name, method, 2) for name in ("one", "two"))
    assert_same(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("theirs:nothing", "theirs has no function nothing"),
        ("nowhere:f", "nowhere cannot be imported"),
        ("theirs:broken", "'a mistake'"),
        ("peft:C3AConfig", "block size"),
        ("theirs:", "is not package.module:function"),
    ],
)
def test_a_method_that_cannot_be_trained_is_refused_in_one_line(flags, place, capsys, monkeypatch, method, words):
    monkeypatch.chdir(place)
    line = refused(capsys, *without(flags, "--checkpointing_steps"), "--method", method)
    assert "--method" in line and words in line and not (place / "output").exists()
