"""The gated block-shortcut (RaSA): the blocks of a chain share some of their ranks, weighted by trained gates."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..chains import Before, Chain
from ..merges import MERGES, Merge
from ..merging import pooled, shared_rank
from .base import add_scaled, cast, rows, whole_weight
from .block import BlockShortcut
from .state import Wires, refuse_replica

GATES = "lora_gates"
"""Attribute of a LoRA layer with its gates, by adapter; PEFT saves, freezes and deletes them as it does A and B."""


class GatedShortcut(BlockShortcut):
    """RaSA (He et al., 2025, arXiv 2503.12576) along a chain: `W_n x_n + s_n [B~_n, B_S] diag(d_n) [A~_n; A_S] x_n`.

    The pool A_S (k L x p), B_S (q x k L) has the last k of the r ranks of each of the chain's L blocks, in their order;
    A~_n and B~_n are the other ranks of block n. k is `shared_rank(r)`. The gates d_n (r - k + k L) are trained. Those
    of a block's own ranks start at 1, those of the pool at 1/L: each block starts with the mean over the chain. No
    other shortcut adds parameters, so create the optimizer after `connect`.

    The update is a product of stacked matrices, so the merge is exact: `A* = [A~_n; A_S]`, `B* = [B~_n, B_S] diag(d_n)`
    of rank r - k + k L. A chain of one block has no gates and stays plain LoRA.
    """

    merges: ClassVar = {"none": MERGES["none"], "exact": Merge("merge_gated")}

    def __init__(self, wires: Wires, name: str, own: tuple, chain: Sequence[tuple]) -> None:
        """Initialize the variant of one block; `own` is its (A, B), and `chain` the (A, B) of all blocks, in order."""
        super().__init__(wires, name, [own], None, False)
        self.chain = chain

    @classmethod
    def reach(cls, pre_num: int) -> None:
        """Return None: a block uses its complete chain, whatever `pre_num` is."""
        return None

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], before: Before, head: str) -> list:
        """Return one variant for each block of a chain; each references the A and B of all blocks."""
        if len(names) == 1:
            return [BlockShortcut(wires, names[0], factors, None, False)]
        return [cls(wires, name, own, factors) for name, own in zip(names, factors, strict=True)]

    def forward(
        self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the block's output (batch x tokens x q).

        `x` is its input (batch x tokens x p), and `result` the output of the frozen layer.
        """
        refuse_replica(module)
        a = self._pooled([module.lora_A[active_adapter], *(a for a, _ in self.chain)], x, dim=0)
        b = self._pooled([module.lora_B[active_adapter], *(b for _, b in self.chain)], x, dim=1)
        b = b * getattr(module, GATES)[active_adapter].to(b)
        if self.wires.observer is not None:
            self.wires.observer(self, x, a, b)
        hidden = F.linear(rows(module.lora_dropout[active_adapter](cast(x, a))), a)
        return add_scaled(result, hidden, b, module.scaling[active_adapter], module)

    def _pooled(self, linears: Sequence[nn.Linear], x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return `[A~_n; A_S]` (dim 0) or `[B~_n, B_S]` (dim 1); the block's own factor comes first in `linears`."""
        shape = linears[0].out_features, linears[0].in_features
        own, *chain = [whole_weight(linear, shape, x, self.name) for linear in linears]
        return pooled(own, chain, dim)


def gates_in(chain: Chain) -> int:
    """Return the number of gates of each block of a chain: r - k + k L, or 0 for a chain of one block."""
    shared = shared_rank(chain[0].rank)
    return chain[0].rank + shared * (len(chain) - 1) if len(chain) > 1 else 0


def add_gates(layers: Sequence[LoraLayer], adapter: str) -> None:
    """Add the gates of a chain's blocks to their layers, at their initial values (see `GatedShortcut`)."""
    for layer in layers:
        weight = layer.lora_A[adapter].weight
        shared = shared_rank(len(weight))
        gates = weight.new_ones(len(weight) + shared * (len(layers) - 1))
        gates[len(weight) - shared :] = 1 / len(layers)
        setattr(layer, GATES, nn.ParameterDict({adapter: nn.Parameter(gates, requires_grad=weight.requires_grad)}))
        layer.adapter_layer_names = (*layer.adapter_layer_names, GATES)


def remove_gates(layer: LoraLayer) -> None:
    """Remove the gates of a layer, if it has any."""
    if hasattr(layer, GATES):
        delattr(layer, GATES)
        layer.adapter_layer_names = tuple(name for name in layer.adapter_layer_names if name != GATES)


def gates_of(layer: LoraLayer, adapter: str) -> nn.Parameter | None:
    """Return the gates of a layer; None without any."""
    return getattr(layer, GATES, {}).get(adapter)
