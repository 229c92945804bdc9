"""Training samples: sample number `position` of a run is a function of the seed and the position, and of nothing else.

So all methods see the same data, a resumed run equals an uninterrupted one, and N processes share what one would read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..arguments import Flags
from ..training.objective import Objective
from .dataset import ImageDataset
from .encoding import Latents, Texts
from .images import crop_and_scale, crop_sizes
from .loaders import worker_options
from .seeds import generator, shuffled

VALIDATION_DRAWS = 4  # noises per held-out image, one in each quarter of the timesteps


@dataclass(frozen=True)
class Material:
    """What samples are made of."""

    images: ImageDataset
    latents: Latents | None
    """None: images are encoded as they are drawn."""
    texts: Texts
    """Text states of the prompts, and of the captions where these are encoded beforehand."""
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    objective: Objective
    latent_shape: tuple[int, int, int]
    flags: Flags


def split(count: int, flags: Flags) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The images trained on, and those held out for the validation loss."""
    order = shuffled(count, flags.seed, "validation_split")
    share = flags.validation_split
    held_out = min(max(1, round(share * count)), count - 1) if share else 0
    return tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out]))


class TrainingSamples(Dataset):
    """Samples of the training images, as many as anybody asks for."""

    purpose = "training"

    def __init__(self, material: Material) -> None:
        self.material = material
        self.noise_offset = material.flags.noise_offset
        self._epoch, self._order = None, None

    def image(self, position: int) -> int:
        """The image of a sample: each epoch goes through all of them in an order of its own."""
        train = self.material.train
        epoch, place = divmod(position, len(train))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(train), self.material.flags.seed, "order", epoch)
        return train[self._order[place]]

    def timestep(self, position: int, draws: torch.Generator) -> torch.Tensor:
        """The timestep of a sample."""
        return self.material.objective.draw(draws)

    def __getitem__(self, position: int) -> dict:
        material = self.material
        draws = generator(material.flags.seed, self.purpose, position)
        shape, index = material.latent_shape, self.image(position)
        sample = {"timesteps": self.timestep(position, draws), "noise": torch.randn(shape, generator=draws)}
        if self.noise_offset:
            sample["noise"] += self.noise_offset * torch.randn(shape[0], 1, 1, generator=draws)
        sample["posterior_noise"] = torch.randn(shape, generator=draws)
        captions = material.images.captions[index]
        sample["caption"] = captions[_choose(len(captions), draws)]
        if material.flags.cache_text_embeddings:
            sample["text"] = material.texts[sample["caption"]]
        return sample | (self._fresh(index, draws) if material.latents is None else self._cached(index, draws))

    def _cached(self, index: int, draws: torch.Generator) -> dict:
        latents = self.material.latents
        return latents.of(index, _choose(latents.variants, draws))

    def _fresh(self, index: int, draws: torch.Generator) -> dict:
        flags, image = self.material.flags, self.material.images.open(index)
        crop = (0.5, 0.5) if flags.center_crop else torch.rand(2, generator=draws).tolist()
        flip = flags.random_flip and bool(torch.rand((), generator=draws) < 0.5)
        sizes = torch.tensor(crop_sizes(image.size, crop, flip, flags.resolution))
        pixels = crop_and_scale(image, crop, flip, flags.resolution, flags.image_interpolation_mode)
        return {"pixels": pixels, "sizes": sizes}


class CalibrationSamples(TrainingSamples):
    """Training images with noise of their own, for the merge."""

    purpose = "calibration"


class ValidationSamples(TrainingSamples):
    """Held-out images, each with VALIDATION_DRAWS noises spread evenly over the timesteps, without the noise offset.

    At most --max_validation_images of them, drawn once; the noises of an image do not depend on which others are.
    """

    purpose = "validation"

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self.noise_offset = 0.0
        flags, count = material.flags, len(material.held_out)
        drawn = shuffled(count, flags.seed, "max_validation_images")[: flags.max_validation_images]
        self.measured = sorted(drawn)

    def __len__(self) -> int:
        return len(self.measured) * VALIDATION_DRAWS

    def __getitem__(self, number: int) -> dict:
        place, draw = divmod(number, VALIDATION_DRAWS)
        return super().__getitem__(self.measured[place] * VALIDATION_DRAWS + draw)

    def image(self, position: int) -> int:
        """The image of a sample."""
        return self.material.held_out[position // VALIDATION_DRAWS]

    def timestep(self, position: int, draws: torch.Generator) -> torch.Tensor:
        """The timestep of a sample, in its quarter."""
        quarter = position % VALIDATION_DRAWS + float(torch.rand((), generator=draws))
        return self.material.objective.at(quarter / VALIDATION_DRAWS)


def _choose(count: int, draws: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=draws))


def training_loader(material: Material, steps: Sequence[int], processes: int, rank: int, pin: bool) -> DataLoader:
    """This process's batches of these steps, once; N processes share what one process would read."""
    flags = material.flags
    batch, forwards = flags.train_batch_size, flags.gradient_accumulation_steps
    positions = (  # made as they are needed, for there are as many as samples in a run
        [(forward * processes + rank) * batch + i for i in range(batch)]
        for step in steps
        for forward in range(step * forwards, (step + 1) * forwards)
    )
    return DataLoader(
        TrainingSamples(material), batch_sampler=positions, pin_memory=pin, collate_fn=collate,
        **worker_options(flags.dataloader_num_workers),
    )  # fmt: skip


def batches(samples: Dataset, count: int, size: int) -> Iterator[dict]:
    """The first `count` samples in batches of at most `size`."""
    for start in range(0, count, size):
        yield collate([samples[position] for position in range(start, min(start + size, count))])


def collate(samples: list[dict]) -> dict:
    """A batch: tensors are stacked, but for text states of different lengths, which stay lists."""
    batch = default_collate([{k: v for k, v in sample.items() if k != "text"} for sample in samples])
    if "text" in samples[0]:
        batch["text"] = stack_texts([sample["text"] for sample in samples])
    return batch


def stack_texts(texts: list[dict]) -> dict:
    """Text states of several captions, by name: a tensor, or a list where their lengths differ."""
    columns = {name: [text[name] for text in texts] for name in texts[0]}
    alike = {name: len({value.shape for value in values}) == 1 for name, values in columns.items()}
    return {name: torch.stack(values) if alike[name] else values for name, values in columns.items()}
