"""Measure the scale of shortcut terms at initialization, to calibrate `lora_matched` (see `controls`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import ResLoraConfig
from ..linking import base_model, lora_layers
from ..model import connect, disconnect
from ..shortcuts.base import Shortcut
from ..tracing import evaluating
from ..wiring import connected
from .controls import DEFAULT, Settings


@contextmanager
def gauged(model: nn.Module, shortcuts: ResLoraConfig, example_inputs: dict | None = None) -> Iterator[Gauge]:
    """Connect a model that has plain LoRA inside this context, and yield a `Gauge` that measures its forward passes.

    The model is in eval mode and connected by `shortcuts`. Raises `ValueError` as `reslora.connect` does.
    """
    connect(model, shortcuts, example_inputs=example_inputs)
    base = base_model(model)
    connected(base, DEFAULT).wires.observer = gauge = Gauge(base, shortcuts.carries)
    try:
        with torch.no_grad(), evaluating(base):
            yield gauge
    finally:
        disconnect(model)


@dataclass
class Gauge:
    """Sums of squares for each block: of h (the input of its B), and of A_n x_n."""

    base: nn.Module
    carries: bool
    squares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def __call__(self, variant: Shortcut, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None) -> None:
        """Record one forward pass of a block; see `Wires.observer`."""
        h = own
        if handed is not None:
            h = own + handed if self.carries else torch.cat([own, handed], dim=1)
        for place, value in enumerate((h, own)):
            dtype = torch.promote_types(value.dtype, torch.float32)
            self.squares[variant.name][place] += torch.linalg.vector_norm(value, dtype=dtype).item() ** 2

    def settings(self) -> Settings:
        """Return the matched alphas, for `put_on`."""
        layers = lora_layers(self.base, DEFAULT)
        squares = self.squares.items()
        return {"alphas": {name: layers[name].lora_alpha[DEFAULT] * _ratio(h, own) for name, (h, own) in squares}}


def _ratio(square: float, of: float) -> float:
    """Return `sqrt(square / of)`; 1 if `of` is zero."""
    return math.sqrt(square / of) if of else 1.0
