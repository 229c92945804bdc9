"""A denoiser whose weights stay on disk to save memory: each weight is read when it is used."""

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

from ...io import read_object
from .quantising import block_layers

IN_MEMORY = 4 * 2**30
"""Size in bytes of a float32 denoiser; a smaller denoiser is always loaded completely, because that is faster."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    name: str

    def read(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read a copy of the tensor; floating-point values become float32."""
        with safe_open(self.path, "pt") as file:  # not left open: pages of an open file stay in memory
            value = file.get_tensor(self.name)
            return value.to(device, torch.float32 if value.is_floating_point() else value.dtype, copy=True)


def stored_weights(folder: Path, variant: str | None = None) -> dict[str, Stored]:
    """Return the location of each weight in a model's folder, in the files that `from_pretrained` would read.

    Returns {} if the folder has no weights.
    """
    index = read_object(folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant))
    if index:
        return {name: Stored(folder / file, name) for name, file in index["weight_map"].items()}
    path = folder / _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return {name: Stored(path, name) for name in file.keys()}  # noqa: SIM118 - no mapping


class StoredLinear(nn.Linear):
    """A frozen linear layer whose weight is read from disk in every forward pass, in float32."""

    def __init__(self, linear: nn.Linear, stored: Stored, device: torch.device) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored, self.device, self.bias = stored, device, linear.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override] # read-only
        """The weight (q x p) in float32, a new copy from disk: changing the copy has no effect."""
        return self.stored.read(self.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `W x + b` (... x q) for `x` (... x p)."""
        weight = x.new_empty(self.out_features, self.in_features) if x.is_meta else self.weight
        return F.linear(x, weight, self.bias)


def empty_model(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """Return a model with the configuration in `folder`, in float32, with its parameters on the meta device."""
    with init_empty_weights():
        return kind.from_config(kind.load_config(folder))


def stays_stored(empty: nn.Module, stored: Mapping[str, Stored], device: torch.device) -> bool:
    """Return whether weights stay on disk: the model is too large to be loaded, and the files have exactly its weights.

    A model is too large if it exceeds IN_MEMORY and, on a GPU, half of the free memory. On a GPU, reading a weight from
    disk takes longer than computing with it. The results are the same whether weights stay on disk or not.
    """
    state, free = empty.state_dict(), torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    whole = sum(value.nbytes for value in state.values()) <= max(IN_MEMORY, free // 2)
    return not whole and state.keys() == stored.keys()


def with_stored_weights(empty: ModelMixin, stored: Mapping[str, Stored], device: torch.device) -> ModelMixin:
    """Give an empty model frozen float32 weights: the weights of its blocks stay on disk, all others are loaded."""
    held = dict(stored)
    for name, layer in list(block_layers(empty)):
        empty.set_submodule(name, StoredLinear(layer, held.pop(f"{name}.weight"), device))
    empty.load_state_dict({name: where.read(device) for name, where in held.items()}, assign=True)
    return empty.requires_grad_(False).eval().to(device)


def load_exact(kind: type[ModelMixin], folder: Path, device: torch.device, variant: str | None = None) -> ModelMixin:
    """Return a directory's model in float32.

    If the model is too large to be loaded completely (see `stays_stored`), the weights of its blocks stay on disk.
    """
    stored, empty = stored_weights(folder, variant), empty_model(kind, folder)
    if stays_stored(empty, stored, device):
        return with_stored_weights(empty, stored, device)
    return kind.from_pretrained(folder, variant=variant, use_safetensors=True).to(device)
