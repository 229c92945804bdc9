"""The input-shortcut, ResLoRA_is: a block also receives the input of the previous block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..linking import Before
from .base import OWN, Shortcut
from .state import Wires
from .tensors import add_product


class InputShortcut(Shortcut):
    """ResLoRA_is: `W_n x_n + s_n B_n A_n (x_n + x_{n-1})` (Eq. 2).

    x_{n-1} is not stored: block n-1 computes `[A_{n-1}; A_n] x_{n-1}` in one product and passes on the r-wide second
    half.
    """

    repeats_heads = True

    def __init__(self, wires: Wires, name: str, source: str | None, following: nn.Linear | None, head: str) -> None:
        """Initialize the variant of one block.

        `source`: name of the previous block, None for a head. `following`: A of the next block, which also multiplies
        x_n; None without a next block.
        """
        super().__init__(wires, name)
        self.source = source
        self.following = following
        self.repeats = source is None and head == "repeat"

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], before: Before, head: str) -> list:
        """Return one variant for each block of a chain.

        Each variant has the name of the previous block, whose tensor it adds, and the A of the next block.
        """
        sources = [names[taken[0]] if taken else None for taken in before]
        following = {k: a for taken, (a, _) in zip(before, factors, strict=True) for k in taken}
        return [cls(wires, name, sources[n], following.get(n), head) for n, name in enumerate(names)]

    def forward(
        self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the block's output (batch x tokens x q).

        `x`: the block's input (batch x tokens x p); `result`: the output of the frozen layer.
        """
        state = self._running()
        self._record(state, x)
        own, *handed_on = self._products(state, module, active_adapter, x)
        if handed_on:
            state.handed[self.name, OWN] = handed_on[0], x.shape[:-1]
        hidden, handed, scaling = own, None, module.scaling[active_adapter]
        if self.source is not None:
            handed = self._take(state, self.source, x)
            hidden = own + handed
        elif self.repeats:
            handed, scaling = own, 2 * scaling
        self._observe(x, own, handed)
        return add_product(result, hidden, module, active_adapter, scaling)

    def others(self) -> Sequence[nn.Linear]:
        """Return the A module of the next block; empty for the last block."""
        return () if self.following is None else (self.following,)

    @classmethod
    def parts(cls, chain: Sequence[torch.Tensor], n: int, before: Sequence[int]) -> Sequence[torch.Tensor]:
        """Return A_n, which multiplies x_{n-1}; empty for a head."""
        return [chain[n] for _ in before]
