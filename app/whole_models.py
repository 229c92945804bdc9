"""Write a complete model with changed weights as a folder that diffusers can load.

The base model's files are copied, one component after the other; a component with a LoRA is written tensor by tensor.
This module does not import Gradio.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from reslora import export
from reslora.images.model.loading import Model, check_weights
from reslora.images.model.lora_files.reading import PICKLES
from reslora.images.model.stored import Stored
from reslora.images.output.merged_weights import write_merged
from reslora.io import remove_leftovers, replacing, write_json

from .library import Library
from .runs import RunError

FOLDER, INDEX = "models", "model_index.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
CHUNK = 2**24
"""Number of bytes to read at once when copying a file."""


def place_for(library: Library, name: object) -> Path:
    """Return the path of a new model below the runs folder. Raises `RunError` for an invalid or existing name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RunError("Give the model a name of at most 64 letters, digits, hyphens, dots and underscores.")
    target = library.folder / FOLDER / name
    if os.path.lexists(target):
        raise RunError(f"{FOLDER}/{name} already exists: give another name.")
    return target


def lines_for(place: str) -> str:
    """Return the lines of Python that load the model in the folder `place`."""
    return (
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({place!r})\n"
        'image = pipeline("a prompt").images[0]'
    )


def write(
    target: Path,
    model: Model,
    base: Mapping[str, object],
    parts: Mapping[str, nn.Module | Path],
    check: Callable[[], None],
) -> None:
    """Write a new folder `target` with the components of the base model, some of which are replaced by `parts`.

    `parts`: by component name, a folder of weights, or a model with a plain LoRA, of which only the LoRA is read.
    `base`: the loaded components of the base model; a component is saved from these, instead of copied, if its files
    differ from what is loaded. `check`: called between two tensors; may raise an exception to stop.

    After any error, the folder is removed. Raises `RunError` if `target` exists or if files of a component are missing,
    and `OSError` if a file cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with replacing(target) as temporary:
        temporary.mkdir()
        index = dict(model.index)
        for name in [name for name, kind in index.items() if isinstance(kind, list) and isinstance(kind[0], str)]:
            check()
            if name in parts:
                write_part(temporary / name, model, parts[name], check)
            elif model.variant or name == "scheduler" or (name == "vae" and model.vae):
                if base.get(name) is not None:
                    base[name].save_pretrained(temporary / name)
            elif (model.folder / name).is_dir():
                copy(model.folder / name, temporary / name, check)
            if not (temporary / name).is_dir():
                if base.get(name) is not None:
                    raise RunError(f"The base model's folder {name} is missing: restore this folder.")
                index[name] = [None, None]
        write_json(temporary / INDEX, index)
        if target.exists():
            raise RunError(f"{FOLDER}/{target.name} already exists: give another name.")


def write_part(folder: Path, model: Model, part: nn.Module | Path, check: Callable[[], None]) -> None:
    """Write a denoiser or text encoder to a new folder.

    If `part` is a folder, copy it; if it is a model with a LoRA, merge the LoRA into the base weights in float32."""
    is_denoiser = folder.name == model.family.denoiser
    if isinstance(part, Path):
        if is_denoiser:
            check_weights(part, None, model.empty_denoiser(), f"{part.parent.name}/{part.name}")
        copy(part, folder, check)
    elif is_denoiser:
        stored = {name: Watched(where.path, where.name, check) for name, where in model.stored_denoiser().items()}
        write_merged(part, folder, stored)
    else:
        export.export_merged(part, folder)


@dataclass(frozen=True)
class Watched(Stored):
    """A tensor in a file, whose method `read` first calls `check`."""

    check: Callable[[], None]

    def read(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Call `check`, then return a copy of the tensor on a device."""
        self.check()
        return super().read(device)


def copy(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy a folder, except hidden files and pickles, which can run code and which diffusers does not need."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if not path.is_file() or path.suffix in PICKLES or any(part.startswith(".") for part in place.parts):
            continue
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, (target / place).open("wb") as written:
            while chunk := read.read(CHUNK):
                check()
                written.write(chunk)
