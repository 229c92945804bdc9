"""Make the samples that `plan` lists: noise, timestep, caption and crop depend on the seed and the position."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.data import DataLoader, Dataset

from ...content_hash import content_mark
from ...errors import RunFailed
from ...options.images import NOISES, DataOptions, MethodOptions, TrainingOptions, ValidationOptions
from ..generators import derive, generator, shuffled
from ..model.families.base import Family
from ..model.objective import Objective
from .batch import Batch, collate
from .captions import choose
from .encoding import Instruction, Texts, opened, view
from .images import open_image
from .loaders import worker_options
from .plan import Draw, Plan
from .size import Size
from .sources import Source

TIMESTEPS = 8  # number of timesteps at which the losses of each image are compared
SHOWN = 256  # longest edge of an image in figures, in pixels
VALIDATION_DRAWS = 4  # noises per held-out image, one in each quarter of the timesteps


@dataclass(frozen=True)
class TrainingData:
    """The training data: sources, text states and options that samples are made from."""

    sources: tuple[Source, ...]
    texts: Texts
    """Text states of the prompts, and of the captions if these are encoded beforehand."""
    objective: Objective
    shapes: Mapping[Size, tuple[int, int, int]]
    """Channels, height and width of the latents, by image size."""
    family: Family
    adapter: MethodOptions
    data: DataOptions
    training: TrainingOptions
    validation: ValidationOptions

    @property
    def class_text(self) -> Mapping[str, torch.Tensor] | None:
        """The frozen text states of --output_preservation_prompt, without a batch dimension; None if not given."""
        return next((self.texts[prompt] for prompt in self.training.preserved_prompts), None)

    def plan(self, processes: int) -> Plan:
        """Return the order of the training images for `processes` processes."""
        return Plan(self.sources, self.training.train_batch_size * processes, self.training.seed)

    def updates(self, processes: int) -> int:
        """Return the number of optimizer updates per epoch with `processes` processes."""
        return self.plan(processes).updates_per_epoch(self.training.gradient_accumulation_steps)

    def sampled_caption(self, draw: Draw) -> str:
        """Return a sample's caption after the random transform.

        The sample's position seeds the transform, separately from the noise.
        """
        source = self.sources[draw.source]
        draws = generator(self.training.seed, "caption", draw.position)
        return source.transform.sampled(source.images.captions[draw.image], draws)

    @property
    def paired(self) -> bool:
        """Whether the images have reference images."""
        return self.sources[0].images.paired

    @property
    def held_out(self) -> list[tuple[int, int]]:
        """For every held-out image, the index of its source, and the index of the image within this source."""
        return [(number, image) for number, source in enumerate(self.sources) for image in source.held_out]

    def training_images(self, count: int) -> list[PIL.Image.Image]:
        """Return at most `count` training images for figures, evenly spaced over the data, no larger than SHOWN pixels.

        Class images and images that cannot be read at present are left out.
        """
        places = [
            (source.images, image) for source in self.sources if not source.images.of_class for image in source.train
        ]
        found = []
        for images, image in places[:: max(1, len(places) // count)][:count]:
            with contextlib.suppress(Exception):  # figures are optional, and each format's reader raises its own types
                opened = images.open(image)
                opened.thumbnail((SHOWN, SHOWN))
                found.append(opened)
        return found

    def references(self) -> list[tuple[str, list[PIL.Image.Image]]]:
        """Return the reference images of each sample image: those of the options, or else of the first held-out images.

        Without held-out images, those of the first training images are returned. The list is empty if no image has
        reference images. Each item is a hash of the images' content, and the images.
        """
        if files := self.validation.validation_image:
            count = self.data.references_per_image
            each = [files[start : start + count] for start in range(0, len(files), count)]
            return [("+".join(map(content_mark, some)), list(map(open_image, some))) for some in each]
        places = self.held_out or [(0, image) for image in self.sources[0].train]
        places = places[: max(1, len(self.validation.validation_prompt))] if self.paired else []
        images = [(self.sources[source].images, image) for source, image in places]
        return [(found.marks[image], found.open_references(image)) for found, image in images]


class TrainingSamples(Dataset):
    """Dataset that maps a `Draw` to its training sample."""

    purpose = "training"
    varies = True
    """Whether captions are transformed randomly if the options specify it."""
    centered = False
    """Whether stored latents are those of the unflipped center crop, not of a random variant."""

    def __init__(self, training_data: TrainingData) -> None:
        self.training_data = training_data
        self.noise_offset = training_data.training.noise_offset

    def random(self, draw: Draw) -> torch.Generator:
        """Return the random generator of a sample."""
        return generator(self.training_data.training.seed, self.purpose, draw.position)

    def timestep(self, position: int, shape: Sequence[int], draws: torch.Generator) -> torch.Tensor:
        """Return the timestep of a sample, a scalar; `shape` is channels, height and width of its latents."""
        return self.training_data.objective.draw(
            draws, tokens=shape[1] * shape[2] // self.training_data.family.latents_per_token
        )

    def __getitem__(self, draw: Draw) -> Batch:
        training_data, source = self.training_data, self.training_data.sources[draw.source]
        draws = self.random(draw)
        shape = training_data.shapes[draw.size]
        timestep, noise = self.timestep(draw.position, shape, draws), torch.randn(shape, generator=draws)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn(shape[0], 1, 1, generator=draws)
        posterior_noise = torch.randn(shape, generator=draws)
        captions = source.images.captions[draw.image]
        chosen = captions[choose(len(captions), draws)]
        varies = self.varies and source.transform.varies
        caption = training_data.sampled_caption(draw) if varies else source.transform.plain(chosen)
        latents = source.latents
        return Batch(
            timestep, noise, posterior_noise, weight=torch.tensor(source.weight), caption=caption,
            text=training_data.texts[self._instruction(caption, source, draw.image)]
            if training_data.data.cache_text_embeddings else None,
            **(
                self._fresh(source, draw, draws) if latents is None
                else latents.of(draw.image, 0 if self.centered else choose(latents.variants, draws))
            ),
        )  # fmt: skip

    def _instruction(self, caption: str, source: Source, image: int) -> Instruction:
        return (caption, source.images.marks[image]) if self.training_data.family.reads_references else caption

    def _fresh(self, source: Source, draw: Draw, draws: torch.Generator) -> dict[str, torch.Tensor]:
        data = self.training_data.data
        found = opened(source.images, draw.image, self.training_data.training.masked_loss)
        if isinstance(found, str):
            raise RunFailed(f"{source.images.name(draw.image)}: {found}")
        crop = (0.5, 0.5) if data.center_crop else torch.rand(2, generator=draws).tolist()
        flip = data.random_flip and bool(torch.rand((), generator=draws) < 0.5)
        return view(found, crop, flip, draw.size, data, self.training_data.family)

    def batched(self, draws: Sequence[Draw], batch_size: int) -> Iterator[Batch]:
        """Yield the samples of `draws`, all of one size, in batches."""
        for first in range(0, len(draws), batch_size):
            yield collate([self[draw] for draw in draws[first : first + batch_size]])


class CalibrationSamples(TrainingSamples):
    """Samples for the calibration of the merge: training images with other noise and untransformed captions."""

    purpose = "calibration"
    varies = False

    def batches(self, count: int, processes: int = 1) -> Iterator[Batch]:
        """Yield the first `count` samples of a run with `processes` processes, in batches of --train_batch_size."""
        plan, size = self.training_data.plan(processes), self.training_data.training.train_batch_size
        for first in range(0, count, size):
            forward, rank = divmod(first // size, processes)
            draws = plan.forward(forward)[rank * size : (rank + 1) * size]
            yield collate([self[draw] for draw in draws[: count - first]])


class ValidationSamples(TrainingSamples):
    """Samples of held-out images: VALIDATION_DRAWS of each, spread evenly over the timesteps, without the noise offset.

    At most --max_validation_images are used, chosen at random once per run. The noise of an image does not
    depend on which other images are chosen.
    """

    purpose = "validation"
    varies = False

    def __init__(self, training_data: TrainingData) -> None:
        super().__init__(training_data)
        self.noise_offset = 0.0
        held_out, most = training_data.held_out, training_data.validation.max_validation_images
        measured = sorted(shuffled(len(held_out), training_data.training.seed, "max_validation_images")[:most])
        self.draws = [
            Draw(source, image, training_data.sources[source].sizes[image], place * VALIDATION_DRAWS + noise)
            for place in measured
            for source, image in [held_out[place]]
            for noise in range(VALIDATION_DRAWS)
        ]

    def timestep(self, position: int, shape: Sequence[int], draws: torch.Generator) -> torch.Tensor:
        """Return a random timestep, a scalar, in the quarter of the timesteps that the position determines."""
        quarter = position % VALIDATION_DRAWS + float(torch.rand((), generator=draws))
        return self.training_data.objective.at(quarter / VALIDATION_DRAWS)

    def batches(self) -> Iterator[Batch]:
        """Yield all samples; every batch has one size."""
        for size in dict.fromkeys(draw.size for draw in self.draws):
            of_size = [draw for draw in self.draws if draw.size == size]
            yield from self.batched(of_size, self.training_data.training.train_batch_size)


class FixedSamples(TrainingSamples):
    """TIMESTEPS x `noises` samples of each image: the unflipped center crop, with noise seeded by the image's content.

    The samples of an image are the same in all runs, whatever the seed and the other images are.
    """

    varies = False
    centered = True

    def __init__(self, training_data: TrainingData, noises: int = NOISES) -> None:
        data = dataclasses.replace(training_data.data, center_crop=True, random_flip=False)
        super().__init__(dataclasses.replace(training_data, data=data))
        self.noise_offset = 0.0
        self.timesteps, self.noises = measured_at(training_data.objective), noises

    def random(self, draw: Draw) -> torch.Generator:
        """Return the generator seeded by the image's content and the sample's number."""
        return generator("experiment", self.training_data.sources[draw.source].images.marks[draw.image], draw.position)

    def timestep(self, position: int, shape: Sequence[int], draws: torch.Generator) -> torch.Tensor:
        """Return the timestep, a scalar, in the middle of the stratum that the sample's position determines."""
        return self.timesteps[position // self.noises]

    def size(self, image: tuple[int, int]) -> Size:
        """Return the size of an image; `image`: index of its source, and index of the image within the source."""
        return self.training_data.sources[image[0]].sizes[image[1]]

    def batches(self, images: Sequence[tuple[int, int]], batch_size: int) -> Iterator[Batch]:
        """Yield all samples of images of one size in batches."""
        positions = range(TIMESTEPS * self.noises)
        draws = [Draw(*image, self.size(image), position) for image in images for position in positions]
        return self.batched(draws, batch_size)


def measured_at(objective: Objective) -> list[torch.Tensor]:
    """Split the range of timesteps into TIMESTEPS equal strata, and return the middle of each stratum, a scalar."""
    return [objective.at((number + 0.5) / TIMESTEPS) for number in range(TIMESTEPS)]


@torch.no_grad()
def losses_of(
    loss: Callable[[Batch], torch.Tensor],
    training_data: TrainingData,
    images: Sequence[tuple[int, int]],
    noises: int = NOISES,
    most: int = 0,
) -> torch.Tensor:
    """Return the loss of each image at each timestep, averaged over the noises (images x TIMESTEPS).

    `loss` maps a batch to one loss per sample. `images`: index of the source, and index of the image within the source.
    All samples of an image are in one batch, so that other images do not change even the rounding. Images of one size
    share a batch of at most `most` samples. Batches that do not fit into memory are divided.
    """
    samples, each = FixedSamples(training_data, noises), TIMESTEPS * noises
    count = max(1, most // each)
    order = sorted(range(len(images)), key=lambda place: samples.size(images[place]) if count > 1 else place)
    groups = itertools.groupby(order, lambda place: samples.size(images[place]) if count > 1 else place)
    together = [[images[place] for place in group] for _, group in groups]
    batch_size = count * each
    while True:
        try:
            found = [loss(batch) for group in together for batch in samples.batches(group, batch_size)]
            losses = torch.cat(found).view(len(images), TIMESTEPS, noises).mean(2).cpu()
            return losses[torch.argsort(torch.tensor(order))]
        except RuntimeError as error:
            if batch_size == 1 or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        batch_size //= 2


def measured(training_data: TrainingData) -> list[tuple[int, int]]:
    """Return at most --max_validation_images held-out images: those with the lowest hashes of their content.

    Each image is a pair: the index of its source, and the index of the image within this source.
    """
    marks = {image: training_data.sources[image[0]].images.marks[image[1]] for image in training_data.held_out}
    order = sorted(marks, key=lambda image: derive("max_validation_images", marks[image]))
    chosen = set(order[: training_data.validation.max_validation_images])
    return [image for image in training_data.held_out if image in chosen]


def training_loader(
    training_data: TrainingData, steps: Sequence[int], processes: int, rank: int, pin: bool
) -> DataLoader:
    """Return a loader of the batches that process `rank` of `processes` reads in `steps`.

    N processes together read the samples that one process with N times the batch size would read.
    """
    plan, training = training_data.plan(processes), training_data.training
    batch, forwards = training.train_batch_size, training.gradient_accumulation_steps
    draws = (  # generated lazily, because there are as many as samples in the run
        plan.forward(forward)[rank * batch : (rank + 1) * batch]
        for step in steps
        for forward in range(step * forwards, (step + 1) * forwards)
    )
    return DataLoader(
        TrainingSamples(training_data), batch_sampler=draws, pin_memory=pin, collate_fn=collate,
        **worker_options(training_data.data.dataloader_num_workers),
    )  # fmt: skip
