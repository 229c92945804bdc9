"""The model: refusals before anything is encoded, and single files that become a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoencoderKLQwenImage, StableDiffusionPipeline, UNet2DConditionModel
from pipelines import qwen_image, sdxl, tiny_qwen_vae
from safetensors.torch import save_file

from images.runs import failed, losses, main, refused
from reslora.bundled import ASSETS
from reslora.images.model.loading import find_model
from reslora.options.images import Options


def refused_model(capsys, base_flags, folder: Path) -> str:
    """Return the line with which the model is refused, before anything is encoded or written."""
    output = folder.parent / "out"
    line = refused(capsys, *base_flags, "--pretrained_model_name_or_path", folder, "--output_dir", output)
    assert f"--pretrained_model_name_or_path {folder}" in line
    assert not output.exists()
    return line


def damage_missing(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").unlink()


def damage_cut_off(unet: Path) -> None:
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("damage", [damage_missing, damage_cut_off])
def test_damaged_unet_is_refused_before_anything_is_encoded(base_flags, model, capsys, tmp_path, damage):
    broken = shutil.copytree(model, tmp_path / "model")
    damage(broken / "unet")
    assert "unet" in refused_model(capsys, base_flags, broken)


@pytest.mark.parametrize("index, vae", [("[]", None), (None, "[]")])
def test_damaged_model_configs_are_refused(base_flags, model, capsys, tmp_path, index, vae):
    broken = shutil.copytree(model, tmp_path / "model")
    if index:
        (broken / "model_index.json").write_text(index)
    if vae:
        (broken / "vae" / "config.json").write_text(vae)
    name = "model_index.json" if index else "vae/config.json"
    assert name in refused_model(capsys, base_flags, broken)


def test_another_autoencoder_is_of_the_class_that_the_pipeline_has(tmp_path):
    other = tiny_qwen_vae({"latents_std": [2.0] * 4})
    other.save_pretrained(tmp_path / "vae")
    flags = Options.of(
        pretrained_model_name_or_path=str(qwen_image(tmp_path / "model")), revision=None, variant=None,
        pretrained_vae_model_name_or_path=str(tmp_path / "vae"), cache_dir=None, output_dir="",
        prediction_type=None,
    )  # fmt: skip
    pipeline = find_model(flags.model, flags.output, PartialState()).load_pipeline(
        torch.float32, torch.device("cpu"), encoders=False
    )
    assert type(pipeline.vae) is AutoencoderKLQwenImage and pipeline.vae.config.latents_std == [2.0] * 4
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in pipeline.vae.state_dict().items())


def other_vae(model: Path, folder: Path) -> Path:
    return model / "unet"


def vae_without_config(model: Path, folder: Path) -> Path:
    (shutil.copytree(model / "vae", folder / "vae") / "config.json").unlink()
    return folder / "vae"


def vae_cut_off(model: Path, folder: Path) -> Path:
    damage_cut_off(shutil.copytree(model / "vae", folder / "vae"))
    return folder / "vae"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_vae, "its class is UNet2DConditionModel, and the pipeline has AutoencoderKL; give an autoencoder"),
        (vae_without_config, "no folder with a config.json"),
        (vae_cut_off, "check the name and the files"),
        (lambda model, folder: folder / "nowhere", "no folder with a config.json"),
        (lambda model, folder: "nobody/vae", "check the name and the files"),
    ],
)
def test_another_autoencoder_is_blamed_itself(brief_flags, model, capsys, tmp_path, make, words):
    vae = make(model, tmp_path)
    flags = ["--pretrained_vae_model_name_or_path", vae, "--output_dir", tmp_path / "out"]
    line = refused(capsys, *brief_flags, *flags, quiet=False)
    assert f"error: --pretrained_vae_model_name_or_path {vae}: " in line and words in line
    assert str(model) not in line.replace(str(vae), "")


def test_memory_that_runs_out_is_no_fault_of_the_models_folder(brief_flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *args, **kwargs: torch.empty(2**60))
    line = failed(capsys, *brief_flags, "--output_dir", tmp_path / "out")
    assert "memory ran out (" in line and "repair" not in line


def test_a_missing_tokenizer_is_named(base_flags, model, capsys, tmp_path):
    broken = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(broken / "tokenizer")
    line = refused_model(capsys, base_flags, broken)
    assert str(broken / "tokenizer") in line or "no tokenizer" in line
    assert ": ;" not in line


def test_predictions_of_the_image_itself_are_refused(base_flags, model, capsys, tmp_path):
    """Training it on the noise would destroy what it has learned."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    line = refused_model(capsys, base_flags, folder)
    assert "prediction_type" in line and "sample" in line


def test_noise_is_not_predicted_where_the_schedule_ends_in_noise_alone(base_flags, model, capsys, tmp_path):
    """Decided by the scheduler's configuration: no weights are read, and sampling would divide by zero."""
    folder = shutil.copytree(model, tmp_path / "model")
    damage_cut_off(folder / "unet")
    config = folder / "scheduler" / "scheduler_config.json"
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | zero_snr))
    named = ["--pretrained_model_name_or_path", folder, "--output_dir", tmp_path / "out"]
    line = refused(capsys, *base_flags, *named, "--prediction_type", "epsilon")
    assert "error: --prediction_type epsilon: " in line and "rescale_betas_zero_snr" in line and "v_prediction" in line
    for flags in ([], ["--prediction_type", "v_prediction"]):
        assert "diffusion_pytorch_model.safetensors" in refused(capsys, *base_flags, *named, *flags)


def test_other_kinds_of_pipeline_are_refused_by_name(base_flags, model, capsys, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    line = refused_model(capsys, base_flags, folder)
    assert "KandinskyPipeline" in line and "StableDiffusionPipeline" in line


EXAMPLE = ASSETS.parent / "app" / "example" / "lora" / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (None, "a LoRA; give its base model here, and this file with --init_lora"),
        ("unet", "a U-Net alone; give a complete model"),
        ("vae", "an autoencoder alone; give a complete model here, and this file with --pretrained_vae_model"),
        ("text_encoder", "a text encoder alone; give a complete model"),
    ],
)
def test_a_lora_or_a_part_of_a_model_is_refused_by_what_it_is(data, model, capsys, part, what):
    """As a file and as a folder, by its header only, without asking the Hub."""
    (file,) = (model / part).glob("*.safetensors") if part else [EXAMPLE]
    for path, where in ((file, "it"), (file.parent, f"it has no model_index.json, and its {file.name}")):
        flag = ("--pretrained_model_name_or_path", path)
        line = refused(capsys, *flag, "--train_data_dir", data)
        assert f"error: {flag[0]} {path}: {where} is {what}" in line


REFINER = {"projection_class_embeddings_input_dim": 16 + 5 * 8, "cross_attention_dim": 24}


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        (REFINER, "refiner"),
        ({"cross_attention_dim": 24}, "24 wide, its text encoders give 40"),
        ({"projection_class_embeddings_input_dim": 16 + 7 * 8}, "not the six sizes"),
    ],
)
def test_a_refiners_unet_among_sdxls_parts_is_refused(data, capsys, tmp_path, unet, words):
    """The pipeline's class is SDXL's, so its U-Net would fail only after everything is encoded."""
    folder = sdxl(tmp_path / "model", unet=unet)
    flags = ["--train_data_dir", str(data), "--resolution", "32", "--rank", "2", "--report_to", "none"]
    line = refused_model(capsys, flags, folder)
    assert words in line and "give a base model's folder" in line


def test_hub_that_cannot_be_reached_is_said_at_once(capsys, data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False, raising=False)
    flags = ("--pretrained_model_name_or_path", "nobody/nothing", "--train_data_dir", data, "--report_to", "none")
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "nobody/nothing" in line and "http://127.0.0.1:9 cannot be reached" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_a_single_file_is_made_a_folder_once(brief_flags, model, tmp_path, monkeypatch):
    """diffusers' conversion, which needs configurations from the Hub, is replaced by its result."""
    path, converted = tmp_path / "model.safetensors", []
    save_file({"weight": torch.zeros(3)}, path, {"modelspec.prediction_type": "v"})

    def convert(given, **more):
        converted.append(given)
        return StableDiffusionPipeline.from_pretrained(model)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", convert)
    flags = [*brief_flags, "--pretrained_model_name_or_path", path, "--cache_dir", tmp_path / "cache"]
    for name in ("one", "two"):
        assert main(*flags, "--output_dir", tmp_path / name) == 0
    assert converted == [str(path)]
    assert main(*brief_flags, "--prediction_type", "v_prediction", "--output_dir", tmp_path / "folder") == 0
    assert losses(tmp_path / "one", "lora") == losses(tmp_path / "folder", "lora")
