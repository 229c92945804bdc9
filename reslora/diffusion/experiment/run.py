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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...common.errors import InvalidArgument
from ...common.folder import check_held, lent, locked
from ...common.methods import METHODS
from ...common.signals import NOT_BEGUN, StopRequest
from ...common.status import Status
from ...common.together import decided, each
from ...experiment.arms import Arm
from ...experiment.course import ADAPTERS, Course
from ...experiment.crew import Orders, crew_of, heard
from ...experiment.parts import too_few
from ...experiment.record import EXPERIMENT, Facts, facts_of, read_experiment
from ...experiment.report import About
from ...experiment.run import train, train_and_conclude
from ...experiment.subject import COMPARING, Subject
from ...files import read_object, remove_leftovers
from ...options.grid import Grid
from ...options.images import Options, ValidationOptions
from ...options.option import in_words
from ...words import counted
from ..checks import check_methods
from ..context import Context
from ..data.dataset import ImageDataset
from ..data.material import latents_of, material_of, note_images, tell_counts, with_texts
from ..data.samples import Material, measured_at
from ..folder import cache_folder
from ..output.trackers import note_settings, start_trackers
from ..processes import start_accelerator
from ..run import Setting, check_before_loading, find_all, forget_encoder, identity_of, load_and_check, train_method
from ..training.checkpoints import (
    EXPORTS,
    MERGING,
    Identity,
    check_past,
    checkpoints_of,
    past_of,
    plan_resume,
)
from ..training.schedule import Schedule, schedule_of
from .judging import base_losses, export_chosen, measured
from .measure import SelectLoss
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


def run_experiment(asked: Grid[Options], stop: StopRequest, orders: Orders | None = None) -> None:
    """Trains the arms that the options name and that have not ended yet, and tells which method does best.

    With orders, it is one of --arms_at_once processes: it trains what it is given, in a folder that the main process
    has locked, checked and noted the settings in.
    """
    if orders:  # TensorBoard reads one file of a folder at a time
        asked = asked.replace(logging_dir=f"{asked.base.output.logging_dir}/process-{orders.number}")
    began, plain, given = time.monotonic(), asked.run(), asked
    with stop.at_once():
        accelerator = start_accelerator(plain)
    with contextlib.ExitStack() as stack:
        if orders:
            stack.enter_context(lent(Path(plain.output.output_dir)))
        else:
            decided(lambda: take_folder(given, stop, stack))
        kinds, context = find_all(plain, accelerator, stop)
        identity = identity_of(kinds, context)
        asked = with_varied(context.options, given)
        if orders:
            context = dataclasses.replace(context, status=Status())
        else:
            decided(lambda: check_folder(asked, identity))
            check_before_loading(kinds, context)
        check_count(len({mark for images in kinds if not images.of_class for mark in images.marks}), plain.data)
        pipeline, objective = each(lambda: load_and_check(context))
        each(lambda: check_variants(asked, context))
        if orders or (plain.experiment.arms_at_once or 1) == 1:
            start_trackers(context)
        material = material_of(kinds, pipeline, objective, context)
        decided(check_held)
        note_images(material, context, goes_on=(context.folder / EXPERIMENT).exists())
        parts = decided(lambda: parts_of(learnt(material.sources), plain.data, plain.validation, plain.experiment))
        decided(lambda: check_parts(asked.base, parts, learnt(material.sources)))
        material = with_parts(material, parts, accelerator.num_processes)
        tell_counts(material, context)
        materials = {seed: of_seed(material, seed, pipeline, context) for seed in asked.values("seed")}
        forget_encoder(pipeline, context)
        schedule = with_few_looks(schedule_of(material, context), plain.validation)
        asked = asked.replace(max_train_steps=schedule.steps, validation_steps=schedule.validation_steps)
        decided(lambda: check_same(asked, identity))
        course, setting = Course(asked, began), Setting(pipeline, material, schedule, identity, context)
        bench = Bench(course, setting, materials, parts)
        note_settings(asked.flat(), schedule, accelerator, write=not orders)
        if orders:
            for arm in orders.arms(course):
                with heard():
                    train(arm, course, bench)
        else:
            accelerator.print(f"{counted(len(course.arms()), 'arm')} of {counted(schedule.steps, 'step')}; {parts}")
            crew = crew_of(plain.experiment, "train_sd.py", functools.partial(run_experiment, given), stop)
            train_and_conclude(course, bench, crew)
        accelerator.end_training()


def take_folder(grid: Grid[Options], stop: StopRequest, stack: contextlib.ExitStack) -> None:
    """Locks the experiment's folder until the stack closes, and refuses at once what its content does not allow.

    What a killed start has left half-written in it goes away.
    """
    stop.check(NOT_BEGUN)  # what a single process was asked while accelerate started
    course = Course(grid)
    stack.enter_context(locked(course.folder))
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


def check_same(grid: Grid[Options], identity: Identity | None = None) -> None:
    """Refuses to go on with an experiment but with more methods, rates and seeds; and in the folder of a plain run."""
    values, folder = grid.flat(), Path(grid.base.output.output_dir)
    there = read_experiment(folder).get("identity")
    if there is None:
        for method in METHODS:
            if checkpoints_of(folder / method) or (folder / method / EXPORTS).exists():
                problem = "holds a run that is no experiment"
                raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
        return
    check_past(values, folder, there, identity)
    for name in FIXED:
        value, before = values[name], there.get(name)
        settled = value is not None or name == "metric_model"  # of the others the model or the images say it yet
        if settled and before != value:
            problem, fix = f"{folder} was begun with {in_words(before)}", "use that, or choose another --output_dir"
            raise InvalidArgument(f"--{name} {in_words(value)}", problem, fix)


def check_parts(options: Options, parts: Parts, images: Mapping[int, ImageDataset]) -> None:
    """Refuses to go on with another split than the experiment was begun with."""
    folder = Path(options.output.output_dir)
    there = read_experiment(folder)
    if not there:
        return
    before = there.get("identity", {}).get("parts")
    if before != content_of(parts, images):
        problem = "was begun with another split of these images"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")


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
    material = dataclasses.replace(material, sources=tuple(sources), options=options)
    return with_texts(material, pipeline, context) if any(source.recipe.rewrites for source in sources) else material


@dataclass(frozen=True)
class Bench(Subject):
    """What the arms of an experiment are trained on."""

    course: Course
    setting: Setting
    materials: Mapping[int, Material]
    """By seed."""
    parts: Parts
    about: About = IMAGES

    @property
    def device(self) -> torch.device:
        return self.setting.context.accelerator.device

    def setting_of(self, arm: Arm) -> Setting:
        """As a plain run of the arm has it, but that one checkpoint is kept unless more are asked for."""
        options = going_on(self.course.options_of(arm))
        options = options.replace(checkpoints_total_limit=options.output.checkpoints_total_limit or 1)
        before = self.course.arms().index(arm) if arm in self.course.arms() else 0
        place = self.course.place_of(arm)
        context = dataclasses.replace(self.setting.context, options=options, place=place, before=before)
        material = self.materials[arm.seed]
        own = options.replace(cache_text_embeddings=material.options.data.cache_text_embeddings)
        material = dataclasses.replace(material, options=own)
        return dataclasses.replace(self.setting, material=material, context=context)

    def train(self, arm: Arm) -> None:
        setting = self.setting_of(arm)
        context, (method,) = setting.context, setting.context.options.adapter.method
        resume = decided(lambda: plan_resume(context.options, setting.identity, context.place))
        if not resume.checkpoints[method]:  # of which a plain run would say that it starts afresh
            options = context.options.replace(resume_from_checkpoint=None)
            setting = dataclasses.replace(setting, context=dataclasses.replace(context, options=options))
        if context.options.training.compile:
            torch.compiler.reset()  # or it gives up after as many models as it remembers
        try:
            if method not in resume.finished:
                train_method(method, resume, setting, SelectLoss)
        finally:
            context.accelerator.free_memory()

    @functools.cached_property
    def content(self) -> str:
        """What the parts are known by."""
        return content_of(self.parts, learnt(self.setting.material.sources))

    @functools.cached_property
    def marks(self) -> list[str]:
        return [self.setting.material.sources[source].images.marks[number] for source, number in self.parts.test]

    def facts(self) -> Facts:
        objective = self.setting.material.objective
        return {
            **facts_of(self.parts, LIBRARIES),
            "timesteps": [float(timestep) / objective.timesteps for timestep in measured_at(objective)],
            "identity": identity_record(self.course.grid.flat(), self.setting.identity) | {"parts": self.content},
        }

    def too_few(self) -> list[str]:
        return too_few(len(self.parts.test), self.about.unit, self.parts.enough)

    def goes_on(self, ended: int, total: int) -> None:
        """Says how many arms have ended, in the run's status."""
        self.setting.context.status.say(f"training, {ended} of {counted(total, 'arm')} ended")

    def begins(self, phase: str, arm: Arm) -> None:
        """Says what is done with an arm next, in the run's status; a stop is heeded before it."""
        self.setting.context.stop.check(COMPARING)
        self.setting.context.status.say(phase, self.course.name_of(arm))

    def measured(self, arm: Arm, step: int) -> dict:
        return measured(step, self.parts.test, self.setting_of(arm))

    def base_losses(self) -> dict:
        return base_losses(self.parts.test, self.setting_of(self.course.arms()[0]))

    def export(self, arm: Arm, step: int) -> list[str]:
        return export_chosen(step, self.setting_of(arm))
