"""The file of a run in LyCORIS's format: its layers and their names, for every family."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from ...export import KOHYA_FILE, name_in_files, tuned_layers
from ...lycoris import Tensors, tensors_of, write_lycoris
from ..model.families.base import Family
from ..model.lora_files.names import names_of, spelled


class FileLayer(NamedTuple):
    """A layer in the file."""

    module: BaseTunerLayer
    swapped: bool = False
    """Whether ComfyUI swaps the two halves of the update's rows; see `Fused.swapped`."""

    def placed(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Swap the halves of a swapped layer's DoRA scale, because ComfyUI swaps only the update; twice restores it."""
        scale = {name: value for name, value in tensors.items() if self.swapped and name == "dora_scale"}
        return dict(tensors) | {name: torch.cat(value.chunk(2)[::-1]) for name, value in scale.items()}


def file_layers(parts: Mapping[str, nn.Module], family: Family) -> dict[str, FileLayer]:
    """Return the adapted layers of all parts by their names in the file.

    If the family has a file for kohya's scripts, the names are those of kohya's scripts. Otherwise a layer has the name
    of the model's original code, which ComfyUI uses. A part of such a layer has diffusers' name.
    """
    found = {}
    for part, module in parts.items():
        base, layers = tuned_layers(module)
        fused = names_of(family, base.config).original if part == family.denoiser else {}
        swapped = {one.layers[0][1] for one in fused.values() if one.swapped}
        own = {one.layers[0][1]: name for name, one in fused.items() if len(one.layers) == 1 and not one.swapped}
        for name, layer in layers.items():
            if part != family.denoiser:
                found[spelled(f"{family.text_names[part][0]}_", name_in_files(base, name))] = FileLayer(layer)
            elif KOHYA_FILE in family.lora_files:
                found[spelled("lora_unet_", family.kohya_name(base.config, name) or name)] = FileLayer(layer)
            elif name in own:
                found[f"diffusion_model.{own[name]}"] = FileLayer(layer)
            else:
                found[f"{part}.{name}"] = FileLayer(layer, name in swapped)
    return found


def write_lycoris_file(parts: Mapping[str, nn.Module], path: Path, family: Family, metadata: dict[str, str]) -> None:
    """Write the LoHa, LoKr or DoRA layers of all parts to one file; `metadata` is added to its header."""
    layers = file_layers(parts, family).items()
    write_lycoris(path, {name: layer.placed(tensors_of(layer.module)) for name, layer in layers}, metadata)


def read_lycoris_file(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each layer, by the layer's name in the file and the tensor's name without `.weight`."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        layer, _, tensor = key.removesuffix(".weight").rpartition(".")
        found.setdefault(layer, {})[tensor] = value
    return found
