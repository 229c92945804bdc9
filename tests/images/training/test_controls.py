"""Control methods in runs: calibrated before the first step, resumed unchanged, exported as plain LoRA."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from images.runs import final_weights, main, refused, without

METHODS = ("lora_matched", "ms_placebo")
CONTROLS = ("--method", *METHODS, "--shortcut", "middle", "--pre_num", "2", "--checkpointing_steps", "1")


@pytest.fixture(scope="module")
def flags(brief_flags) -> list[str]:
    return [*without(without(brief_flags, "--method"), "--max_train_steps"), *CONTROLS]


@pytest.fixture(scope="module")
def controls(flags, tmp_path_factory) -> Path:
    """Two steps of each; the run has compared every file with the merged model."""
    output = tmp_path_factory.mktemp("controls") / "out"
    assert main(*flags, "--max_train_steps", 2, "--output_dir", output) == 0
    return output


def header(folder: Path) -> dict:
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        return json.loads(file.metadata()["control"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_are_the_base_plus_the_plain_lora_that_peft_reads(controls, model, method):
    peft = load_file(controls / method / "peft" / "adapter_model.safetensors")
    config = json.loads((controls / method / "peft" / "adapter_config.json").read_text())
    alphas = {name.removeprefix("^").replace("\\", ""): alpha for name, alpha in config["alpha_pattern"].items()}
    assert len(set(alphas.values())) > 2 if method == "lora_matched" else not alphas
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    whole = UNet2DConditionModel.from_pretrained(controls / method / "unet").state_dict()
    layers = [name.removesuffix(".weight") for name in base if not torch.equal(base[name], whole[name])]
    assert layers and {f"base_model.model.{name}.lora_A.weight" for name in layers} <= peft.keys()
    for name in layers:
        down, up = (peft[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        expected = base[f"{name}.weight"].double() + alphas.get(name, config["lora_alpha"]) / config["r"] * up @ down
        torch.testing.assert_close(whole[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.exhaustive
def test_what_a_placebo_trains_is_as_large_as_lora_and_says_its_seed(controls):
    lora, placebo = (final_weights(controls, method, 2) for method in ("lora_matched", "ms_placebo"))
    assert {name: value.shape for name, value in lora.items()} == {name: v.shape for name, v in placebo.items()}
    found = header(controls / "ms_placebo" / "checkpoint-2")
    assert found["seed"] == 0 and {count for count, _ in found["rotations"].values()} == {
        1
    }  # its chains have two blocks


def test_a_control_needs_samples_and_a_start_from_zero(capsys):
    line = refused(capsys, "--method", "lora", "ms_placebo", "--merge_calibration_samples", "0")
    assert "--method ms_placebo" in line and "--merge_calibration_samples 64" in line
    line = refused(capsys, "--method", "lora_matched", "--init_lora", __file__)
    assert f"--init_lora {__file__}" in line and "can only start from zero" in line
