"""Read each exported file back with its library, and compare its tensors with those of the merged model."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ... import export
from ...attributes import override_attributes
from ...errors import RunFailed, first_line
from ...export import DIFFUSERS_FILE, LYCORIS_FILE, Factors
from ...linking import base_model, lora_layers
from ...lycoris import merged_weight
from ...methods.adapters import remove_adapters
from ...methods.registry import METHODS
from ...methods.updates import has_updates
from ..context import ImageContext
from ..model.families.base import Family
from ..model.lora_files.writing import peft_folder
from ..model.new_tokens import FOLDER as EMBEDDINGS
from ..model.new_tokens import exported, read_embeddings
from ..model.stored import Stored, empty_model, stored_weights
from .lycoris_file import file_layers, read_lycoris_file
from .merged_weights import merged_tensors

PEFT_FOLDER = "peft"
ADAPTER = "default"
ROUNDING = 1e-6
"""Largest accepted relative difference: files that store `scale * B` round this product to float32."""
Parts = Mapping[str, nn.Module]
"""The trained modules by their names in the pipeline, the denoiser first."""
Differences = dict[str, float]
"""Relative differences (of the Frobenius norm), by the name of a layer or tensor."""


def peft_parts(parts: Parts, converted: Parts | None) -> Parts:
    """Return the modules to write in PEFT's format: if PEFT lacks the method, the converted modules."""
    return converted if converted and any(map(has_updates, parts.values())) else parts


def read_back(
    parts: Parts, method: str, pipeline: DiffusionPipeline, context: ImageContext, converted: Parts | None = None
) -> dict[str, float]:
    """Return the largest relative difference between each exported file and the merged model.

    The updates of the layers are compared in a LoRA file, the parameters and scales in PEFT's folder, and the tensors
    in merged weights. `parts` have the merged adapters; afterwards they have no adapters. `converted`: as in
    `write_adapters`.

    Raises `RunFailed` if a file cannot be read, or differs by more than ROUNDING.
    """
    family, folder, name = context.model.family, context.folder_of(method), context.name_of(method)
    found: dict[str, float] = {}

    def check(file: str, read: Callable[[], Differences]) -> None:
        """Store the largest of a file's differences."""
        found[file] = largest(f"{name}/{file}", read)

    if context.writes_merged:
        for part, module in parts.items():
            stored = context.model.stored_denoiser() if part == family.denoiser else None
            check(part, partial(of_merged, module, folder / part, stored))
    if embeddings := exported(pipeline, family, context.options.adapter.words_of_tokens):
        check(EMBEDDINGS, partial(of_embeddings, embeddings, folder))
    if METHODS[method].lycoris:
        check(LYCORIS_FILE, partial(of_lycoris, parts, folder / LYCORIS_FILE, family))
    row = METHODS[method]
    lora = converted if row.own else parts if row.plain_lora else None
    updates, values = updates_of(lora or {}), values_of(peft_parts(parts, converted))
    for module in parts.values():
        remove_adapters(module)
    with override_attributes(pipeline, **parts):
        for file in (DIFFUSERS_FILE, *family.lora_files) if updates else ():
            check(file, partial(of_lora, updates, parts, pipeline, folder / file))
    check(PEFT_FOLDER, partial(of_peft, values, parts, folder / PEFT_FOLDER, family))
    return dict(sorted(found.items(), key=lambda item: item[0] in parts))


def largest(place: str, read: Callable[[], Differences]) -> float:
    """Return the largest of the differences that `read` returns; see `read_back` for errors."""
    advice = "run the same command again to rewrite it"
    try:
        found = read()
    except Exception as error:  # the libraries raise many types for a damaged file
        raise RunFailed(f"{place}: cannot be read back ({first_line(error)}); {advice}") from None
    name = max(found, key=found.__getitem__)
    if found[name] > ROUNDING:
        raise RunFailed(f"{place}: {name} was read back with a relative difference of {found[name]:.2g}; {advice}")
    return found[name]


def of_merged(module: nn.Module, folder: Path, stored: Mapping[str, Stored] | None) -> Differences:
    """Return the differences of merged weights.

    `stored`: location of the denoiser's base weights, which are read one at a time; None for a text encoder.
    """
    if stored is None:
        loaded, info = type(module).from_pretrained(folder, output_loading_info=True)
        expected, found = export.merged_state_dict(module), loaded.state_dict()
        there = found.keys() - info["missing_keys"]  # from_pretrained initializes them
        return by_name(expected, there, lambda name: relative(expected[name], found[name]))
    merged, written = merged_tensors(module, stored), stored_weights(folder)
    names = empty_model(type(base_model(module)), folder).state_dict()  # from the written configuration
    return by_name(names, written, lambda name: relative(merged(name), written[name].read()))


def of_embeddings(files: Mapping[str, dict], folder: Path) -> Differences:
    """Return the differences of the embeddings of new tokens; `files`: the result of `exported`."""
    expected = {f"{name} {key}": value for name, tensors in files.items() for key, value in tensors.items()}
    found = read_embeddings(folder, files)
    return by_name(expected, found, lambda name: relative(expected[name], found[name]))


def of_lora(updates: Mapping[str, Factors], parts: Parts, pipeline: DiffusionPipeline, path: Path) -> Differences:
    """Return the differences of a LoRA file's updates, loaded by the pipeline; `parts` are in the pipeline."""
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
    loaded = updates_of(parts)
    pipeline.unload_lora_weights()
    return by_name(updates, loaded, lambda name: relative_update(updates[name], loaded[name]))


def of_lycoris(parts: Parts, path: Path, family: Family) -> Differences:
    """Return the differences of the updates in LyCORIS's format, computed by LyCORIS's formula from the tensors."""
    layers, found = file_layers(parts, family), read_lycoris_file(path)

    def difference(name: str) -> float:
        """Return the relative difference of a layer's update from PEFT's own."""
        layer, weight = layers[name].module, layers[name].module.get_base_layer().weight.double()
        update = export.merged_value(layer, "weight", weight) - weight
        return relative(update, merged_weight(layers[name].placed(found[name]), weight) - weight)

    return by_name(layers, found, difference)


def of_peft(values: Mapping[str, torch.Tensor], parts: Parts, folder: Path, family: Family) -> Differences:
    """Return the differences of the adapters' parameters and scales, loaded by PEFT into `parts`."""
    for part, module in parts.items():
        PeftModel.from_pretrained(module, peft_folder(folder, part, family))
    loaded = values_of(parts)
    return by_name(values, loaded, lambda name: relative(values[name], loaded[name]))


def by_name(expected: Collection[str], found: Collection[str], measure: Callable[[str], float]) -> Differences:
    """Return `measure(name)` of every name; raises `ValueError` if a name is in only one of the collections."""
    if only := sorted(set(expected) ^ set(found)):
        raise ValueError(f"{only[0]} is missing from the {'file' if only[0] in expected else 'merged model'}")
    return {name: measure(name) for name in expected}


def updates_of(parts: Parts) -> dict[str, Factors]:
    """Return the LoRA factors of every layer, by the part's and the layer's name."""
    return {
        f"{part}.{name}": Factors(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])
        for part, module in parts.items()
        for name, layer in lora_layers(base_model(module), ADAPTER).items()
    }


def values_of(parts: Parts) -> dict[str, torch.Tensor]:
    """Return the parameters and the scale of every layer's adapter, by the names of part, layer and parameter."""
    found: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        for name, layer in base_model(module).named_modules():
            if isinstance(layer, BaseTunerLayer):
                scale = torch.tensor(getattr(layer, "scaling", {}).get(ADAPTER, 1.0))
                own = {key: value for key, value in layer.named_parameters() if not key.startswith("base_layer.")}
                found |= {f"{part}.{name}.{key}": value for key, value in {**own, "scale": scale}.items()}
    return found


@torch.no_grad()
def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `expected`; infinite for another shape or NaN."""
    if expected.shape != found.shape:
        return math.inf
    return _ratio((expected - found.to(expected.device)).norm(), expected.norm())


@torch.no_grad()
def relative_update(expected: Factors, found: Factors) -> float:
    """Return the norm of the difference of two updates `scale * B A`, relative to the product of the factors' norms.

    The norm is computed from Gram matrices, because an update is as large as the layer's weight, and is precise to
    about 1e-8. Infinite for another shape or NaN.
    """
    (a, b), (other_a, other_b) = (
        (each.down.flatten(1).double(), each.up.flatten(1).double() * each.scale) for each in (expected, found)
    )
    if a.shape[1:] != other_a.shape[1:] or b.shape[:1] != other_b.shape[:1]:
        return math.inf
    if torch.equal(a, other_a) and torch.equal(b, other_b):
        return 0.0
    down, up = torch.cat([a, other_a]), torch.cat([b, -other_b], dim=1)
    squared = ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0)
    return _ratio(squared.sqrt(), a.norm() * b.norm())


def _ratio(difference: torch.Tensor, size: torch.Tensor) -> float:
    ratio = float(difference / size) if difference else 0.0
    return math.inf if math.isnan(ratio) else ratio
