"""Compute `A x` once for all blocks that read the same tensor x, such as q, k and v of an attention."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .state import State
from .tensors import autocasts, sharded, version_of


class SharedProduct:
    """Compute `[A_q; A_k; A_v] x` as one matrix product for all blocks that read x; each block takes its slices.

    In the forward pass one matrix product replaces three. In the backward pass one p-wide gradient replaces three
    gradients and their sum. The trace of `connect` finds blocks that read the same tensor, and every forward pass
    checks that these blocks still do. A block with another input computes its own `A x`.
    """

    def __init__(self, blocks: Mapping[str, tuple[Any, nn.Linear]]) -> None:
        """Initialize for blocks that read the same tensor: name -> (`Shortcut`, A), in execution order."""
        self.most_rows = min(variant.most_rows for variant, _ in blocks.values())
        self.own = {name: own for name, (_, own) in blocks.items()}
        self.linears = [linear for variant, own in blocks.values() for linear in (own, *variant.others())]
        widths = [variant.widths(own.out_features) for variant, own in blocks.values()]
        self.sizes = list(itertools.chain(*widths))
        ends = [0, *itertools.accumulate(map(len, widths))]
        self.places = {name: slice(*ends[n : n + 2]) for n, name in enumerate(blocks)}
        self.first, *_, self.last = blocks

    def multiply(self, state: State, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Compute the product for `x` and store it in `state`; call this when the first of the blocks runs.

        `rows` (batch * tokens x p) is `x`, flattened and in the dtype of A. Nothing is stored if there are more rows
        than `most_rows`, or if weights are sharded or offloaded.
        """
        weights = [linear.weight for linear in self.linears]
        if len(rows) <= self.most_rows and _usable(weights, rows):
            slices = F.linear(rows, torch.cat(weights)).split(self.sizes, dim=1)
            state.shared = self, x, _circumstances(x), slices

    def take(self, state: State, name: str, x: torch.Tensor, own: nn.Linear) -> Sequence[torch.Tensor] | None:
        """Return the slices of the block `name`, whose own A is `own`.

        Returns None if the stored product belongs to other blocks, or if x or A is another tensor than in that product.
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
    """Return the version of `x`, gradient mode and autocast dtype: a stored product is reused only if all are equal."""
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
    return version_of(x), torch.is_grad_enabled(), dtype


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
