"""app/downloads.py: which files can be downloaded, their paths, and the lines that load them."""

import os
import zipfile

import pytest
from app_runs import HOSTILE, write_run

from app import downloads
from app.library import Library
from app.runs import RunError


@pytest.fixture
def library(tmp_path):
    folder = write_run(tmp_path / "runs" / "run", pretrained_model_name_or_path="owner/model") / "reslora"
    names = [
        "pytorch_lora_weights.safetensors",
        "kohya.safetensors",
        "comfyui.safetensors",
        "trainer.pt",
        "lycoris.safetensors",
    ]
    names += ["peft/adapter_model.safetensors", "peft/adapter_config.json", "peft/text_encoder/adapter_config.json"]
    names += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return Library(tmp_path / "runs")


def test_each_has_its_path_and_lines_of_python_that_compile(library):
    run = library.find("run")
    found = {one.label: one for one in downloads.downloads_of(run)}
    assert list(found) == [
        "ResLoRA: merged weights",
        "ResLoRA: comfyui.safetensors (ComfyUI)",
        "ResLoRA: kohya.safetensors (kohya, ComfyUI, A1111)",
        "ResLoRA: pytorch_lora_weights.safetensors (diffusers)",
        "ResLoRA: lycoris.safetensors (ComfyUI, Forge)",
        "ResLoRA: peft (PEFT)",
    ]
    assert "models/loras" in found.pop("ResLoRA: lycoris.safetensors (ComfyUI, Forge)").use
    for one in found.values():
        assert one.place.startswith(f"{run.folder}/reslora/")
        lines = one.use.splitlines()[-3:]
        compile("\n".join(lines), "use", "exec")
        assert "from_pretrained('owner/model'" in one.use and ("models/loras" in one.use) == ("ComfyUI" in one.label)
    assert f"load_lora_weights('{run.folder}/reslora', weight_name='kohya" in found[list(found)[2]].use
    assert f"PeftModel.from_pretrained(pipeline.unet, '{run.folder}/reslora/peft')" in found["ResLoRA: peft (PEFT)"].use


def test_a_copy_is_handed_out_of_what_is_listed_and_of_nothing_else(library, monkeypatch):
    run = library.find("run")
    file = downloads.packed(run, downloads.find(run, "ResLoRA: comfyui.safetensors (ComfyUI)"))
    assert file.name == "run-reslora-comfyui.safetensors" and file.read_text() == "comfyui.safetensors"
    os.utime(run.folder / "reslora" / "peft" / "adapter_config.json", (0, 0))  # zip files have no times before 1980
    archive = downloads.packed(run, downloads.find(run, "ResLoRA: peft (PEFT)"))
    with zipfile.ZipFile(archive) as content:
        assert set(content.namelist()) == {
            "adapter_config.json", "adapter_model.safetensors", "text_encoder/adapter_config.json",
        }  # fmt: skip
    for label in [*HOSTILE, "ResLoRA: trainer.pt", "../../etc/passwd"]:
        with pytest.raises(RunError):
            downloads.find(run, label)
    monkeypatch.setattr(downloads, "LARGEST", 3)
    with pytest.raises(RunError, match="larger"):
        downloads.packed(run, downloads.find(run, "ResLoRA: peft (PEFT)"))
