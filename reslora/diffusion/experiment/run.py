"""An experiment: every arm trained as a plain run of its options, rates and checkpoints chosen, methods compared.

Arms share the model and what is encoded, and by seed noise and order. They differ from plain runs in the images alone,
of which the content says what is trained on. What an arm writes is in a folder of its own, and what is on disk decides
what is left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...common.errors import InvalidArgument
from ...common.folder import lent, locked
from ...common.methods import METHODS
from ...common.recovery import ADAPTERS
from ...common.signals import StopRequest
from ...common.status import Status
from ...common.together import decided, each
from ...experiment.arms import Arm
from ...experiment.course import Course
from ...experiment.crew import Orders
from ...experiment.record import EXPERIMENT, Facts, facts_of, read_experiment
from ...experiment.report import About
from ...experiment.subject import Subject
from ...files import read_object, remove_leftovers
from ...options.grid import Grid
from ...options.images import NOISES, Options, ValidationOptions
from ...options.option import in_words
from ...words import counted
from ..checks import check_methods
from ..context import Context
from ..data.material import latents_of, tell_counts, with_texts
from ..data.samples import Material, measured_at
from ..folder import cache_folder
from ..output.trackers import note_settings
from ..run import begin, check_before_loading, encode, forget_encoder
from ..study import ImageStudy
from ..training.checkpoints import (
    EXPORTS,
    MERGING,
    Identity,
    check_past,
    checkpoints_of,
    past_of,
    plan_resume,
)
from ..training.loop import train_method
from ..training.schedule import Schedule, schedule_of
from .judging import base_losses, export_chosen, measured
from .pages import IMAGES
from .split import Parts, check_count, content_of, learnt, parts_of, with_parts

MOST_LOOKS = 10
ADAPTER = ("rank", "shortcut", "pre_num")  # what an adapter is made of, where several are given
CHANGING = ("learning_rate", "seed")  # and the methods: of these more may be added
FIXED = (
    *MERGING,
    "max_train_steps",
    "validation_steps",
    "cache_latents",
    "metric_model",
)  # which a plain run may change
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@contextlib.contextmanager
def open_study(given: Grid[Options], stop: StopRequest, orders: Orders | None = None) -> Iterator[Bench]:
    """Lock the folder, check the options, and load and encode what the arms share.

    With orders, for one of --arms_at_once processes, in a folder that the main process has locked, checked and noted
    the settings in.
    """
    if orders:  # TensorBoard reads one file of a folder at a time
        given = given.replace(logging_dir=f"{given.base.output.logging_dir}/process-{orders.number}")
    began, plain, folder = time.monotonic(), given.run(), Path(given.base.output.output_dir)
    with contextlib.ExitStack() as stack:
        check, lock = (lambda: None, lent) if orders else (lambda: take_folder(given), locked)
        kinds, context, identity = begin(plain, stop, stack, check, lock)
        asked = with_varied(context.options, given)
        if orders:
            context = dataclasses.replace(context, status=Status())
        else:
            decided(lambda: check_folder(asked, identity))
            check_before_loading(kinds, context)
        check_count(len({mark for images in kinds if not images.of_class for mark in images.marks}), plain.data)
        each(lambda: check_variants(asked, context))
        alone, goes_on = (plain.experiment.arms_at_once or 1) == 1, (folder / EXPERIMENT).exists()
        pipeline, material = encode(kinds, context, goes_on, track=bool(orders) or alone)
        parts = decided(lambda: parts_of(learnt(material.sources), plain.data, plain.validation, plain.experiment))
        content = content_of(parts, learnt(material.sources))
        decided(lambda: check_same(asked, identity, content))
        processes = context.accelerator.num_processes
        material = with_parts(material, parts, processes)
        tell_counts(material, context)
        materials = {seed: of_seed(material, seed, pipeline, context) for seed in asked.values("seed")}
        forget_encoder(pipeline, context)
        schedule = with_few_looks(schedule_of(material.updates(processes), context), plain.validation)
        asked = asked.replace(max_train_steps=schedule.steps, validation_steps=schedule.validation_steps)
        decided(lambda: check_same(asked, identity, content))
        note_settings(asked.flat(), schedule, context.accelerator, write=not orders)
        course, study = Course(asked, began), ImageStudy(schedule, identity, context, pipeline, material)
        context.accelerator.print(f"{counted(len(course.arms()), 'arm')} of {counted(schedule.steps, 'step')}; {parts}")
        yield Bench(course, study, materials, parts, content, stop, context.accelerator.device)
        context.accelerator.end_training()


def take_folder(grid: Grid[Options]) -> None:
    """Refuses a folder whose content does not allow it; what a killed start has left half-written in it goes away."""
    course = Course(grid)
    Status(course.folder).say("preparing")
    check_folder(grid)
    for folder in map(course.folder_of, course.arms()):
        for place in (folder, folder / "samples", folder / ADAPTERS):
            remove_leftovers(place)


def check_folder(grid: Grid[Options], identity: Identity | None = None) -> None:
    """Refuses to go on with anything else than more methods, rates or seeds, and plain runs in the folder."""
    course = Course(grid)
    check_same(grid, identity)
    for arm in course.arms():
        own, folder = going_on(course.options_of(arm)), course.folder_of(arm)
        if course.ended(arm):
            check_past(own.flat(), folder, read_object(folder / EXPORTS), identity)
        else:
            plan_resume(own, identity, course.place_of(arm))


def going_on(options: Options) -> Options:
    """An arm's options: it goes on from its newest checkpoint, and nobody has to ask for that."""
    return options.replace(resume_from_checkpoint="latest")


def check_same(grid: Grid[Options], identity: Identity | None = None, parts: str = "") -> None:
    """Refuses to go on with an experiment but with more methods, rates and seeds; and in the folder of a plain run.

    `parts`: the content of the split, once it is known.
    """
    values, folder = grid.flat(), Path(grid.base.output.output_dir)
    there = read_experiment(folder).get("identity")
    if there is None:
        for method in METHODS:
            if checkpoints_of(folder / method) or (folder / method / EXPORTS).exists():
                problem = "holds a run that is no experiment"
                raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
        return
    check_past(values, folder, there, identity)
    if parts and there.get("parts") != parts:
        problem = "was begun with another split of these images"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
    for name in FIXED:
        value, before = values[name], there.get(name)
        settled = value is not None or name == "metric_model"  # of the others the model or the images say it yet
        if settled and before != value:
            problem, fix = f"{folder} was begun with {in_words(before)}", "use that, or choose another --output_dir"
            raise InvalidArgument(f"--{name} {in_words(value)}", problem, fix)


def identity_record(values: Mapping[str, Any], identity: Identity) -> dict:
    """Return what `check_same` compares; `values` are flat."""
    past = past_of(values, identity)
    settings = {name: value for name, value in past["settings"].items() if name not in CHANGING}
    return past | {"settings": settings} | {name: values[name] for name in FIXED}


def with_few_looks(schedule: Schedule, options: ValidationOptions) -> Schedule:
    """At most MOST_LOOKS at the select images where no number of steps is given: an epoch may be one step."""
    if options.validation_steps:
        return schedule
    least = math.ceil(schedule.steps / MOST_LOOKS)
    return dataclasses.replace(schedule, validation_steps=max(schedule.validation_steps, least))


def with_varied(resolved: Options, given: Grid[Options]) -> Grid[Options]:
    """Return the experiment with the resolved options of its first run."""
    alpha = given.base.adapter.lora_alpha if "rank" in given.varied else resolved.adapter.lora_alpha
    return Grid(resolved.replace(lora_alpha=alpha), given.varied)


def check_variants(grid: Grid[Options], context: Context) -> None:
    """Tries the methods with every further rank, shortcut and number of blocks."""
    tried = [context.options]
    for options in grid.runs(*ADAPTER):
        if all(options.adapter != other.adapter for other in tried):
            check_methods(options.adapter, options.training, context)
            tried.append(options)


def of_seed(material: Material, seed: int, pipeline: DiffusionPipeline, context: Context) -> Material:
    """The material as a run with another seed has it: with its random crops and variants of captions, encoded."""
    options = context.options.replace(seed=seed)
    context, sources = dataclasses.replace(context, options=options), []
    for source in material.sources:
        if source.latents is not None:
            sizes = [source.size(image) for image in range(len(source.images))]
            latents, problems = latents_of(source.images, sizes, pipeline, context)
            for index, problem in problems.items():  # damaged since the other seeds were encoded
                name = source.images.name(index)
                where = f"--seed {seed}, {name}"
                raise InvalidArgument(
                    where,
                    f"{problem}, and not with other seeds",
                    f"remove {cache_folder(options.model, options.output)}",
                )
            source = dataclasses.replace(source, latents=latents)
        sources.append(source)
    material = dataclasses.replace(material, sources=tuple(sources), training=options.training)
    return with_texts(material, pipeline, context) if any(source.recipe.rewrites for source in sources) else material


@dataclass(frozen=True)
class Bench(Subject):
    """What the arms of an experiment are trained on."""

    course: Course
    study: ImageStudy
    materials: Mapping[int, Material]
    """By seed."""
    parts: Parts
    content: str
    """Of the parts."""
    stop: StopRequest
    device: torch.device
    prog: str = "train_sd.py"
    about: About = IMAGES

    def say(self, phase: str, name: str = "") -> None:
        self.study.context.status.say(phase, name)

    def study_of(self, arm: Arm) -> ImageStudy:
        """As a plain run of the arm has it, but that one checkpoint is kept unless more are asked for."""
        options = going_on(self.course.options_of(arm))
        options = options.replace(checkpoints_total_limit=options.output.checkpoints_total_limit or 1)
        before = self.course.arms().index(arm) if arm in self.course.arms() else 0
        place = self.course.place_of(arm)
        context = dataclasses.replace(self.study.context, options=options, place=place, before=before)
        material = self.materials[arm.seed]
        data = dataclasses.replace(options.data, cache_text_embeddings=material.data.cache_text_embeddings)
        validation = dataclasses.replace(options.validation, validation_noises=NOISES)
        material = dataclasses.replace(
            material, adapter=options.adapter, data=data, training=options.training, validation=validation
        )
        return dataclasses.replace(self.study, material=material, context=context)

    def train(self, arm: Arm) -> None:
        study = self.study_of(arm)
        context, (method,) = study.context, study.context.options.adapter.method
        resume = decided(lambda: plan_resume(context.options, study.identity, context.place))
        if context.options.training.compile:
            torch.compiler.reset()  # or it gives up after as many models as it remembers
        try:
            if method not in resume.finished:
                train_method(method, resume, study)
        finally:
            context.accelerator.free_memory()

    @functools.cached_property
    def marks(self) -> list[str]:
        return [self.study.material.sources[source].images.marks[number] for source, number in self.parts.test]

    def facts(self) -> Facts:
        objective = self.study.material.objective
        return {
            **facts_of(self.parts, LIBRARIES),
            "timesteps": [float(timestep) / objective.timesteps for timestep in measured_at(objective)],
            "identity": identity_record(self.course.grid.flat(), self.study.identity) | {"parts": self.content},
        }

    def measured(self, arm: Arm, step: int) -> dict:
        return measured(step, self.parts.test, self.study_of(arm))

    def base_losses(self) -> dict:
        return base_losses(self.parts.test, self.study_of(self.course.arms()[0]))

    def export(self, arm: Arm, step: int) -> list[str]:
        return export_chosen(step, self.study_of(arm))
