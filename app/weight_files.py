"""Load weights from files into a denoiser or a text encoder.

Names and shapes of all tensors are validated, so that no image is generated with weights that do not fit the model.
Error messages name the file and the tensor. No file is unpickled.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import reslora
from reslora.errors import InvalidArgument, RunFailed, first_line
from reslora.images.model.families.base import Family
from reslora.images.model.lora_files.adding import add_lora, check_fit, in_names_of
from reslora.images.model.lora_files.names import names_of
from reslora.images.model.lora_files.reading import read_content, read_parts
from reslora.io import read_object
from reslora.methods.adapters import attach, load_adapter
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config
from reslora.runtime.checkpoint_folders import RECORD

from .runs import RunError, Weights, stamp_of

LARGEST_ADAPTER = 2**30


def put_merged(model: nn.Module, weights: Weights, strength: float) -> None:
    """Load merged weights into a denoiser or a text encoder that has the base weights.

    The loaded weights are `base + strength * (merged - base)`. Raises `RunError` if names or shapes differ from the
    model's.
    """
    present, merged = model.state_dict(), {}
    for file in sorted(weights.path.glob("*.safetensors")):
        merged.update(in_names_of(model, load_file(file)))
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (present, merged)]
    if wrong := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        raise RunError(f"{weights.label}: {wrong[0]} is missing or does not fit this model.")
    for name, value in merged.items():
        base = present[name]
        if strength == 1.0 or torch.equal(value.to(base), base):
            merged[name] = value.to(base) if strength == 1.0 else base
        else:
            merged[name] = torch.lerp(base.float(), value.to(base.device).float(), strength).to(base.dtype)
    model.load_state_dict(merged, assign=True)


def put_adapter(model: nn.Module, config: dict, targets: list[str] | str, weights: Weights, strength: float) -> None:
    """Load an unmerged checkpoint, including ResLoRA's shortcuts, into a denoiser or a text encoder.

    `config`: the run's options. `targets`: PEFT's `target_modules`. `strength` multiplies each layer's scale.
    """
    if METHODS[weights.method].shortcuts:
        reslora.load(model, weights.path)
    else:
        settings = AdapterSettings(config["rank"], config["lora_alpha"], 0.0, targets, total_steps=0)
        adapter, record = adapter_config(weights.method, settings, model), read_object(weights.path / RECORD)
        for name in ("rank_pattern", "alpha_pattern"):  # of a run that was initialized from a LoRA
            if name in record:
                setattr(adapter, name, record[name])
        attach(model, adapter, in_place=True)
        load_adapter(model, weights.path)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= strength


def put_file(models: Mapping[str, nn.Module], family: Family, file: Weights, strength: float) -> None:
    """Add `strength * s B A` of a LoRA file, in any supported format, to the denoiser and text encoders in `models`.

    Raises `RunError` for a LoRA that does not fit.
    """
    names = names_of(family, models[family.denoiser].config)
    with refusals(file):
        parts = read_parts(read_content(file.path, file.label), names)
        for part, layers in parts.items():
            if part not in models:
                raise RunError(f"{file.label} also has weights for the {part}, which cannot have a LoRA on this page.")
            check_fit(file.label, part, models[part], layers)
    for part, layers in parts.items():
        add_lora(models[part], layers, strength)


def uploaded(path: Path) -> Weights:
    """Return the weights of an uploaded LoRA file. Raises `RunError` for a damaged file, and for a pickle."""
    file = Weights(path.name[:80], "file", "", path)
    with refusals(file):
        read_content(path, file.label)
    return file


@contextlib.contextmanager
def refusals(file: Weights) -> Iterator[None]:
    """Convert the errors of the trainer's readers to `RunError`."""
    try:
        yield
    except (InvalidArgument, RunFailed, OSError) as error:
        raise RunError(f"{without_folders(error, file.path)}.") from None


def files_of(weights: Weights) -> tuple:
    """Return the paths of the files and folders that weights are read from, then the result of `stamp_of` for each."""
    files = (weights.path, *(path for _, path in weights.encoders))
    return *files, *map(stamp_of, files)


def without_folders(error: Exception, *paths: Path | None) -> str:
    """Return the first line of an error message, without the parent folders of `paths`."""
    line = first_line(error)
    for folder in (path.parent for path in paths if path is not None):
        line = line.replace(f"{folder}/", "").replace(str(folder), folder.name)
    return line
