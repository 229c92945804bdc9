"""All trained models as one module whose forward returns the loss of each sample of a batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attributes import override_attributes


class Trained(nn.Module):
    """The trained models, the denoiser first, and their loss.

    accelerate wraps this module, so that gradients of all of them are averaged over processes.
    """

    def __init__(self, parts: Mapping[str, nn.Module], loss: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.loss: Any = loss
        self._compiled: tuple[nn.Module, ...] = ()  # not registered: it has the denoiser's parameters

    @property
    def denoiser(self) -> nn.Module:
        """The model that predicts."""
        return next(iter(self.parts.values()))

    def places(self, folder: Path) -> Iterator[tuple[Path, nn.Module]]:
        """Yield the directory and module of each model: the denoiser in `folder`, a text encoder in a subdirectory."""
        for name, part in self.parts.items():
            yield (folder if part is self.denoiser else folder / name), part

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters by name: the denoiser's own names, and those of text encoders with a prefix.

        The prefix is the text encoder's name in the pipeline.
        """
        for name, part in self.parts.items():
            yield from part.named_parameters(prefix="" if part is self.denoiser else name)

    def forward(self, batch: object) -> torch.Tensor:
        """Return the loss of each sample (batch)."""
        (denoiser,) = self._compiled or (self.denoiser,)
        return self.loss(denoiser, batch)

    def use_compiler(self) -> None:
        """Run the denoiser compiled in `forward` from here on."""
        self._compiled = (compiled(self.denoiser),)

    def without_compiler(self) -> AbstractContextManager[None]:
        """Return a context in which nothing runs compiled."""
        return override_attributes(self, _compiled=())


def compiled(model: nn.Module) -> nn.Module:
    """Return the compiled model for training steps.

    Samples and validation batches have other shapes and do not use it.
    """
    reorder = "reorder_for_peak_memory"
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = on_cpu and reorder in torch._inductor.list_options()
    return torch.compile(model, options={reorder: False} if known else None)
