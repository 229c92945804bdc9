"""The output of a run: documented files, exports that stock libraries read, figures, and the folder on the Hub."""

import copy
import errno
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from pipelines import FAMILIES, image_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from suites import quick

from images.runs import RESUME, cut, failed, final_weights, main, only, printed, training_state, without
from reslora.errors import RunFailed
from reslora.export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from reslora.images.output import exports as results
from reslora.images.output import reading_back
from reslora.images.settings import build_parser
from reslora.methods.registry import METHODS
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


def rewrite(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], **metadata: str) -> None:
    """Write a safetensors file again, with each tensor that `change` returns."""
    with safe_open(path, "pt") as file:
        changed = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        found = file.metadata() | metadata
    save_file({name: value for name, value in changed.items() if value is not None}, path, found)


def scaled(text: str, factor: float) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda name, value: value * factor if text in name else value)


def dropped(text: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda name, value: None if text in name else value)


def double_alpha(path: Path) -> None:
    """Double the alpha of PEFT's configuration, or of diffusers' header."""
    if path.suffix == ".json":
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
        return
    with safe_open(path, "pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
    changed = {name: 2 * value if name.endswith("lora_alpha") else value for name, value in packed.items()}
    rewrite(path, lambda _, value: value, lora_adapter_metadata=json.dumps(changed))


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
KOHYAS = f"lora_unet_{LAYER.replace('.', '_')}"
PEFT, MERGED = "peft/adapter_model.safetensors", "diffusion_pytorch_model.safetensors"
SLIGHTLY = 1 + 1e-5
DAMAGES = {
    "stable_diffusion": [
        (DIFFUSERS_FILE, scaled(f"{LAYER}.lora_B", SLIGHTLY)),
        (DIFFUSERS_FILE, dropped(LAYER)),
        (DIFFUSERS_FILE, dropped(f"{LAYER}.lora_B")),
        (DIFFUSERS_FILE, double_alpha),
        (KOHYA_FILE, scaled(f"{KOHYAS}.lora_down", SLIGHTLY)),
        (KOHYA_FILE, scaled(".alpha", 2.0)),
        (KOHYA_FILE, dropped(KOHYAS)),
        (KOHYA_FILE, dropped(f"{KOHYAS}.lora_up")),
        (PEFT, scaled(f"{LAYER}.lora_A", SLIGHTLY)),
        (PEFT, dropped(f"{LAYER}.lora_A")),
        ("peft/adapter_config.json", double_alpha),
        ("peft/text_encoder/adapter_config.json", double_alpha),
        (f"unet/{MERGED}", scaled("conv_in.bias", 2.0)),
        (f"unet/{MERGED}", dropped(f"{LAYER}.weight")),
        ("text_encoder/model.safetensors", scaled("fc1.bias", math.nan)),
        ("text_encoder/model.safetensors", dropped("fc1.bias")),
    ],
    "z_image": [
        (COMFYUI_FILE, scaled("layers.0.attention.to_k.lora_B", SLIGHTLY)),
        (COMFYUI_FILE, dropped("layers.0.attention.to_k")),
        (COMFYUI_FILE, dropped("layers.0.attention.to_k.lora_B")),
    ],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", DAMAGES)
def test_every_damage_of_a_written_file_is_noticed(brief_flags, tmp_path, monkeypatch, family):
    """A tensor that is slightly different or missing, or another alpha; the files themselves are equal."""
    flags = [*brief_flags, "--lora_alpha", "3", "--output_dir", tmp_path / "out"]
    if family == "stable_diffusion":
        flags += ["--train_text_encoder", "--no-cache_text_embeddings"]
    else:
        flags += ["--pretrained_model_name_or_path", FAMILIES[family](tmp_path / "model")]
    unnoticed = [file for file, _ in DAMAGES[family]]

    def read_back(parts: dict, *args) -> dict:
        for file, damage in DAMAGES[family]:
            path = tmp_path / "out" / "lora" / file
            content = path.read_bytes()
            damage(path)
            assert path.read_bytes() != content
            with pytest.raises(RunFailed, match=re.escape(f"lora/{file.split('/')[0]}: ")):
                reading_back.read_back(copy.deepcopy(parts), *args)
            path.write_bytes(content)
            unnoticed.remove(file)
        return reading_back.read_back(parts, *args)

    monkeypatch.setattr(results, "read_back", read_back)
    assert main(*flags) == 0 and not unnoticed
    assert max(json.loads((tmp_path / "out" / "lora" / "exports.json").read_text())["read_back"].values()) < 1e-7


@pytest.mark.exhaustive
def test_a_run_whose_files_differ_fails_and_writes_them_again(brief_flags, capsys, tmp_path, monkeypatch):
    write = results.write_formats
    damage = scaled(".alpha", 2.0)
    monkeypatch.setattr(results, "write_formats", lambda *args: [write(*args), damage(tmp_path / "lora" / KOHYA_FILE)])
    line = failed(capsys, *brief_flags, "--output_dir", tmp_path)
    assert f"lora/{KOHYA_FILE}: " in line and "read back with a relative difference of" in line
    assert not (tmp_path / "lora" / "exports.json").exists() and not (tmp_path / "loss.png").exists()
    monkeypatch.undo()
    lines = printed(*brief_flags, *RESUME, "--output_dir", tmp_path)
    assert all(only(lines, f"  {file} ", "read back: equal") for file in (DIFFUSERS_FILE, KOHYA_FILE, "peft", "unet"))


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
    files = [DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, LYCORIS_FILE, f"peft/{config}", f"peft/text_encoder/{config}"]
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
        results.write_adapters({"unet": "full"}, tmp_path, family, METHODS["lora"], {})
    assert there() == files and {(tmp_path / file).read_text() for file in files} == {"earlier"}
    with pytest.raises(OSError, match="No space"):
        results.write_adapters({"unet": "new"}, tmp_path, family, METHODS["lora"], {})
    assert there() == [*files[:4], f"peft/{config}"]
    results.write_adapters({"unet": "new"}, tmp_path, family, METHODS["oft"], {})
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
