"""Images and captions, encoded once and kept on disk: latents and text states, read when they are asked for.

A file (see `cells`) holds a part of the dataset and is named by all that its content depends on. So a second run finds
it, processes share it, and an interrupted run encodes no part twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ...common.errors import InvalidArgument, first_line
from ...files import read_object, write_json
from ..arguments import Flags
from ..context import Context
from ..folder import cache_folder
from ..model.families.base import Family, Text
from ..seeds import derive, generator
from .dataset import ImageDataset, data_flag
from .images import crop_and_scale, crop_sizes
from .loaders import stream, worker_options
from .size import Size
from .store import Cell, Cells, cached, missing

PART_OF_IMAGES, PART_OF_CAPTIONS, CAPTIONS_AT_ONCE = 256, 4096, 64
RANDOM_CROPS = 4  # crops cached for an image that isn't square: the centre and three more


@dataclass(frozen=True)
class Texts:
    """Text states by caption, read from disk when they are asked for."""

    cells: Cells
    places: dict[str, int]

    def __getitem__(self, caption: str) -> Text:
        return self.cells[self.places[caption]]

    def __contains__(self, caption: str) -> bool:
        return caption in self.places


@dataclass(frozen=True)
class Latents:
    """The moments of every variant of every image, read from disk when they are asked for."""

    cells: Cells
    """One for each variant of the first image, then of the second, and so on."""
    variants: int
    """Crops and mirror images encoded of each image; number 0 is the upright centre."""
    images: Sequence[int]
    """Which of the encoded images these are."""

    def of(self, index: int, variant: int) -> dict[str, torch.Tensor]:
        """`moments` (2 x channels x height x width) and `sizes` (6) of a variant of an image."""
        return self.cells[self.images[index] * self.variants + variant]

    def select(self, indices: Sequence[int]) -> Latents:
        """The latents of some of the images."""
        return dataclasses.replace(self, images=[self.images[index] for index in indices])


# -- captions ----------------------------------------------------------------------------------------------------------


def encode_texts(
    texts: Sequence[str], key: object, load_encoders: Callable[[], DiffusionPipeline], context: Context
) -> Texts:
    """Text states of each distinct caption; the encoders are loaded only if some are not on disk yet.

    `key` stands for the encoders' weights and precision.
    """
    family, longest, folder = context.model.family, context.flags.max_sequence_length, cache_folder(context.flags)
    texts = list(dict.fromkeys(texts))
    parts = [texts[start : start + PART_OF_CAPTIONS] for start in range(0, len(texts), PART_OF_CAPTIONS)]
    paths = [folder / f"captions-{derive(key, longest, part):016x}.arrow" for part in parts]
    loaded: list[DiffusionPipeline] = []

    def encode(number: int) -> Generator[Cell]:
        loaded[:] = loaded or [load_encoders()]
        for start in range(0, len(parts[number]), CAPTIONS_AT_ONCE):
            context.stop.check("stopped before training began")
            captions = parts[number][start : start + CAPTIONS_AT_ONCE]
            with torch.no_grad():
                states = family.encode_captions(loaded[0], captions, longest)
            for position in range(len(captions)):
                yield {name: value[position] for name, value in states.items()}

    cells = cached(paths, PART_OF_CAPTIONS, encode, context.accelerator)
    return Texts(cells, {text: place for place, text in enumerate(texts)})


# -- images ------------------------------------------------------------------------------------------------------------


class Variants(TorchDataset):
    """Every variant of image `index`: pixels (variants x 3 x height x width) and sizes, or why it cannot be read."""

    def __init__(self, images: ImageDataset, sizes: Sequence[Size], flags: Flags) -> None:
        self.images, self.sizes, self.flags = images, sizes, flags
        # In a bucket there is little room for a crop to move in.
        self.crops = 1 if flags.center_crop or flags.use_aspect_ratio_buckets or images.square else RANDOM_CROPS
        self.flips = (False, True) if flags.random_flip else (False,)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        """How many variants an image has."""
        return self.crops * len(self.flips)

    @property
    def key(self) -> tuple:
        """All that the pixels depend on."""
        flags, seed = self.flags, self.flags.seed if self.crops > 1 else None
        sizes = self.sizes if len(set(self.sizes)) > 1 else self.sizes[:1]
        sides = [(size.height, size.width) for size in sizes]
        return (self.images.content, sides, flags.image_interpolation_mode, self.crops, self.flips, seed)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | str:
        try:
            image = self.images.open(index)
        except Exception as error:  # each format's reader has exceptions of its own
            return f"damaged ({first_line(error)})"
        draws = torch.rand(self.crops - 1, 2, generator=generator(self.flags.seed, "crops", index)).tolist()
        how = [(crop, flip) for crop in [(0.5, 0.5), *draws] for flip in self.flips]
        size, interpolation = self.sizes[index], self.flags.image_interpolation_mode
        pixels = torch.stack([crop_and_scale(image, crop, flip, size, interpolation) for crop, flip in how])
        return pixels, torch.tensor([crop_sizes(image.size, crop, flip, size) for crop, flip in how])


def encode_images(variants: Variants, key: object, vae: nn.Module, context: Context) -> tuple[Latents, dict[int, str]]:
    """The latents' moments of all variants, and which images are damaged; `key` stands for the autoencoder."""
    accelerator, folder = context.accelerator, cache_folder(context.flags)
    starts = range(0, len(variants), PART_OF_IMAGES)
    paths = [folder / f"latents-{derive(key, variants.key, start):016x}.arrow" for start in starts]
    parts = [range(start, min(start + PART_OF_IMAGES, len(variants))) for start in starts]
    _tell_if_anew(paths, variants, folder, accelerator)
    total = sum(len(parts[number]) for number in missing(paths, accelerator))
    silent = not accelerator.is_main_process or total == 0
    bar = tqdm(desc="encoding images", total=total, disable=silent, dynamic_ncols=True)

    def encode(number: int) -> Generator[Cell]:
        options = worker_options(variants.flags.dataloader_num_workers)
        loader = DataLoader(variants, batch_size=None, sampler=parts[number], **options)
        with contextlib.closing(stream(loader)) as items:
            for found in items:
                context.stop.check("stopped before training began")
                if isinstance(found, str):
                    yield from [found] * variants.count
                else:
                    yield from encoded(context.model.family, vae, *found)
                bar.update()

    with bar:
        cells = cached(paths, PART_OF_IMAGES * variants.count, encode, accelerator)
    if accelerator.is_main_process:
        write_json(_record(folder, variants), {"data": data_flag(variants.flags), "latents": paths[0].name})
    problems = {place // variants.count: text for place, text in cells.problems().items()}
    return Latents(cells, variants.count, range(len(variants))), problems


def _tell_if_anew(paths: Sequence[Path], variants: Variants, folder: Path, accelerator: Accelerator) -> None:
    """Says so where other latents of this data are there: one new image is enough, for files are named by all."""
    before = read_object(_record(folder, variants)).get("latents")
    there = isinstance(before, str) and (folder / before).is_file()
    if there and not any(path.exists() for path in paths):
        accelerator.print(f"the images or settings changed: all {len(variants)} images are encoded anew")


def _record(folder: Path, variants: Variants) -> Path:
    """Where it is kept which latents a folder or dataset was encoded to last."""
    flags = variants.flags
    place = flags.dataset_name or str(Path(flags.train_data_dir).resolve())
    return folder / f"images-{derive(place, flags.dataset_config_name):016x}.json"


def encoded(family: Family, vae: nn.Module, pixels: torch.Tensor, sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What is kept of each of an image's variants."""
    with torch.no_grad():
        moments = family.encode_images(vae, pixels.to(vae.device, vae.dtype))
    return [{"moments": moment, "sizes": size} for moment, size in zip(moments, sizes, strict=True)]


def without_damaged(
    images: ImageDataset, latents: Latents, problems: dict[int, str], flags: Flags
) -> tuple[ImageDataset, Latents, list[int]]:
    """Images and latents that training can use, and their numbers among all.

    Raises `InvalidArgument` with --strict, or where none is left.
    """
    keep = [index for index in range(len(images)) if index not in problems]
    if not problems:
        return images, latents, keep
    names = {i: images.rows[i]["image"]["path"] or f"image {i}" for i in problems}
    if flags.strict:
        index, problem = next(iter(problems.items()))
        raise InvalidArgument(f"--strict {names[index]}", problem, "repair or remove it, or leave --strict out")
    if not keep:
        raise InvalidArgument(data_flag(flags), "every image is damaged", "give images that can be opened")
    left_out = [f"{names[i]}: {problem}" for i, problem in problems.items()]
    return images.select(keep, left_out), latents.select(keep), keep
