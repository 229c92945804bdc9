"""A denoiser whose weights stay in its files: read tensor by tensor where they are used, so that a large one fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, _add_variant
from safetensors import safe_open
from torch import nn

from ...files import read_object
from .quantising import block_layers

IN_MEMORY = 4 * 2**30
"""Bytes in float32 up to which a denoiser is loaded whole wherever it runs, for that is faster."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    name: str

    def read(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """A copy of it; numbers of floating point in float32."""
        with safe_open(self.path, framework="pt") as file:  # opened each time: pages of an open file stay in memory
            value = file.get_tensor(self.name)
            return value.to(device, torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def stored_weights(folder: Path, variant: str | None = None) -> dict[str, Stored]:
    """Where each weight of a model's folder is, one file or several, as `from_pretrained` finds them; else empty."""
    index = read_object(folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant))
    if index:
        return {name: Stored(folder / file, name) for name, file in index["weight_map"].items()}
    path = folder / _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return {name: Stored(path, name) for name in file.keys()}  # noqa: SIM118 - no mapping


class StoredLinear(nn.Linear):
    """A frozen linear layer with its weight in a file: what it computes is what one in float32 computes."""

    def __init__(self, linear: nn.Linear, stored: Stored, device: torch.device) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored, self.device, self.bias = stored, device, linear.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override] # read only, as the docstring says
        """The weight (q x p) in float32, read anew; changing it changes nothing."""
        return self.stored.read(self.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`W x + b`."""
        shape = (self.out_features, self.in_features)
        return F.linear(x, x.new_empty(shape) if x.is_meta else self.weight, self.bias)


def empty_model(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """A model of a folder's configuration with its parameters on the meta device, for float32."""
    with init_empty_weights():
        return kind.from_config(kind.load_config(folder))


def stays_stored(empty: nn.Module, stored: Mapping[str, Stored], device: torch.device) -> bool:
    """Whether a model is too large to be loaded whole, and its files hold just what it has.

    Half of what a GPU has free may be taken: there, reading takes longer than computing. Either way computes the same.
    """
    state, free = empty.state_dict(), torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    whole = sum(value.nbytes for value in state.values()) <= max(IN_MEMORY, free // 2)
    return not whole and state.keys() == stored.keys()


def with_stored_weights(empty: ModelMixin, stored: Mapping[str, Stored], device: torch.device) -> ModelMixin:
    """Makes an empty model compute in float32, frozen: the weights of its blocks stay in files, others do not."""
    held = dict(stored)
    for name, layer in list(block_layers(empty)):
        empty.set_submodule(name, StoredLinear(layer, held.pop(f"{name}.weight"), device))
    empty.load_state_dict({name: where.read(device) for name, where in held.items()}, assign=True)
    return empty.requires_grad_(False).eval().to(device)


def load_exact(kind: type[ModelMixin], folder: Path, device: torch.device, variant: str | None = None) -> ModelMixin:
    """The model of a folder in float32: whole, or where it is large, with the weights of its blocks in their files."""
    stored, empty = stored_weights(folder, variant), empty_model(kind, folder)
    if stays_stored(empty, stored, device):
        return with_stored_weights(empty, stored, device)
    return kind.from_pretrained(folder, variant=variant, use_safetensors=True).to(device)
