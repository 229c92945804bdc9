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
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ...errors import InvalidArgument
from ...experiment.arms import Arm
from ...experiment.record import EXPERIMENT, Facts, facts_of, read_experiment
from ...experiment.report import About
from ...experiment.schedule import ArmSchedule
from ...experiment.study import TIMED_STEPS, ExperimentStudy, race, timing
from ...experiment.worker_pool import Orders
from ...formatting import pluralize
from ...io import read_object, remove_leftovers
from ...methods.registry import METHODS
from ...options.grid import Grid
from ...options.images import NOISES, Options, ValidationOptions
from ...options.option import in_words
from ...runtime.checkpoint_folders import ADAPTERS
from ...runtime.folder_lock import locked, share_lock
from ...runtime.processes import broadcast_from_main, on_all
from ...runtime.signals import StopRequest
from ...runtime.status import Status
from ...training.checkpoints import EXPORTS, Identity, check_past, checkpoints_of, named_by, past_of, plan_resume
from ...training.loop import train_method
from ...training.schedule import Schedule
from ...training.state import Learner
from ...training.trackers import note_settings
from ..cache_folder import cache_folder
from ..context import ImageContext
from ..data.batch import Batch
from ..data.samples import TIMESTEPS, TrainingData, measured_at
from ..data.training_data import latents_of, print_folder_counts, with_texts
from ..model.objective import check_objective, objective_of
from ..model_checks import check_methods
from ..output.reports import ImageReports
from ..run import begin, check_before_loading, encode, forget_encoder
from ..schedule import schedule_of, steps_of
from ..study import ImageStudy
from .losses_by_image import write_thumbnails
from .report_sections import IMAGES
from .split import Parts, check_count, content_of, learnt, parts_of, with_parts
from .test_split_losses import EXPORTED, base_losses, export_chosen, export_compared, measured

MOST_LOOKS = 10
SELECT_NOISES = 1  # noises per timestep and image of the selection split; for the test split it is NOISES
CHANGING = ("learning_rate", "seed")  # more values of these may be added to an existing experiment, like methods
FIXED = (
    *named_by("merged", Options()),
    "max_train_steps",
    "validation_steps",
    "cache_latents",
    "metric_model",
)  # options that a resumed single run may change, but an experiment may not
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@contextlib.contextmanager
def open_study(given: Grid[Options], stop: StopRequest, orders: Orders | None = None) -> Iterator[ImageExperiment]:
    """Lock the folder, check the options, and load and encode what the arms share.

    `orders` is set only in a worker process of --arms_at_once. In that case the main process has already locked the
    folder, checked the options and written the settings.
    """
    if orders:  # TensorBoard reads only one active file per folder
        given = given.replace(logging_dir=f"{given.base.output.logging_dir}/process-{orders.number}")
    began, plain, folder = time.monotonic(), given.run(), Path(given.base.output.output_dir)
    with contextlib.ExitStack() as stack:
        check, lock = (lambda: None, share_lock) if orders else (lambda: take_folder(given), locked)
        kinds, context, identity = begin(plain, stop, stack, check, lock)
        asked = with_varied(context.options, given)
        if orders:
            context = dataclasses.replace(context, status=Status())
        else:
            broadcast_from_main(lambda: check_folder(asked, identity))
            widest = context
            if "train_batch_size" in asked.varied:
                most = context.options.replace(train_batch_size=max(asked.values("train_batch_size")))
                widest = dataclasses.replace(context, options=most)
            check_before_loading(kinds, widest)
        check_count(len({mark for images in kinds if not images.of_class for mark in images.marks}), plain.data)
        on_all(lambda: check_variants(asked, context))
        alone, goes_on = (plain.experiment.arms_at_once or 1) == 1, (folder / EXPERIMENT).exists()
        pipeline, training_data = encode(kinds, context, goes_on, track=bool(orders) or alone)
        for each in asked.variants():
            objective_of(each.model, each.training, context.model.family, pipeline)
        parts = broadcast_from_main(
            lambda: parts_of(learnt(training_data.sources), plain.data, plain.validation, plain.experiment)
        )
        content = content_of(parts, learnt(training_data.sources))
        broadcast_from_main(lambda: check_same(asked, identity, content))
        processes = context.accelerator.num_processes
        training_data = with_parts(training_data, parts, processes)
        print_folder_counts(training_data, context)
        training_data_of_seeds = {
            seed: of_seed(training_data, seed, pipeline, context) for seed in asked.values("seed")
        }
        forget_encoder(pipeline, context)
        racing = broadcast_from_main(lambda: ArmSchedule(asked).is_race)
        schedule = with_few_looks(schedule_of(training_data.updates(processes), context), plain.validation, racing)
        asked = asked.replace(max_train_steps=schedule.steps, validation_steps=schedule.validation_steps)
        broadcast_from_main(lambda: check_same(asked, identity, content))
        note_settings(asked, steps_of(schedule), context.accelerator, write=not orders)
        arm_schedule, study = ArmSchedule(asked, began), ArmStudy(schedule, identity, context, pipeline, training_data)
        arm_schedule.estimated = bool(orders and orders.number)  # one process prints the estimate
        measured = f"every {pluralize(schedule.validation_steps, 'step')}"
        context.accelerator.print(
            f"{arm_schedule.runs_in_words()}; {pluralize(schedule.steps, 'step')}, measured {measured}; {parts}"
        )
        there = read_experiment(folder).get("identity")
        noises = there.get("noises", NOISES) if there else SELECT_NOISES
        yield ImageExperiment(
            arm_schedule, study, training_data_of_seeds, parts, content, noises, stop, context.accelerator.device
        )
        context.accelerator.end_training()


def take_folder(grid: Grid[Options]) -> None:
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
        own, folder = going_on(arm_schedule.options_of(arm)), arm_schedule.folder_of(arm)
        if arm_schedule.ended(arm):
            check_past(own, folder, read_object(folder / EXPORTS), identity)
        else:
            plan_resume(own, identity, arm_schedule.place_of(arm))


def going_on(options: Options) -> Options:
    """Return an arm's options, changed to resume from its latest checkpoint."""
    return options.replace(resume_from_checkpoint="latest")


def check_same(grid: Grid[Options], identity: Identity | None = None, parts: str = "") -> None:
    """Raise `InvalidArgument` unless the folder is new or contains an experiment with the same options.

    The options may have more methods, learning rates or seeds. A folder with a single run is rejected too. `parts`: the
    hash of the split; empty as long as it is unknown.
    """
    values, folder = grid.flat(), Path(grid.base.output.output_dir)
    there = read_experiment(folder).get("identity")
    if there is None:
        for method in METHODS:
            if checkpoints_of(folder / method) or (folder / method / EXPORTS).exists():
                problem = "contains a single run, which is not an experiment"
                raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
        return
    check_past(grid, folder, there, identity)
    if parts and there.get("parts") != parts:
        problem = "was begun with another split of these images"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
    for name in FIXED:
        value, before = values[name], there.get(name)
        settled = value is not None or name == "metric_model"  # None: the default depends on model or images
        if settled and before != value:
            problem, fix = f"{folder} was begun with {in_words(before)}", "use that, or choose another --output_dir"
            raise InvalidArgument(f"--{name} {in_words(value)}", problem, fix)


def identity_record(grid: Grid[Options], identity: Identity) -> dict:
    """Return the record that `check_same` compares."""
    past, values = past_of(grid, identity), grid.flat()
    settings = {name: value for name, value in past["settings"].items() if name not in CHANGING}
    return past | {"settings": settings} | {name: values[name] for name in FIXED}


def with_few_looks(schedule: Schedule, options: ValidationOptions, racing: bool) -> Schedule:
    """Limit the default number of validations to MOST_LOOKS, which is also the number with racing.

    The default is one validation per epoch, but an epoch may be a single step, or half of a run.
    """
    if options.validation_steps:
        return schedule
    least = math.ceil(schedule.steps / MOST_LOOKS)
    return dataclasses.replace(schedule, validation_steps=least if racing else max(schedule.validation_steps, least))


def with_varied(resolved: Options, given: Grid[Options]) -> Grid[Options]:
    """Return `given` with its shared options replaced by `resolved`, those of the first run with all defaults set."""
    alpha = given.base.adapter.lora_alpha if "rank" in given.varied else resolved.adapter.lora_alpha
    return dataclasses.replace(given, base=resolved.replace(lora_alpha=alpha))


def check_variants(grid: Grid[Options], context: ImageContext) -> None:
    """Validate the adapters and objectives for every combination of the values of the options that vary.

    The adapter in the context's options has already been validated.
    """
    tried = [context.options.adapter]
    for options in grid.variants():
        check_objective(options.model, options.training, context.model.family)
        if options.adapter not in tried:
            check_methods(options.adapter, options.training, context)
            tried.append(options.adapter)


def of_seed(training_data: TrainingData, seed: int, pipeline: DiffusionPipeline, context: ImageContext) -> TrainingData:
    """Return the training data for another seed: encode the random crops and caption variants of that seed."""
    options = context.options.replace(seed=seed)
    context, sources = dataclasses.replace(context, options=options), []
    for source in training_data.sources:
        if source.latents is not None:
            sizes = [source.size(image) for image in range(len(source.images))]
            latents, problems = latents_of(source.images, sizes, pipeline, context)
            for index, problem in problems.items():  # damaged after the other seeds were encoded
                where, fix = source.images.name(index), f"remove {cache_folder(options.model, options.output)}"
                raise InvalidArgument(f"--seed {seed}, {where}", f"{problem}, and not with other seeds", fix)
            source = dataclasses.replace(source, latents=latents)
        sources.append(source)
    training_data = dataclasses.replace(training_data, sources=tuple(sources), training=options.training)
    return (
        with_texts(training_data, pipeline, context)
        if any(source.transform.rewrites for source in sources)
        else training_data
    )


@dataclass(frozen=True)
class ArmStudy(ImageStudy):
    """The study of an arm: training writes no exports; `ImageExperiment` exports arms when it compares them."""

    race: Callable[[], None] = lambda: None
    """Function that raises `StoppedEarly` in every process if another learning rate is better."""
    timed: Callable[[float], None] = lambda _: None
    """Function that receives the median time in seconds of a few of the first steps."""

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """Yield batches as a single run does, and time the steps after the first one, which may compile."""
        timed = self.timed if self.context.accelerator.is_main_process else None
        a_step = self.context.options.training.gradient_accumulation_steps
        return timing(super().batches(steps), a_step, timed)

    def validate(self, learner: Learner, reports: ImageReports, parts: Sequence[str] | None = None) -> None:
        """Measure and sample as a single run does, and end the arm if another learning rate is better."""
        super().validate(learner, reports, parts)
        self.race()

    def export(self, learner: Learner, schedule: Schedule) -> dict[str, int]:
        """Write nothing, and return no differences."""
        return {}


@dataclass(frozen=True)
class ImageExperiment(ExperimentStudy):
    """The image experiment: data, model and split, which all arms share; trains, evaluates and exports single arms."""

    schedule: ArmSchedule
    study: ArmStudy
    training_data_of_seeds: Mapping[int, TrainingData]
    """Training data by seed."""
    parts: Parts
    content: str
    """Hash of the content of `parts`."""
    noises: int
    """Number of noises per timestep and image for the losses on the selection split."""
    stop: StopRequest
    device: torch.device
    prog: str = "train_sd.py"
    about: About = IMAGES

    def say(self, phase: str, name: str = "") -> None:
        """Write the current phase to the run's status."""
        self.study.context.status.say(phase, name)

    def study_of(self, arm: Arm) -> ArmStudy:
        """Return the study of one arm, as for a single run.

        The arm keeps only its latest checkpoint, unless --checkpoints_total_limit is given.
        """
        options = going_on(self.schedule.options_of(arm))
        options = options.replace(checkpoints_total_limit=options.output.checkpoints_total_limit or 1)
        before = self.schedule.arms().index(arm) if arm in self.schedule.arms() else 0
        place = self.schedule.place_of(arm)
        context = dataclasses.replace(self.study.context, options=options, place=place, before=before)
        training_data = self.training_data_of_seeds[arm.seed]
        data = dataclasses.replace(options.data, cache_text_embeddings=training_data.data.cache_text_embeddings)
        validation = dataclasses.replace(options.validation, validation_noises=self.noises)
        objective = objective_of(options.model, options.training, context.model.family, self.study.pipeline)
        training_data = dataclasses.replace(
            training_data, objective=objective, adapter=options.adapter, data=data, training=options.training,
            validation=validation,
        )  # fmt: skip
        ends = functools.partial(race, arm, self.schedule)
        timed = functools.partial(self.timed, time.monotonic())
        return dataclasses.replace(self.study, training_data=training_data, context=context, race=ends, timed=timed)

    def train(self, arm: Arm) -> None:
        """Train an arm from its latest checkpoint, in every process."""
        study = self.study_of(arm)
        context, (method,) = study.context, study.context.options.adapter.method
        resume = broadcast_from_main(lambda: plan_resume(context.options, study.identity, context.place))
        if context.options.training.compile:
            torch.compiler.reset()  # the compiler falls back to eager mode after a number of recompilations
        try:
            if method not in resume.finished:
                train_method(method, resume, study)
        finally:
            context.accelerator.free_memory()

    def timed(self, began: float, step: float) -> None:
        """Print the expected time of the experiment.

        `began`: when the arm was started, in seconds of `time.monotonic`. `step`: median time of its first steps, in
        seconds.
        """
        options, schedule, shared = self.study.context.options, self.study.schedule, self.study.shared
        # A backward pass takes as long as two forward passes.
        batch = 3 * options.training.train_batch_size * options.training.gradient_accumulation_steps
        a_sample = shared.seconds / shared.samples if shared.samples else step / batch
        samples = len(self.study.training_data.held_out) * TIMESTEPS * self.noises
        prompts = len(options.validation.validation_prompt or []) * options.validation.num_validation_images
        measurement = a_sample * (samples + 2 * options.validation.num_inference_steps * prompts)
        measuring = measurement * math.ceil(schedule.steps / schedule.validation_steps)
        start = max(0.0, time.monotonic() - began - shared.seconds - (1 + TIMED_STEPS) * step)
        self.estimate(schedule.steps, step, start, measuring, self.seconds_to_conclude())

    @functools.cached_property
    def test_ids(self) -> list[str]:
        """Content hash of each test image."""
        return [self.study.training_data.sources[source].images.marks[number] for source, number in self.parts.test]

    def facts(self) -> Facts:
        """Return versions, split sizes, the measured timesteps and the identity of the experiment."""
        objective = self.study.training_data.objective
        return {
            **facts_of(self.parts, LIBRARIES),
            "timesteps": [float(timestep) / objective.timesteps for timestep in measured_at(objective)],
            "identity": identity_record(self.schedule.grid, self.study.identity)
            | {"parts": self.content, "noises": self.noises, "racing": self.schedule.racing},
        }

    def measured(self, arm: Arm, step: int) -> dict:
        """Return the losses and similarities of an arm's checkpoint on the test split."""
        return measured(step, self.parts.test, self.study_of(arm))

    def base_losses(self) -> dict:
        """Return the base model's losses on the test split, and write the thumbnails that the report shows."""
        images = [(self.study.training_data.sources[source].images, number) for source, number in self.parts.test]
        pairs = zip(self.test_ids, images, strict=True)
        opened = ((name, functools.partial(found.open, number)) for name, (found, number) in pairs)
        write_thumbnails(self.schedule.folder, opened)
        return base_losses(self.parts.test, self.study_of(self.schedule.arms()[0]))

    def seconds_to_conclude(self) -> float:
        """Return the expected time to test and export one arm, in seconds.

        It is estimated from the time that validations have taken per sample; 0 before the first validation.
        """
        shared, options = self.study.shared, self.study.context.options
        if not shared.samples:
            return 0.0
        tested = len(self.parts.test) * TIMESTEPS * NOISES
        # 8: two passes with guidance, times four models (the merged model and three formats). 3, below: a backward pass
        # takes as long as two forward passes.
        drawn = 8 * options.validation.num_inference_steps * max(1, options.validation.num_validation_images)
        return (tested + drawn + 3 * options.adapter.merge_calibration_samples) * shared.seconds / shared.samples

    def is_exported(self, arm: Arm, step: int) -> bool:
        """Return whether the arm's exported files exist and are those of its checkpoint at this step."""
        folder = self.schedule.folder_of(arm)
        record = read_object(folder / EXPORTS)
        return record.get(EXPORTED) == step and all((folder / name).exists() for name in record["difference_of_255"])

    def export_compared(self, arm: Arm, step: int) -> None:
        """Write an arm's LoRA files, read them back and compare their images, as a single run does."""
        export_compared(step, self.study_of(arm))

    def export(self, arm: Arm, step: int) -> list[str]:
        """Export an arm's checkpoint into the experiment's directory, and return the names of the files."""
        return export_chosen(step, self.study_of(arm))
