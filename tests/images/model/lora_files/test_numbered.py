"""The oldest layout, whose layers are numbered in the order in which the model's classes registered them."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from images.model.lora_files.loras import assert_same, names, random_factors, tiny, updates
from images.test_conversion import convert, refused
from reslora.images.model.lora_files.numbered import named
from reslora.images.model.lora_files.reading import family_of, read_content, read_parts

OLD, NEW = (
    {"CrossAttention": "Attention", "GEGLU": "GEGLU"},
    {"Attention": "Attention", "ResnetBlock2D": "ResnetBlock2D"},
)
"""Names of classes in a file's metadata, and in present diffusers."""


def saved(path, classes: dict[str, str], feed_forward_first: bool) -> dict[str, torch.Tensor]:
    """Write a file as lora_diffusion does, from the modules of the models; return the updates of the weights."""
    unet = UNet2DConditionModel.from_pretrained(tiny("stable_diffusion") / "unet")
    for block in unet.modules() if feed_forward_first else ():
        if "attn2" in block._modules:  # as diffusers registered them until 2023
            block._modules["attn2"] = block._modules.pop("attn2")
    text = CLIPTextModel.from_pretrained(tiny("stable_diffusion") / "text_encoder")
    tensors, metadata, wanted = {"<s1>": torch.ones(16)}, {"<s1>": "<embed>"}, {}
    for part, model, found in (("unet", unet, classes), ("text_encoder", text, {"CLIPAttention": "CLIPAttention"})):
        place = {module: name for name, module in model.named_modules()}
        metadata[part] = json.dumps(list(found))
        inside = [own for own in model.modules() if type(own).__name__ in found.values()]
        layers = [each for own in inside for each in own.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        for number, layer in enumerate(layers):
            factors = random_factors(layer.weight.shape, 2, 1.0, number)
            tensors |= {f"{part}:{number}:up": factors.up, f"{part}:{number}:down": factors.down}
            metadata[f"{part}:{number}:rank"] = "2"
            name = place[layer] if part == "unet" else f"text_model.{place[layer].removeprefix('text_model.')}"
            wanted[f"{part}.{name}"] = factors.up.flatten(1) @ factors.down.flatten(1)
    save_file(tensors, path, metadata)
    return wanted


@pytest.mark.parametrize(("classes", "feed_forward_first"), [(OLD, True), (OLD, False), (NEW, False)])
def test_numbers_stand_for_the_layers_of_the_classes_in_the_metadata(classes, feed_forward_first, tmp_path, capsys):
    wanted = saved(tmp_path / "in.safetensors", classes, feed_forward_first)
    content = read_content(tmp_path / "in.safetensors", "IN")
    assert family_of(content).name == "stable_diffusion"
    content = named(content, names("stable_diffusion"))
    assert_same(updates(read_parts(content, names("stable_diffusion"))), wanted)
    assert content.metadata == {}
    assert "IN: cloneofsimo's layout, with numbered layers; the embeddings of <s1> are" in capsys.readouterr().out


def test_it_is_converted_and_another_model_is_refused(tmp_path, capsys):
    source, base = tmp_path / "in.safetensors", tiny("stable_diffusion")
    saved(source, OLD, True)
    assert convert(source, tmp_path / "out.safetensors", "--to", "kohya", "--base", base) == 0
    capsys.readouterr()
    assert "numbered layers of unet (CrossAttention, GEGLU) are not those of the model" in refused(
        capsys, source, tmp_path / "other.safetensors", "--to", "kohya"
    )
