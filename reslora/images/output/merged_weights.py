"""Write a denoiser's merged weights, reading the base from disk one tensor at a time."""

import os
from collections.abc import Callable, Mapping

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from ... import export
from ...io import replacing, write_json, write_one_by_one
from ...linking import base_model
from ..model.stored import Stored

LARGEST_FILE = "10GB"  # diffusers' default


def write_merged(denoiser: nn.Module, directory: str | os.PathLike, stored: Mapping[str, Stored]) -> None:
    """Write a float32 denoiser with its adapter merged; the result equals that of `export.export_merged`.

    `stored`: see `merged_tensors`.
    """
    merged_tensor, empty = merged_tensors(denoiser, stored), emptied(denoiser)
    state = empty.state_dict()
    with replacing(directory) as temporary:
        empty.save_config(temporary)
        pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(state, max_shard_size=LARGEST_FILE, filename_pattern=pattern)
        for file, names in split.filename_to_tensors.items():
            write_one_by_one(temporary / file, {name: state[name] for name in names}, merged_tensor)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(temporary / SAFE_WEIGHTS_INDEX_NAME, index)


def merged_tensors(denoiser: nn.Module, stored: Mapping[str, Stored]) -> Callable[[str], torch.Tensor]:
    """Return a function that returns a tensor of the float32 denoiser, with its adapter merged, by the tensor's name.

    `stored` maps the name of each base weight to its file. The base's weights are read from disk, so that only one
    weight is in memory at a time. If the names in the files differ from the model's names, the weights in memory are
    used instead.
    """
    base, layers = export.tuned_layers(denoiser)
    if emptied(denoiser).state_dict().keys() != stored.keys():
        return export.merged_state_dict(base).__getitem__

    def merged_tensor(name: str) -> torch.Tensor:
        """Return a tensor of the denoiser's file; if the tensor belongs to an adapted layer, add the LoRA's update."""
        owner, _, parameter = name.rpartition(".")
        if owner not in layers or parameter not in ("weight", "bias"):
            return stored[name].read()
        layer = layers[owner]
        return export.merged_value(layer, parameter, stored[name].read(next(layer.parameters()).device))

    return merged_tensor


def emptied(denoiser: nn.Module) -> nn.Module:
    """Return the base model without adapters, in float32, on the meta device."""
    base = base_model(denoiser)
    with torch.device("meta"):
        return type(base).from_config(base.config).float()
