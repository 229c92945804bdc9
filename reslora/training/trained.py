"""All trained models as one module whose forward returns the loss of each sample of a batch."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Trained(nn.Module):
    """The trained models, the denoiser first, and their loss.

    `embeddings`: those of new tokens, by the name of the text encoder that contains them.

    accelerate wraps this module, so that the gradients of all models are averaged over processes.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        loss: Callable[[nn.Module, Any], torch.Tensor],
        embeddings: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.embeddings = nn.ModuleDict(embeddings or {})
        self.loss: Any = loss
        self._compiled: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not registered twice

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, which is the first of the models."""
        return next(iter(self.parts.values()))

    def places(self, folder: Path) -> Iterator[tuple[Path, nn.Module]]:
        """Yield each model and its directory: `folder` for the denoiser, a subdirectory for a text encoder."""
        for name, part in self.parts.items():
            yield (folder if part is self.denoiser else folder / name), part

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of all models by name.

        Parameters of a text encoder have the encoder's name in the pipeline as a prefix; those of the denoiser have
        none.
        """
        for name, part in self.parts.items():
            yield from part.named_parameters(prefix="" if part is self.denoiser else name)
        yield from self.embeddings.named_parameters(prefix="new_tokens")

    def forward(self, batch: object) -> torch.Tensor:
        """Return the loss of each sample, of shape (batch,)."""
        (denoiser,) = self._compiled or (self.denoiser,)
        return self.loss(denoiser, batch)

    def use_compiler(self) -> None:
        """Compile the denoiser for all later calls of `forward`."""
        self._compiled = (compiled(self.denoiser),)


def compiled(model: nn.Module) -> nn.Module:
    """Return a compiled version of the model for training steps.

    Samples and validation use the uncompiled model, because their batches have other shapes.

    PyTorch 2.13's CPU compiler loses track of buffers that are written in place when it fuses loops
    (`SchedulerNode.recompute_size_and_body`). Reordering operations to save memory then moves the use of an
    upsampling's gradient before its computation. Without this reordering, all gradients are right.
    """
    reorder = "reorder_for_peak_memory"
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = on_cpu and reorder in torch._inductor.list_options()
    return torch.compile(model, options={reorder: False} if known else None)
