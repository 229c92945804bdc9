"""Calibration: the unmerged model runs on a few batches, and every wired block's moments are collected."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from . import merging
from .config import ResLoraConfig
from .merging import Factors, Merged, Moments, Second
from .shortcuts import BlockShortcut, Shortcut, Wires, rows
from .tracing import evaluating, to_device


class Calibrator:
    """Watches the unmerged model run on the calibration batches and fills in the moments of every block."""

    def __init__(
        self, plan: list[list[Factors]], merged: list[list[Merged]] | None, config: ResLoraConfig, method: str
    ) -> None:
        self.blocks = {block.name: block for chain in plan for block in chain}
        self.middle = config.shortcut == "middle"
        self.candidates = {}
        for number, chain in enumerate(plan):
            for n, block in enumerate(chain):
                guess = None
                if method == "lstsq" and n > 0:
                    guess = merging.neighbour_sum(chain, n, config.reach, self.middle)
                elif method == "weights" and self.middle and n > 0:
                    guess = merged[number][n].a - block.a
                block.moments = Moments(guess)
                self.candidates[block.name] = merged[number][n] if merged is not None else None
        self.fits = method == "lstsq"
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

    def __call__(self, variant: Shortcut, layer: LoraLayer, x, own, handed) -> None:
        """Called by every wired block; for block-shortcuts `own` and `handed` are the stacked A and B."""
        with torch.autocast(x.device.type, enabled=False):
            block = self.blocks[variant.name]
            tokens = rows(x)
            tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
            if isinstance(variant, BlockShortcut):
                self._measure_cut(block, tokens, own, handed)
                own, handed = tokens @ own[:1].to(tokens).t(), None
            norm = torch.linalg.vector_norm(own.to(tokens) if self.middle else tokens)
            if self.fits and block.moments.guess is not None:
                self._share_second(variant.name, x, tokens)
            block.moments.add(tokens, own, handed, norm)

    def _measure_cut(self, block: Factors, tokens: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """A block merge cut to `max_rank`: measures the outputs themselves."""
        merged = self.candidates[block.name]
        if merged.a.shape == a.shape:
            return
        whole = tokens @ a.to(tokens).t() @ b.to(tokens).t()
        cut = tokens @ merged.a.to(tokens).t() @ merged.b.to(tokens).t()
        block.moments.measure(whole, cut - whole)

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
