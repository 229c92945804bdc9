"""The block-shortcut, ResLoRA_bs: a block also applies the A and B of earlier blocks to its input."""

import math
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from ..linking import Before
from ..merging import MERGES, Factors, Merge, Merged, merge_exact
from .base import Shortcut
from .state import State, Wires, refuse_replica
from .tensors import add_scaled, autocasts, cast, inside_checkpoint, rows

SUM = "sum of B A"
"""Key in `State.handed` of the sum of B A that a block passes to the next block, if both sums start at the head."""


class BlockShortcut(Shortcut):
    """ResLoRA_bs: `W_n x_n + s_n (sum_{k=0..m} B_{n-k} A_{n-k}) x_n` (Eq. 3).

    Computed as two matrix products for any m: `[B_n, ..., B_{n-m}] [A_n; ...; A_{n-m}] x_n`. No `State` is required; if
    there is one, blocks that read the same tensor share the first product.

    With many blocks and rows it is cheaper to sum the matrices B A (q x p) first, and to multiply x by the sum once. If
    the sum of a block starts at the head, the block adds its own B A to the sum of the previous block.
    """

    raises_rank = True
    merges: ClassVar = {"none": MERGES["none"], "exact": Merge(merge_exact)}

    def __init__(
        self, wires: Wires, name: str, factors: Sequence[tuple], sum_from: str | None, gives_sum: bool
    ) -> None:
        """Initialize the variant of one block.

        `factors`: (A, B) of this block, then of the earlier blocks. `sum_from`: name of the block to whose sum this
        block adds its own B A, or None. `gives_sum`: whether the next block adds its own B A to the sum of this block.
        """
        super().__init__(wires, name)
        (lora_a, lora_b), *self.before = factors
        self.sum_from = sum_from
        self.gives_sum = gives_sum
        self.most_rows = rows_for_a_first(lora_a, lora_b, blocks=len(factors))

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], before: Before, head: str) -> list:
        """Return one variant for each block of a chain; each references the A and B of earlier blocks."""
        sums = [names[n - 1] if 0 < len(taken) == n else None for n, taken in enumerate(before)]
        gives_sum = [name is not None for name in (*sums[1:], None)]
        taking = [[factors[k] for k in (n, *taken)] for n, taken in enumerate(before)]
        return [cls(wires, *block) for block in zip(names, taking, sums, gives_sum, strict=True)]

    def forward(
        self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the block's output (batch x tokens x q).

        `x`: the block's input (batch x tokens x p); `result`: the output of the frozen layer.
        """
        refuse_replica(module)
        state, scaling = self._sharing(), module.scaling[active_adapter]
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if self.wires.observer is not None:
            (products,) = self._multiply(lora_a, rows(cast(x, lora_a.weight)))
            own, *handed = products.split(lora_a.out_features, dim=1)
            self._observe(x, own, torch.cat(handed, dim=1) if handed else None)
        if x.numel() // x.shape[-1] > self.most_rows:
            change = self._change(state, lora_a, lora_b, x)
            hidden = rows(module.lora_dropout[active_adapter](cast(x, lora_a.weight)))
            if autocasts(x.device):
                hidden = hidden.to(result.dtype)
            return add_scaled(result, hidden, change.to(hidden.dtype), scaling, module)
        (hidden,) = self._products(state, module, active_adapter, x)
        return add_scaled(result, hidden, self._stacked_b(lora_b, x), scaling, module)

    def _stacked_b(self, lora_b: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return self._stack(lora_b, [b for _, b in self.before], x, dim=1)

    def _change(self, state: State | None, lora_a: nn.Linear, lora_b: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Return `sum_{k=0..m} B_{n-k} A_{n-k}` (q x p).

        The dtype is at least float32, because the sum is rounded once for each block.
        """
        grad = torch.is_grad_enabled()
        given, recorded = (None, None) if state is None else state.handed.pop((self.sum_from, SUM), (None, None))
        with torch.autocast(x.device.type, enabled=False) if autocasts(x.device) else nullcontext():
            if given is not None and recorded == grad and given.device == x.device:
                a, b = self._stack(lora_a, (), x), self._stack(lora_b, (), x)
                change = torch.addmm(given, at_least_float32(b), at_least_float32(a))
            else:
                a, b = self._stack(lora_a, self.others(), x), self._stacked_b(lora_b, x)
                change = at_least_float32(b) @ at_least_float32(a)
        if state is not None and self.gives_sum:
            state.handed[self.name, SUM] = change, grad
        return change

    def _sharing(self) -> State | None:
        """Return the state that stores shared products; None to share nothing.

        - Inside a checkpoint without the contexts of `Wires.contexts`: a separate state for each forward pass and each
          recomputation of this checkpoint, so that both compute the same products.
        - In a compiled graph: None, because no state may be written in code that gradient checkpointing runs twice.
        - Otherwise: the state of the running forward pass, if there is one.
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
        """Return the A modules of the earlier blocks."""
        return [a for a, _ in self.before]

    def widths(self, rank: int) -> Sequence[int]:
        """Return one width, that of all A stacked: `[B_n, ..., B_{n-m}]` multiplies the complete product."""
        return ((1 + len(self.before)) * rank,)

    def measure(self, block: Factors, merged: Merged | None, x: Any, own: Any, handed: Any) -> None:
        """Add one forward pass to the block's moments, with the error of the merge unless its rank is complete."""
        block.moments.add(x, own, None, torch.linalg.vector_norm(x))
        if len(merged.a) != (1 + len(self.before)) * len(block.a):
            a = torch.cat([block.a.to(x), *(a.weight.to(x) for a, _ in self.before)])
            b = torch.cat([block.b.to(x), *(b.weight.to(x) for _, b in self.before)], dim=1)
            whole = x @ a.t() @ b.t()
            block.moments.measure(whole, x @ merged.a.to(x).t() @ merged.b.to(x).t() - whole)


def rows_for_a_first(lora_a: nn.Linear, lora_b: nn.Linear, blocks: int) -> float:
    """Return the number of rows of x up to which `B (A x)` costs no more than `(B A) x`.

    `blocks`: number of stacked blocks.
    """
    inputs, rank, outputs = lora_a.in_features, blocks * lora_a.out_features, lora_b.out_features
    saved = rank * (inputs + outputs) - inputs * outputs  # multiplications that `(B A) x` saves for each row
    return rank * inputs * outputs / saved if saved > 0 else math.inf


def at_least_float32(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` itself if it is float32 or float64, else a float32 copy."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
