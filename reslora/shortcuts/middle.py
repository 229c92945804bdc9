"""The middle-shortcut, ResLoRA_ms: a block also adds the A x of earlier blocks."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..linking import Before
from ..merging import MERGES, Merge, merge_weights_middle
from .base import OWN, Shortcut
from .state import Wires
from .tensors import add_product, cast, passes, rows

SUM = "sum of A x"
"""Key in `State.handed` of the sum of A x that a block passes to the next block, if both sums start at the head."""


class MiddleShortcut(Shortcut):
    """ResLoRA_ms: `W_n x_n + s_n B_n (sum_{k=0..m} A_{n-k} x_{n-k})` (Eq. 4); only r-wide vectors are added.

    Block n of a chain has at most n earlier blocks, so m is 0 in the head.
    """

    merges: ClassVar = MERGES | {"weights": Merge(merge_weights_middle)}

    def __init__(self, wires: Wires, name: str, sources: list[str], takes_sum: bool, gives: Sequence[str]) -> None:
        """Initialize the variant of one block.

        `sources`: names of the blocks whose tensors this block adds. `takes_sum`: whether the block adds SUM (of the
        previous block, its only source) or OWN of each source. `gives`: keys of the tensors that the block passes on:
        OWN, SUM or both.
        """
        super().__init__(wires, name)
        self.sources = sources
        self.takes_sum = takes_sum
        self.gives = gives

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], before: Before, head: str) -> list:
        """Return one variant for each block of a chain; each has the names of the earlier blocks whose tensors it adds.

        If the sum of a block starts at the head, the block adds the complete sum of the previous block instead of every
        term: one addition, however long the chain is.
        """
        whole = [0 < len(taken) == n for n, taken in enumerate(before)]
        sources = [taken[:1] if all_of_them else taken for taken, all_of_them in zip(before, whole, strict=True)]
        apart = {k for taken, all_of_them in zip(before, whole, strict=True) if not all_of_them for k in taken}
        found = []
        for n, name in enumerate(names):
            gives = [OWN] * (n in apart) + [SUM] * any(whole[n + 1 : n + 2])
            found.append(cls(wires, name, [names[k] for k in sources[n]], whole[n], gives))
        return found

    def forward(
        self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the block's output (batch x tokens x q).

        `x`: the block's input (batch x tokens x p); `result`: the output of the frozen layer.
        """
        state = self._running()
        (own,) = self._products(state, module, active_adapter, x)
        if state.norms is not None:
            undropped, lora_a = own, module.lora_A[active_adapter]
            if not passes(module.lora_dropout[active_adapter]):
                with torch.no_grad():
                    undropped = lora_a(cast(rows(x), lora_a.weight))
            self._record(state, undropped)
        handed = None
        for source in self.sources:
            value = self._take(state, source, x, SUM if self.takes_sum else OWN)
            handed = value if handed is None else handed + value
        self._observe(x, own, handed)
        hidden = own if handed is None else own + handed
        for what in self.gives:
            state.handed[self.name, what] = (own if what == OWN else hidden), x.shape[:-1]
        return add_product(result, hidden, module, active_adapter, module.scaling[active_adapter])

    def _multiply(self, lora_a: nn.Linear, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return `A x` by calling the A module, because a sharded weight is complete only while its module runs."""
        return (lora_a(x),)

    @classmethod
    def parts(cls, chain: Sequence[torch.Tensor], n: int, before: Sequence[int]) -> Sequence[torch.Tensor]:
        """Return A_{n-1}, A_{n-2}, ..., which multiply x_{n-1}, x_{n-2}, ..."""
        return [chain[k] for k in before]

    def normed(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return `A_n x_n` (tokens x r), whose norm is f_n (Eq. 12)."""
        return own.to(x)
