"""Write a LoRA in the format of one tool."""

import typing
from collections.abc import Mapping
from pathlib import Path

from transformers import CLIPTextModel

from ....errors import InvalidArgument
from ....export import (
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    KOHYA_FILE,
    PEFT_CONFIG_FILE,
    PEFT_FILE,
    Factors,
    write_diffusers,
    write_folded,
    write_kohya,
    write_peft,
)
from ....io import replacing
from ..families.base import Family
from .names import Names, Parts

FILES = {"diffusers": DIFFUSERS_FILE, "kohya": KOHYA_FILE, "comfyui": COMFYUI_FILE, "peft": None}
"""The formats, and their file names in a folder; PEFT's format is a folder."""


def output_of(text: str, to: str) -> Path:
    """Return the file to write, or PEFT's folder; raises `InvalidArgument` if that would replace other files."""
    path, flag = Path(text), f"OUT {text}"
    if (file := FILES[to]) is not None:
        path = path if path.suffix == ".safetensors" else path / file
        if path.is_dir() or path.parent.is_file():
            raise InvalidArgument(flag, "a folder and a file share that name", "give another")
        return path
    if path.suffix == ".safetensors" or path.is_file():
        raise InvalidArgument(flag, "--to peft writes a folder", "give the name of one")
    own = {folder / name for folder in (path, *path.glob("text_encoder*")) for name in (PEFT_CONFIG_FILE, PEFT_FILE)}
    if others := sorted(file for file in path.rglob("*") if file not in own and not file.is_dir()):
        problem = f"the folder also has {others[0].relative_to(path)}, which would be replaced"
        raise InvalidArgument(flag, problem, "give another")
    if path.name in ("", ".."):
        raise InvalidArgument(flag, "--to peft writes a folder, and this is not the name of one", "give its name")
    return path


def write(parts: Parts, names: Names, to: str, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the LoRA to `path`, in the format `to`: diffusers, kohya, comfyui or peft.

    `path` is a file, but for PEFT a folder, with a subfolder for each text encoder. `names` has the names of the
    layers in kohya's and ComfyUI's files. `metadata` is added to the header of a file.
    """
    if to == "diffusers":
        write_diffusers(path, parts, metadata)
    elif to == "kohya":
        write_kohya(path, names.to_kohya(parts), metadata)
    elif to == "comfyui":
        write_folded(path, names.to_comfyui(parts), metadata, names.family.comfyui_words)
    else:
        with replacing(path) as temporary:
            for part, layers in parts.items():
                write_peft(peft_folder(temporary, part, names.family), _as_loaded(part, layers, names))


def peft_folder(folder: Path, part: str, family: Family) -> Path:
    """Return PEFT's folder for a part of the pipeline: `folder` for the denoiser, a subfolder for a text encoder."""
    return folder if part == family.denoiser else folder / part


def _as_loaded(part: str, layers: Mapping[str, Factors], names: Names) -> dict[str, Factors]:
    """Return layers by their names in the model: some CLIP text encoders lack the prefix `text_model.` of files."""
    short = typing.get_type_hints(names.family.pipeline.__init__).get(part) is CLIPTextModel
    return {name.removeprefix("text_model.") if short else name: factors for name, factors in layers.items()}
