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
    """Description of the file; empty for a complete model in one file."""
    fix: str = "give a complete model, with text encoder and autoencoder"


WIDE = ("BF16", "F16", "F32", "F64")
TRANSFORMER = r"(diffusion_model\.|transformer\.)?"
KINDS = (
    Kind(
        r".*(lora_|\.lora\.|_lora\.|hada_w|lokr_w|oft_)",
        "a LoRA",
        "give its base model here, and this file with --init_lora",
    ),
    Kind(r"model\.diffusion_model\.", ""),
    Kind(
        r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|mid|up)",
        "an autoencoder alone",
        "give a complete model here, and this file with --pretrained_vae_model_name_or_path",
    ),
    Kind(r"(text_model\.)?(encoder\.(layers|block)|embeddings)\.", "a text encoder alone"),
    Kind(r"(down_blocks|input_blocks)\.\d", "a U-Net alone"),
    Kind(
        rf"{TRANSFORMER}(\w*blocks|layers)\.\d",
        "a transformer alone",
        "give its pipeline's folder or name on the hub, and this with --pretrained_transformer_file",
    ),
)
"""The known kinds; the first kind that matches counts."""


QUANTIZED = (
    (r".*(\.(absmax|quant_map|nested_absmax)$|\.quant_state\.)", "bitsandbytes' 4 or 8 bits"),
    (r".*(\.(scale_weight|scale_input|weight_scale(_2)?|weight_scale_inv|input_scale)$|scaled_fp8$)", "scaled fp8"),
    (r".*\.(qweight|qzeros|wscales|comfy_quant)$", "integers with scales"),
)
"""Names of tensors that only quantized files have, and what the file is quantized to."""


def refuse_quantized(path: Path, flag: str) -> None:
    """Raise `InvalidArgument` for a GGUF file, and for a safetensors file with quantized weights."""
    found = "GGUF" if path.suffix.lower() == ".gguf" else None
    if found is None:
        names = tensor_names(path)
        found = next((what for pattern, what in QUANTIZED if any(re.match(pattern, name) for name in names)), None)
    if found is None and names:
        with safe_open(path, "pt") as file:
            dtypes = {file.get_slice(name).get_dtype() for name in names if name.endswith(".weight")}
        found = next((f"dtype {dtype}" for dtype in sorted(dtypes) if dtype not in WIDE), None)
    if found:
        fix = "give its bf16 or fp16 version; --base_precision quantizes that"
        raise InvalidArgument(flag, f"its weights are quantized ({found})", fix)


def refuse_others(path: Path, flag: str) -> None:
    """Raise `InvalidArgument` if a file is neither a transformer nor a complete model, or if it is quantized."""
    if not path.is_file():
        raise InvalidArgument(flag, "no such file", "give a .safetensors file")
    refuse_quantized(path, flag)
    if path.suffix != ".safetensors":
        raise InvalidArgument(flag, "not a .safetensors file", "give such a file")
    kind = kind_of(path)
    if kind is None or kind.what not in ("", KINDS[-1].what):
        what = kind.what if kind else "no known transformer"
        raise InvalidArgument(flag, f"it is {what}", "give a transformer, or a file that contains one")


def refuse_parts(path: Path, flag: str) -> None:
    """Raise `InvalidArgument` if a safetensors file, or a file in a folder, is a LoRA or only one part of a model."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        kind = kind_of(file)
        if kind and kind.what:
            where = "it" if file == path else f"it has no model_index.json, and its {file.name}"
            raise InvalidArgument(flag, f"{where} is {kind.what}", kind.fix)


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a safetensors file; None if it is unknown."""
    names = tensor_names(path)
    return next((kind for kind in KINDS if any(re.match(kind.names, name) for name in names)), None)


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file; [] if the file is damaged."""
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def read_index(folder: Path, flag: str) -> dict:
    """Return the content of a pipeline's model_index.json.

    Raises `InvalidArgument` if the index cannot be read, or if the pipeline's class is not in `FAMILIES`.
    """
    index = read_object(folder / "model_index.json")
    if not index:
        raise InvalidArgument(flag, "no readable model_index.json", "give a pipeline in diffusers format")
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in FAMILIES:
        raise InvalidArgument(flag, f"a {found}", f"give one of {', '.join(FAMILIES)}")
    return index
