"""Class images: images of the class that the training images belong to, for prior preservation.

A model that is also trained on class images (DreamBooth, Ruiz et al., 2023) continues to generate the class as the base
model does.
"""

import bisect
import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from filelock import Timeout

from ...checks import check_writable
from ...errors import InvalidArgument, RunFailed
from ...formatting import pluralize
from ...io import replacing
from ...options.images import DataOptions, Options, OutputOptions
from ...runtime.folder_lock import guarded
from ...runtime.processes import LONGEST_WAIT
from ...runtime.signals import NOT_BEGUN
from ..context import ImageContext
from ..generators import derive
from .dataset import METADATA, ImageDataset
from .folders import kohyas_folders, load_folders
from .images import is_image
from .listing import files_of
from .size import Size
from .sources import Source

LOCK = "class images"  # a path in the folder, because a run that writes there holds the lock of the folder
PAUSE = timedelta(seconds=1)  # between two attempts to get the lock


def load_class_images(options: Options) -> list[ImageDataset]:
    """Return the images in --class_data_dir; [] without the option."""
    if options.data.class_data_dir is None:
        return []
    here = options.replace(
        train_data_dir=options.data.class_data_dir, train_data_repeats=[1], train_data_weight=[1.0],
        dataset_name=None, max_train_samples=None,
    )  # fmt: skip
    found = load_folders(here.model, here.data, here.training, here.output, caption=options.data.class_prompt)
    return [dataclasses.replace(images, of_class=True) for images in found]


def missing_class_images(data: DataOptions, output: OutputOptions) -> int:
    """Return the number of class images to generate.

    The number is 0 without --class_data_dir, or if that folder contains kohya's folders (10_name). Raises
    `InvalidArgument` if the folder contains the training images. If images must be generated, this function also raises
    `InvalidArgument`

    - if the folder has a metadata file, because that file would not list the generated images;
    - if the folder is not writable.
    """
    if data.class_data_dir is None:
        return 0
    folder = Path(data.class_data_dir)
    for name in () if data.dataset_name else data.train_data_dir:
        if Path(name).resolve().is_relative_to(folder.resolve()):
            problem = f"contains the training images of --train_data_dir {name}"
            raise InvalidArgument(f"--class_data_dir {folder}", problem, "give class images a folder of their own")
    if folder.is_dir() and kohyas_folders(folder, data, output)[0]:
        return 0
    everything = files_of(folder, data, output) if folder.is_dir() else []
    there = sum(map(is_image, everything))
    missing, metadata = data.num_class_images - there, [path for path in everything if path.name in METADATA]
    if missing > 0 and metadata:  # training would not use images that the metadata does not list
        problem = f"{pluralize(missing, 'image')} would be generated, which {metadata[0]} does not list"
        fix = f"give --num_class_images {there}, or remove that file"
        raise InvalidArgument(f"--num_class_images {data.num_class_images}", problem, fix)
    if missing > 0:
        check_writable(folder, f"--class_data_dir {folder}")
    return max(0, missing)


def generate_missing(context: ImageContext) -> None:
    """Generate images of --class_prompt until --num_class_images exist.

    The base model generates them. The random generator of each image is seeded with --seed and the file name.
    """
    data, output = context.options.data, context.options.output
    folder = Path(data.class_data_dir or "")
    if missing_class_images(data, output):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, context):
            # Another run may have generated the missing images in the meantime.
            if missing := missing_class_images(data, output):
                draw(folder, missing, context)


def exclusive_lock(folder: Path, context: ImageContext) -> contextlib.AbstractContextManager[object]:
    """Return the lock on a folder, after waiting until no other run on this machine generates class images into it.

    Raises `RunFailed` after LONGEST_WAIT; a request to stop ends the wait.
    """
    for waited in range(LONGEST_WAIT // PAUSE):
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(guarded(folder / LOCK))
                return stack.pop_all()
        except Timeout:
            if not waited:
                context.accelerator.print(f"another run generates class images in {folder}: waiting for it")
                context.status.say("waiting for the class images of another run")
        context.stop.check(NOT_BEGUN)
        time.sleep(PAUSE.total_seconds())
    raise RunFailed(
        f"--class_data_dir {folder}: another run still generates images there; stop that run, or choose another folder"
    )


def draw(folder: Path, missing: int, context: ImageContext) -> None:
    """Generate `missing` class images into the folder, under unused file names."""
    options = context.options
    names = (folder / f"class-{number:05d}.png" for number in range(options.data.num_class_images))
    todo = [path for path in names if not path.exists()][:missing]
    context.accelerator.print(f"generating {pluralize(len(todo), 'class image')} in {folder}")
    model, device = context.model, context.accelerator.device
    side = max(options.data.resolution)  # the highest resolution at which they are trained
    pipeline = model.load_pipeline(context.dtype, device, encoders=True)
    denoiser = model.load_denoiser(context.dtype, device, options.model.base_precision, options.model.blocks_to_swap)
    setattr(pipeline, model.family.denoiser, denoiser.eval())
    guidance = {model.family.guidance: options.validation.guidance_scale}
    for first in range(0, len(todo), options.training.train_batch_size):
        context.stop.check(NOT_BEGUN)
        paths = todo[first : first + options.training.train_batch_size]
        seeds = [derive(options.training.seed, "class", path.name) for path in paths]
        negative = {} if "guidance_scale" in guidance else {"negative_prompt": [""] * len(paths)}
        with torch.no_grad():
            drawn = pipeline(
                prompt=[options.data.class_prompt] * len(paths), height=side, width=side,
                num_inference_steps=options.validation.num_inference_steps, **guidance, **negative,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images  # fmt: skip
        for path, image in zip(paths, drawn, strict=True):
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
        context.status.count("generating class image", first + len(paths), len(todo))


def balanced(training: Sequence[Source], of_class: Sequence[Source], per_forward: int) -> tuple[Source, ...]:
    """Return all sources, with repeats such that an epoch uses about as many class images as training images.

    Images of the kind with fewer samples per epoch are repeated; every image is used at least once per epoch.
    `per_forward` is the batch size of all processes together.
    """
    kinds = sizes_of(training), sizes_of(of_class)
    swapped = share_of(*kinds, 1, per_forward) > 1
    fewer, others = reversed(kinds) if swapped else kinds

    def excess(times: int) -> float:
        """Return `share_of` minus 1 if the rarer kind of images is repeated `times` times."""
        return round(share_of(fewer, others, times, per_forward) - 1, 9)

    # The lowest number of repeats with a ratio of at least 1, or the number below it if its ratio is nearer to 1. On a
    # tie the even number, as `round` does.
    enough = 1 + bisect.bisect_left(range(1, others.total() * per_forward + 1), 0.0, key=excess)
    times = min(range(max(1, enough - 1), enough + 1), key=lambda times: (abs(excess(times)), times % 2))
    repeats = (1, times) if swapped else (times, 1)
    return tuple(
        dataclasses.replace(source, repeats=source.repeats * more)
        for sources, more in zip((training, of_class), repeats, strict=True)
        for source in sources
    )


def sizes_of(sources: Sequence[Source]) -> Counter[Size]:
    """Return the number of samples per epoch of each size."""
    found: Counter[Size] = Counter()
    for source in sources:
        for image in source.train:
            found[source.sizes[image]] += source.repeats
    return found


def share_of(fewer: Counter[Size], others: Counter[Size], times: int, per_forward: int) -> float:
    """Return the ratio of samples per epoch between two groups of images, given the number of images of each size.

    The numerator counts the images of `fewer`, each `times` times; the denominator counts the images of `others`. The
    ratio includes the images that fill up the last batch of each size to `per_forward` samples.
    """
    uses = other_uses = 0.0
    for size in fewer | others:
        count, other = fewer[size] * times, others[size]
        filled = math.ceil((count + other) / per_forward) * per_forward / (count + other)
        uses += count * filled
        other_uses += other * filled
    return uses / other_uses
