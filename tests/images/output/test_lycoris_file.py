"""The file in LyCORIS's format: the names of every family's layers, and the check of what a run has written."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from pipelines import EDITS, FAMILIES
from safetensors.torch import load_file, save_file

from images.model.lora_files.loras import PIPELINE_OF
from images.runs import main, without
from reslora.errors import RunFailed
from reslora.export import LYCORIS_FILE
from reslora.images.model.families import load_family
from reslora.images.model.lora_files.names import names_of
from reslora.images.output import exports, reading_back
from reslora.images.output.lycoris_file import file_layers, read_lycoris_file, write_lycoris_file

TO_Q, LINEAR1 = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"
# A layer in diffusers, and its name in the file: ComfyUI has these names for the layer, or for a part of its own layer.
NAMES = {
    "stable_diffusion": {
        "mid_block.attentions.0.proj_in": "lora_unet_mid_block_attentions_0_proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
        ),
    },
    "sdxl": {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_k": (
            "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k"
        )
    },
    "flux": {
        TO_Q: f"transformer.{TO_Q}",
        LINEAR1: f"transformer.{LINEAR1}",
        "transformer_blocks.0.attn.to_out.0": "diffusion_model.double_blocks.0.img_attn.proj",
        "norm_out.linear": "transformer.norm_out.linear",
    },
    "sd3": {
        TO_Q: f"transformer.{TO_Q}",
        "transformer_blocks.0.attn.to_out.0": "diffusion_model.joint_blocks.0.x_block.attn.proj",
    },
    "z_image": {"layers.0.attention.to_q": "diffusion_model.layers.0.attention.to_q"},
    "qwen_image": {TO_Q: "lora_unet_transformer_blocks_0_attn_to_q"},
    "krea2": {"transformer_blocks.0.attn.to_q": "diffusion_model.blocks.0.attn.wq"},
}


def adapted(family: str, folder: Path, config: peft.PeftConfig) -> dict[str, torch.nn.Module]:
    """Return a family's tiny denoiser with an adapter of random values, by the denoiser's name."""
    own = load_family(PIPELINE_OF[family])
    place = {**FAMILIES, **EDITS}[family](folder)
    denoiser = own.denoiser_class.from_pretrained(place / own.denoiser)
    denoiser.add_adapter(config)
    for name, value in denoiser.named_parameters():
        if value.requires_grad:
            value.data = torch.rand_like(value) * 0.1 + ("magnitude" in name)
    return {own.denoiser: denoiser}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", {**FAMILIES, **EDITS})
def test_every_layer_has_the_name_that_readers_know(family, tmp_path):
    own = load_family(PIPELINE_OF[family])
    parts = adapted(family, tmp_path / "model", peft.LoKrConfig(r=2, target_modules="all-linear"))
    known = names_of(own, parts[own.denoiser].config).known
    layers = file_layers(parts, own)
    found = {layer.module: known[name] for name, layer in layers.items()}
    for name, module in parts[own.denoiser].named_modules():
        if module in found:
            assert (own.denoiser, name) in found.pop(module).layers and not found.get(module)
    assert not found
    by_module = {layer.module: name for name, layer in layers.items()}
    for name, in_file in NAMES.get(family, {}).items():
        assert by_module[parts[own.denoiser].get_submodule(name)] == in_file


def test_dora_of_a_norm_whose_halves_comfyui_swaps(tmp_path):
    """ComfyUI swaps the halves of the update's rows, and multiplies the rows in its own order by the scale."""
    own = load_family(PIPELINE_OF["flux"])
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["norm_out.linear"])
    parts = adapted("flux", tmp_path / "model", config)
    layer = parts["transformer"].get_submodule("norm_out.linear")
    weight = layer.get_base_layer().weight.detach().double().clone()
    write_lycoris_file(parts, tmp_path / LYCORIS_FILE, own, {})
    [tensors] = [{name: value.double() for name, value in found.items()} for found in read(tmp_path)]
    layer.double().merge()
    merged = layer.get_base_layer().weight.detach()

    def swapped(value: torch.Tensor) -> torch.Tensor:
        return torch.cat(value.chunk(2)[::-1])

    rows = swapped(weight) + swapped(tensors["lora_up"] @ tensors["lora_down"])
    theirs = tensors["dora_scale"] * rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(swapped(theirs), merged, rtol=1e-6, atol=1e-7)


def read(folder: Path) -> list[dict[str, torch.Tensor]]:
    return list(read_lycoris_file(folder / LYCORIS_FILE).values())


def changed(text: str, factor: float | None) -> Callable[[Path], None]:
    """Return a function that multiplies a file's tensors with this text in their names; None: that drops them."""

    def change(path: Path) -> None:
        found = {name: factor and value * factor if text in name else value for name, value in load_file(path).items()}
        save_file({name: value for name, value in found.items() if value is not None}, path)

    return change


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
SLIGHTLY = 1 + 1e-4
DAMAGES = {
    "dora": [(f"{LAYER}.dora_scale", SLIGHTLY), (f"{LAYER}.lora_up", SLIGHTLY), (f"{LAYER}.dora_scale", None)],
    "loha": [(f"{LAYER}.hada_w1_a", SLIGHTLY), (f"{LAYER}.alpha", 2.0), (LAYER, None), (f"{LAYER}.hada_w2_b", None)],
    "lokr": [(f"{LAYER}.lokr_w1", SLIGHTLY), (LAYER, None), (f"{LAYER}.lokr_w1", None)],
}


@pytest.mark.exhaustive
def test_runs_write_the_file_and_notice_every_damage(brief_flags, tmp_path, monkeypatch):
    flags = [*without(brief_flags, "--method"), "--lora_alpha", "3", "--max_train_steps", "2"]
    noticed = []

    def read_back(parts: dict, method: str, *args) -> dict:
        path = tmp_path / method / LYCORIS_FILE
        content = path.read_bytes()
        for text, factor in DAMAGES[method]:
            changed(text, factor)(path)
            with pytest.raises(RunFailed, match=f"{method}/{LYCORIS_FILE}: "):
                reading_back.read_back(copy.deepcopy(parts), method, *args)
            path.write_bytes(content)
            noticed.append(method)
        return reading_back.read_back(parts, method, *args)

    monkeypatch.setattr(exports, "read_back", read_back)
    assert main(*flags, "--method", "dora", "loha", "lokr", "--output_dir", tmp_path) == 0
    assert noticed == [method for method, damages in DAMAGES.items() for _ in damages]
    for method in DAMAGES:
        record = json.loads((tmp_path / method / "exports.json").read_text())["read_back"]
        assert record.keys() == {LYCORIS_FILE, "peft", "unet"} and max(record.values()) < 1e-6
