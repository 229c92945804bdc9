"""app/whole_models.py: the written folder loads in stock diffusers and generates the same images."""

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from app_runs import REQUEST, image_of, trained
from diffusers import DiffusionPipeline

from app import whole_models
from app.library import Library
from app.runs import RunError
from app.stacks import stacked, to_write
from app.studio import Cancelled, Studio
from app.whole_models import Watched, lines_for, place_for
from reslora.images.model.stored import Stored


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    return Library(trained(tmp_path_factory)).find("tiny")


@pytest.fixture
def library(trained_run, tmp_path):
    """A library with the run in its own folder, to which models are written."""
    shutil.copytree(trained_run.folder, tmp_path / "runs" / "tiny")
    return Library(tmp_path / "runs")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def drawn_by_the_lines(place, monkeypatch):
    """Return the image that the displayed three lines generate, with Generate's settings."""
    scope, call = {}, DiffusionPipeline.from_pretrained
    lines = lines_for(str(place)).splitlines()
    assert len(lines) == 3
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *given: quiet(call(*given)))
    exec("\n".join(lines[:2]), scope)
    settings = {"num_inference_steps": REQUEST.steps, "guidance_scale": REQUEST.guidance, "height": 32, "width": 32}
    seed = torch.Generator().manual_seed(REQUEST.seed)
    image = scope["pipeline"](REQUEST.prompt, generator=seed, **settings).images[0]
    return np.asarray(image).astype(int), scope["pipeline"]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def nothing_is_left(library):
    return not list((library.folder / "models").iterdir())


@pytest.mark.exhaustive
@pytest.mark.parametrize("chosen", ["stack", "reslora: merged weights", "lora: kohya.safetensors"])
def test_it_draws_what_generate_draws(studio, library, monkeypatch, chosen):
    run, target = library.find("tiny"), place_for(library, "mine")
    names = ["tiny: lora", "tiny: reslora"]
    weights = stacked(library, run, names, "0.7 -0.5") if chosen == "stack" else run.find_weights(chosen)
    list(studio.write_whole(run, to_write(weights, 1.0), target))
    image, _ = drawn_by_the_lines(target, monkeypatch)
    assert np.abs(image - image_of(studio, run, weights)).max() <= 1
    assert list(library.runs()) == ["tiny"]
    with pytest.raises(RunError, match="models/mine already exists: give another name"):
        place_for(library, "mine")
    with pytest.raises(RunError, match="models/mine already exists"):
        list(studio.write_whole(run, to_write(weights, 1.0), target))
    assert [path.name for path in target.parent.iterdir()] == ["mine"]


@pytest.mark.exhaustive
def test_of_files_in_half_precision_another_scheduler_and_no_checker(studio, library, tmp_path, monkeypatch):
    """Parts that differ from the base's files are written from memory; pickles are not copied."""
    run = library.find("tiny")
    base = DiffusionPipeline.from_pretrained(run.word("pretrained_model_name_or_path"))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base", variant="bf16")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "base" / "tokenizer" / "extra.bin").write_bytes(pickle.dumps("pickle"))
    changes = {"pretrained_model_name_or_path": str(tmp_path / "base"), "variant": "bf16"}
    changes |= {"prediction_type": "v_prediction"}
    config = run.folder / "config.json"
    config.write_text(json.dumps(run.config | changes))
    list(studio.write_whole(run, stacked(library, run, ["tiny: lora"], ""), place_for(library, "half")))
    image, pipeline = drawn_by_the_lines(library.folder / "models" / "half", monkeypatch)
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and pipeline.safety_checker is None
    assert np.abs(image - image_of(studio, run, stacked(library, run, ["tiny: lora"], ""))).max() <= 1
    assert not list(library.folder.glob("models/half/**/*.bin"))


def test_a_full_disk_leaves_nothing(studio, library, monkeypatch):
    read, count = Stored.read, []

    def fails(self, *given):
        count.append(self.name)
        if len(count) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read(self, *given)

    monkeypatch.setattr(Stored, "read", fails)
    run = library.find("tiny")
    with pytest.raises(RunError, match=r"^The model could not be written: No space left on device\.$"):
        list(studio.write_whole(run, stacked(library, run, ["tiny: lora"], ""), place_for(library, "mine")))
    assert len(count) == 5 and nothing_is_left(library)


@pytest.mark.parametrize("label", ["lora: pytorch_lora_weights.safetensors", "lora: merged weights"])
def test_cancelled_it_stops_at_the_next_tensor_and_leaves_nothing(studio, library, monkeypatch, label):
    run, count = library.find("tiny"), []

    def counted(check):
        count.append(1)
        if len(count) == 3:
            assert studio.cancel("me")
        check()

    write = whole_models.write
    monkeypatch.setattr(whole_models, "write", lambda *given: write(*given[:-1], lambda: counted(given[-1])))
    with pytest.raises(Cancelled):
        list(studio.write_whole(run, to_write(run.find_weights(label), 1.0), place_for(library, "mine"), "me"))
    assert len(count) == 3 and nothing_is_left(library)
    assert image_of(studio, run, run.find_weights(label)).size  # the turn was given back


def test_a_tensor_is_read_only_after_a_look_whether_it_is_wanted(tmp_path):
    def stop():
        raise Cancelled

    with pytest.raises(Cancelled):
        Watched(tmp_path / "none", "name", stop).read()


@pytest.mark.parametrize("gone", ["", "vae"])
def test_a_base_that_is_gone_makes_no_model(studio, library, tmp_path, gone):
    """Before the first part is copied, and during the copy."""
    run, base = library.find("tiny"), tmp_path / "base"
    shutil.copytree(run.word("pretrained_model_name_or_path"), base)
    (run.folder / "config.json").write_text(json.dumps(run.config | {"pretrained_model_name_or_path": str(base)}))
    image_of(studio, run, run.find_weights("base model"))
    (base / gone).rename(tmp_path / "elsewhere")
    target = place_for(library, "mine")
    with pytest.raises(RunError, match=r"^The model of this run cannot be loaded: .*no such folder|no vae folder"):
        list(studio.write_whole(run, run.find_weights("lora: kohya.safetensors"), target))
    parts = {"unet": run.find_weights("lora: merged weights").path}
    with pytest.raises(RunError, match=r"^The base model's folder \w+ is missing: restore this folder\.$"):
        whole_models.write(target, studio.model, studio.pipeline.components, parts, lambda: None)
    assert nothing_is_left(library)


def test_merged_weights_that_are_not_whole_are_refused(studio, library):
    run = library.find("tiny")
    (file,) = (run.folder / "lora" / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RunError, match="could not be written: lora/unet, unet/diffusion_pytorch_model") as refusal:
        list(studio.write_whole(run, run.find_weights("lora: merged weights"), place_for(library, "mine")))
    assert str(library.folder) not in str(refusal.value) and nothing_is_left(library)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc", "a" * 65, "a\0", "a b", None, 5, ["a"]])
def test_names_that_could_be_anything_else_are_refused(library, name):
    with pytest.raises(RunError, match=r"^Give the model a name"):
        place_for(library, name)
