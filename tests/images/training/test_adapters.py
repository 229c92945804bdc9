"""DoRA, and ranks and alphas of single layers, in runs: resumed, merged, exported; refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

from images.runs import RESUME, assert_same, final_weights, main, refused, without

PATTERNS = {"rank_pattern": ["attn2.to_k=2", "mid_block.*to_q=1"], "alpha_pattern": ["attn1.to_v=3"]}
TWO_STEPS = ("--max_train_steps", 2, "--num_validation_images", 0)
LINES = [word for name, texts in PATTERNS.items() for word in (f"--{name}", *texts)]
METHODS = ("reslora", "dora")


@pytest.fixture(scope="module")
def flags(brief_flags) -> list[str]:
    return [*without(without(brief_flags, "--method"), "--max_train_steps"), "--checkpointing_steps", "1"]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory) -> Path:
    """Two steps of each; the run has compared every file with the merged model."""
    output = tmp_path_factory.mktemp("adapters") / "out"
    assert main(*flags, "--method", *METHODS, *LINES, *TWO_STEPS, "--output_dir", output) == 0
    return output


@pytest.mark.exhaustive
def test_one_goes_on_as_if_nothing_had_been(flags, trained, tmp_path):
    shutil.copytree(trained / "dora" / "checkpoint-1", tmp_path / "out" / "dora" / "checkpoint-1")
    assert main(*flags, "--method", "dora", *LINES, *TWO_STEPS, "--output_dir", tmp_path / "out", *RESUME) == 0
    one, other = (final_weights(output, "dora", 2) for output in (tmp_path / "out", trained))
    assert_same(one, other)
    assert not any(torch.equal(one[name], value) for name, value in final_weights(trained, "dora", 1).items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_what_peft_makes_of_its_files(trained, model, method):
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    whole = UNet2DConditionModel.from_pretrained(trained / method / "unet").state_dict()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, trained / method / "peft").merge_and_unload().state_dict()
    changed = [name for name in whole if not torch.equal(before[name], whole[name])]
    assert changed and all(name.endswith(".weight") for name in changed)
    for name, value in whole.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
    plain = {path.name for path in (trained / method).glob("*.safetensors")}
    assert ("kohya.safetensors" in plain) == (method == "reslora")


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_files_have_the_ranks_and_scales_of_each_layer(trained, method):
    saved = load_file(trained / method / "peft" / "adapter_model.safetensors")
    config = json.loads((trained / method / "peft" / "adapter_config.json").read_text())
    assert config["use_dora"] == (method == "dora")
    ranks, alphas = (
        {key.removeprefix("^").replace("\\", ""): value for key, value in config[field].items()} for field in PATTERNS
    )
    for key, value in saved.items():
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        expected = 2 if "attn2.to_k" in name else 1 if "mid_block" in name and "to_q" in name else 4
        assert len(value) == ranks.get(name, config["r"]) == expected, name
        assert alphas.get(name, config["lora_alpha"]) == (3 if "attn1.to_v" in name else 8), name


def test_what_cannot_be_is_refused_by_name(flags, capsys):
    line = refused(capsys, *flags, "--method", "lora", "adalora", "--rank_pattern", "to_k=2")
    assert "--rank_pattern to_k=2: --method adalora does not support this option" in line
    line = refused(capsys, *flags, "--method", "oft", "--lora_dropout", "0.1")
    assert "--lora_dropout 0.1" in line and "--method oft" in line
    line = refused(capsys, "--method", "lora", "--alpha_pattern", "to_k")
    assert "--alpha_pattern to_k: not NAME=VALUE" in line
    line = refused(capsys, *flags, "--method", "lora", "--rank_pattern", "to_z=2", quiet=False)
    assert "--rank_pattern to_z=2: no adapted layer matches" in line
