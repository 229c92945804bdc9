"""The block-shortcut, ResLoRA_bs: a block also applies the A and B of the blocks before it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from ..merging import MERGES, Factors, Merged, Method, Moments, merge_exact, neighbours
from .base import Shortcut, add_scaled, inside_checkpoint, whole_weight
from .state import State, Wires, refuse_replica


class BlockShortcut(Shortcut):
    """ResLoRA_bs: `W_n x_n + s_n (sum_{k=0..m} B_{n-k} A_{n-k}) x_n` (Eq. 3).

    Two products whatever m is: `[B_n, ..., B_{n-m}] [A_n; ...; A_{n-m}] x_n`. Needs no state, but uses
    the one there is, to share the first of them.
    """

    carries = False
    raises_rank = True
    merges: ClassVar = {"none": MERGES["none"], "exact": Method(merge_exact)}

    def __init__(self, wires: Wires, name: str, previous: list[tuple[nn.Linear, nn.Linear]]) -> None:
        super().__init__(wires, name)
        self.previous = previous

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], reach: int | None, head: str) -> list:
        """One variant for each block of a chain: each knows the A and B of those before it."""
        before = ([factors[k] for k in neighbours(n, reach)] for n in range(len(names)))
        return [cls(wires, name, previous) for name, previous in zip(names, before, strict=True)]

    def forward(self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        """`x` (batch x tokens x p) and the frozen layer's `result` (batch x tokens x q) to the block's output."""
        refuse_replica(module)
        (hidden,) = self._products(self._sharing(), module, active_adapter, x)
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        shape = lora_b.out_features, lora_b.in_features
        weight = whole_weight(lora_b, shape, x, self.name)
        if self.previous:
            before = [whole_weight(b, shape, x, self.name) for _, b in self.previous]
            weight = torch.cat((weight, *before), dim=1)
        if self.wires.observer is not None:
            stack = [lora_a.weight, *(a.weight.to(lora_a.weight) for a in self.others())]
            self._observe(x, torch.cat(stack), weight)
        return add_scaled(result, hidden, weight, module.scaling[active_adapter], module)

    def _sharing(self) -> State | None:
        """Where products are shared: the running forward's state, or inside a checkpoint that knows of none, its own.

        Its recomputation then shares as the forward did. In a compiled graph nothing may be written to a state inside
        a checkpoint, so there nothing is shared.
        """
        if torch.compiler.is_compiling():
            return None
        slot, checkpoint = self.wires.threads.slot, inside_checkpoint()
        if checkpoint is None or (slot.state is not None and slot.state.segments):
            return slot.state
        if slot.checkpoint() is not checkpoint:
            slot.checkpoint, slot.apart = weakref.ref(checkpoint), State()
        return slot.apart

    def others(self) -> Sequence[nn.Linear]:
        """The A of the blocks before it."""
        return [a for a, _ in self.previous]

    def widths(self, rank: int) -> Sequence[int]:
        """One slice for all: B of the whole chain multiplies it at once."""
        return ((1 + len(self.previous)) * rank,)

    @classmethod
    def resolve(cls, method: str, calibrated: bool, recorded: bool) -> str:
        """Exact, whatever the method."""
        return "exact"

    @classmethod
    def moments(cls, block: Factors, merged: Merged | None, fits: bool) -> Moments:
        """There is nothing to fit."""
        return Moments()

    def measure(self, block: Factors, merged: Merged | None, x, own, handed) -> None:
        """Only a merge cut to a rank misses anything; `own` and `handed` are the stacked A and B."""
        block.moments.add(x, x @ own[:1].to(x).t(), None, torch.linalg.vector_norm(x))
        if merged.a.shape != own.shape:
            whole = x @ own.to(x).t() @ handed.to(x).t()
            cut = x @ merged.a.to(x).t() @ merged.b.to(x).t()
            block.moments.measure(whole, cut - whole)

    @classmethod
    def error(cls, block: Factors, merged: Merged) -> float:
        """Zero, but for what a cut to a rank loses."""
        moments = block.moments
        return (moments.miss / moments.output) ** 0.5 if moments.output > 0 else 0.0
