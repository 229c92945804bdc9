"""Export plain LoRA in the formats of common tools, and merged weights.

| function | writes | read by |
|---|---|---|
| `export_peft` | `adapter_config.json`, `adapter_model.safetensors` | `PeftModel.from_pretrained(unet, dir)` |
| `export_diffusers` | `pytorch_lora_weights.safetensors` | `pipeline.load_lora_weights(dir)` |
| `export_kohya` | one file with `lora_unet_...` keys | kohya, ComfyUI, A1111/Forge, diffusers |
| `export_comfyui` | one file with `diffusion_model...` keys | ComfyUI, diffusers |
| `export_merged` | a diffusers model folder | `UNet2DConditionModel.from_pretrained(dir)` |

A model connected by `reslora.connect` is not plain LoRA: call `reslora.merge` first.
"""

import copy
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn

from .checkpoint import PEFT_PREFIX, jsonable, peft_state
from .guards import refuse_merged
from .io import replacing, replacing_both, serialized, write_tensors
from .linking import base_model, lora_layers
from .ranks import changes_base, commonest, declare_scaling, whole
from .wiring import connection_of

DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, LYCORIS_FILE = (
    "pytorch_lora_weights.safetensors",
    "kohya.safetensors",
    "comfyui.safetensors",
    "lycoris.safetensors",
)
"""File names of exported LoRA. diffusers looks for the first file name; the other names are this project's."""
PEFT_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
OF_A_MODEL = re.compile(
    r"(generation_)?config\.json|(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
"""Matches the names of files that `save_pretrained` of diffusers and transformers writes."""


class Factors(NamedTuple):
    """LoRA factors of one layer: its weight update is `scale * up @ down`."""

    down: torch.Tensor
    """A: rank x inputs; for a convolution, rank x inputs x kernel height x kernel width."""
    up: torch.Tensor
    """B: outputs x rank; for a convolution, outputs x rank x 1 x 1."""
    scale: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.down.shape[0]


def export_peft(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write any PEFT adapter of `model` (LoRA, AdaLoRA, LoHa, OFT ...) in PEFT's format, and return the directory.

    Works for a `PeftModel` and for adapters added by `add_adapter`; the files load with `PeftModel.from_pretrained`. If
    `set_adapters` or `set_scale` changed the scale of layers, the exported alphas include this scale. Other files in
    the directory are not changed.

    Raises `ValueError` if the adapter is connected or missing, or if PEFT's configuration cannot express its scales.
    """
    base = _plain(model, adapter_name)
    state = peft_state(model, adapter_name)
    config = copy.deepcopy(base.peft_config[adapter_name])
    config.inference_mode = True
    declare_scaling(config, base, adapter_name)
    _write_both(Path(directory), config, state)
    return Path(directory)


def export_diffusers(
    denoiser: nn.Module | Mapping[str, nn.Module],
    directory: str | os.PathLike,
    adapter_name: str = "default",
    prefix: str = "unet",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write `pytorch_lora_weights.safetensors` into `directory` and return its path.

    `prefix` is the denoiser's name in the pipeline. If text encoders were trained too, pass a dict from the names in
    the pipeline to the models as `denoiser`; `prefix` is then unused. `metadata` holds strings to add to the file's
    header, which also contains kohya's hash of the tensors. B is multiplied by the scaling, and the header sets
    alpha = rank for each layer, so programs that use alpha and programs that ignore it compute the same weights.

    Raises `ValueError` if the adapter is connected or not plain LoRA.
    """
    path = Path(directory) / DIFFUSERS_FILE
    named = denoiser if isinstance(denoiser, Mapping) else {prefix: denoiser}
    write_diffusers(path, {name: _factors_of(model, adapter_name) for name, model in named.items()}, metadata)
    return path


def export_kohya(
    denoiser: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike,
    adapter_name: str = "default",
    metadata: dict[str, str] | None = None,
    rename: Callable[[str], str] = str,
) -> Path:
    """Write one file with kohya's keys (`lora_unet_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`).

    All layers get the same alpha a, because diffusers applies the most frequent alpha to every layer. The B of
    layer n, with the scale s_n and the rank r_n, is multiplied by s_n r_n / a. `rename` maps a layer's diffusers name
    to kohya's name. `metadata` holds strings to add to the file's header (`ss_...`), which also contains kohya's hash
    of the tensors. If text encoders were trained too, pass a dict from key prefixes (`lora_unet`, `lora_te`) to the
    models as `denoiser`. Returns the path.

    Raises `ValueError` if the adapter is connected or not plain LoRA.
    """
    named = denoiser if isinstance(denoiser, Mapping) else {"lora_unet": denoiser}
    layers = {
        f"{prefix}_{rename(name).replace('.', '_')}": factors
        for prefix, model in named.items()
        for name, factors in _factors_of(model, adapter_name).items()
    }
    write_kohya(path, layers, metadata)
    return Path(path)


def export_comfyui(
    denoiser: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    metadata: dict[str, str] | None = None,
    rename: Callable[[str], str] = str,
) -> Path:
    """Write one file with ComfyUI's keys (`diffusion_model.<layer>.lora_A.weight`, `.lora_B.weight`).

    B is multiplied by the scaling, so the file needs no alpha. `rename` maps a layer's diffusers name to ComfyUI's
    name. `metadata` holds strings to add to the file's header. Returns the path.

    Raises `ValueError` if the adapter is connected or not plain LoRA.
    """
    layers = _factors_of(denoiser, adapter_name)
    write_folded(path, {f"diffusion_model.{rename(name)}": factors for name, factors in layers.items()}, metadata)
    return Path(path)


# -- factors to files --------------------------------------------------------------------------------------------------


def write_diffusers(
    path: str | os.PathLike, parts: Mapping[str, Mapping[str, Factors]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write diffusers' LoRA file for one or several models of a pipeline.

    `parts`: model name in the pipeline -> layer name -> factors. The rank patterns in the header match a text encoder's
    layers with and without the prefix `text_model.`, which only some versions of transformers use.
    """
    layers: dict[str, Factors] = {}
    packed: dict[str, Any] = {}
    for prefix, named in parts.items():
        layers |= {f"{prefix}.{name}": factors for name, factors in named.items()}
        common = commonest(factors.rank for factors in named.values())
        pattern = {
            "^" + re.escape(name).replace(r"text_model\.", r"(text_model\.)?"): factors.rank
            for name, factors in named.items()
            if factors.rank != common
        }
        packed |= {
            f"{prefix}.r": common,
            f"{prefix}.lora_alpha": common,
            f"{prefix}.rank_pattern": pattern,
            f"{prefix}.alpha_pattern": pattern,
            f"{prefix}.target_modules": sorted(name.removeprefix("text_model.") for name in named),
        }
    write_folded(
        path, layers, {"lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True), **(metadata or {})}
    )


def write_folded(
    path: str | os.PathLike,
    layers: Mapping[str, Factors],
    metadata: Mapping[str, str] | None = None,
    words: tuple[str, str] = ("lora_A", "lora_B"),
) -> None:
    """Write A and `scale * B` of every layer as `<name>.lora_A.weight` and `<name>.lora_B.weight`.

    `words`: strings to use in these keys in place of `lora_A` and `lora_B`.
    """
    tensors, (down, up) = {}, words
    for name, factors in layers.items():
        tensors[f"{name}.{down}.weight"] = factors.down
        tensors[f"{name}.{up}.weight"] = factors.up * factors.scale
    write_tensors(path, tensors, {"format": "pt", "sshs_model_hash": tensors_hash(tensors), **(metadata or {})})


def write_kohya(
    path: str | os.PathLike, layers: Mapping[str, Factors], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file in kohya's format; the keys of `layers` are kohya's names (`lora_unet_...`). See `export_kohya`."""
    scaled = {name: factors.scale * factors.rank for name, factors in layers.items()}
    # alpha is float32 whatever the adapter's dtype, and every B is divided by exactly the stored number. The
    # sign goes into B: some programs do not support a negative alpha.
    written = torch.tensor(abs(commonest(scaled.values())) or 1.0, dtype=torch.float32)
    alpha = written.item()
    tensors = {}
    for name, factors in layers.items():
        tensors[f"{name}.lora_down.weight"] = factors.down
        tensors[f"{name}.lora_up.weight"] = factors.up * (scaled[name] / alpha)
        tensors[f"{name}.alpha"] = written.clone()
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(commonest(factors.rank for factors in layers.values())),
        "ss_network_alpha": str(alpha),
        "sshs_model_hash": tensors_hash(tensors),
        **{key: str(value) for key, value in (metadata or {}).items()},
    }
    write_tensors(path, tensors, header)


def write_peft(directory: str | os.PathLike, layers: Mapping[str, Factors]) -> None:
    """Write `layers` as a PEFT adapter directory; A and B are stored unscaled, and alpha sets each layer's scale."""
    config = lora_config(layers)
    config.inference_mode = True
    config.target_modules = sorted(layers) if all("." in name for name in layers) else config.target_modules
    tensors = {}
    for name, factors in layers.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = factors.down
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = factors.up
    _write_both(Path(directory), config, tensors)


def _write_both(directory: Path, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write PEFT's configuration and weights file; other files in the directory are not changed.

    If a write fails, both old files stay. If the process is killed, weights may remain without a configuration; no
    program loads such a directory.
    """
    with replacing_both(directory / PEFT_CONFIG_FILE, directory / PEFT_FILE) as (described, weights):
        described.write_text(json.dumps(jsonable(config), indent=2, sort_keys=True), encoding="utf-8")
        write_tensors(weights, tensors, {"format": "pt"})


def lora_config(layers: Mapping[str, Factors]) -> LoraConfig:
    """Return a `LoraConfig` that targets exactly these layers, each with its own rank and alpha."""
    ranks = {name: factors.rank for name, factors in layers.items()}
    alphas = {name: whole(factors.scale * factors.rank) for name, factors in layers.items()}
    rank, alpha = commonest(ranks.values()), commonest(alphas.values())
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={"^" + re.escape(name): value for name, value in ranks.items() if value != rank},
        alpha_pattern={"^" + re.escape(name): value for name, value in alphas.items() if value != alpha},
        # One expression of complete names: as a suffix, a name could match another layer.
        target_modules="|".join(re.escape(name) for name in sorted(layers)),
    )


def _factors_of(model: nn.Module, adapter_name: str) -> dict[str, Factors]:
    """Return the LoRA factors of every adapted layer, by the layer's name in exported files.

    Raises `ValueError` if the adapter trained parameters other than A and B, or changed the frozen weights.
    """
    base = _plain(model, adapter_name)
    config = base.peft_config[adapter_name]
    for setting, without in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
        if (value := getattr(config, setting, None) or without) != without:
            problem = f"{setting}={value!r} trained weights that LoRA files of diffusers, kohya and ComfyUI cannot hold"
            raise ValueError(f"{problem}: use export_peft, or train without this setting")
    found = {}
    for name, layer in lora_layers(base, adapter_name).items():
        if adapter_name not in layer.lora_A or not _adds(layer, adapter_name):
            raise ValueError(f"{name} is not plain LoRA on a linear or convolution layer; use export_peft")
        down, up = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        found[name_in_files(base, name)] = Factors(down, up, layer.scaling[adapter_name])
    if changes_base(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changed the frozen weights, and readers of this file "
            "would add it to the original ones: use export_peft or export_merged, or train with init_lora_weights=True"
        )
    return found


def name_in_files(base: nn.Module, name: str) -> str:
    """Return a layer's name in LoRA files: they have the prefix `text_model.`, which newer transformers drop."""
    dropped = type(base).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
    return f"text_model.{name}" if dropped else name


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a safetensors file without its header; model managers identify LoRA files by this hash."""
    return hashlib.sha256(serialized(tensors)[1]).hexdigest()


def export_merged(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write the base model with the adapter merged into its weights, and return the directory.

    Works for models of diffusers and transformers, with any PEFT adapter that can be merged. Merged weights are
    computed in at least float32 and cast to the dtype of the base weights. `model` itself is unchanged.

    Raises `ValueError` if PEFT has merged an adapter already, or if the directory has files that do not belong to a
    model: the new directory replaces it, so these files would be lost.
    """
    base = _plain(model, adapter_name)
    found = sorted(path.relative_to(directory) for path in Path(directory).rglob("*") if not path.is_dir())
    if others := [str(path) for path in found if not OF_A_MODEL.fullmatch(str(path))]:
        raise ValueError(f"{directory} has {others[0]}, which the merged model would delete: give another folder")
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
        except SafetensorError as error:  # a full disk, for example, which callers expect as an OSError
            raise OSError(f"{directory}: {error}") from error
    return Path(directory)


@torch.no_grad()
def merged_state_dict(base: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Return the state dict of the base model with the adapter merged into the adapted layers.

    Names, shapes and dtypes are those of the base model's state dict. Merged values are computed in at least float32.
    """
    owners = {f"{name}.": module for name, module in _unmerged(base).items()}
    state = {}
    for key, value in base.state_dict().items():
        owner = next((prefix for prefix in owners if key.startswith(prefix)), None)
        if owner is None:  # for `modules_to_save`, the trained copy, which comes second, replaces the original
            place = key.replace(".original_module.", ".").replace(f".modules_to_save.{adapter_name}.", ".")
            if ".modules_to_save." not in place:
                state[place] = value
            continue
        rest = key.removeprefix(owner)
        if not rest.startswith("base_layer."):
            continue
        parameter = rest.removeprefix("base_layer.")
        layer = owners[owner]
        if parameter in ("weight", "bias") and adapter_name in _adapters(layer):
            value = merged_value(layer, parameter, value, adapter_name)
        state[f"{owner}{parameter}".replace(".token_adapter.", ".")] = value
    return state


def tuned_layers(model: nn.Module, adapter_name: str = "default") -> tuple[nn.Module, dict[str, BaseTunerLayer]]:
    """Return the base model, and its layers that have the adapter, by name.

    Raises `ValueError` if the model is connected or has no such adapter, or if PEFT has merged an adapter.
    """
    base = _plain(model, adapter_name)
    return base, {name: layer for name, layer in _unmerged(base).items() if adapter_name in _adapters(layer)}


def _unmerged(base: nn.Module) -> dict[str, BaseTunerLayer]:
    """Return the layers with adapters, by name.

    Raises `ValueError` if PEFT has merged an adapter, because an export would add the adapter a second time.
    """
    tuned = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    refuse_merged(tuned)
    return tuned


@torch.no_grad()
def merged_value(
    layer: BaseTunerLayer, parameter: str, value: torch.Tensor, adapter_name: str = "default"
) -> torch.Tensor:
    """Return `value`, the frozen weight or bias of a layer, with the adapter merged; shape and dtype stay.

    `parameter` is "weight" or "bias". The merged value is computed in at least float32. `value` may come from a file
    and be on another device than the layer.
    """
    if _adds(layer, adapter_name):
        return _summed(layer, value, adapter_name) if parameter == "weight" else value
    wide = torch.promote_types(value.dtype, torch.float32)
    merged = copy.deepcopy(layer).to(wide)
    base = merged.get_base_layer()
    if "weight" not in base._parameters:  # an offloaded weight is read from a file each time
        plain = nn.Linear(base.in_features, base.out_features, device=value.device, dtype=wide)
        plain.weight.data, plain.bias = base.weight.to(wide), base.bias
        merged.base_layer = base = plain
    getattr(base, parameter).data = value.to(wide, copy=True)  # a copy, because merging changes it
    merged.merge(adapter_names=[adapter_name])
    return getattr(base, parameter).detach().to(value.dtype)


def _adds(layer: BaseTunerLayer, adapter_name: str) -> bool:
    """Return whether the adapter only adds a matrix to the layer's weight.

    DoRA instead scales rows, OFT multiplies by rotations, and `lora_bias` also changes the bias.
    """
    if isinstance(layer, LoraLayer):
        return layer.lora_variant.get(adapter_name) is None and not layer.lora_bias.get(adapter_name)
    return isinstance(layer, LycorisLayer)


def _summed(layer: BaseTunerLayer, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    plain = isinstance(layer, LoraLayer) and not hasattr(layer, "lora_E")
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
            f"adapter_name={adapter_name!r} is not on this model; its adapters: {', '.join(map(repr, known)) or 'none'}"
        )
    return base
