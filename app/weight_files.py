"""Weights from files into a denoiser: checked whole first, so that nothing is drawn with what does not fit.

A refusal names the file and the tensor. Nothing is ever unpickled.
"""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import reslora
from reslora.checkpoint import PEFT_PREFIX
from reslora.common.adapters import attach, load_adapter
from reslora.common.errors import first_line
from reslora.common.methods import METHODS, AdapterSettings, adapter_config
from reslora.diffusion.training.checkpoints import RECORD
from reslora.export import PEFT_CONFIG_FILE, PEFT_FILE
from reslora.files import read_object
from reslora.ranks import changes_base

from .runs import RunError, Weights

LARGEST_ADAPTER = 2**30
LARGEST_HEADER = 32 * 2**20
PAIRS = (
    (".lora_A.", ".lora_B."),
    (".lora_down.", ".lora_up."),
    (".lora.down.", ".lora.up."),
    ("_lora.down.", "_lora.up."),
)
"""How the two factors of a LoRA are told apart: PEFT and diffusers, kohya, and two of diffusers' older forms."""
PEFT_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
PEFT_FIELDS += ("layers_to_transform", "layers_pattern")
"""What of PEFT's configuration says which layers have a plain LoRA, and how it is scaled."""


def put_merged(model: nn.Module, weights: Weights, strength: float) -> None:
    """Whole merged weights of a denoiser or a text encoder.

    Another strength lies on the line from the base through them, as with a LoRA's scale.
    """
    present, merged = model.state_dict(), {}
    for file in sorted(weights.path.glob("*.safetensors")):
        merged.update(in_names_of(model, load_file(file)))
    refuse_others(weights.label, merged, {name: tensor.shape for name, tensor in present.items()})
    for name, value in merged.items():
        base = present[name]
        if strength == 1.0 or torch.equal(value.to(base), base):
            merged[name] = value.to(base) if strength == 1.0 else base
        else:
            merged[name] = torch.lerp(base.float(), value.to(base.device).float(), strength).to(base.dtype)
    model.load_state_dict(merged, assign=True)


def put_file(pipeline: DiffusionPipeline, parts: Mapping[str, nn.Module], weights: Weights, strength: float) -> None:
    """A LoRA file in a form that diffusers reads; what is for `parts` is used: the denoiser, then text encoders."""
    path, label, (part, *encoders) = weights.path, weights.label, parts
    denoiser = parts[part]
    check_adapter_file(path, label)
    in_file = load_file(path)
    refuse_halves(label, in_file)
    refuse_not_finite(label, in_file)
    if weights.config:
        state, alphas, metadata = peft_state(label, in_file, part), [], peft_metadata(label, weights.config, part)
    else:
        # Without use_safetensors=True diffusers falls back to unpickling where it cannot read a file.
        state, *alphas, metadata = pipeline.lora_state_dict(
            path.parent, weight_name=path.name, use_safetensors=True, unet_config=denoiser.config, return_alphas=True,
            return_lora_metadata=True,
        )  # fmt: skip
    of = {part: {name: value for name, value in state.items() if name.startswith(f"{part}.")} for part in parts}
    if not of[part]:
        raise RunError(f"{label}: there are no LoRA weights for this model's denoiser in it.")
    # The names that diffusers is about to use, whichever the file has.
    given = refuse_misfits(label, convert_unet_state_dict_to_peft(of[part]), denoiser, in_file)
    refuse_absent(label, part, metadata or {}, denoiser, given)
    options = {"adapter_name": "default", "metadata": metadata, "network_alphas": alphas[0] if alphas else None}
    for name in (name for name in encoders if of[name]):
        named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(of[name]))
        given = refuse_misfits(label, in_names_of(parts[name], named), parts[name], in_file)
        refuse_absent(label, name, metadata or {}, parts[name], given)
        pipeline.load_lora_into_text_encoder(
            of[name], text_encoder=parts[name], prefix=name, lora_scale=strength, **options
        )
    state, load = of[part], getattr(pipeline, f"load_lora_into_{part}")
    taken = inspect.signature(load).parameters  # those of transformers know no alphas
    load(state, **{part: denoiser}, **{name: value for name, value in options.items() if name in taken})
    if strength != 1.0:
        denoiser.set_adapters("default", strength)


def in_names_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the model: newer transformers have no `text_model` in CLIP, but its files do."""
    flat = isinstance(model, PreTrainedModel) and not hasattr(model, "text_model")
    return {name.replace("text_model.", "", 1) if flat else name: value for name, value in tensors.items()}


def put_adapter(model: nn.Module, config: dict, targets: list[str] | str, weights: Weights, strength: float) -> None:
    """An unmerged checkpoint of a denoiser or a text encoder: with its shortcuts, as it was trained."""
    if METHODS[weights.method].shortcuts:
        reslora.load(model, weights.path)
    else:
        settings = AdapterSettings(config["rank"], config["lora_alpha"], 0.0, targets, total_steps=0)
        adapter, record = adapter_config(weights.method, settings), read_object(weights.path / RECORD)
        for name in ("rank_pattern", "alpha_pattern"):  # of a run that went on from a LoRA
            if name in record:
                setattr(adapter, name, record[name])
        attach(model, adapter, in_place=True)
        load_adapter(model, weights.path)
    refuse_not_finite(weights.label, {name: p for name, p in model.named_parameters() if ".lora_" in name})
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= strength


# -- what is refused ---------------------------------------------------------------------------------------------------


def check_adapter_file(path: Path, label: str) -> Iterable[str]:
    """Refuses what isn't a LoRA in safetensors form, by its content; returns the tensors' names."""
    if path.stat().st_size > LARGEST_ADAPTER:
        raise RunError(f"{label}: larger than {LARGEST_ADAPTER // 2**20} MB.")
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        content = file.read(length) if 2 <= length <= LARGEST_HEADER else b""
    if path.suffix.lower() == ".safetensors" and content.startswith(b"{") and len(content) < length:
        raise RunError(f"{label}: cut short or damaged.")
    try:
        entries = {name: entry for name, entry in json.loads(content).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        complete = end == path.stat().st_size - 8 - length
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        raise RunError(f"{label}: not a safetensors file; .bin, .ckpt and .pt files can run code.") from None
    if not complete:
        raise RunError(f"{label}: cut short or damaged.")
    if not any("lora" in name.lower() for name in entries):
        raise RunError(f"{label}: there are no LoRA weights in it.")
    return entries


def uploaded(*paths: str | Path) -> Weights:
    """An uploaded LoRA file as something to generate with; `RunError` if it isn't one.

    One that PEFT wrote needs its adapter_config.json: among `paths`, or beside it. A folder of PEFT's will do, too.
    """
    given = [path / PEFT_FILE if path.is_dir() else path for path in map(Path, paths)]
    configs = [path for path in given if path.suffix.lower() == ".json"]
    files = [path for path in given if path not in configs]
    if len(files) != 1 or len(configs) > 1:
        raise RunError(f"Give one .safetensors file, and only with one of PEFT's its {PEFT_CONFIG_FILE}.")
    path, label = files[0], files[0].name[:80]
    if path.suffix.lower() != ".safetensors":
        raise RunError(f"{label}: only .safetensors files are taken; .bin, .ckpt and .pt files can run code.")
    if not path.is_file():
        raise RunError(f"{label}: there is no such file.")
    if not all(name.startswith(PEFT_PREFIX) for name in check_adapter_file(path, label)):
        return Weights(label, "file", "", path)
    config = configs[0] if configs else path.with_name(PEFT_CONFIG_FILE)
    if not config.is_file():
        raise RunError(f"{label} was written by PEFT, whose {PEFT_CONFIG_FILE} says its alpha: give that file with it.")
    return Weights(label, "file", "", path, config=config)


# -- files of PEFT -----------------------------------------------------------------------------------------------------


def peft_state(label: str, tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """PEFT's tensors by diffusers' names; refuses what is no factor of a LoRA, which diffusers would leave out."""
    for name in tensors:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise RunError(f"{label}: {name} is no factor of a plain LoRA, which alone is read of PEFT's files.")
    return {name.replace(PEFT_PREFIX, f"{part}.", 1): tensor for name, tensor in tensors.items()}


def peft_metadata(label: str, path: Path, part: str) -> dict:
    """What PEFT's adapter_config.json says, as diffusers writes it into its own files; refuses all but plain LoRA."""
    content = read_object(path)
    if content.get("peft_type") != "LORA":
        raise RunError(
            f"{label}: its {PEFT_CONFIG_FILE} says {content.get('peft_type')!r}; only PEFT's plain LoRA is read."
        )
    for name in ("use_dora", "lora_bias", "modules_to_save", "bias"):
        if content.get(name) not in (None, False, "none", []):
            raise RunError(f"{label}: its {PEFT_CONFIG_FILE} says {name} = {content[name]}; only plain LoRA is read.")
    own = {name: content[name] for name in PEFT_FIELDS if content.get(name) is not None}
    try:
        config = LoraConfig(**own, init_lora_weights=content.get("init_lora_weights", True))
        scales = [config.r, config.lora_alpha, *config.rank_pattern.values(), *config.alpha_pattern.values()]
        whole = {"r", "lora_alpha", "target_modules"} <= own.keys() and all(float(value) > 0 for value in scales)
    except Exception:  # PEFT checks little of a configuration
        whole = False
    if not whole:
        raise RunError(f"{label}: its {PEFT_CONFIG_FILE} is damaged.")
    if changes_base(config):
        raise RunError(f"{label}: init_lora_weights = {config.init_lora_weights!r} has changed the base model, too.")
    return {f"{part}.{name}": value for name, value in own.items()}


def refuse_halves(label: str, names: Iterable[str]) -> None:
    """Refuses a LoRA that has one factor of a layer and lacks the other."""
    for name in names:
        for pair in PAIRS:
            for this, other in (pair, pair[::-1]):
                if this in name and (partner := name.replace(this, other)) not in names:
                    raise RunError(f"{label}: {partner} is missing.")


def refuse_not_finite(label: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise RunError(f"{label}: {name} has values that are not finite.")


def refuse_others(label: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Refuses all but exactly the tensors wanted, in their shapes, with finite values."""
    for name in sorted(wanted.keys() - tensors.keys()):
        raise RunError(f"{label}: {name} is missing.")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise RunError(f"{label}: {name} is of no layer of this model.")
        if tensor.shape != wanted[name]:
            raise RunError(f"{label}: {name} is {shape(tensor)}, and {shape(wanted[name])} in this model.")
    refuse_not_finite(label, tensors)


def refuse_misfits(label: str, state: Mapping[str, Tensor], denoiser: nn.Module, in_file: Iterable[str]) -> set[str]:
    """Refuses LoRA weights of layers that the denoiser lacks, or of other shapes; returns the layers they are for.

    `state` is what diffusers made of the file, whose own names are `in_file`: messages use those.
    """
    part = next(iter(state)).partition(".")[0]
    modules = dict(denoiser.named_modules())
    written = {flat(name.replace(PEFT_PREFIX, f"{part}.", 1)): name for name in in_file}
    ranks: dict[str, int] = {}
    for name, tensor in state.items():
        module, factor = name.partition(".lora_")[0].partition(".")[2], 0 if ".lora_A." in name else 1
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        known, weight = written.get(flat(name), name), getattr(modules.get(module), "weight", None)
        if weight is None:
            raise RunError(f"{label}: {known} is of no layer of this model.")
        # A is (rank, in), B is (out, rank); convolutions have their window after that.
        wanted = weight.shape[1 - factor]
        if tensor.ndim < 2 or tensor.shape[1 - factor] != wanted:
            raise RunError(f"{label}: {known} is {shape(tensor)}, but this model's layer has {wanted} features.")
        if ranks.setdefault(module, tensor.shape[factor]) != tensor.shape[factor]:
            raise RunError(f"{label}: {known} is {shape(tensor)}, of another rank than its other factor.")
    return set(ranks)


def refuse_absent(label: str, part: str, metadata: dict, denoiser: nn.Module, given: set[str]) -> None:
    """Refuses a file that lacks a layer which its own metadata says was adapted."""
    own = {name.removeprefix(f"{part}."): value for name, value in metadata.items() if name.startswith(f"{part}.")}
    if not own:
        return
    config = LoraConfig(**own)
    for name, module in denoiser.named_modules():
        adapted = isinstance(module, (nn.Linear, nn.Conv2d)) and check_target_module_exists(config, name)
        if adapted and name not in given:
            raise RunError(f"{label}: {part}.{name}.lora_A.weight is missing.")


def flat(name: str) -> str:
    """A tensor's name in which diffusers' and kohya's forms agree."""
    for factor, marks in enumerate(zip(*PAIRS, strict=True)):
        for mark in marks:
            if mark in name:
                layer = name.partition(mark)[0].removeprefix("lora_").replace(".", "_")
                return f"{layer} {factor}"
    return name


def shape(of: Tensor | torch.Size) -> str:
    return " x ".join(map(str, of.shape if isinstance(of, Tensor) else of))


def without_folders(error: Exception, *paths: Path | None) -> str:
    """An error's first line with the names of files, not where they are on this machine."""
    line = first_line(error)
    for folder in (path.parent for path in paths if path is not None):
        line = line.replace(f"{folder}/", "").replace(str(folder), folder.name)
    return line
