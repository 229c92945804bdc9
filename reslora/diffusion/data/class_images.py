"""Class images: pictures of the kind of thing that is learnt, so that the model keeps what it knows of it.

Prior preservation (Ruiz et al., 2023): beside the training images, the model learns to draw what it draws already.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ...common.together import decided, each
from ...files import replacing
from ..arguments import Flags
from ..context import Context
from ..seeds import derive
from .dataset import ImageDataset, load_images
from .images import SUFFIXES
from .sources import Source


def load_class_images(context: Context) -> ImageDataset | None:
    """The images in --class_data_dir, those that are missing drawn by the model as it is; None without that flag."""
    flags = context.flags
    if flags.class_data_dir is None:
        return None
    decided(lambda: draw_missing(context))
    here = flags.replace(train_data_dir=flags.class_data_dir, dataset_name=None, max_train_samples=None)
    return each(lambda: load_images(here, caption=flags.class_prompt))


def missing_class_images(flags: Flags) -> int:
    """How many the model has to draw; 0 without --class_data_dir."""
    if flags.class_data_dir is None:
        return 0
    there = sum(path.suffix.lower() in SUFFIXES for path in Path(flags.class_data_dir).rglob("*"))
    return max(0, flags.num_class_images - there)


def draw_missing(context: Context) -> None:
    """Draws --class_prompt until --num_class_images are there: image number n is a function of the seed and n."""
    flags, folder = context.flags, Path(context.flags.class_data_dir)
    missing = missing_class_images(flags)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = (folder / f"class-{number:05d}.png" for number in range(flags.num_class_images))
    todo = [path for path in names if not path.exists()][:missing]
    context.accelerator.print(f"drawing {len(todo)} class images into {folder}")
    model, device = context.model, context.accelerator.device
    pipeline = model.load_pipeline(context.dtype, device, encoders=True)
    setattr(pipeline, model.family.denoiser, model.load_denoiser(context.dtype, device).eval())
    for first in range(0, len(todo), flags.train_batch_size):
        context.stop.check("stopped before training began")
        paths = todo[first : first + flags.train_batch_size]
        seeds = [derive(flags.seed, "class", path.name) for path in paths]
        with torch.no_grad():
            drawn = pipeline(
                prompt=[flags.class_prompt] * len(paths), height=flags.resolution, width=flags.resolution,
                num_inference_steps=flags.num_inference_steps, guidance_scale=flags.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images  # fmt: skip
        for path, image in zip(paths, drawn, strict=True):
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")


def balanced(training: Source, of_class: Source) -> tuple[Source, Source]:
    """Both, the smaller one repeated: an epoch meets about as many images of either, each at least once."""
    one, other = len(training.train), len(of_class.train)
    return (
        dataclasses.replace(training, repeats=max(1, round(other / one))),
        dataclasses.replace(of_class, repeats=max(1, round(one / other))),
    )
