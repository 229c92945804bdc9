"""Plain LoRA in the formats that people's tools read, and merged weights.

| function | writes | read by |
|---|---|---|
| `export_peft` | `adapter_config.json`, `adapter_model.safetensors` | `PeftModel.from_pretrained(unet, dir)` |
| `export_diffusers` | `pytorch_lora_weights.safetensors` | `pipeline.load_lora_weights(dir)` |
| `export_kohya` | one file with `lora_unet_...` keys | kohya, ComfyUI, A1111/Forge, diffusers |
| `export_comfyui` | one file with `diffusion_model...` keys | ComfyUI, diffusers |
| `export_merged` | a diffusers model folder | `UNet2DConditionModel.from_pretrained(dir)` |

A connected model has no plain weights yet: merge it first.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from .chains import base_model, lora_layers, unwrap
from .checkpoint import PEFT_PREFIX
from .files import replacing, write_tensors
from .wiring import connection_of

DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE = (
    "pytorch_lora_weights.safetensors",
    "kohya.safetensors",
    "comfyui.safetensors",
)
"""The names of LoRA files: diffusers reads only its own; the others are as a run calls them."""
PEFT_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def export_peft(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Writes any PEFT adapter of `model` (LoRA, AdaLoRA, LoHa, LoKr) as PEFT itself does, and returns the folder.

    Works for wrapped models and for those with `add_adapter`, whose files load with `PeftModel.from_pretrained` then.
    Raises `ValueError` if the adapter is connected or not there.
    """
    base, outer = _plain(model, adapter_name), unwrap(model)
    source = outer if isinstance(outer, PeftModel) else base
    state = get_peft_model_state_dict(source, adapter_name=adapter_name, save_embedding_layers=False)
    state = {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}
    config = copy.deepcopy(base.peft_config[adapter_name])
    config.inference_mode = True
    for field, value in vars(config).items():
        if isinstance(value, set):  # whose order differs from process to process
            setattr(config, field, sorted(value))
    with replacing(directory) as temporary:
        config.save_pretrained(str(temporary))
        write_tensors(temporary / PEFT_FILE, state, {"format": "pt"})
    return Path(directory)


def export_diffusers(
    denoiser: nn.Module | Mapping[str, nn.Module],
    directory: str | os.PathLike,
    adapter_name: str = "default",
    prefix: str = "unet",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes `pytorch_lora_weights.safetensors` into `directory` and returns its path.

    `prefix` is the denoiser's name in the pipeline; where text encoders were trained, too, give all models by these
    names instead. `metadata`: further strings for the file's header, which also gets kohya's hash of the tensors. The
    scaling is folded into B and the header says alpha = rank for each layer, so that readers which ignore it agree with
    those that do not. Raises `ValueError` if the adapter is connected or not plain LoRA.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, object] = {}
    for name, model in (denoiser if isinstance(denoiser, Mapping) else {prefix: denoiser}).items():
        base = _plain(model, adapter_name)
        tensors |= _folded(base, adapter_name, name)
        packed |= {f"{name}.{key}": value for key, value in _ranks(base, adapter_name).items()}
    path = Path(directory) / DIFFUSERS_FILE
    write_tensors(
        path,
        tensors,
        {
            "format": "pt",
            "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True),
            "sshs_model_hash": _tensors_hash(tensors),
            **(metadata or {}),
        },
    )
    return path


def _ranks(base: nn.Module, adapter_name: str) -> dict:
    """The ranks of all layers, with alphas that are the same, as PEFT's configuration says them."""
    layers = lora_layers(base, adapter_name)
    ranks = {_in_files(base, name): layer.r[adapter_name] for name, layer in layers.items()}
    common = _commonest(ranks.values())
    patterns = {
        "^" + re.escape(name).replace(r"text_model\.", r"(text_model\.)?"): rank  # not all transformers have it
        for name, rank in ranks.items()
        if rank != common
    }
    same = {"r": common, "lora_alpha": common, "rank_pattern": patterns, "alpha_pattern": patterns}
    return same | {"target_modules": sorted(name.removeprefix("text_model.") for name in ranks)}


def export_kohya(
    denoiser: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike,
    adapter_name: str = "default",
    metadata: dict[str, str] | None = None,
    rename: Callable[[str], str] = str,
) -> Path:
    """Writes one file with kohya's keys (`lora_unet_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`).

    All layers get one alpha a, with up-weights rescaled by s r_n / a, because diffusers applies the commonest alpha to
    every layer. `rename`: from a layer's name in diffusers to its name where kohya's scripts have another. `metadata`:
    further strings for the file's header (`ss_...`), which also gets kohya's hash of the tensors. Where text encoders
    were trained, too, give all models by the prefixes of their layers (`lora_unet`, `lora_te`). Returns the path.
    """
    layers = {}
    for prefix, model in (denoiser if isinstance(denoiser, Mapping) else {"lora_unet": denoiser}).items():
        base = _plain(model, adapter_name)
        for name, layer in lora_layers(base, adapter_name).items():
            layers[prefix + "_" + rename(_in_files(base, name)).replace(".", "_")] = layer
    scaled = {key: layer.scaling[adapter_name] * layer.r[adapter_name] for key, layer in layers.items()}
    # float32 whatever the adapter's dtype, and exactly what the up-weights are divided by.
    written = torch.tensor(_commonest(scaled.values()) or 1.0, dtype=torch.float32)
    alpha = written.item()
    tensors = {}
    for key, layer in layers.items():
        down, up = _factors(key, layer, adapter_name)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up * (scaled[key] / alpha)
        tensors[f"{key}.alpha"] = written.clone()
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(_commonest(layer.r[adapter_name] for layer in layers.values())),
        "ss_network_alpha": str(alpha),
        "sshs_model_hash": _tensors_hash(tensors),
        **{key: str(value) for key, value in (metadata or {}).items()},
    }
    write_tensors(path, tensors, header)
    return Path(path)


def export_comfyui(
    denoiser: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes one file with ComfyUI's keys (`diffusion_model.<layer>.lora_A.weight`, `.lora_B.weight`).

    The scaling is folded into B, so no alpha is needed. `metadata`: strings for the file's header. Returns the path.
    """
    tensors = _folded(_plain(denoiser, adapter_name), adapter_name, "diffusion_model")
    write_tensors(path, tensors, {"format": "pt", "sshs_model_hash": _tensors_hash(tensors), **(metadata or {})})
    return Path(path)


def _folded(base: nn.Module, adapter_name: str, prefix: str) -> dict[str, torch.Tensor]:
    """A and s B of every layer, by names below `prefix`."""
    tensors = {}
    for name, layer in lora_layers(base, adapter_name).items():
        down, up = _factors(name, layer, adapter_name)
        tensors[f"{prefix}.{_in_files(base, name)}.lora_A.weight"] = down
        tensors[f"{prefix}.{_in_files(base, name)}.lora_B.weight"] = up * layer.scaling[adapter_name]
    return tensors


def _in_files(base: nn.Module, name: str) -> str:
    """A layer's name in files: newer transformers have CLIP's text model flat, its readers know it as it was."""
    flat = type(base).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
    return f"text_model.{name}" if flat else name


def _tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all of a safetensors file but its header, by which model managers know a LoRA again."""
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def export_merged(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Writes the base model with the adapter's weights added, summed in float32 and cast, as `save_pretrained` does.

    For diffusers' and transformers' models, with any PEFT adapter whose layers know their weight update. `model` itself
    stays. Returns the folder.
    """
    base = _plain(model, adapter_name)
    state = merged_state_dict(base, adapter_name)
    if hasattr(type(base), "from_config"):
        with torch.device("meta"):
            plain = type(base).from_config(base.config)
        plain.load_state_dict(state, assign=True)
        save = plain.save_pretrained
    else:
        save = functools.partial(base.save_pretrained, state_dict=state)
    with replacing(directory) as temporary:
        try:
            save(str(temporary))
        except SafetensorError as error:  # a full disk, say, which is an OSError to whoever writes files
            raise OSError(f"{directory}: {error}") from error
    return Path(directory)


@torch.no_grad()
def merged_state_dict(base: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The state dict of the bare base model with the adapter's update added to the layers that have it."""
    tuned = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    owners = {f"{name}.": module for name, module in tuned.items()}
    state = {}
    for key, value in base.state_dict().items():
        owner = next((prefix for prefix in owners if key.startswith(prefix)), None)
        if owner is None:
            state[key] = value
            continue
        rest = key.removeprefix(owner)
        if not rest.startswith("base_layer."):
            continue
        parameter = rest.removeprefix("base_layer.")
        layer = owners[owner]
        if parameter == "weight" and adapter_name in _adapters(layer):
            value = _summed(layer, value, adapter_name)
        state[owner + parameter] = value
    return state


def _summed(layer: BaseTunerLayer, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    plain = isinstance(layer, LoraLayer) and not hasattr(layer, "lora_E") and not layer.lora_variant
    if plain and adapter_name in layer.lora_A and weight.dim() == 2:
        down, up = layer.lora_A[adapter_name].weight.to(wide), layer.lora_B[adapter_name].weight.to(wide)
        delta = (up @ down) * layer.scaling[adapter_name]
        delta = delta.t() if getattr(layer, "fan_in_fan_out", False) else delta
    else:
        delta = layer.get_delta_weight(adapter_name).to(wide)
    return (weight.to(wide) + delta).to(weight.dtype)


def _adapters(layer: BaseTunerLayer) -> set[str]:
    return {adapter for names in layer.adapter_layer_names for adapter in getattr(layer, names, None) or ()}


def _plain(model: nn.Module, adapter_name: str) -> nn.Module:
    base = base_model(model)
    if connection_of(base) is not None:
        raise ValueError("this model is connected, so it has no plain LoRA weights yet: call reslora.merge first")
    known = getattr(base, "peft_config", {})
    if adapter_name not in known:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not on this model; it has {', '.join(map(repr, known)) or 'none'}"
        )
    return base


def _factors(name: str, layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if adapter_name not in layer.lora_A or layer.lora_variant.get(adapter_name) is not None:
        raise ValueError(f"{name} is not plain LoRA on a linear or convolution layer; export it with export_peft")
    return layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()


def _commonest(values: Iterable[float]) -> float:
    found = list(values)
    return max(dict.fromkeys(found), key=found.count)
