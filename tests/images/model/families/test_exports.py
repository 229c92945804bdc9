"""Every family's exports are read by stock diffusers and PEFT, with the names that other tools use."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from pipelines import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file
from suites import quick

import reslora
import train_sd
from images.runs import assert_same_merge, train_family
from reslora.images.context import ImageContext
from reslora.images.model.families import load_family
from reslora.images.output.calibration_file import read_calibration
from reslora.images.output.exports import kohya_metadata
from reslora.options.images import Options
from reslora.training.schedule import Schedule


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of each family, made when they are first requested."""
    made: dict[str, Path] = {}

    def run(family: str, *more: str, **parts) -> Path:
        if family not in made or more or parts:
            folder = tmp_path_factory.mktemp(family)
            FAMILIES[family](folder / "model", **parts)
            train_family(folder, "--validation_height", "48", *more)
            if more or parts:
                return folder
            made[family] = folder
        return made[family]

    return run


def drawn(folder: Path, weights: Path | None = None, **parts) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    if weights is not None:
        pipe.load_lora_weights(weights.parent, weight_name=weights.name)
    seed = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "guidance_scale": 2.0, "num_inference_steps": 2}
    return pipe(prompt="blue box", generator=seed, output_type="np", **size).images[0]


@pytest.mark.parametrize("family", quick(FAMILIES, "stable_diffusion"))
def test_files_agree_in_stock_diffusers_and_change_what_is_drawn(runs, family):
    folder = runs(family)
    out = folder / "out" / "reslora"
    record = json.loads((out / "exports.json").read_text())["read_back"]
    files = [name for name in record if name.endswith(".safetensors")]
    denoiser = "unet" if (folder / "model" / "unet").is_dir() else "transformer"
    assert {"pytorch_lora_weights.safetensors", "peft", denoiser} <= record.keys() and max(record.values()) < 1e-6
    base = drawn(folder)
    merged_class = type(getattr(DiffusionPipeline.from_pretrained(folder / "model"), denoiser))
    merged = drawn(folder, **{denoiser: merged_class.from_pretrained(out / denoiser)})
    assert np.abs(merged - base).max() > 0.02
    for name in files:
        assert np.abs(drawn(folder, out / name) - merged).max() <= 2 / 255, name
    for name in ("samples/step-000000", "samples/step-000003", "merged"):
        with PIL.Image.open(out / name / "0-0.png") as sample:
            assert sample.size == (32, 48)


@pytest.mark.exhaustive
def test_stable_diffusion_3_trains_and_draws_without_t5(runs):
    """Its pipeline reads the width of T5's states from the denoiser, which is not loaded while captions are encoded."""
    folder = runs("sd3", "--no-cache_text_embeddings", "--method", "lora", "reslora", with_t5=False)
    out = folder / "out" / "reslora"
    without = {"text_encoder_3": None, "tokenizer_3": None}
    merged = SD3Transformer2DModel.from_pretrained(out / "transformer")
    seen = drawn(folder, out / "pytorch_lora_weights.safetensors", **without)
    assert np.abs(seen - drawn(folder, **without)).max() > 0.02
    assert np.abs(seen - drawn(folder, transformer=merged, **without)).max() <= 2 / 255


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["stable_diffusion", "flux", "krea2"])
def test_merge_is_repeated_from_the_kept_samples(runs, family):
    folder = runs(family)
    out, denoiser = folder / "out" / "reslora", "unet" if (folder / "model" / "unet").is_dir() else "transformer"
    model = getattr(DiffusionPipeline.from_pretrained(folder / "model"), denoiser)
    reslora.load(model, out / "checkpoint-3")
    report = reslora.merge(model, calibration=read_calibration(out / "calibration.safetensors")).to_dict()
    expected = json.loads((out / "merge.json").read_text())
    assert report["method"] == "lstsq" and max(block["error"] for block in report["blocks"]) > 1e-3
    assert_same_merge(report, expected)


@pytest.mark.exhaustive
def test_z_image_trains_its_main_layers_alone_and_comfyui_knows_their_names(runs):
    keys = load_file(runs("z_image") / "out" / "reslora" / "comfyui.safetensors").keys()
    assert keys and all(key.startswith("diffusion_model.layers.") for key in keys)


@pytest.mark.exhaustive
def test_sdxl_has_kohyas_names(runs):
    """As sd-scripts writes them: `input_blocks` counts the layers of each level and its downsampler."""
    path = runs("sdxl") / "out" / "reslora" / "kohya.safetensors"
    names = {key.split(".")[0] for key in load_file(path)}
    config = json.loads((runs("sdxl") / "model" / "unet" / "config.json").read_text())
    per_level = config["layers_per_block"]
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(per_level if "CrossAttn" in kind else 0):
            number = level * (per_level + 1) + layer + 1
            assert f"lora_unet_input_blocks_{number}_1_transformer_blocks_0_attn1_to_q" in names
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(per_level + 1 if "CrossAttn" in kind else 0):
            number = level * (per_level + 1) + layer
            assert f"lora_unet_output_blocks_{number}_1_transformer_blocks_0_attn2_to_out_0" in names
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k" in names
    assert not any("down_blocks" in name or "up_blocks" in name for name in names)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "file", "version"),
    [
        ("stable_diffusion", "kohya", "sd_v1_v"),
        ("sdxl", "kohya", "sdxl_base_v1-0"),
        ("z_image", "comfyui", "z_image"),
        ("flux", "pytorch_lora_weights", "flux1"),
        ("sd3", "pytorch_lora_weights", "sd3_m"),
    ],
)
def test_model_managers_recognise_the_file(runs, family, file, version):
    path = runs(family) / "out" / "reslora" / f"{file}.safetensors"
    with safe_open(path, "pt") as content:
        metadata = content.metadata()
    assert metadata["ss_base_model_version"] == version and len(metadata["sshs_model_hash"]) == 64
    assert metadata["modelspec.architecture"].endswith("/lora") and metadata["ss_v2"] == "False"
    predicted = {"stable_diffusion": "v", "sdxl": "epsilon"}.get(family)  # of flows nothing is said
    assert metadata.get("modelspec.prediction_type") == predicted


@pytest.mark.parametrize(
    ("width", "prediction", "version", "architecture"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1"),
        (768, "v_prediction", "sd_v1_v", "stable-diffusion-v1"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v"),
    ],
)
def test_what_a_model_predicts_is_in_kohyas_and_stability_ais_names(width, prediction, version, architecture):
    """As sd-scripts writes them; A1111 recognizes 2.x by `ss_v2`."""
    flags = Options.of(
        pretrained_model_name_or_path="a/sd", learning_rate=0.5, seed=3, resolution=[16, 8],
        use_aspect_ratio_buckets=True,
    )  # fmt: skip
    objective = SimpleNamespace(prediction_type=prediction)
    training_data = SimpleNamespace(options=flags, objective=objective, sources=[])
    context = ImageContext(flags, SimpleNamespace(family=load_family("StableDiffusionPipeline")), None, None)
    config = SimpleNamespace(cross_attention_dim=width)
    metadata = kohya_metadata(config, training_data, Schedule(7, 1, 0, False), context)
    named = {"base_model": "sd", "learning_rate": "0.5", "seed": "3", "steps": "7", "resolution": "16 8"}
    assert {name: metadata[f"ss_{name}"] for name in named} == named and metadata["ss_enable_bucket"] == "True"
    assert metadata["modelspec.resolution"] == "16x16" and metadata["modelspec.title"] == "LoRA for sd"
    assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == str(width == 1024)
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata["modelspec.prediction_type"] == prediction.removesuffix("_prediction")


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_gradient_checkpointing_changes_nothing(runs, family, tmp_path):
    folder = runs(family)
    config = json.loads((folder / "out" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "gradient_checkpointing": True, "num_validation_images": 0})
    )
    out = tmp_path / "out"
    assert train_sd.main(["--config", str(tmp_path / "config.json"), "--output_dir", str(out)]) == 0
    name = "reslora/pytorch_lora_weights.safetensors"
    plain, checkpointed = load_file(folder / "out" / name), load_file(out / name)
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value)
