"""The output of a run: documented files, exports that stock libraries read, figures, and the folder on the Hub."""

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from pipelines import image_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from suites import quick

from images.runs import RESUME, cut, failed, final_weights, main, training_state, without
from reslora.export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from reslora.images.output import exports as results
from reslora.images.settings import build_parser
from reslora.runtime.log import read_log


def test_run_writes_the_documented_files(run):
    for name in ("config.json", "comparison.png", "loss.png"):
        assert (run / name).is_file()
    for method in ("lora", "reslora"):
        names = ["log.jsonl", "pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_config.json"]
        names += ["peft/adapter_model.safetensors", "unet/config.json", "checkpoint-2", "checkpoint-4"]
        names += [f"samples/step-{step:06d}/{prompt}-0.png" for step in (0, 2, 4) for prompt in (0, 1)]
        for name in names:
            assert (run / method / name).exists(), name
    for name in ("chains.json", "merge.json", "calibration.safetensors"):
        assert (run / "reslora" / name).is_file()
    assert not (run / "pytorch_lora_weights.safetensors").exists()  # that is for runs of one method
    assert not list(run.rglob("*.tmp"))


def test_log_has_training_and_validation_rows(run):
    rows = [json.loads(line) for line in (run / "reslora" / "log.jsonl").read_text().splitlines()]
    assert rows == read_log(run / "reslora" / "log.jsonl")
    assert all(set(row) == {"step", "split", "loss", "lr", "seconds"} for row in rows)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [0, 2, 4]


def test_config_holds_every_resolved_flag(run):
    config = json.loads((run / "config.json").read_text())
    assert config["lora_alpha"] == 8 and config["method"] == ["lora", "reslora"] and config["max_train_steps"] == 4
    assert set(config) == {a.dest for a in build_parser()._actions} - {
        "help",
        "help_all",
        "version",
        "config",
        "hub_token",
        "resume_from_checkpoint",
        "vary",
    }


@pytest.mark.parametrize("method", ["lora", "reslora"])
def test_exports_load_in_stock_libraries_and_agree(run, model, method):
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)),
    }
    outputs = {}
    with torch.no_grad():
        for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
            pipeline = StableDiffusionPipeline.from_pretrained(model)
            outputs["base"] = pipeline.unet(**inputs).sample
            pipeline.load_lora_weights(run / method, weight_name=name)
            outputs[name] = pipeline.unet(**inputs).sample
        base = UNet2DConditionModel.from_pretrained(model / "unet")
        outputs["peft"] = PeftModel.from_pretrained(base, run / method / "peft")(**inputs).sample
        outputs["unet"] = UNet2DConditionModel.from_pretrained(run / method / "unet")(**inputs).sample
    reference, base = outputs.pop("unet"), outputs.pop("base")
    assert (reference - base).abs().max() > 1e-2
    for output in outputs.values():
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_one_method_leaves_its_weights_where_diffusers_script_does(brief_flags, tmp_path):
    assert main(*brief_flags, "--method", "lora_x2", "--output_dir", tmp_path / "out") == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out" / "lora_x2" / name).read_bytes()


@pytest.mark.exhaustive
def test_other_adapters_train_and_export(brief_flags, tmp_path):
    flags = [*without(brief_flags, "--method"), "--max_train_steps", "3", "--validation_prompt", "red disc"]
    assert main(*flags, "--method", "adalora", "loha", "lokr", "--output_dir", tmp_path / "out") == 0
    for method in ("adalora", "loha", "lokr"):
        record = json.loads((tmp_path / "out" / method / "exports.json").read_text())
        assert {"peft", "unet"} <= set(record["read_back"]) and max(record["read_back"].values()) < 1e-6


# -- samples and figures ---------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_no_validation_images_are_drawn_where_none_are_asked_for(brief_flags, tmp_path):
    """As in the command of diffusers' own test."""
    flags = [*brief_flags, "--num_validation_images", "0", "--validation_prompt", "red disc", "--validation_steps", "1"]
    assert main(*flags, "--output_dir", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "lora" / "samples").exists()
    assert (tmp_path / "out" / "lora" / "exports.json").is_file()


@pytest.mark.exhaustive
def test_prompts_in_other_scripts_and_fewer_images_than_a_batch(brief_flags, capsys, tmp_path):
    flags = [*brief_flags, "--train_data_dir", image_folder(tmp_path / "p", count=1), "--train_batch_size", "4"]
    assert main(*flags, "--validation_prompt", "κόκκινος δίσκος", "--output_dir", tmp_path / "out") == 0
    assert (tmp_path / "out" / "comparison.png").is_file()
    assert "glyph" not in capsys.readouterr().err.lower()


# -- exports that do not match ---------------------------------------------------------------------------------------


def scale_values(path: Path, ending: str, factor: float) -> None:
    """Multiply the tensors of a safetensors file whose names have this ending."""
    tensors = {name: value * factor if name.endswith(ending) else value for name, value in load_file(path).items()}
    with safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())


def double_alpha(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
DAMAGES = {
    "kohya.safetensors": lambda folder: scale_values(folder / "kohya.safetensors", ".alpha", 2.0),
    "peft": lambda folder: double_alpha(folder / "peft" / "adapter_config.json"),
    DIFFUSERS_FILE: lambda folder: scale_values(folder / DIFFUSERS_FILE, f"{BLOCK}.lora_B.weight", 1 + 1e-5),
    "unet": lambda folder: scale_values(folder / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias", 2.0),
    "text_encoder": lambda folder: scale_values(folder / "text_encoder" / "model.safetensors", "fc1.bias", math.nan),
}


@pytest.mark.parametrize("file", quick(DAMAGES, "kohya.safetensors"))
def test_a_file_that_differs_from_the_merged_model_fails(brief_flags, capsys, tmp_path, monkeypatch, file):
    """It changes between writing and reading: a wrong alpha, or other values in one layer, adapted or not."""
    write = results.write_formats
    monkeypatch.setattr(results, "write_formats", lambda *args: [write(*args), DAMAGES[file](tmp_path / "lora")])
    encoder = ["--train_text_encoder", "--no-cache_text_embeddings"] if file == "text_encoder" else []
    line = failed(capsys, *brief_flags, *encoder, "--output_dir", tmp_path)
    assert f"lora/{file}: " in line and "read back with a relative difference of" in line
    assert not (tmp_path / "lora" / "exports.json").exists() and not (tmp_path / "loss.png").exists()
    if file == "kohya.safetensors":
        assert "a relative difference of 1;" in line
        monkeypatch.undo()
        assert main(*brief_flags, *RESUME, "--output_dir", tmp_path) == 0
        assert max(json.loads((tmp_path / "lora" / "exports.json").read_text())["read_back"].values()) < 1e-6


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", [DIFFUSERS_FILE, "unet/diffusion_pytorch_model.safetensors"])
def test_a_truncated_file_fails(brief_flags, capsys, tmp_path, monkeypatch, file):
    write = results.write_formats
    monkeypatch.setattr(results, "write_formats", lambda *args: [write(*args), cut(tmp_path / "lora" / file)])
    line = failed(capsys, *brief_flags, "--output_dir", tmp_path)
    assert f"lora/{file.partition('/')[0]}: cannot be read back" in line


@pytest.mark.parametrize("what", quick(["weights", "pixels"], "weights"))
def test_training_that_has_diverged_exports_nothing(brief_flags, capsys, tmp_path, monkeypatch, what):
    def diverged(*args: object) -> dict:
        parts = exact(*args)
        if what == "weights":
            next(value for name, value in parts["unet"].named_parameters() if "lora_B" in name).data[0, 0] = math.nan
        return parts

    exact = results.exact_parts
    monkeypatch.setattr(results, "exact_parts", diverged)
    if what == "pixels":
        monkeypatch.setattr(results.Sampler, "draw", lambda *args: [np.ones((2, 2, 3)), np.full((2, 2, 3), np.nan)])
    line = failed(capsys, *brief_flags, "--output_dir", tmp_path)
    assert what in line and "not finite: training has diverged; start again with a lower --learning_rate" in line
    assert not (tmp_path / "lora" / DIFFUSERS_FILE).exists()


# -- files of an earlier training --------------------------------------------------------------------------------------


def test_earlier_adapters_stay_until_the_new_ones_are_there(tmp_path, monkeypatch):
    """A full disk loses none of them; afterwards, files of formats that are no longer written are removed."""
    family, config = SimpleNamespace(denoiser="unet", lora_files=(KOHYA_FILE,)), "adapter_config.json"
    files = [DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, f"peft/{config}", f"peft/text_encoder/{config}"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("earlier")

    def full(part: str, folder: Path) -> None:
        folder.mkdir()
        (folder / config).write_text(part)
        if part == "full":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.export, "export_peft", full)
    monkeypatch.setattr(results, "write_lora", lambda parts, folder, *_: full("full", folder / "other"))

    def there() -> list[str]:
        return [file for file in files if (tmp_path / file).is_file()]

    with pytest.raises(OSError, match="No space"):
        results.write_adapters({"unet": "full"}, tmp_path, family, {})
    assert there() == files and {(tmp_path / file).read_text() for file in files} == {"earlier"}
    with pytest.raises(OSError, match="No space"):
        results.write_adapters({"unet": "new"}, tmp_path, family, {})
    assert there() == files[:4]
    results.write_adapters({"unet": "new"}, tmp_path, family, None)
    assert there() == [f"peft/{config}"]


def test_a_disk_too_full_for_merged_weights_has_the_adapters_already(monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    written: list[str] = []
    monkeypatch.setattr(results, "write_adapters", lambda *_: written.append("adapters"))
    monkeypatch.setattr(results, "write_merged", full)
    model = SimpleNamespace(family=SimpleNamespace(denoiser="unet"), stored_denoiser=dict)
    context = SimpleNamespace(model=model, folder_of=Path, writes_merged=True)
    with pytest.raises(OSError, match="No space"):
        results.write_formats({"unet": None}, "lora", {}, context)
    assert written == ["adapters"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("base", ["no", "fp8"])
def test_the_average_of_a_schedule_free_optimizer_is_saved_and_exported(model, base_flags, tmp_path, base):
    """Samples are generated with it too: x, not the trained y = beta x + (1 - beta) z."""
    flags = [*base_flags, "--method", "lora", "--optimizer", "schedulefree", "--learning_rate", "0.01"]
    assert main(*flags, "--base_precision", base, "--num_validation_images", "0", "--output_dir", tmp_path) == 0
    saved, state = final_weights(tmp_path, "lora"), training_state(tmp_path, 4, "lora")
    exported = load_file(tmp_path / "lora" / "peft" / "adapter_model.safetensors")
    layers = [name for name, _ in UNet2DConditionModel.from_pretrained(model, subfolder="unet").named_modules()]
    for number, name in enumerate(sorted(saved, key=lambda name: (layers.index(name.partition(".lora_")[0]), name))):
        trained, z = state["trained"][number], state["optimizer"]["state"][number]["z"]
        assert not torch.allclose(saved[name], trained, rtol=0, atol=1e-4)
        torch.testing.assert_close(saved[name], (trained - 0.1 * z) / 0.9, rtol=0, atol=1e-6)
        found = exported[f"base_model.model.{name.replace('.default', '')}"]
        torch.testing.assert_close(found, saved[name], rtol=0, atol=1e-6)
