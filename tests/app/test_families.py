"""The application with a pipeline of every family: generation, and unmerged checkpoints."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from app_runs import image_of, write_run
from pipelines import FAMILIES

from app.generation_request import Request
from app.library import Library
from app.runs import BASE
from app.studio import Studio
from reslora.config import ResLoraConfig
from reslora.images.initial_lora import targets_of
from reslora.images.model.loading import find_model
from reslora.methods.adapters import attach, save_adapter
from reslora.methods.registry import AdapterSettings, adapter_config
from reslora.options.images import Options

REQUEST = Request(prompt="red disc", steps=2, seed=5, width=40, height=32)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """A run of a family as the trainer leaves it before the merge."""
    folder = tmp_path_factory.mktemp(request.param)
    model = FAMILIES[request.param](folder / "model")
    write_run(folder / "runs" / "run", pretrained_model_name_or_path=str(model))
    flags = Options.of(
        pretrained_model_name_or_path=str(model), pretrained_vae_model_name_or_path=None, revision=None, variant=None,
        cache_dir=None, output_dir="", prediction_type=None,
    )  # fmt: skip
    found = find_model(flags.model, flags.output, PartialState())
    targets = found.family.defaults.get("target_modules", ["to_q", "to_k", "to_v", "to_out.0"])
    change_config(folder / "runs" / "run", target_modules=targets, lora_alpha=4)
    for method in ("lora", "reslora"):
        denoiser = found.load_denoiser(torch.float32, torch.device("cpu"))
        config = adapter_config(method, AdapterSettings(2, 4, 0.0, targets_of(targets), total_steps=4))
        attach(denoiser, config, ResLoraConfig("input") if method == "reslora" else None)
        write_checkpoint(denoiser, folder / "runs" / "run" / method / "checkpoint-4")
    return Library(folder / "runs").find("run")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_checkpoint(denoiser, folder):
    """Write a checkpoint with weights that change the images."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    folder.mkdir()
    save_adapter(denoiser, folder)
    (folder / "trainer.json").write_text("{}")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def drawn(studio, run, label):
    return drawn_with(studio, run, run.find_weights(label))


def drawn_with(studio, run, weights):
    return image_of(studio, run, weights, REQUEST)


@pytest.mark.exhaustive
def test_checkpoints_are_drawn(studio, run):
    base = drawn(studio, run, BASE.label)
    assert base.shape[:2] in ((32, 40), (32, 32)) and base.std() > 0  # some families draw multiples of 16
    labels = ("LoRA: unmerged, step 4", "ResLoRA: unmerged, step 4")
    images = [drawn(studio, run, label) for label in labels]
    assert all(np.abs(image - other).max() > 2 for image in images for other in (base, *images) if image is not other)
    assert np.array_equal(drawn(studio, run, BASE.label), base)
