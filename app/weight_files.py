"""Load weights from files into a denoiser or a text encoder.

Names and shapes of all tensors are validated, so that no image is generated with weights that do not fit the model.
Error messages name the file and the tensor. No file is unpickled.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import reslora
from reslora.errors import InvalidArgument, RunFailed, first_line
from reslora.export import Factors
from reslora.images.model.families.base import Family
from reslora.images.model.lora_files.adding import add_lora, in_names_of
from reslora.images.model.lora_files.names import Parts, names_of
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
    refuse_others(weights.label, merged, present)
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
    """Add `strength * s B A` of a LoRA file to the layers of the denoiser and text encoders in `models`.

    Raises `RunError` for a LoRA that does not fit.
    """
    for name, layers in factors_of(file, family, models).items():
        add_lora(models[name], layers, strength)


def factors_of(file: Weights, family: Family, models: Mapping[str, nn.Module]) -> Parts:
    """Return the low-rank factors of a LoRA file in any supported format, by model and layer.

    Raises `RunError` if the file is invalid or does not fit the models."""
    names = names_of(family, models[family.denoiser].config)
    try:
        check_adapter_file(file.path, file.label)
        content = read_content(file.path, file.label)
        parts = read_parts(content, names)
    except (InvalidArgument, RunFailed, OSError) as error:
        raise RunError(f"{without_folders(error, file.path)}.") from None
    for part, layers in parts.items():
        if part not in models:
            raise RunError(f"{file.label} also has weights for the {part}, which cannot have a LoRA on this page.")
        refuse_misfits(f"{file.label}: {part}", models[part], in_names_of(models[part], layers))
    return parts


# -- validation --------------------------------------------------------------------------------------------------------


def check_adapter_file(path: Path, label: str) -> None:
    """Raise `RunError` for a file that is too large, not in safetensors format, or without LoRA weights."""
    if path.stat().st_size > LARGEST_ADAPTER:
        raise RunError(f"{label}: the file is larger than {LARGEST_ADAPTER // 2**20} MB.")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
    except SafetensorError:
        raise RunError(
            f"{label}: the file is incomplete, damaged, or not a safetensors file; choose another file."
        ) from None
    if not any("lora" in name.lower() for name in names):
        raise RunError(f"{label}: the file contains no LoRA weights.")


def uploaded(path: Path) -> Weights:
    """Return the weights of an uploaded LoRA file. Raises `RunError` for other files."""
    label = path.name[:80]
    if path.suffix.lower() != ".safetensors":
        raise RunError(f"{label}: give a .safetensors file; .bin, .ckpt and .pt files can run code.")
    check_adapter_file(path, label)
    return Weights(label, "file", "", path)


def files_of(weights: Weights) -> tuple:
    """Return the paths of the files and folders that weights are read from, then the result of `stamp_of` for each."""
    files = (weights.path, *(path for _, path in weights.encoders))
    return *files, *map(stamp_of, files)


def refuse_others(label: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise `RunError` unless the tensors have exactly the names and shapes of `wanted`."""
    for name in sorted(wanted.keys() - tensors.keys()):
        raise RunError(f"{label}: {name} is missing.")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise RunError(f"{label}: {name} is not a tensor of this model.")
        if tensor.shape != wanted[name].shape:
            raise RunError(
                f"{label}: {name} has shape {shape(tensor.shape)}, but {shape(wanted[name].shape)} in this model."
            )


def refuse_misfits(label: str, model: nn.Module, layers: Mapping[str, Factors]) -> None:
    """Raise `RunError` for a LoRA of a layer that the model does not have, or of another shape.

    `label`: file and model (denoiser or text encoder), for the message.
    """
    modules = dict(model.named_modules())
    for name, (down, up, _) in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise RunError(f"{label}.{name} is not a layer of this model.")
        if (found := torch.Size([len(up), *down.shape[1:]])) != weight.shape:
            raise RunError(f"{label}.{name} has shape {shape(found)}, but {shape(weight.shape)} in this model.")


def shape(size: torch.Size) -> str:
    """Return a tensor's shape as text, such as `320 x 4`."""
    return " x ".join(map(str, size))


def without_folders(error: Exception, *paths: Path | None) -> str:
    """Return the first line of an error message, without the parent folders of `paths`."""
    line = first_line(error)
    for folder in (path.parent for path in paths if path is not None):
        line = line.replace(f"{folder}/", "").replace(str(folder), folder.name)
    return line
