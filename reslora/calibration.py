"""Calibration: the unmerged model runs on a few batches, and every wired block's moments are collected."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .merging import Factors, Merged, Second
from .shortcuts.base import Shortcut, rows
from .shortcuts.state import Wires
from .tracing import evaluating, to_device


class Calibrator:
    """Watches the unmerged model run on the calibration batches and fills in the moments of every block."""

    def __init__(
        self, plan: list[list[Factors]], merged: list[list[Merged]] | None, shortcut: type[Shortcut], fits: bool
    ) -> None:
        """`merged` is the outcome of a merge that needs no calibration; one that `fits` needs second moments."""
        self.blocks = {block.name: block for chain in plan for block in chain}
        results = [None] * len(self.blocks) if merged is None else [result for chain in merged for result in chain]
        self.merged = dict(zip(self.blocks, results, strict=True))
        for name, block in self.blocks.items():
            block.moments = shortcut.moments(block, self.merged[name], fits)
        self.fits = fits
        self.readers: dict[str, str] = {}
        # Weak references: a calibration forward must not keep every layer's input alive.
        self.inputs: list[tuple[weakref.ref, str]] = []

    def read(self, base: nn.Module, wires: Wires, calibration: Iterable[Mapping]) -> None:
        """Runs every batch once; raises `ValueError` for batches that do not fit or give non-finite values."""
        device = next(base.parameters()).device
        wires.observer = self
        count = 0
        try:
            with evaluating(base):
                for batch in calibration:
                    if not isinstance(batch, Mapping):
                        raise ValueError(
                            f"calibration[{count}] is a {type(batch).__name__}; give dicts of the model's arguments"
                        )
                    self.inputs.clear()
                    _forward(base, to_device(dict(batch), device), count)
                    count += 1
        finally:
            wires.observer = None
            self.inputs.clear()
        if count == 0:
            raise ValueError("calibration is empty; give at least one dict of the base model's arguments")
        self._finish()

    def __call__(self, variant: Shortcut, x, own, handed) -> None:
        """Called by every wired block, with what its forward computed."""
        with torch.autocast(x.device.type, enabled=False):
            block = self.blocks[variant.name]
            tokens = rows(x)
            tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
            if self.fits and block.moments.guess is not None:
                self._share_second(variant.name, x, tokens)
            variant.measure(block, self.merged[variant.name], tokens, own, handed)

    def _share_second(self, name: str, x: torch.Tensor, tokens: torch.Tensor) -> None:
        """q, k and v of one attention read the same tensor: its second moment is computed and kept once."""
        leader = next((other for seen, other in self.inputs if seen() is x), None)
        if leader is None:
            self.inputs.append((weakref.ref(x), name))
        leader = leader or name
        if self.readers.setdefault(name, leader) != leader:
            raise ValueError(
                f"{name} reads another tensor than in the first calibration batch; calibrate in like batches"
            )
        moments = self.blocks[name].moments
        if leader != name:
            moments.second = self.blocks[leader].moments.second
            return
        moments.second = moments.second or Second()
        moments.second.add(tokens)

    def _finish(self) -> None:
        for name, block in self.blocks.items():
            if block.moments.forwards == 0:
                raise ValueError(f"{name} did not run on the calibration batches: is the adapter active and enabled?")
            if not block.moments.finite():
                raise ValueError(f"calibration gives NaN or infinity at the input of {name}; check its batches")
            block.norm = block.moments.norm


def _forward(base: nn.Module, batch: dict, number: int) -> None:
    try:
        base(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"calibration[{number}] does not run through {type(base).__name__}: {detail}") from error
