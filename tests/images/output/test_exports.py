"""The output of a run: documented files, exports that stock libraries read, figures, and the folder on the Hub."""

import contextlib
import dataclasses
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from pipelines import image_folder
from safetensors.torch import load_file

from images.runs import failed, final_weights, main, training_state, without
from reslora.errors import RunFailed
from reslora.export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from reslora.images.context import ImageContext
from reslora.images.output import exports as results
from reslora.images.prompts import Prompt
from reslora.images.settings import build_parser
from reslora.options.images import Options
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
        assert {"peft", "unet"} <= set(record["difference_of_255"])
        assert max(record["difference_of_255"].values()) <= 2


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


@pytest.mark.exhaustive
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "finite"), (1.0, "/255")])
def test_an_export_that_does_not_draw_what_the_merged_model_draws_fails(
    brief_flags, capsys, tmp_path, monkeypatch, value, word
):
    """The export is damaged here; a black image of NaN must not count as equal."""
    load = StableDiffusionPipeline.load_lora_weights

    def spoil(pipeline, *args, **more):
        load(pipeline, *args, **more)
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(value)

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", spoil)
    line = failed(capsys, *brief_flags, "--output_dir", tmp_path / "out")
    assert "lora/pytorch_lora_weights.safetensors" in line and word in line
    assert not (tmp_path / "out" / "lora" / "exports.json").exists()


# -- the comparison by itself ------------------------------------------------------------------------------------------


class Picture:
    """A denoiser that stands for its image, and a sampler of such denoisers."""

    def __init__(self, value: float, chaos: int = 0) -> None:
        self.value, self.chaos = value, chaos

    config = pipeline = None
    family = SimpleNamespace(takes_guidance=False, unguided=1.0)

    def eval(self) -> "Picture":
        return self

    def wanted(self, prompts: list[Prompt], images: int) -> list[tuple[Prompt, int]]:
        return [(dataclasses.replace(prompts[0], guidance_scale=4.0), 7)] * images

    def draw(self, denoiser: "Picture", prompts: list[Prompt], images: int) -> list[np.ndarray]:
        """Return the image; `chaos`: its change for every millionth by which the guidance changes."""
        nudged = ((prompts[0].guidance_scale or 4.0) / 4 - 1) * 1e6
        return [np.full((2, 2, 3), (denoiser.value + self.chaos * round(nudged)) / 255)] * len(prompts) * images


def folder_of(path: Path) -> Path:
    (path / "lora").mkdir()
    return path / "lora"


def compared(folder: Path, monkeypatch, drawn: float, read: float, chaos: int = 0, told: list | None = None) -> dict:
    """Return the result of `export_method` if the merged model generates one value, and an export another."""
    for path in (folder / "exports.json", folder.parent / "loss.png"):
        path.write_text("{}")  # of an earlier merge
    monkeypatch.setattr(results, "exact_parts", lambda *_: {"unet": Picture(drawn)})
    monkeypatch.setattr(results, "in_float32", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(results, "write_formats", lambda *_: None)
    monkeypatch.setattr(results, "read_back", lambda *_: [("peft", Picture(read))])
    monkeypatch.setattr(results, "kohya_metadata", lambda *_: {})
    shown = {"validation_prompt": ["red disc"], "num_validation_images": 1, "train_text_encoder": False}
    flags = Options.of(**shown, validation_prompt_options=None, save_best=False, output_dir=str(folder.parent))
    told = [] if told is None else told
    trained, accelerator = SimpleNamespace(loss=None), SimpleNamespace(print=told.append)
    learner = SimpleNamespace(method=folder.name, name=folder.name, trained=trained)
    return results.export_method(learner, None, Picture(0, chaos), None, ImageContext(flags, None, accelerator, None))


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


@pytest.mark.parametrize("difference", [0, 1, 2, -2])
def test_exports_may_differ_by_two_of_255(tmp_path, monkeypatch, difference):
    assert compared(folder_of(tmp_path), monkeypatch, 100, 100 + difference) == {"peft": abs(difference)}


@pytest.mark.parametrize("difference", [3, -3, 155, -100])
def test_exports_that_differ_by_more_fail(tmp_path, monkeypatch, difference):
    with pytest.raises(RunFailed, match=f"lora/peft: its image differs by {abs(difference)}/255"):
        compared(folder_of(tmp_path), monkeypatch, 100, 100 + difference)
    assert not (tmp_path / "lora" / "exports.json").exists() and not (tmp_path / "loss.png").exists()


def test_a_model_that_rounding_alone_moves_is_exported_and_a_line_says_so(tmp_path, monkeypatch):
    """Such as LoRA at 6e-3 on the bundled U-Net: images cannot verify the file, but the training is not lost."""
    folder, told = folder_of(tmp_path), []
    assert compared(folder, monkeypatch, 100, 150, chaos=3, told=told) == {"peft": 50}
    assert "rounding alone moves it by 3/255" in told[-1] and "--learning_rate" in told[-1]
    with pytest.raises(RunFailed, match="its image differs by 50/255"):
        compared(folder, monkeypatch, 100, 150, chaos=2)


@pytest.mark.parametrize(("unguided", "takes", "lowest"), [(1.0, False, 1.0), (0.0, False, 0.0), (1.0, True, 0.0)])
def test_rounding_is_imitated_without_guidance_too(unguided, takes, lowest):
    """The scale is a millionth above the highest one that has no effect."""
    family = SimpleNamespace(takes_guidance=takes, unguided=unguided)
    sampler = SimpleNamespace(family=family, wanted=lambda prompts, _: [(prompts[0], 7)])
    nudged = results.nudge(Prompt("a", guidance_scale=0.0), sampler)
    assert nudged.guidance_scale == pytest.approx(lowest + 1e-6, abs=1e-9)


@pytest.mark.parametrize(("drawn", "read", "who"), [(float("nan"), 1, "lora"), (1, float("inf"), "lora/peft")])
def test_pixels_that_are_not_finite_fail_on_either_side(tmp_path, monkeypatch, drawn, read, who):
    with pytest.raises(RunFailed, match=f"^{who}: .*not finite.*diverged"):
        compared(folder_of(tmp_path), monkeypatch, drawn, read)
    assert (tmp_path / "lora" / "exports.json").exists() == (
        who == "lora"
    )  # until something of another merge is written


def test_every_image_must_be_finite(tmp_path, monkeypatch):
    draw = Picture.draw
    monkeypatch.setattr(Picture, "draw", lambda *given: [*draw(*given), np.full((2, 2, 3), np.nan)])
    with pytest.raises(RunFailed, match=r"^lora: .*not finite.*diverged"):
        compared(folder_of(tmp_path), monkeypatch, 1, 1)


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
