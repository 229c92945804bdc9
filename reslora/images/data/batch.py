"""A batch: samples of one size, stacked, as the data loader yields them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from ..model.families.base import Text


@dataclass
class Batch:
    """The inputs of one forward pass. Every tensor starts with the batch dimension.

    Datasets yield each sample as a `Batch` without that dimension.
    """

    timesteps: torch.Tensor
    """One timestep per sample, of shape (batch,)."""
    noise: torch.Tensor
    """Noise to add to the latents, batch x channels x height x width; `posterior_noise` has the same shape."""
    posterior_noise: torch.Tensor
    """The noise that samples latents from their mean and standard deviation."""
    sizes: torch.Tensor
    """6 integers per sample: SDXL's size conditioning, see `images.crop_sizes`."""
    weight: torch.Tensor
    """Factor of each sample's loss, of shape (batch,)."""
    caption: str | list[str]
    text: Text | None = None
    """Text states; None if the forward pass encodes the caption."""
    moments: torch.Tensor | None = None
    """Mean and standard deviation of the latents, batch x 2 x channels x height x width.

    None if the forward pass encodes the pixels.
    """
    pixels: torch.Tensor | None = None
    """Batch x 3 x height x width, in [-1, 1]."""
    reference: torch.Tensor | None = None
    """Means of the latents of the reference images that an edit model reads; None if the forward pass encodes them.

    Batch x images x channels x height x width.
    """
    reference_pixels: torch.Tensor | None = None
    """Batch x images x 3 x height x width, in [-1, 1]."""
    mask: torch.Tensor | None = None
    """The weight of the loss at each position, 0 to 1, in the shape batch x 1 x height x width.

    Height and width are those of `pixels` or, if these are None, of the latents.
    """

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`, copied without waiting for the device."""
        return self._with(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; torch's `DataLoader` calls this if `pin_memory` is set."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(**tree_map_only(torch.Tensor, change, vars(self)))


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack single samples into a batch; text states of different lengths stay lists."""
    stacked: dict = {}
    for name in vars(samples[0]):
        values = [getattr(sample, name) for sample in samples]
        if values[0] is not None:
            stacked[name] = stack_texts(values) if name == "text" else default_collate(values)
    return Batch(**stacked)


def stack_texts(texts: Sequence[Mapping[str, torch.Tensor]]) -> Text:
    """Return the text states of several captions, by name: a stacked tensor, or a list of tensors if lengths differ.

    `texts`: text states of single captions, without a batch dimension.
    """
    columns = {name: [text[name] for text in texts] for name in texts[0]}
    alike = {name: len({value.shape for value in values}) == 1 for name, values in columns.items()}
    return {name: torch.stack(values) if alike[name] else values for name, values in columns.items()}
