"""Prepare the training data: encode images and captions that are not cached, assign images to buckets, split them."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence

from diffusers import DiffusionPipeline
from PIL.Image import Image

from ...errors import InvalidArgument
from ...formatting import is_or_are, pluralize, printable
from ...io import read_object, write_json
from ...options.images import DataOptions
from ...runtime.processes import all_gather, broadcast_from_main
from ..context import ImageContext
from ..model.loading import wide_enough
from ..model.objective import Objective
from ..prompts import UNRELATED, prompts_of
from .buckets import bucket_of, ladder, named_buckets, own_bucket
from .captions import VERBATIM, build_caption_transform
from .class_images import balanced
from .dataset import ImageDataset, data_flag
from .encoding import (
    Instruction,
    Latents,
    Texts,
    Variants,
    damaged_images,
    encode_images,
    encode_texts,
    without_damaged,
)
from .lengths import print_long_captions
from .plan import Plan
from .samples import TrainingData
from .size import Size
from .sources import Source, split, without_copies

NOTED = "images.json"  # the number of images of a run, their content hashes, and the images that are left out
UNEVEN = 2  # if an epoch uses one bucket this many times as often as another, the trainer prints a line
VARIANTS, FEW_VARIANTS = 4, 1000  # the most texts encoded beforehand: per caption, or in total if that is more


def load_training_data(
    kinds: Sequence[ImageDataset], pipeline: DiffusionPipeline, objective: Objective, context: ImageContext
) -> TrainingData:
    """Return the training data, with captions and images encoded or found in the cache.

    `kinds` are the training images and the class images, if any.
    """
    family, options = context.model.family, context.options
    largest = max((images for images in kinds if not images.of_class), key=len)
    sources = tuple(
        source for images in kinds for source in sources_of(images, int(images is largest), pipeline, context)
    )
    sources, copies = without_copies(sources)
    print_bucket_sizes(sources, context)
    for source in sources:
        print_skipped_images(source.images, context)
    if copies:
        context.accelerator.print(f"left out of training: {pluralize(copies, 'exact duplicate')} of held-out images")
    if any(images.of_class for images in kinds):
        per_forward = options.training.train_batch_size * context.accelerator.num_processes
        training, of_class = ([s for s in sources if s.images.of_class == kind] for kind in (False, True))
        sources = balanced(training, of_class, per_forward)
    sizes = {size for source in sources for size in source.sizes}
    shapes = {size: family.latent_shape(pipeline, size.height, size.width) for size in sizes}
    parts = options.adapter, options.data, options.training, options.validation
    training_data = TrainingData(sources, Texts(None, {}), objective, shapes, family, *parts)
    print_long_captions(training_data, pipeline, context)
    return with_texts(training_data, pipeline, context)


def note_images(training_data: TrainingData, context: ImageContext, resuming: bool) -> None:
    """Write to `images.json` which images the run uses. Call this after all images were opened to find damaged ones.

    Raises `InvalidArgument` if processes find different images damaged. Raises it also if a resumed run would use other
    images than before, because its held-out images would change.
    """
    options, path = context.options, context.folder / NOTED
    used = "; ".join(source.images.fingerprint for source in training_data.sources)
    left_out = [line for source in training_data.sources for line in source.images.left_out]
    if len(set(all_gather(used))) > 1:
        raise InvalidArgument(data_flag(options.data), "the processes found different damaged images", "repair them")

    def write_used() -> None:
        """Write which images are used. Raises `InvalidArgument` if a resumed run was trained on other images."""
        there = read_object(path).get("images", used)
        if resuming and there != used:
            example = f" (left out: {left_out[0]})" if left_out else ""
            problem = f"{context.folder} was trained on {there}; now it would be {used}{example}"
            raise InvalidArgument(data_flag(options.data), problem, "restore it, or choose another --output_dir")
        write_json(path, {"images": used, "left_out": left_out})

    broadcast_from_main(write_used)


def with_texts(training_data: TrainingData, pipeline: DiffusionPipeline, context: ImageContext) -> TrainingData:
    """Return the training data with the text states of all prompts and, if captions are cached, of all captions.

    If there are too many captions to cache, the text encoders are loaded into the pipeline, and each training step
    encodes the captions of its own samples.
    """
    data, validation, model = training_data.data, training_data.validation, context.model
    parts = model.family.frozen_text_parts if context.live_encoders else model.family.text_parts
    key = (model.family.name, model.fingerprint(*parts), str(context.dtype))
    prompts = ["", *(validation.validation_prompt or training_data.sources[0].images.captions[0][:1])]
    prompts += [prompt.negative_prompt for prompt in prompts_of(validation)]
    prompts += UNRELATED if validation.metric_model else ()
    prompts += training_data.training.preserved_prompts
    wanted: list[Instruction] = list(prompts)
    references = None
    if training_data.family.reads_references:
        wanted, references = with_references(prompts, training_data)

    def load_encoders() -> DiffusionPipeline:
        """Return a pipeline with the text encoders."""
        if not data.cache_text_embeddings:
            return pipeline
        return model.load_pipeline(context.dtype, context.accelerator.device, encoders=True, vae=False)

    if data.cache_text_embeddings and parts and references is None:
        captions = captions_of(training_data, context.accelerator.num_processes)
        if captions is None:
            whole = model.load_pipeline(context.dtype, context.accelerator.device, encoders=True)
            vars(pipeline).update(vars(whole))  # setting the encoders is not enough: `__init__` reads them
            data = dataclasses.replace(data, cache_text_embeddings=False)
            context.accelerator.print(
                "there are too many variants of captions to cache them: each step encodes its captions, and the text "
                "encoders stay in memory"
            )
        wanted += captions or []
    texts = encode_texts(wanted, key, load_encoders, context, references)
    return dataclasses.replace(training_data, texts=texts, data=data)


def with_references(
    prompts: Sequence[str], training_data: TrainingData
) -> tuple[list[Instruction], dict[str, Callable[[], list[Image]]]]:
    """Return every caption and prompt with the hash of its reference images, and functions that open these."""
    found: dict[Instruction, None] = {}
    opened: dict[str, Callable[[], list[Image]]] = {}
    for mark, some in training_data.references():
        opened[mark] = some.copy
        found |= dict.fromkeys((prompt, mark) for prompt in prompts)
    for source in training_data.sources:
        images = source.images
        # --metric_model also generates from test images, with the empty negative prompt.
        empty = [""] if source.transform.dropout or training_data.validation.metric_model else []
        for index, (mark, texts) in enumerate(zip(images.marks, images.captions, strict=True)):
            opened[mark] = functools.partial(images.open_references, index)
            found |= dict.fromkeys((text, mark) for text in [*map(source.transform.plain, texts), *empty])
    return list(found), opened


def captions_of(training_data: TrainingData, processes: int) -> list[str] | None:
    """Return every caption that a run will use, or None if random transforms make too many captions.

    The limit is FEW_VARIANTS, or VARIANTS times the number of captions if that is higher.
    """
    captions = dict.fromkeys(
        source.transform.plain(text)
        for source in training_data.sources
        for texts in source.images.captions
        for text in texts
    )
    if any(source.transform.rewrites for source in training_data.sources):
        most, plan = max(FEW_VARIANTS, VARIANTS * len(captions)), training_data.plan(processes)
        steps = (
            training_data.training.max_train_steps
            or training_data.training.num_train_epochs * training_data.updates(processes)
        )
        for forward in range(steps * training_data.training.gradient_accumulation_steps):
            drawn = [draw for draw in plan.forward(forward) if training_data.sources[draw.source].transform.rewrites]
            captions |= dict.fromkeys(map(training_data.sampled_caption, drawn))
            if len(captions) > most:
                return None
    return list(captions)


def sources_of(images: ImageDataset, least: int, pipeline: DiffusionPipeline, context: ImageContext) -> list[Source]:
    """Return one source per resolution.

    The first source has all images, split into training and held-out images; class images are not split. The sources of
    other resolutions have only training images, without those that would get the size of an earlier resolution. `least`
    is the lowest number of held-out images, if any are held out.
    """
    options, multiple = context.options, context.model.family.pixel_multiple(pipeline)
    sides, label = options.data.resolution, images.label
    labels = [f"{label} at {side}" if label and len(sides) > 1 else label for side in sides]
    first = [size for size in sizes_of(images, multiple, options.data)[0] if size]
    whole = source_of(dataclasses.replace(images, label=labels[0]), first, pipeline, context)
    share = 0.0 if images.of_class else options.validation.validation_split
    train, held_out = split(len(whole.images), share, options.training.seed, least)
    found, images = [dataclasses.replace(whole, train=train, held_out=held_out)], whole.images
    for label, sizes in zip(labels[1:], sizes_of(images, multiple, options.data)[1:], strict=True):
        if again := {index: size for index in train if (size := sizes[index])}:
            some = images.select(list(again))
            some = dataclasses.replace(some, label=label, left_out=(), notes=())  # its lines are printed once
            found.append(source_of(some, list(again.values()), pipeline, context))
    return found


def source_of(images: ImageDataset, sizes: list[Size], pipeline: DiffusionPipeline, context: ImageContext) -> Source:
    """Return a source of the undamaged images, with their latents; no image is held out yet."""
    options = context.options
    if options.data.cache_latents:
        latents, problems = latents_of(images, sizes, pipeline, context)
    else:
        latents, problems = None, damaged_images(images, context)
    images, latents, keep = without_damaged(images, latents, problems, options.data)
    shared = {size: size for size in sizes}  # one object for each size, which saves memory
    kept = tuple(shared[sizes[index]] for index in keep)
    weight = images.weight * (options.data.prior_loss_weight if images.of_class else 1.0)
    transform = VERBATIM if images.of_class else build_caption_transform(options.data)
    return Source(images, latents, tuple(range(len(images))), (), kept, weight, images.repeats, transform)


def sizes_of(images: ImageDataset, multiple: int, options: DataOptions) -> list[list[Size | None]]:
    """Return the sizes of all images, one list per resolution. A size is None if an earlier resolution has it.

    An image that is smaller than the buckets of several resolutions is used at its own size only once.
    """
    found: list[list[Size | None]] = [[] for _ in options.resolution]
    for image in images.sizes:
        uses_per_epoch: set[Size | str] = set()
        for sizes, resolution in zip(found, options.resolution, strict=True):
            size, own = size_of(image, resolution, multiple, options)
            new = size not in uses_per_epoch and not (own and "own" in uses_per_epoch)
            sizes.append(size if new else None)
            if new:
                uses_per_epoch |= {size, "own"} if own else {size}
    return found


def size_of(image: tuple[int, int], resolution: int, multiple: int, options: DataOptions) -> tuple[Size, bool]:
    """Return the size that an image (width and height) is cropped and scaled to: a square, or the best bucket.

    The second return value is whether the size is the image's own, because the image is smaller than all buckets.
    """
    if not options.use_aspect_ratio_buckets:
        return Size(resolution, resolution), False
    if options.aspect_ratio_buckets:
        return bucket_of(image, named_buckets(options.aspect_ratio_buckets)), False
    buckets = ladder(resolution, multiple)
    size = bucket_of(image, buckets) if options.bucket_upscale else own_bucket(image, resolution, multiple)
    return size, size not in buckets


def print_bucket_sizes(sources: Sequence[Source], context: ImageContext) -> None:
    """Print the number of images in each bucket."""
    if context.options.data.use_aspect_ratio_buckets or len(context.options.data.resolution) > 1:
        found = Counter(size for source in sources for size in source.sizes)
        counts = [f"{size.height}x{size.width}: {count}" for size, count in found.items()]
        context.accelerator.print(f"{pluralize(len(found), 'bucket')} (height x width: images): {', '.join(counts)}")


def print_folder_counts(training_data: TrainingData, context: ImageContext) -> None:
    """Print repeats, weight of the loss and number of masks of each source (a folder of images) that has a label.

    The printed line begins with the label. A single source may have no label.
    """
    plan = training_data.plan(context.accelerator.num_processes)
    print_uneven_buckets(plan, context)
    for source in training_data.sources:
        images, masked = source.images, sum(source.images.masked)
        if images.label:
            kind, times = "class image" if images.of_class else "image", times_of(source, plan)
            count = pluralize(len(source.train), kind)
            line = f"{images.label}: {count}, each {times} an epoch, weight {source.weight:g}"
            line += f"; {len(source.held_out)} more held out" if source.held_out else ""
            line += (
                f"; {masked} of {len(images)} {is_or_are(masked)} masked"
                if context.options.training.masked_loss
                else ""
            )
            context.accelerator.print(printable(line))


def print_large_batch(training_data: TrainingData, context: ImageContext) -> None:
    """Print a warning if a batch of all processes has more samples than there are training images."""
    plan = training_data.plan(context.accelerator.num_processes)
    count = len({place for items in plan.buckets.values() for place in items})
    if plan.per_forward > count:
        training, processes = context.options.training, context.accelerator.num_processes
        times = plan.per_forward * training.gradient_accumulation_steps / count
        size, smaller = training.train_batch_size, max(1, count // processes)
        context.accelerator.print(
            f"warning: --train_batch_size {size}: more than the {pluralize(count, 'training image')}, so a step uses "
            f"each image {times:.3g} times; give {smaller} or fewer"
        )


def print_uneven_buckets(plan: Plan, context: ImageContext) -> None:
    """Print a line if an epoch uses the images of one bucket far more often than those of another."""
    uses = plan.uses_per_epoch
    least, most = min(uses, key=uses.__getitem__), max(uses, key=uses.__getitem__)
    if uses[most] >= UNEVEN * uses[least]:
        often, seldom = (f"{size.height}x{size.width} {uses[size]:.3g} times" for size in (most, least))
        smaller = "a smaller --train_batch_size" if context.options.training.train_batch_size > 1 else "fewer processes"
        context.accelerator.print(
            "the last batch of each bucket is filled with more images of that bucket, so an epoch uses images of "
            f"{often}, and images of {seldom}; use {smaller} and more --gradient_accumulation_steps to even this out"
        )


def times_of(source: Source, plan: Plan) -> str:
    """Format how often an epoch uses a source's images; with a single bucket, all are used equally often."""
    if not source.train:
        return "never"  # an experiment's splits may hold out all images of a small folder
    uses = {source.repeats * plan.uses_per_epoch[source.sizes[image]] for image in source.train}
    uses = uses if len(plan.uses_per_epoch) > 1 else {source.repeats}
    low, high = (f"{round(times, 1):g}" for times in (min(uses), max(uses)))
    if low != high:
        return f"{low} to {high} times"
    return "once" if low == "1" else f"{low} times"


def latents_of(
    images: ImageDataset, sizes: Sequence[Size], pipeline: DiffusionPipeline, context: ImageContext
) -> tuple[Latents, dict[int, str]]:
    """Return the latents of all images at their sizes, and the reasons why images are unusable, by image index."""
    vae, model = pipeline.vae, context.model
    key = (model.family.name, model.fingerprint("vae"), str(vae.dtype))
    with wide_enough(model.family, vae):
        variants = Variants(images, sizes, context.options.data, context.options.training, model.family)
        return encode_images(variants, key, vae, context)


def print_skipped_images(images: ImageDataset, context: ImageContext) -> None:
    """Print the notes about unread files, the first 20 unusable images, and the number of unusable images."""
    for line in (*images.notes, *(f"left out: {line}" for line in images.left_out[:20])):
        context.accelerator.print(printable(line))
    if images.left_out:
        context.accelerator.print(f"left out {pluralize(len(images.left_out), 'image')}, kept {len(images):,}")
