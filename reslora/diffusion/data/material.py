"""From images and captions to what samples are made of: encoded, or found encoded on disk."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from ..arguments import Flags
from ..context import Context
from ..model.loading import wide_enough
from ..model.objective import Objective
from .buckets import bucket_of, ladder, named_buckets, own_bucket
from .class_images import balanced
from .dataset import ImageDataset
from .encoding import Latents, Texts, Variants, encode_images, encode_texts, without_damaged
from .samples import Material
from .size import Size
from .sources import Source, split


def material_of(
    kinds: Sequence[ImageDataset], pipeline: DiffusionPipeline, objective: Objective, context: Context
) -> Material:
    """Captions and images encoded, or found encoded on disk; what only encoding needs leaves the memory.

    `kinds`: the images to be learnt, and class images where there are any.
    """
    flags, family = context.flags, context.model.family
    texts = texts_of([options for images in kinds for options in images.captions], pipeline, context)
    sources = tuple(source_of(images, pipeline, number > 0, context) for number, images in enumerate(kinds))
    if flags.cache_latents:
        pipeline.vae.encoder = None  # samples need the decoder alone
    for source in sources:
        tell_what_is_left_out(source.images, context)
    sources = balanced(*sources) if len(sources) > 1 else sources
    sizes = {size for source in sources for size in source.buckets}
    shapes = {size: family.latent_shape(pipeline, size.height, size.width) for size in sizes}
    return Material(sources, texts, objective, shapes, flags)


def texts_of(captions: Sequence[Sequence[str]], pipeline: DiffusionPipeline, context: Context) -> Texts:
    """Text states of the prompts and, where they are encoded beforehand, of all captions."""
    flags, model = context.flags, context.model
    key = (model.family.name, model.fingerprint(*model.family.text_parts), str(context.dtype))
    prompts = ["", *(flags.validation_prompt or captions[0][:1])]

    def load_encoders() -> DiffusionPipeline:
        if not flags.cache_text_embeddings:
            return pipeline
        return model.load_pipeline(context.dtype, context.accelerator.device, encoders=True, vae=False)

    wanted = prompts + ([text for options in captions for text in options] if flags.cache_text_embeddings else [])
    return encode_texts(wanted, key, load_encoders, context)


def source_of(images: ImageDataset, pipeline: DiffusionPipeline, of_class: bool, context: Context) -> Source:
    """The images with their latents, without the damaged ones, put into buckets and, but for class images, split."""
    flags = context.flags
    sizes = sizes_of(images, context.model.family.pixel_multiple(pipeline), flags)
    latents, keep = None, list(range(len(images)))
    if flags.cache_latents:
        latents, problems = latents_of(images, sizes, pipeline, context)
        images, latents, keep = without_damaged(images, latents, problems, flags)
    train, held_out = split(len(images), 0.0 if of_class else flags.validation_split, flags.seed)
    buckets = tuple(dict.fromkeys(sizes))
    bucket = tuple(buckets.index(sizes[index]) for index in keep)
    if flags.use_aspect_ratio_buckets:
        tell_buckets(buckets, bucket, context)
    weight = flags.prior_loss_weight if of_class else 1.0
    return Source(images, latents, train, held_out, buckets, bucket, weight)


def sizes_of(images: ImageDataset, multiple: int, flags: Flags) -> list[Size]:
    """What each image is cropped and scaled to: one square, or with buckets the size that keeps most of it."""
    if not flags.use_aspect_ratio_buckets:
        return [Size(flags.resolution, flags.resolution)] * len(images)
    if flags.aspect_ratio_buckets:
        buckets = named_buckets(flags.aspect_ratio_buckets)
        return [bucket_of(size, buckets) for size in images.sizes]
    if flags.bucket_upscale:
        return [bucket_of(size, ladder(flags.resolution, multiple)) for size in images.sizes]
    return [own_bucket(size, flags.resolution, multiple) for size in images.sizes]


def tell_buckets(buckets: Sequence[Size], bucket: Sequence[int], context: Context) -> None:
    """How many images each bucket has."""
    counts = [f"{size.height}x{size.width}: {bucket.count(number)}" for number, size in enumerate(buckets)]
    context.accelerator.print(f"{len(buckets)} buckets (height x width: images): {', '.join(counts)}")


def latents_of(
    images: ImageDataset, sizes: list[Size], pipeline: DiffusionPipeline, context: Context
) -> tuple[Latents, dict[int, str]]:
    """Latents of all images at their sizes, and which of them are damaged."""
    vae, model = pipeline.vae, context.model
    key = (model.family.name, model.fingerprint("vae"), str(vae.dtype))
    with wide_enough(model.family, vae):
        return encode_images(Variants(images, sizes, context.flags), key, vae, context)


def tell_what_is_left_out(images: ImageDataset, context: Context) -> None:
    """A line for each of the first images that cannot be used, and how many there are."""
    for line in (*images.notes, *(f"left out: {line}" for line in images.left_out[:20])):
        context.accelerator.print(line)
    if images.left_out:
        context.accelerator.print(f"left out {len(images.left_out)} images, kept {len(images)}")
