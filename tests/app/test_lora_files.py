"""app/weight_files.py: LoRA files of runs and of other tools are used as they are meant, or refused by name."""

import numpy as np
import pytest
import torch
from app_runs import image_of, own_runs
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from pipelines import stable_diffusion

from app.library import Library
from app.runs import Weights
from app.studio import Studio
from app.weight_files import put_file, uploaded
from reslora.export import export_diffusers, merged_state_dict
from reslora.images import conversion
from reslora.images.model.families import load_family


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(own_runs(tmp_path_factory))


@pytest.fixture(scope="module")
def run(library):
    return library.find("tiny")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def test_a_lora_of_linear_layers_and_convolutions_adds_its_update(tmp_path):
    """With strength 2 the update is twice as large; the exact one is of the merge in PEFT."""
    model = stable_diffusion(tmp_path / "model")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.add_adapter(LoraConfig(r=6, target_modules=["to_q", "conv1"], init_lora_weights=False))
    file = Weights("own", "file", "", export_diffusers(unet, tmp_path / "own"))
    merged = merged_state_dict(unet)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    put_file({"unet": unet}, load_family("StableDiffusionPipeline"), file, 2.0)
    found = merged_state_dict(unet)
    for name, value in before.items():
        torch.testing.assert_close(found[name], value + 2 * (merged[name] - value), rtol=1e-5, atol=1e-5)
    assert sum(bool((merged[name] - value).abs().max() > 1e-2) for name, value in before.items()) > 4


def test_what_the_converter_writes_is_drawn(studio, run, tmp_path):
    expected = image_of(studio, run, run.find_weights("LoRA: kohya.safetensors"))
    source, target = run.folder / "lora" / "kohya.safetensors", tmp_path / "comfyui.safetensors"
    base = run.word("pretrained_model_name_or_path")
    assert conversion.main([str(source), str(target), "--to", "comfyui", "--base", base]) == 0
    assert np.abs(image_of(studio, run, uploaded(target)) - expected).max() <= 1
