"""Compare LoRA files: read and check them, encode the images, measure, and write the results."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from ... import __version__
from ...errors import InvalidArgument
from ...experiment.record import EXPERIMENT
from ...experiment.verdicts import LEAST_GROUPS
from ...formatting import pluralize
from ...options.images import Options
from ...runtime.signals import StopRequest
from ...training.checkpoints import Identity
from ..context import ImageContext
from ..data.dataset import ImageDataset, data_flag
from ..data.samples import measured_at
from ..data.training_data import load_training_data
from ..experiment.arm_study import ImageArmStudy
from ..experiment.losses_by_image import write_thumbnails
from ..experiment.run import LIBRARIES
from ..experiment.split import Image, features_of_all, groups_of, names_of, order_of, training_images
from ..model.objective import objective_of
from ..output.metric import load_metric
from ..run import begin
from ..schedule import schedule_of
from .files import Entry
from .loras import LoraFile, in_order_of_seeds, read_loras, trained_on
from .measuring import Measuring, tasks_of
from .results import Images, concluded, write_results


def compare_files(
    options: Options, entries: Sequence[Entry], strengths: Sequence[float], reference: str | None, stop: StopRequest
) -> None:
    """Compare the files, write the results into the output directory, and print them.

    `reference`: name of the entry with which the others are compared, or base. None: the first entry, or base if there
    is only one entry.
    """
    folder = Path(options.output.output_dir)
    with contextlib.ExitStack() as stack:
        kinds, context, identity = begin(options, stop, stack, lambda: check_folder(folder))
        check_count(len({mark for images in kinds for mark in images.marks}), "image", options)
        paths = dict.fromkeys(path for entry in entries for path in entry.files)
        loras = read_loras(list(paths), context.model)
        entries, notes = in_seed_order(entries, loras)
        study, images = prepare(kinds, with_encoders(context, loras.values()), identity)
        notes += notes_of(entries, loras, images.marks, folders_of(options))
        for line in notes:
            print(line, flush=True)
        pairs = [(study.training_data.sources[source].images, number) for source, number in images.places]
        opened = (functools.partial(found.open, number) for found, number in pairs)
        write_thumbnails(folder, zip(images.marks, opened, strict=True))
        measured = Measuring(study, images.places, loras).each(tasks_of(entries, strengths))
        result = concluded(measured, images, reference, notes)
        facts = {
            "versions": {"reslora-sd": __version__} | {name: version(name) for name in LIBRARIES},
            "timesteps": [
                float(timestep) / study.training_data.objective.timesteps
                for timestep in measured_at(study.training_data.objective)
            ],
            "settings": settings_of(study.context.options),
        }
        write_results(result, facts, loras, folder)


def check_folder(folder: Path) -> None:
    """Raise `InvalidArgument` for a directory with a run, whose report would be replaced."""
    for name in ("config.json", EXPERIMENT):
        if (folder / name).exists():
            raise InvalidArgument(f"--output_dir {folder}", "contains a run or an experiment", "choose another folder")


def check_count(number: int, what: str, options: Options, duplicates: int = 0) -> None:
    """Raise `InvalidArgument` if there are too few images, or groups of images, for a verdict."""
    if number < LEAST_GROUPS:
        without = f" without {pluralize(duplicates, 'near-duplicate')}" if duplicates else ""
        fix = f"a verdict needs at least {LEAST_GROUPS}, better 30"
        raise InvalidArgument(data_flag(options.data), f"only {pluralize(number, what)}{without}", fix)


def in_seed_order(entries: Sequence[Entry], loras: Mapping[Path, LoraFile]) -> tuple[list[Entry], list[str]]:
    """Return the entries with the files of all groups in the same order of seeds, and a note about the order."""
    if len(entries) == 1 or len(entries[0].files) == 1:
        return list(entries), []
    groups = {entry.name: [loras[path] for path in entry.files] for entry in entries}
    if ordered := in_order_of_seeds(groups):
        found = [Entry(name, tuple(file.path for file in files)) for name, files in ordered.items()]
        return found, ["groups are compared seed by seed; the seeds are those in the files' metadata (ss_seed)"]
    unknown = "the metadata do not give all groups the same seeds"
    return list(entries), [f"{unknown}, so the first file of each group is compared with the first of the others, ..."]


def with_encoders(context: ImageContext, loras: Collection[LoraFile]) -> ImageContext:
    """Return the context in which captions are encoded again for each file, if any file has a text encoder's LoRA."""
    denoiser = context.model.family.denoiser
    if all(set(lora.parts) <= {denoiser} for lora in loras):
        return context
    return dataclasses.replace(context, options=context.options.replace(train_text_encoder=True))


def folders_of(options: Options) -> set[str]:
    """Return the names of the folders of images and of their subfolders."""
    folders = [Path(folder) for folder in options.data.train_data_dir]
    return {each.resolve().name for folder in folders for each in (folder, *folder.iterdir()) if each.is_dir()}


def notes_of(
    entries: Sequence[Entry], loras: Mapping[Path, LoraFile], marks: Collection[str], folders: Collection[str]
) -> list[str]:
    """Return a warning about each file whose metadata say that it was trained on the compared images."""
    notes = []
    for entry in entries:
        for path in entry.files:
            if why := trained_on(loras[path], marks, folders):
                name = entry.name if len(entry.files) == 1 else f"{entry.name}, {path.name}"
                notes.append(f"warning: {name}: {why}. Losses of trained images are too low: compare on other images")
    return notes


def settings_of(options: Options) -> dict[str, object]:
    """Return the options that losses depend on, by name, for the report."""
    values = options.flat()
    names = (
        "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "train_data_dir",
        "conditioning_data_dir", "resolution", "use_aspect_ratio_buckets", "caption_prefix", "test_groups",
        "mixed_precision", "max_sequence_length", "guidance_scale_train", "prediction_type", "validation_prompt",
        "seed", "num_inference_steps", "guidance_scale", "metric_model",
    )  # fmt: skip
    return {name: values[name] for name in names if values[name] not in (None, [], "", False)}


def prepare(kinds: Sequence[ImageDataset], context: ImageContext, identity: Identity) -> tuple[ImageArmStudy, Images]:
    """Return the study that measures, and the images to measure: one of each group of near-duplicates.

    Raises `InvalidArgument` if there are too few images for a verdict.
    """
    options, model, device = context.options, context.model, context.accelerator.device
    context.status.say("loading the model")
    if options.validation.metric_model:
        load_metric(options.validation.metric_model, str(device))
    pipeline = model.load_pipeline(
        context.dtype, device, encoders=not options.data.cache_text_embeddings, trainable=bool(context.encoders)
    )
    objective = objective_of(options.model, options.training, model.family, pipeline)
    training_data = load_training_data(kinds, pipeline, objective, context)
    found = training_images(training_data.sources)
    flat: list[Image] = [(source, number) for source, images in found.items() for number in range(len(images))]
    marks = [found[source].marks[number] for source, number in flat]
    alike = groups_of(marks, features_of_all(found, flat, data_flag(options.data)))
    chosen = sorted(min(group, key=marks.__getitem__) for group in alike)
    names = names_of(found, flat, options.experiment.test_groups)
    places = [flat[place] for place in chosen]
    images = Images(
        places,
        [marks[place] for place in chosen],
        [found[source].name(number) for source, number in places],
        [names[place] for place in chosen] if names else [],
        order_of(found, places),
        len(set(marks)) - len(chosen),
    )
    check_count(len(places), "image", options, images.duplicates)
    if images.groups:
        check_count(len(set(images.groups)), "group", options)
    sources = tuple(
        dataclasses.replace(source, train=(), held_out=tuple(number for where, number in places if where == place))
        for place, source in enumerate(training_data.sources)
    )
    training_data = dataclasses.replace(training_data, sources=sources)
    return ImageArmStudy(schedule_of(1, context), identity, context, pipeline, training_data), images
