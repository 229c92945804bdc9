"""The control method `lora_matched` in runs: calibrated before the first step, resumed unchanged, exported."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from images.runs import main, refused, without

CONTROLS = ("--method", "lora_matched", "--shortcut", "middle", "--pre_num", "2", "--checkpointing_steps", "1")


@pytest.fixture(scope="module")
def flags(brief_flags) -> list[str]:
    return [*without(without(brief_flags, "--method"), "--max_train_steps"), *CONTROLS]


@pytest.fixture(scope="module")
def controls(flags, tmp_path_factory) -> Path:
    """Two steps; the run has compared every file with the merged model."""
    output = tmp_path_factory.mktemp("controls") / "out"
    assert main(*flags, "--max_train_steps", 2, "--output_dir", output) == 0
    return output


@pytest.mark.exhaustive
def test_merged_weights_are_the_base_plus_the_plain_lora_that_peft_reads(controls, model):
    peft = load_file(controls / "lora_matched/peft/adapter_model.safetensors")
    config = json.loads((controls / "lora_matched/peft/adapter_config.json").read_text())
    alphas = {name.removeprefix("^").replace("\\", ""): alpha for name, alpha in config["alpha_pattern"].items()}
    assert len(set(alphas.values())) > 2
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    whole = UNet2DConditionModel.from_pretrained(controls / "lora_matched/unet").state_dict()
    layers = [name.removesuffix(".weight") for name in base if not torch.equal(base[name], whole[name])]
    assert layers and {f"base_model.model.{name}.lora_A.weight" for name in layers} <= peft.keys()
    for name in layers:
        down, up = (peft[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        expected = base[f"{name}.weight"].double() + alphas.get(name, config["lora_alpha"]) / config["r"] * up @ down
        torch.testing.assert_close(whole[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_control_needs_samples_and_a_start_from_zero(capsys):
    line = refused(capsys, "--method", "lora", "lora_matched", "--merge_calibration_samples", "0")
    assert "--method lora_matched" in line and "--merge_calibration_samples 64" in line
    line = refused(capsys, "--method", "lora_matched", "--init_lora", __file__)
    assert f"--init_lora {__file__}" in line and "can only start from zero" in line
