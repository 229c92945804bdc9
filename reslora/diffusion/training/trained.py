"""What is trained, as one module: its forward gives the loss of each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common.temporarily import temporarily


class Trained(nn.Module):
    """The parts of a model that train, the denoiser first, and their loss.

    accelerate wraps this module, so that the gradients of every part are averaged over the processes.
    """

    def __init__(self, parts: Mapping[str, nn.Module], loss: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.loss: Any = loss
        self._compiled: tuple[nn.Module, ...] = ()  # no module of its own: it has the parameters of the denoiser

    @property
    def denoiser(self) -> nn.Module:
        """The part that predicts."""
        return next(iter(self.parts.values()))

    def places(self, folder: Path) -> Iterator[tuple[Path, nn.Module]]:
        """Where in a folder each part has its files: the denoiser in it, a text encoder in one of its name below."""
        for name, part in self.parts.items():
            yield (folder if part is self.denoiser else folder / name), part

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by name: the denoiser's by its own, those of a text encoder below its name in the pipeline."""
        for name, part in self.parts.items():
            yield from part.named_parameters(prefix="" if part is self.denoiser else name)

    def forward(self, batch: object) -> torch.Tensor:
        """Loss of each sample."""
        (denoiser,) = self._compiled or (self.denoiser,)
        return self.loss(denoiser, batch)

    def use_compiler(self) -> None:
        """From here on the denoiser runs compiled in `forward`."""
        self._compiled = (compiled(self.denoiser),)

    def without_compiler(self) -> AbstractContextManager[None]:
        """Inside, nothing runs compiled."""
        return temporarily(self, _compiled=())


def compiled(model: nn.Module) -> nn.Module:
    """Return the model for training steps only: samples and validation batches have other shapes, and go without."""
    reorder = "reorder_for_peak_memory"
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = on_cpu and reorder in torch._inductor.list_options()
    return torch.compile(model, options={reorder: False} if known else None)
