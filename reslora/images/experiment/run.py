"""Run an experiment: train every arm, choose learning rates and checkpoints, and compare the methods.

An arm is one run: a method with a learning rate and a seed. All arms share the model and the encoded data; arms with
the same seed also share noise and the order of images. Arms differ from single runs only in the split, which depends on
the images' content. Each arm writes to its own folder, and the files on disk determine the remaining work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...errors import InvalidArgument
from ...experiment.arms import Arm, check_evaluations
from ...experiment.executors import Worker
from ...experiment.record import EXPERIMENT, Facts, facts_of, methods_of, read_experiment
from ...experiment.report import About
from ...experiment.schedule import ArmSchedule
from ...experiment.study import TIMED_STEPS, ExperimentStudy, print_estimate, race, train_arm
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from ...formatting import how_often, pluralize
from ...io import read_object, remove_leftovers, replacing
from ...methods.registry import METHODS
from ...options.grid import Grid
from ...options.images import Options, TrainingOptions, ValidationOptions
from ...options.option import in_words
from ...options.unused import is_read
from ...runtime.checkpoint_folders import ADAPTERS, EXPORTS, checkpoints_of
from ...runtime.folder_lock import locked, sharing_lock
from ...runtime.processes import broadcast_from_main
from ...runtime.sample_folders import by_step
from ...runtime.signals import StopRequest
from ...runtime.status import Status
from ...training.checkpoints import Identity, check_past, named_by, past_of, plan_resume
from ...training.schedule import Schedule
from ...training.trackers import note_settings
from ..cache_folder import cache_folder
from ..context import ImageContext
from ..data.samples import TIMESTEPS, TrainingData, measured_at
from ..data.training_data import latents_of, print_folder_counts, print_large_batch, with_texts
from ..model.objective import check_objective, objective_of
from ..model_checks import check_family, check_methods
from ..output.exports import PEFT_FOLDER
from ..run import begin, check_before_loading, encode, free_encoder
from ..schedule import schedule_of, steps_of
from .arm_study import TEST_NOISES, ImageArmStudy
from .losses_by_image import write_thumbnails
from .report_sections import IMAGES
from .split import Parts, check_count, content_of, order_of, parts_of, training_images, with_parts

MIN_EVALUATIONS, MAX_EVALUATIONS = 4, 10  # default number of measurements of a run on the selection split
MEASURING = 1 / 8  # at most this fraction of the time of training, but MIN_EVALUATIONS measurements in any case
FORWARDS = 3  # forward passes that take as long as a training pass: its backward pass counts as two
SELECT_NOISES = 1  # noises per timestep and image of the selection split
ENCODED = ("random_flip", "train_text_encoder")  # options that vary with which images or captions are encoded anew
CHANGING = ("learning_rate", "seed")  # values that may be added to an existing experiment, like methods
FIXED = (
    *named_by("merged", Options()),
    "max_train_steps",
    "validation_steps",
    "cache_latents",
    "metric_model",
)  # options that a resumed single run may change, but an experiment may not
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@contextlib.contextmanager
def open_study(given: Grid[Options], stop: StopRequest, worker: Worker | None = None) -> Iterator[ImageExperiment]:
    """Lock the folder, check the options, load the model, and encode the data that all arms share.

    With `worker`, this process does jobs for the main process, which has locked the folder, checked the options and
    written the settings.
    """
    if worker:  # TensorBoard reads only one active file per folder
        given = given.replace(logging_dir=f"{given.base.output.logging_dir}/process-{worker.name}")
    began, plain, folder = time.monotonic(), given.run(), Path(given.base.output.output_dir)
    with contextlib.ExitStack() as stack:
        check: Callable[[], None] = (lambda: None) if worker else (lambda: prepare_folder(given))
        lock = functools.partial(sharing_lock, owner=worker.owner) if worker else locked
        kinds, context, identity = begin(plain, stop, stack, check, lock)
        asked = with_varied(context.options, given)
        if worker:
            context = dataclasses.replace(context, status=Status())
        # the data must suit arms that train the text encoders
        widest = with_options(context, train_text_encoder=any(asked.values("train_text_encoder")))

        def check_all() -> None:
            """Check the folder, and all options that can be checked without weights."""
            check_folder(asked, identity)
            largest = max(asked.values("train_batch_size"))
            check_before_loading(kinds, with_options(widest, train_batch_size=largest))
            check_count(len({mark for images in kinds if not images.of_class for mark in images.marks}), plain.data)
            check_variants(asked, context)

        if not worker:
            broadcast_from_main(check_all)
        resuming, track = (folder / EXPERIMENT).exists(), bool(worker) or plain.experiment.in_this_process
        pipeline, training_data = encode(kinds, widest, resuming, track)
        for each in asked.variants():
            objective_of(each.model, each.training, context.model.family, pipeline)
        images = training_images(training_data.sources)

        def split() -> tuple[Parts, str]:
            """Return the split and its hash; raises `InvalidArgument` if the folder's experiment has another split."""
            parts = parts_of(images, plain.data, plain.validation, plain.experiment)
            content = content_of(parts, images)
            check_same(asked, identity, content)
            return parts, content

        parts, content = broadcast_from_main(split)
        processes = context.accelerator.num_processes
        training_data = with_parts(training_data, parts, processes)
        print_large_batch(training_data, context)
        print_folder_counts(training_data, context)
        variants = {data_key(options): options for options in asked.runs("seed", *ENCODED)}
        data_of = {key: data_of_variant(training_data, options, pipeline, context) for key, options in variants.items()}
        free_encoder(pipeline, context)
        schedule = schedule_of(training_data.updates(processes), context)
        if not plain.validation.validation_steps:
            racing, before = broadcast_from_main(
                lambda: (ArmSchedule(asked).is_race, there_of(folder).get("validation_steps"))
            )
            samples = len(parts.select) * TIMESTEPS * SELECT_NOISES
            schedule = with_default_evaluations(schedule, plain.training, racing, samples, before)
        check_evaluations(asked, schedule.steps, schedule.validation_steps, "--validation_steps")
        schedule = dataclasses.replace(schedule, sampled=(0, schedule.steps))
        asked = asked.replace(max_train_steps=schedule.steps, validation_steps=schedule.validation_steps)
        broadcast_from_main(lambda: check_same(asked, identity, content))
        note_settings(asked, steps_of(schedule), context.accelerator, write=not worker)
        arm_schedule = ArmSchedule(asked, began)
        study = ImageArmStudy(schedule, identity, context, pipeline, training_data)
        measured = how_often(schedule.validation_steps, schedule.steps)
        context.accelerator.print(
            f"{arm_schedule.runs_in_words()}; {pluralize(schedule.steps, 'step')}, measured {measured}; {parts}"
        )
        yield ImageExperiment(arm_schedule, study, data_of, parts, content)
        context.accelerator.end_training()


def with_options(context: ImageContext, **values: Any) -> ImageContext:
    """Return the context with some options replaced.

    If no value changes, the result is `context` itself, so that no line is printed twice.
    """
    options = context.options.replace(**values)
    return context if options == context.options else dataclasses.replace(context, options=options)


def there_of(folder: Path) -> dict:
    """Return the identity of the experiment in a folder; empty for a new one."""
    return read_experiment(folder).get("identity") or {}


def prepare_folder(grid: Grid[Options]) -> None:
    """Check the folder's content, and remove the partial files of a killed process.

    Raises `InvalidArgument` if the folder cannot be used for this experiment.
    """
    arm_schedule = ArmSchedule(grid)
    Status(arm_schedule.folder).say("preparing")
    check_folder(grid)
    for folder in map(arm_schedule.folder_of, arm_schedule.arms()):
        for place in (folder, folder / "samples", folder / ADAPTERS):
            remove_leftovers(place)


def check_folder(grid: Grid[Options], identity: Identity | None = None) -> None:
    """Raise `InvalidArgument` if the folder contains a single run, or an experiment with other options.

    The options may have more methods, learning rates or seeds than the experiment in the folder.
    """
    arm_schedule = ArmSchedule(grid)
    check_same(grid, identity)
    arm_schedule.check_racing()
    for arm in arm_schedule.arms():
        own, folder = resumed_options(arm_schedule.options_of(arm)), arm_schedule.folder_of(arm)
        if arm_schedule.ended(arm):
            check_past(own, folder, read_object(folder / EXPORTS), identity, own.adapter.method)
        else:
            plan_resume(own, identity, arm_schedule.place_of(arm))


def resumed_options(options: Options) -> Options:
    """Return an arm's options, changed to resume from its latest checkpoint."""
    return options.replace(resume_from_checkpoint="latest")


def check_same(grid: Grid[Options], identity: Identity | None = None, parts: str = "") -> None:
    """Raise `InvalidArgument` unless the folder is new or contains an experiment with the same options.

    The options may have more methods, learning rates or seeds. A folder with a single run is rejected too. `parts`: the
    hash of the split; empty as long as it is unknown.
    """
    values, folder = grid.flat(), Path(grid.base.output.output_dir)
    earlier = read_experiment(folder)
    there, methods = earlier.get("identity"), methods_of(earlier)
    if there is None:
        for method in METHODS.folders_in(folder):
            if checkpoints_of(folder / method) or (folder / method / EXPORTS).exists():
                problem = "contains a single run, which is not an experiment"
                raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
        return
    check_past(grid, folder, there, identity, methods)
    if parts and there.get("parts") != parts:
        problem = "was started with another split of these images"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
    for name in FIXED:
        value, before = values[name], there.get(name)
        # the default of another option that is None depends on the model or the images
        settled = value is not None or name == "metric_model"
        if settled and before != value and is_read(grid.base.option(name), methods):
            problem, fix = f"{folder} was started with {in_words(before)}", "use that, or choose another --output_dir"
            raise InvalidArgument(f"--{name} {in_words(value)}", problem, fix)


def identity_record(grid: Grid[Options], identity: Identity) -> dict:
    """Return the record that `check_same` compares."""
    past, values = past_of(grid, identity), grid.flat()
    settings = {name: value for name, value in past["settings"].items() if name not in CHANGING}
    return past | {"settings": settings} | {name: values[name] for name in FIXED}


def with_default_evaluations(
    schedule: Schedule, options: TrainingOptions, racing: bool, samples: int, before: int | None = None
) -> Schedule:
    """Return the schedule with the default number of measurements: MAX_EVALUATIONS, or as many as MEASURING permits.

    Without racing, there is at most one measurement per epoch, but an epoch may be a single step or a complete run.
    With racing there may be more. `samples`: number of samples of a measurement. `before`: steps between measurements
    of the experiment in the folder, if any.
    """
    trained = schedule.steps * options.gradient_accumulation_steps * options.train_batch_size
    evaluations = min(MAX_EVALUATIONS, max(MIN_EVALUATIONS, int(MEASURING * FORWARDS * trained / samples)))
    least = math.ceil(schedule.steps / evaluations)
    every = before or (least if racing else min(schedule.steps, max(schedule.validation_steps, least)))
    return dataclasses.replace(schedule, validation_steps=every)


def with_varied(resolved: Options, given: Grid[Options]) -> Grid[Options]:
    """Return `given` with its shared options replaced by `resolved`, those of the first run with all defaults set."""
    alpha = given.base.adapter.lora_alpha if "rank" in given.varied else resolved.adapter.lora_alpha
    averages = given.base.validation.average_checkpoints  # single runs do not have this option
    return dataclasses.replace(given, base=resolved.replace(lora_alpha=alpha, average_checkpoints=averages))


def check_variants(grid: Grid[Options], context: ImageContext) -> None:
    """Validate the adapter and the objective of every variant: every combination of values of the options that vary.

    The adapter in the context's options has already been validated.
    """
    tried = [context.options.adapter]
    for options in grid.variants():
        check_objective(options.model, options.training, context.model.family)
        check_family(options.adapter, options.training, context.model)
        if options.adapter not in tried:
            check_methods(options.adapter, options.training, context)
            tried.append(options.adapter)


def data_key(options: Options) -> tuple:
    """Return the seed and the options in ENCODED: if one of them changes, images or captions are encoded anew."""
    return (options.training.seed, *(options[name] for name in ENCODED))


def data_of_variant(
    training_data: TrainingData, options: Options, pipeline: DiffusionPipeline, context: ImageContext
) -> TrainingData:
    """Return the training data of the arms that have these options.

    Encodes random crops, mirrored images and caption variants of the seed, and the captions for the text encoders that
    are trained.
    """
    context, sources, seed = dataclasses.replace(context, options=options), [], options.training.seed
    for source in training_data.sources:
        if source.latents is not None:
            latents, problems = latents_of(source.images, source.sizes, pipeline, context)
            for index, problem in problems.items():  # damaged after the other seeds were encoded
                where, fix = source.images.name(index), f"remove {cache_folder(options.model, options.output)}"
                raise InvalidArgument(f"--seed {seed}, {where}", f"{problem}, but could be read for other seeds", fix)
            source = dataclasses.replace(source, latents=latents)
        sources.append(source)
    own = dataclasses.replace(options.data, cache_text_embeddings=training_data.data.cache_text_embeddings)
    training_data = dataclasses.replace(training_data, sources=tuple(sources), training=options.training, data=own)
    anew = options.adapter.train_text_encoder != training_data.adapter.train_text_encoder
    # Text encoders that read reference images must also read those of the selection split, which was unknown before.
    anew = anew or training_data.family.reads_references or any(source.transform.rewrites for source in sources)
    return with_texts(training_data, pipeline, context) if anew else training_data


def expected_times(
    validation: ValidationOptions,
    calibration: int,
    schedule: Schedule,
    select: int,
    test: int,
    a_sample: float,
) -> tuple[float, float]:
    """Return the expected seconds of all measurements of an arm, and of its test and export.

    `calibration`: number of samples that a merge reads. `select`, `test`: number of images in the splits. `a_sample`:
    seconds to measure a sample.
    """
    prompts = len(validation.validation_prompt or []) * validation.num_validation_images
    # two passes with guidance
    samples = select * TIMESTEPS * SELECT_NOISES * math.ceil(schedule.steps / schedule.validation_steps)
    measuring = samples + 2 * validation.num_inference_steps * prompts
    # The merged model generates as many samples, and each of three file formats generates a single image.
    drawn = 2 * validation.num_inference_steps * (max(1, prompts) + 3)
    tested = test * TIMESTEPS * TEST_NOISES + drawn + FORWARDS * calibration
    return a_sample * measuring, a_sample * tested


@dataclass(frozen=True)
class ImageExperiment(ExperimentStudy):
    """The image experiment: the data, model and split of all arms. Trains, evaluates and exports single arms."""

    schedule: ArmSchedule
    study: ImageArmStudy
    data_of: Mapping[tuple, TrainingData]
    """Training data by `data_key`."""
    parts: Parts
    content: str
    """Hash of the content of `parts`."""
    prog: str = "train_sd.py"
    about: About = IMAGES

    @property
    def context(self) -> ImageContext:  # type: ignore[override]
        """The context of the experiment."""
        return self.study.context

    def study_of(self, arm: Arm) -> ImageArmStudy:
        """Return the study of one arm, as for a single run.

        The arm keeps only its latest checkpoint, unless --checkpoints_total_limit is given.
        """
        options = resumed_options(self.schedule.options_of(arm))
        options = options.replace(checkpoints_total_limit=options.output.checkpoints_total_limit or 1)
        before = self.schedule.arms().index(arm) if arm in self.schedule.arms() else 0
        place = self.schedule.place_of(arm)
        context = dataclasses.replace(self.study.context, options=options, place=place, before=before)
        training_data = self.data_of[data_key(options)]
        data = dataclasses.replace(options.data, cache_text_embeddings=training_data.data.cache_text_embeddings)
        validation = dataclasses.replace(options.validation, validation_noises=SELECT_NOISES)
        objective = objective_of(options.model, options.training, context.model.family, self.study.pipeline)
        training_data = dataclasses.replace(
            training_data, objective=objective, adapter=options.adapter, data=data, training=options.training,
            validation=validation,
        )  # fmt: skip
        ends = functools.partial(race, arm, self.schedule)
        timed = functools.partial(self.timed, time.monotonic())
        return dataclasses.replace(
            self.study,
            training_data=training_data,
            context=context,
            race=ends,
            timed=timed,
            took=self.schedule.measured,
        )

    def train(self, arm: Arm) -> None:
        """Train an arm from its latest checkpoint, or average the checkpoints of another one, in every process."""
        study = self.study_of(arm)
        if broadcast_from_main(lambda: self.has_base_samples(arm)):
            study = dataclasses.replace(
                study, schedule=dataclasses.replace(study.schedule, sampled=(study.schedule.steps,))
            )
        train_arm(study, self.schedule.average_of(arm))

    def has_base_samples(self, arm: Arm) -> bool:
        """Return whether another arm has samples of the base model: those from before its first step."""
        others = (self.schedule.folder_of(other) for other in self.schedule.arms() if other != arm)
        return any(0 in by_step(folder / "samples") for folder in others)

    def timed(self, began: float, step: float) -> None:
        """Print the expected time of the experiment.

        `began`: when the arm was started, in seconds of `time.monotonic`. `step`: median time of its first steps, in
        seconds.
        """
        training, shared = self.study.context.options.training, self.study.shared
        batch = FORWARDS * training.train_batch_size * training.gradient_accumulation_steps
        a_sample = shared.seconds / shared.samples if shared.samples else step / batch
        measuring, to_conclude = self.times(a_sample)
        start = max(0.0, time.monotonic() - began - shared.seconds - (1 + TIMED_STEPS) * step)
        to_conclude += start  # testing an arm loads the model, too
        print_estimate(self.schedule, self.device, self.study.schedule.steps, step, start, measuring, to_conclude)

    def times(self, a_sample: float) -> tuple[float, float]:
        """Return the expected seconds of all measurements of an arm, and of its test and export.

        `a_sample`: seconds to measure a sample.
        """
        options, select, test = self.study.context.options, len(self.parts.select), len(self.parts.test)
        calibration = options.adapter.merge_calibration_samples
        return expected_times(options.validation, calibration, self.study.schedule, select, test, a_sample)

    @functools.cached_property
    def test_ids(self) -> list[str]:
        """Content hash of each test image."""
        return [self.study.training_data.sources[source].images.marks[number] for source, number in self.parts.test]

    @functools.cached_property
    def test_order(self) -> list[int]:
        """Indices of the test images, in the order in which the images were taken."""
        return order_of(training_images(self.study.training_data.sources), self.parts.test)

    def facts(self) -> Facts:
        """Return versions, split sizes, the measured timesteps and the identity of the experiment."""
        objective = self.study.training_data.objective
        return {
            **facts_of(self.parts, LIBRARIES),
            "timesteps": [float(timestep) / objective.timesteps for timestep in measured_at(objective)],
            "identity": identity_record(self.schedule.grid, self.study.identity)
            | {
                "parts": self.content,
                "noises": SELECT_NOISES,
                "test_noises": TEST_NOISES,
                "racing": self.schedule.racing,
            },
        }

    def base_losses(self) -> dict:
        """Return the losses on the test split before training, and write the thumbnails that the report shows."""
        images = [(self.study.training_data.sources[source].images, number) for source, number in self.parts.test]
        pairs = zip(self.test_ids, images, strict=True)
        opened = ((name, functools.partial(found.open, number)) for name, (found, number) in pairs)
        write_thumbnails(self.schedule.folder, opened)
        return self.study_of(self.schedule.arms()[0]).base_losses(self.parts.test)

    def seconds_to_conclude(self) -> float:
        """Return the expected time to test and export one arm, in seconds.

        The time is estimated from the time that validations have taken per sample; 0 before the first validation.
        """
        shared = self.study.shared
        return self.times(shared.seconds / shared.samples)[1] if shared.samples else 0.0

    def test_and_export(self, arm: Arm, step: int, keep: Callable[[dict], None] | None, to_export: bool) -> None:
        """Test an arm's checkpoint, and export it into the arm's directory as a single run does."""
        self.study_of(arm).test_and_export(step, self.parts.test, keep, to_export)

    def export(self, arm: Arm, step: int) -> list[str]:
        """Copy an arm's exported LoRA files to the experiment's directory, and return their names.

        The files replace those of an earlier export.
        """
        folder, into = self.schedule.folder_of(arm), self.schedule.folder
        formats = (*self.study.context.model.family.lora_files, DIFFUSERS_FILE, LYCORIS_FILE, PEFT_FOLDER)
        names = [name for name in formats if (folder / name).exists()]
        for name in names:
            with replacing(into / name) as temporary:
                copy = shutil.copytree if (folder / name).is_dir() else shutil.copyfile
                copy(folder / name, temporary)
        for file in {DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, LYCORIS_FILE} - set(names):
            (into / file).unlink(missing_ok=True)
        return names
