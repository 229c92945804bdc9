"""What an arm is measured by: losses at fixed timesteps and noises.

The noises are functions of an image's content and a number: alike in all arms, whatever their seeds and whatever other
images there are. Each image is measured on its own, so that no other one changes even the rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ...common.adapters import save_adapter
from ...files import replacing
from ..data.batch import Batch, collate
from ..data.encoding import Latents
from ..data.plan import Draw
from ..data.samples import Material, TrainingSamples
from ..model.objective import Objective
from ..output.reports import Reports, Validation
from ..seeds import generator
from ..training.denoising import evaluating
from ..training.state import Learner
from .split import Image

TIMESTEPS, NOISES = 8, 4
ADAPTERS = "adapters"  # of every checkpoint that may be chosen, without what a resumed run needs


def measured_at(objective: Objective) -> list[torch.Tensor]:
    """The timesteps, each in the middle of its stratum."""
    return [objective.at((number + 0.5) / TIMESTEPS) for number in range(TIMESTEPS)]


class FixedSamples(TrainingSamples):
    """TIMESTEPS x NOISES samples of an image: its centre, upright, with noises that its content seeds."""

    varies = False

    def __init__(self, material: Material) -> None:
        flags = material.flags.replace(center_crop=True, random_flip=False, noise_offset=0.0)
        super().__init__(dataclasses.replace(material, flags=flags))
        self.timesteps = measured_at(material.objective)

    def random(self, draw: Draw) -> torch.Generator:
        """By the image's content and the sample's number."""
        return generator("experiment", self.material.sources[draw.source].images.marks[draw.image], draw.position)

    def timestep(self, position: int, shape: Sequence[int], draws: torch.Generator) -> torch.Tensor:
        """Of its stratum."""
        return self.timesteps[position // NOISES]

    def _cached(self, latents: Latents, draw: Draw, draws: torch.Generator) -> dict[str, torch.Tensor]:
        return latents.of(draw.image, 0)

    def batches(self, image: Image) -> Iterator[Batch]:
        """All samples of an image."""
        source, number = image
        size, most = self.material.sources[source].size(number), self.material.flags.train_batch_size
        draws = [Draw(source, number, size, position) for position in range(TIMESTEPS * NOISES)]
        for first in range(0, len(draws), most):
            yield collate([self[draw] for draw in draws[first : first + most]])


@torch.no_grad()
def losses_of(loss: Callable[[Batch], torch.Tensor], material: Material, images: Sequence[Image]) -> torch.Tensor:
    """Images x TIMESTEPS: the mean of `loss` (of each sample of a batch) over the noises."""
    samples = FixedSamples(material)
    found = [torch.cat([loss(batch) for batch in samples.batches(image)]) for image in images]
    return torch.stack(found).view(len(images), TIMESTEPS, NOISES).mean(2).cpu()


class SelectLoss(Validation):
    """In place of a run's validation loss: that on the images which choose, and the adapter kept beside it."""

    def _measure_and_draw(self, learner: Learner, reports: Reports, parts: Sequence[str]) -> None:
        if "loss" in parts and learner.step:
            keep_adapter(learner, adapter_folder(reports.folder, learner.step))
        super()._measure_and_draw(learner, reports, parts)

    def mean_loss(self, denoiser: nn.Module) -> float:
        """Mean over images, timesteps and noises."""
        with evaluating(denoiser, *self.loss.encoders), self.accelerator.autocast():
            losses = losses_of(
                lambda batch: self.loss(denoiser, batch, weighted=False), self.material, self.material.held_out
            )
        return losses.mean().item()


def adapter_folder(folder: Path, step: int) -> Path:
    """Where an arm keeps the adapter of a step."""
    return folder / ADAPTERS / f"step-{step:06d}"


def keep_adapter(learner: Learner, folder: Path) -> None:
    """Writes the adapters as they are at this step, as a checkpoint has them."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        for place, part in learner.trained.places(temporary):
            save_adapter(part, place)
