"""A denoiser's merged weights, written from the files of its base one tensor after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from ... import export
from ...files import replacing, write_json, write_one_by_one
from ..model.stored import Stored

LARGEST_FILE = "10GB"  # as diffusers has it


def write_merged(denoiser: nn.Module, directory: str | os.PathLike, stored: Mapping[str, Stored]) -> Path:
    """Writes what `export.export_merged` writes of a denoiser in float32, with the base's weights read from its files.

    `stored` is where each weight of the base is; of the model only the adapter is read. In memory is one tensor at a
    time. A base whose files name their weights otherwise than the model is written from memory. Returns the folder.
    """
    base, layers = export.tuned_layers(denoiser)
    with torch.device("meta"):
        empty = type(base).from_config(base.config)
    state = empty.float().state_dict()
    if state.keys() != stored.keys():
        return export.export_merged(denoiser, directory)

    def merged(name: str) -> torch.Tensor:
        owner, _, parameter = name.rpartition(".")
        if owner not in layers or parameter not in ("weight", "bias"):
            return stored[name].read()
        layer = layers[owner]
        return export.merged_value(layer, parameter, stored[name].read(next(layer.parameters()).device))

    with replacing(directory) as temporary:
        empty.save_config(temporary)
        pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(state, max_shard_size=LARGEST_FILE, filename_pattern=pattern)
        for file, names in split.filename_to_tensors.items():
            write_one_by_one(temporary / file, {name: state[name] for name in names}, merged)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(temporary / SAFE_WEIGHTS_INDEX_NAME, index)
    return Path(directory)
