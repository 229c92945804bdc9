"""Compute `A x` once for all blocks that read the same tensor x, such as q, k and v of an attention."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .state import State


class SharedProduct:
    """`[A_q; A_k; A_v] x` as one product, of which each block takes its slices.

    One product replaces three, and in the backward pass one p-wide gradient replaces three and their sum. The trace
    finds the blocks that read the same tensor. Every forward pass verifies it, and a block with another input computes
    its own product.
    """

    def __init__(self, blocks: Mapping[str, tuple[Any, nn.Linear]]) -> None:
        """Initialize the product of the blocks that read one tensor: their variants (`Shortcut`) and A, by name."""
        self.most_rows = min(variant.most_rows for variant, _ in blocks.values())
        self.own = {name: own for name, (_, own) in blocks.items()}
        self.linears = [linear for variant, own in blocks.values() for linear in (own, *variant.others())]
        widths = [variant.widths(own.out_features) for variant, own in blocks.values()]
        self.sizes = list(itertools.chain(*widths))
        ends = [0, *itertools.accumulate(map(len, widths))]
        self.places = {name: slice(*ends[n : n + 2]) for n, name in enumerate(blocks)}
        self.first, *_, self.last = blocks

    def multiply(self, state: State, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Compute the product when the first of the blocks runs; `rows` (batch * tokens x p) are `x` as A reads it."""
        weights = [linear.weight for linear in self.linears]
        if len(rows) <= self.most_rows and _usable(weights, rows):
            slices = F.linear(rows, torch.cat(weights)).split(self.sizes, dim=1)
            state.shared = self, x, _circumstances(x), slices

    def take(self, state: State, name: str, x: torch.Tensor, own: nn.Linear) -> Sequence[torch.Tensor] | None:
        """Return the slices of the block whose own A is `own`.

        Returns None if the latest product is of another group, another x or another A.
        """
        if state.shared is None:
            return None
        group, read, circumstances, slices = state.shared
        if group is not self or read is not x or self.own[name] is not own or circumstances != _circumstances(x):
            return None
        if name == self.last:
            state.shared = None  # no other block needs the slices, nor x
        return slices[self.places[name]]


def _circumstances(x: torch.Tensor) -> tuple:
    """Return what a product depends on in addition to its factors: the version of `x`, gradients and autocast."""
    # In a compiled graph only the trace is available. Tensors created in inference mode have no version.
    version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
    return version, torch.is_grad_enabled(), dtype


def _usable(weights: list[torch.Tensor], rows: torch.Tensor) -> bool:
    """Return whether the weights are neither sharded nor offloaded, and have the device and dtype that `rows` need."""
    width, device, dtype = rows.shape[1], rows.device, rows.dtype
    any_dtype = autocasts(device)
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != width or weight.device != device or sharded(weight):
            return False
        if not any_dtype and weight.dtype != dtype:
            return False
    return True


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is enabled for a device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def sharded(weight: torch.Tensor) -> bool:
    """Return whether a weight holds only a shard of its values, although it has the complete shape."""
    return type(weight) is not nn.Parameter and hasattr(weight, "_local_tensor")
