"""Recognize files that are not a complete model (a LoRA, a text encoder, ...) by the names of their tensors."""

import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from ...errors import InvalidArgument
from ...io import read_object
from .families import FAMILIES


class Kind(NamedTuple):
    """A kind of weight file."""

    names: str
    """A regular expression that matches the start of a tensor's name in such a file."""
    what: str
    """What the file is; empty for a complete model in one file."""
    fix: str = "give a whole model, with text encoder and autoencoder"


KINDS = (
    Kind(
        r".*(lora_|\.lora\.|_lora\.|hada_w|lokr_w|oft_)",
        "a LoRA",
        "give the model that it was made for, and this with --init_lora",
    ),
    Kind(r"model\.diffusion_model\.", ""),
    Kind(
        r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|mid|up)",
        "an autoencoder alone",
        "give a whole model, and this with --pretrained_vae_model_name_or_path",
    ),
    Kind(r"(text_model\.)?(encoder\.(layers|block)|embeddings)\.", "a text encoder alone"),
    Kind(r"(down_blocks|input_blocks)\.\d", "a U-Net alone"),
    Kind(r"(\w*blocks|layers)\.\d", "a transformer alone"),
)
"""The known kinds; the first kind that matches counts."""


def refuse_parts(path: Path, flag: str) -> None:
    """Raise `InvalidArgument` if a safetensors file, or a file in a folder, is a LoRA or only one part of a model."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        names = tensor_names(file)
        kind = next((kind for kind in KINDS if any(re.match(kind.names, name) for name in names)), None)
        if kind and kind.what:
            where = "it" if file == path else f"no model_index.json, and {file.name} in it"
            raise InvalidArgument(flag, f"{where} is {kind.what}", kind.fix)


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file; [] if the file is damaged."""
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def read_index(folder: Path, flag: str) -> dict:
    """Return the content of a pipeline's model_index.json.

    Raises `InvalidArgument` if it cannot be read, or if the pipeline's class is not in `FAMILIES`.
    """
    index = read_object(folder / "model_index.json")
    if not index:
        raise InvalidArgument(flag, "no readable model_index.json", "give a pipeline in diffusers format")
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in FAMILIES:
        raise InvalidArgument(flag, f"a {found}", f"give one of {', '.join(FAMILIES)}")
    return index
