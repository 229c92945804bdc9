"""Encode images and captions once, store latents and text states on disk, and read them on access.

An item's key (see `store`) is a hash of everything that its encoding depends on, and of nothing else in the dataset.
Therefore a second run encodes only new or changed items, and a resumed run repeats no finished file. The processes of
a run divide the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ...errors import InvalidArgument, RunFailed
from ...options.images import DataOptions, TrainingOptions
from ...runtime.signals import NOT_BEGUN
from ..cache_folder import cache_folder
from ..context import ImageContext
from ..generators import derive, generator
from ..model.families.base import Family
from ..model.loading import wide_enough
from .buckets import kept
from .dataset import ImageDataset, data_flag
from .images import NOTHING_COUNTS, crop_and_scale, crop_mask, crop_sizes, damage, passes
from .loaders import stream, worker_options
from .size import Size
from .store import Encoded, Item, fill, remove_damaged, share

CAPTIONS_AT_ONCE = 64
MASKED = "masked-2"  # part of the cache's keys; change it whenever masks are read differently
RANDOM_CROPS = 4  # crops that are cached of an image that must be cut: the center and three random ones
FITS = 0.93  # if a bucket keeps at least this fraction of an image, only the center crop is cached


Opened = tuple[Image, Image | None, list[Image]]
"""An image, its mask or None, and its reference images."""
Instruction = str | tuple[str, str]
"""A caption or, if the text encoder reads reference images, a caption and the hash of its reference image's content."""


@dataclass(frozen=True)
class Texts:
    """Outputs of the text encoders by caption, read from disk on access."""

    encoded: Encoded | None
    """The text states; None if all text encoders are trained, so that nothing can be stored."""
    places: dict[Instruction, int]

    def __getitem__(self, caption: Instruction) -> dict[str, torch.Tensor]:
        return self.encoded.read(self.places[caption]) if self.encoded else {}


@dataclass(frozen=True)
class Latents:
    """The encoded images: mean and standard deviation of the latents, for each variant (crop and flip) of each image.

    The tensors are read from disk on access.
    """

    encoded: Encoded
    variants: int
    """The highest number of variants of an image; variant 0 is the unflipped center crop.

    An image that needs only one crop has fewer variants, and `of` wraps a higher number around.
    """
    images: Sequence[int]
    """The position of each image among the encoded images."""

    def of(self, index: int, variant: int) -> dict[str, torch.Tensor]:
        """Return a variant: `moments` (2 x channels x height x width), `sizes` (6) and, if the image has one, `mask`.

        With reference images, the result also has `reference`: the means of their latents (images x channels x height x
        width).
        """
        return self.encoded.read(self.images[index], variant)

    def select(self, indices: Sequence[int]) -> Latents:
        """Return the latents of some of the images."""
        return dataclasses.replace(self, images=[self.images[index] for index in indices])


# -- captions ----------------------------------------------------------------------------------------------------------


def encode_texts(
    texts: Sequence[Instruction],
    key: object,
    load_encoders: Callable[[], DiffusionPipeline],
    context: ImageContext,
    references: Mapping[str, Callable[[], list[Image]]] | None = None,
) -> Texts:
    """Return the text states of each distinct caption; the encoders are loaded only if states are missing on disk.

    `key` identifies the encoders' weights and precision. If some encoders are trained, only the output of the frozen
    ones is stored. `references`: functions that open reference images, by the hash in `texts`.
    """
    family, longest = context.model.family, context.options.training.max_sequence_length
    texts = list(dict.fromkeys(texts))
    places = {text: place for place, text in enumerate(texts)}
    if context.live_encoders and not family.frozen_text_parts:
        return Texts(None, places)
    encode_captions = family.encode_frozen if context.live_encoders else family.encode_captions
    keys = [derive(key, longest, text) for text in texts]
    encoded = _stored(f"captions-{derive(key, longest):016x}", keys, context)
    loaded = functools.cache(load_encoders)

    def encode(numbers: Sequence[int]) -> Generator[Item]:
        """Yield the text states of each of these texts."""
        context.status.say("encoding captions")
        pipeline = loaded()
        at_once = CAPTIONS_AT_ONCE if references is None else 1  # a reference image adds more than a thousand tokens
        for start in range(0, len(numbers), at_once):
            context.stop.check(NOT_BEGUN)
            some = [texts[number] for number in numbers[start : start + at_once]]
            with torch.no_grad():
                if references is None:
                    states = encode_captions(pipeline, [text for text in some if isinstance(text, str)], longest)
                else:
                    ((caption, mark),) = (text for text in some if isinstance(text, tuple))
                    states = family.encode_with_references(pipeline, caption, references[mark]())
            for position in range(len(some)):
                yield {name: value[position].unsqueeze(0) for name, value in states.items()}

    with _stops_with_others(context):
        fill(encoded, encode, context.accelerator)
    return Texts(encoded, places)


# -- images ------------------------------------------------------------------------------------------------------------


class Variants(TorchDataset):
    """Dataset that maps an image's number to all variants (crops and flips) of the image, stacked tensors of `view`.

    For an image that cannot be trained on, the item is a string with the reason.
    """

    def __init__(
        self, images: ImageDataset, sizes: Sequence[Size], data: DataOptions, training: TrainingOptions, family: Family
    ) -> None:
        self.images, self.sizes, self.data, self.training, self.family = images, sizes, data, training, family
        self.flips = (False, True) if data.random_flip else (False,)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        """The highest number of variants of an image."""
        return max(map(self.crops, range(len(self)))) * len(self.flips)

    def crops(self, index: int) -> int:
        """Return the number of crops of an image: 1 with --center_crop, or if little or nothing is cut off."""
        image, size = self.images.sizes[index], self.sizes[index]
        whole = image[0] * size.height == image[1] * size.width
        # In a bucket with nearly the image's aspect ratio, crops would hardly differ.
        fits = self.data.use_aspect_ratio_buckets and kept(image, size) >= FITS
        return 1 if whole or fits or self.data.center_crop else RANDOM_CROPS

    def key(self, index: int) -> tuple:
        """Return everything that the pixels of an image depend on."""
        size, crops = self.sizes[index], self.crops(index)
        seed = self.training.seed if crops > 1 else None
        pixels = (size.height, size.width, self.data.image_interpolation_mode, crops, self.flips, seed)
        more = [MASKED] * self.training.masked_loss + ["references"] * self.images.paired
        return (self.images.marks[index], *pixels, *more)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | str:
        found = opened(self.images, index, self.training.masked_loss)
        if isinstance(found, str):
            return found
        # Seeded by content, so that the crops do not depend on the image's position in the data.
        random = generator(self.training.seed, "crops", self.images.marks[index])
        draws = torch.rand(self.crops(index) - 1, 2, generator=random).tolist()
        how = [(crop, flip) for crop in [(0.5, 0.5), *draws] for flip in self.flips]
        return default_collate([view(found, *each, self.sizes[index], self.data, self.family) for each in how])


@dataclass
class Damages(TorchDataset):
    """Dataset that maps an image's number to the reason why the image cannot be trained on; {} if there is none."""

    images: ImageDataset
    masked: bool

    def __getitem__(self, index: int) -> Item:
        found = opened(self.images, index, self.masked)
        return found if isinstance(found, str) else {}


def opened(images: ImageDataset, index: int, masked: bool) -> Opened | str:
    """Return an image, its mask and its reference images, or the reason why the image cannot be trained on.

    The mask is None if `masked` is false. Raises `RunFailed` if a file may be intact but cannot be read at present, or
    has changed since the run began.
    """
    try:
        image, mask = images.open_masked(index) if masked else (images.open(index), None)
        references = images.open_references(index)
    except RunFailed:
        raise
    except Exception as error:
        if passes(error):
            raise RunFailed(f"{images.name(index)} {damage(error)}; restore it, and resume") from None
        return damage(error)
    return NOTHING_COUNTS if mask is not None and mask.getbbox() is None else (image, mask, references)


def view(
    found: Opened, crop: Sequence[float], flip: bool, size: Size, data: DataOptions, family: Family
) -> dict[str, torch.Tensor]:
    """Return the tensors of a crop of an opened image: `pixels` (3 x height x width) and `sizes` (6).

    If the image has a mask, the result also has `mask` (1 x height x width). If it has reference images, the result has
    `reference_pixels` (images x 3 x height x width).
    """
    image, mask, references = found
    interpolation = data.image_interpolation_mode
    tensors = {
        "pixels": crop_and_scale(image, crop, flip, size, interpolation),
        "sizes": torch.tensor(crop_sizes(image.size, crop, flip, size)),
    }
    if mask is not None:
        tensors["mask"] = crop_mask(mask, crop, flip, size)
    if references:
        size = Size(*family.reference_size(size.height, size.width))
        scaled = [crop_and_scale(reference, crop, flip, size, interpolation) for reference in references]
        tensors["reference_pixels"] = torch.stack(scaled)
    return tensors


def encode_images(
    variants: Variants, key: object, vae: nn.Module, context: ImageContext
) -> tuple[Latents, dict[int, str]]:
    """Return the latents of all variants, and the reasons why images cannot be trained on, by the image's number.

    `key` identifies the autoencoder. Only images whose latents are not on disk yet are opened and encoded.
    """
    keys = [derive(key, variants.key(index)) for index in range(len(variants))]
    found = _stored(f"latents-{derive(key):016x}", keys, context)
    _fill(found, variants, lambda views: encoded(context.model.family, vae, views), "encoding image", context)
    return Latents(found, variants.count, range(len(variants))), found.problems()


def damaged_images(images: ImageDataset, context: ImageContext) -> dict[int, str]:
    """Return the reasons why images cannot be trained on, by the image's number, in a run that stores no latents.

    Each image is opened once, and the result is cached for later runs.
    """
    keys = [derive(mark, context.options.training.masked_loss and MASKED) for mark in images.marks]
    found = _stored("opened", keys, context)
    _fill(found, Damages(images, context.options.training.masked_loss), lambda item: item, "opening image", context)
    return found.problems()


def _stored(kind: str, keys: Sequence[int], context: ImageContext) -> Encoded:
    """Return the items of the cache with these keys, without damaged ones."""
    found = Encoded(cache_folder(context.options.model, context.options.output), kind, keys)
    with _stops_with_others(context):
        remove_damaged(found, context.accelerator)
    return found


def _fill(
    found: Encoded, images: TorchDataset, make: Callable[[Mapping], Item], phase: str, context: ImageContext
) -> None:
    """Encode images that are not stored yet by `make`; store the results, or the reasons why an image is unusable."""
    accelerator = context.accelerator
    total = len(share(found, accelerator))
    silent = not (accelerator.is_main_process and total)
    bar = tqdm(desc=f"{phase}s", total=total, disable=silent, dynamic_ncols=True)
    number = itertools.count(1)

    def encode_images(numbers: Sequence[int]) -> Generator[Item]:
        """Yield the encoded data of each of these images, or the reason why the image cannot be read."""
        arguments = worker_options(context.options.data.dataloader_num_workers)
        loader = DataLoader(images, batch_size=None, sampler=numbers, **arguments)
        with contextlib.closing(stream(loader)) as loaded:
            for item in loaded:
                context.stop.check(NOT_BEGUN)
                yield item if isinstance(item, str) else make(item)
                bar.update()
                context.status.count(phase, next(number), total)

    with bar, _stops_with_others(context):
        fill(found, encode_images, context.accelerator)


@contextlib.contextmanager
def _stops_with_others(context: ImageContext) -> Generator[None]:
    """If the block fails because another process has stopped on request, stop this process in the same way."""
    try:
        yield
    except RunFailed:
        context.stop.check(NOT_BEGUN)
        raise


def moments_of(
    family: Family, vae: nn.Module, pixels: torch.Tensor, references: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Encode images (batch x 3 x height x width) and, if given, their references (batch x images x 3 x ...).

    Returns `moments` (batch x 2 x channels x height x width of the latents) and `reference`, the means of the latents
    (batch x images x channels x height x width).
    """
    with torch.no_grad(), wide_enough(family, vae):
        found = {"moments": family.encode_images(vae, pixels.to(vae.device, vae.dtype))}
        if references is not None:
            means = family.encode_images(vae, references.flatten(0, 1).to(vae.device, vae.dtype))[:, 0]
            found["reference"] = means.unflatten(0, references.shape[:2])
    return found


def encoded(family: Family, vae: nn.Module, views: Mapping[str, torch.Tensor]) -> Item:
    """Encode an item of `Variants`, and return the tensors of all variants, which are then stored.

    They are `moments`, `sizes` and, if the item has them, `reference` and `mask` (at the size of the latents).
    """
    kept = moments_of(family, vae, views["pixels"], views.get("reference_pixels")) | {"sizes": views["sizes"]}
    if "mask" in views:
        kept["mask"] = interpolate(views["mask"], kept["moments"].shape[-2:], mode="area")
    return kept


def without_damaged(
    images: ImageDataset, latents: Latents | None, problems: dict[int, str], options: DataOptions
) -> tuple[ImageDataset, Latents | None, list[int]]:
    """Return the usable images, their latents (None if latents are not stored), and their positions among all images.

    Raises `InvalidArgument` if no image is usable or, with --strict, if any image is not usable.
    """
    keep = [index for index in range(len(images)) if index not in problems]
    if not problems:
        return images, latents, keep
    if options.strict:
        index, problem = next(iter(problems.items()))
        raise InvalidArgument(f"--strict {images.name(index)}", problem, "repair or remove it, or leave --strict out")
    left_out = [f"{images.name(index)}: {problem}" for index, problem in problems.items()]
    if not keep:
        problem = f"no image can be trained (for example {left_out[0]})"
        raise InvalidArgument(data_flag(options), problem, "repair them, or give others")
    return images.select(keep, left_out), latents and latents.select(keep), keep
