"""A batch: samples of one size, stacked, as the loader hands them over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import default_collate

from ..model.families.base import Text


@dataclass
class Batch:
    """What a forward is made of, batch first; of a single sample, the same without that axis."""

    timesteps: torch.Tensor
    noise: torch.Tensor
    """Channels x height x width of the latents, as the next one."""
    posterior_noise: torch.Tensor
    """For drawing latents from their mean and standard deviation."""
    sizes: torch.Tensor
    """6 numbers, see `images.crop_sizes`."""
    weight: torch.Tensor
    """Of the sample's loss."""
    caption: str | list[str]
    text: Text | None = None
    """Text states; None: the caption is encoded in the forward."""
    moments: torch.Tensor | None = None
    """Mean and standard deviation of the latents; None: pixels are encoded in the forward."""
    pixels: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    """1 x height x width, of the pixels or of the latents: how much of the loss of each place counts."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._with(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU reads by itself; torch's loader calls it."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors: dict = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors, text=self.text and changed(self.text, change))


def collate(samples: Sequence[Batch]) -> Batch:
    """Single samples as one batch: tensors are stacked, but for text states of different lengths, which stay lists."""
    stacked: dict = {}
    for field in dataclasses.fields(Batch):
        values = [getattr(sample, field.name) for sample in samples]
        if values[0] is not None:
            stacked[field.name] = stack_texts(values) if field.name == "text" else default_collate(values)
    return Batch(**stacked)


def stack_texts(texts: Sequence[Mapping[str, torch.Tensor]]) -> Text:
    """Text states of several captions, by name: a tensor, or a list where their lengths differ."""
    columns = {name: [text[name] for text in texts] for name in texts[0]}
    alike = {name: len({value.shape for value in values}) == 1 for name, values in columns.items()}
    return {name: torch.stack(values) if alike[name] else values for name, values in columns.items()}


def changed(text: Text, change: Callable[[torch.Tensor], torch.Tensor]) -> Text:
    """Text states with every tensor changed."""
    return {
        name: list(map(change, value)) if isinstance(value, list) else change(value) for name, value in text.items()
    }
