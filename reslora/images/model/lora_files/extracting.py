"""Extract a LoRA from the difference of two complete models, with one layer's weights in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ....errors import InvalidArgument, refused_as
from ....export import Factors
from .names import Fused, Names, Parts, shaped
from .reading import refuse_pickles, wide

PLAIN = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""Prefixes of the denoiser's tensors, in files of the denoiser only or of a complete model."""
SCALED = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant|scale_weight|weight_scale|absmax|SCB)")
"""Names of the scales in a quantized model, without which its weights are meaningless."""


@dataclass
class Weights:
    """The tensors of a model's safetensors files, read on access."""

    flag: str
    files: dict[str, Path]
    """The file of each tensor, by the tensor's name."""

    @classmethod
    def of(cls, path: Path, denoiser: str, flag: str) -> Weights:
        """Open a file, the denoiser in a pipeline's folder, or a denoiser's folder.

        Raises `InvalidArgument` for pickles, and for quantized weights.
        """
        folder = path / denoiser if (path / denoiser).is_dir() else path
        found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [path]
        # If there are files with and without a variant (fp16), both have the same tensors.
        found = [file for file in found if PLAIN.fullmatch(file.name)] or found
        refuse_pickles(folder, flag)
        if not found or not all(file.is_file() for file in found):
            raise InvalidArgument(flag, "no safetensors weights there", "give a file, or a folder in diffusers format")
        files: dict[str, Path] = {}
        for file in found:
            with refused_as(flag, "give complete files"), safe_open(file, "pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        if scaled := next(filter(SCALED.fullmatch, files), None):
            problem = f"{scaled}: its weights are stored in 8 or 4 bits with a scale"
            raise InvalidArgument(flag, problem, "give the model in 16 or 32 bits")
        return cls(flag, files)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Return the rows `rows` of a tensor, of shape (rows, ...), in float32 or wider."""
        with safe_open(self.files[name], "pt") as opened:
            return wide(opened.get_tensor(name) if rows == slice(None) else opened.get_slice(name)[rows])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        with safe_open(self.files[name], "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())


@dataclass(frozen=True)
class Place:
    """The place of a layer's weight in a model's files."""

    name: str
    rows: slice
    swapped: bool = False

    def read(self, weights: Weights) -> torch.Tensor:
        """Return the layer's weight (out, in, *kernel) from the file; the two halves are swapped if `swapped`."""
        value = weights.read(self.name, self.rows)
        return torch.cat(value.chunk(2)[::-1]) if self.swapped else value


def places_of(weights: Weights, names: Names) -> dict[str, Place]:
    """Return where each of the denoiser's layers is, in files with diffusers' or the original names.

    Raises `InvalidArgument` if the files are of another family.
    """
    own = {layer: Fused(((names.family.denoiser, layer),)) for layer in names.shapes}
    for table in (own, names.original):
        for prefix in PREFIXES:
            places: dict[str, Place] = {}
            for name, fused in table.items():
                if (key := f"{prefix}{name}.weight") in weights.files:
                    places |= _places(key, fused, weights)
            if len(places) > len(names.shapes) // 2:
                return places
    fix = "give models of one family, and --base or --family if it is not certain"
    raise InvalidArgument(weights.flag, f"no weights of a {names.family.name} denoiser", fix)


def _places(key: str, fused: Fused, weights: Weights) -> Iterator[tuple[str, Place]]:
    unit, start = weights.shape(key)[0] / sum(fused.outputs), 0
    for (_, layer), width in zip(fused.layers, fused.outputs, strict=True):
        rows = round(width * unit)
        yield layer, Place(key, slice(start, start + rows), fused.swapped)
        start += rows


def extracted(base: Weights, tuned: Weights, names: Names, rank: int) -> tuple[Parts, dict[str, float], list[str]]:
    """Return the best LoRA of `rank` for `tuned - base`, each layer's relative error, and the tensors not covered.

    The last item has the names of tensors that differ but are not the weight of a linear layer or a convolution, and of
    tensors that only one of the models has.
    """
    in_base, in_tuned = places_of(base, names), places_of(tuned, names)
    layers, errors = {}, {}
    common = in_base.keys() & in_tuned.keys()
    for layer in common:
        one, other = in_base[layer].read(base), in_tuned[layer].read(tuned)
        if one.shape != other.shape:
            problem = f"{layer} is {tuple(other.shape)} in it, but {tuple(one.shape)} in the base model"
            raise InvalidArgument(tuned.flag, problem, "give a model of the same kind")
        if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
            raise InvalidArgument(tuned.flag, f"{layer} is not finite, in it or in the base", "give complete models")
        if not torch.equal(one, other):
            layers[layer], errors[f"{names.family.denoiser}.{layer}"] = difference(other - one, rank)
    held = {places[layer].name for places in (in_base, in_tuned) for layer in common}
    return {names.family.denoiser: dict(sorted(layers.items()))}, errors, _others(base, tuned, held)


def _others(base: Weights, tuned: Weights, held: set[str]) -> list[str]:
    """Return the names of tensors, except `held`, that differ, and then of those that only one of the models has."""
    found = [
        name
        for name in sorted((base.files.keys() & tuned.files.keys()) - held)
        if base.shape(name) != tuned.shape(name) or not torch.equal(base.read(name), tuned.read(name))
    ]
    return found + sorted((base.files.keys() ^ tuned.files.keys()) - held)


def difference(delta: torch.Tensor, rank: int) -> tuple[Factors, float]:
    """Return the best factors of `rank` for a weight's change, and their relative error (Frobenius norm).

    `delta`: outputs x inputs, with kernel height and width for a convolution. The factors come from the eigenvectors of
    the smaller Gram matrix, in float64.
    """
    matrix = delta.flatten(1).double()
    wide = matrix.shape[0] > matrix.shape[1]
    tall = matrix if wide else matrix.t()
    values, vectors = torch.linalg.eigh(tall.t() @ tall)
    kept, basis = values.flip(0).clamp(min=0)[:rank], vectors.flip(1)[:, :rank]
    root = kept.sqrt().sqrt()  # each factor gets the square root of the singular values
    safe = torch.where(root > 0, root, 1.0)
    one, other = basis * root, (tall @ basis) / safe
    down, up = (one.t(), other) if wide else (other.t(), one)
    error = float((1 - kept.sum() / matrix.square().sum()).clamp(min=0).sqrt())
    factors = Factors(down.to(delta.dtype).contiguous(), up.to(delta.dtype), 1.0)
    return shaped(factors, delta.shape[1:]), error
