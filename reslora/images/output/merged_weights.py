"""Write a denoiser's merged weights, reading the base from disk one tensor at a time."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from ... import export
from ...io import replacing, write_json, write_one_by_one
from ..model.stored import Stored

LARGEST_FILE = "10GB"  # diffusers' default


def write_merged(denoiser: nn.Module, directory: str | os.PathLike, stored: Mapping[str, Stored]) -> Path:
    """Write a float32 denoiser as `export.export_merged` does, with the base's weights read from disk; return the
    folder.

    `stored` maps each weight of the base to its file; of the model in memory, only the adapter is read. One tensor is
    in memory at a time. If the base's files name their weights differently, it is written from memory.
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
