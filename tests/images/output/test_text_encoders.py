"""Exports of trained text encoders: read by stock diffusers, transformers and PEFT, and merged again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from pipelines import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reslora
from images.runs import assert_same_merge, train_family
from images.training.test_text_encoders import ENCODERS, FLAG
from reslora.images.output.calibration_file import read_calibration

PREFIXES = {"stable_diffusion": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of each family, made when first requested; the first encoder has the names of CLIP's own files."""
    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(family)
            FAMILIES[family](folder / "model", **ENCODERS[family])
            with_prefix(folder / "model" / "text_encoder" / "model.safetensors")
            more = ["--shortcut", "block"] if family == "sdxl" else []  # block raises ranks, layer by layer
            more += ["--base_precision", "int8"] if family == "flux" else []  # all parts are loaded anew to be merged
            train_family(folder, FLAG, *more)
        return made[family]

    return run


def with_prefix(path: Path) -> None:
    """Return names with the prefix `text_model.` of CLIP's files, which newer versions of transformers leave out."""
    tensors = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    inner = {name: value for name, value in tensors.items() if not name.startswith("text_projection")}
    outer = {name: value for name, value in tensors.items() if name not in inner}
    save_file(outer | {f"text_model.{name}": value for name, value in inner.items()}, path, metadata={"format": "pt"})


def pipeline_of(folder: Path, *merged: str) -> DiffusionPipeline:
    """Return the stock pipeline with merged parts of the run."""
    pipe = DiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
    for name in merged:
        made = type(getattr(pipe, name)).from_pretrained(folder / "out" / "reslora" / name)
        assert next(made.parameters()).dtype == torch.float32
        setattr(pipe, name, made.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def seen(pipe: DiffusionPipeline, names) -> list[torch.Tensor]:
    """Return the output of each text encoder for a prompt: all layers, and the pooled state."""
    found = []
    for name in names:
        tokens = getattr(pipe, name.replace("text_encoder", "tokenizer"))(["red blue"], return_tensors="pt").input_ids
        output = getattr(pipe, name)(tokens, output_hidden_states=True)
        found += [*output.hidden_states, output[0], output[1]]
    return found


def drawn(pipe: DiffusionPipeline) -> np.ndarray:
    size = {"height": 32, "width": 32, "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "np"}
    return pipe(prompt="blue box", generator=torch.Generator().manual_seed(0), **size).images[0]


def denoiser_of(folder: Path) -> str:
    return "unet" if (folder / "model" / "unet").is_dir() else "transformer"


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ENCODERS)
def test_every_file_gives_the_text_states_and_images_of_the_merged_weights(runs, family):
    folder, names = runs(family), ENCODERS[family]
    out = folder / "out" / "reslora"
    record = json.loads((out / "exports.json").read_text())["read_back"]
    files = [name for name in record if name.endswith(".safetensors")]
    assert {"peft", denoiser_of(folder), *names} <= record.keys() and max(record.values()) < 1e-6
    assert ("kohya.safetensors" in files) == (family in PREFIXES)
    merged = pipeline_of(folder, denoiser_of(folder), *names)
    states, image = seen(merged, names), drawn(merged)
    base = seen(pipeline_of(folder), names)
    assert sum((one - other).abs().max() > 1e-2 for one, other in zip(states, base, strict=True)) >= 3 * len(names)
    for file in files:
        pipe = pipeline_of(folder)
        pipe.load_lora_weights(out, weight_name=file)
        torch.testing.assert_close(seen(pipe, names), states, rtol=1e-4, atol=1e-5)
        assert np.abs(drawn(pipe) - image).max() <= 2 / 255, file
        with safe_open(out / file, "pt") as content:
            keys = list(content.keys())
        of_text = PREFIXES[family] if file == "kohya.safetensors" else [f"{name}.text_model." for name in names]
        assert all(any(key.startswith(start) for key in keys) for start in of_text)
        assert all(key.startswith((*of_text, "lora_unet_", f"{denoiser_of(folder)}.")) for key in keys)
    pipe = pipeline_of(folder)
    for name in names:
        PeftModel.from_pretrained(getattr(pipe, name), out / "peft" / name)
    torch.testing.assert_close(seen(pipe, names), states, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_written_of_each_part(runs, family):
    """For the denoiser as usual, and for each encoder in a subfolder of its name; encoders have their own chains."""
    folder, names = runs(family), ENCODERS[family]
    out = folder / "out" / "reslora"
    chains, report = (json.loads((out / name).read_text()) for name in ("chains.json", "merge.json"))
    assert list(chains) == ["links", "chains", "unlinked", "readers", *names]
    assert list(report) == ["method", "shortcut", "blocks", "notes", *names]
    for number, name in enumerate(names):
        layers = 2 if (family, number) == ("sdxl", 0) else 3
        found = [[block["name"] for block in chain["blocks"]] for chain in chains[name]["chains"]]
        roles = [chain["role"] for chain in chains[name]["chains"]]
        start = "" if type(getattr(pipeline_of(folder), name)).__name__ == "CLIPTextModel" else "text_model."
        assert found == [[f"{start}encoder.layers.{i}.{role}" for i in range(layers)] for role in roles]
        assert {role.removeprefix("self_attn.") for role in roles} == {"q_proj", "k_proj", "v_proj", "out_proj"}
        assert len(report[name]["blocks"]) == 4 * layers
        merged = load_file(out / name / "model.safetensors")
        before = load_file(folder / "model" / name / "model.safetensors")
        assert merged.keys() == before.keys()  # the names that `save_pretrained` has for what was read
        changed = {key for key, value in merged.items() if not torch.equal(value, before[key])}
        expected = {f"{block}.weight".removeprefix("text_model.") for chain in found for block in chain}
        assert {key.removeprefix("text_model.") for key in changed} == expected


@pytest.mark.exhaustive
def test_an_encoders_merge_is_repeated_from_the_captions_that_were_kept(runs):
    folder = runs("sd3")
    out, name = folder / "out" / "reslora", "text_encoder_2"
    model = getattr(pipeline_of(folder), name)
    assert reslora.load(model, out / "checkpoint-3" / name) is model
    batches = read_calibration(out / f"calibration-{name}.safetensors")
    assert [batch["input_ids"].shape for batch in batches] == [(3, 8), (1, 8)]
    report = reslora.merge(model, calibration=batches).to_dict()
    expected = json.loads((out / "merge.json").read_text())[name]
    assert_same_merge(report, expected)
    assert report["method"] == "lstsq"
