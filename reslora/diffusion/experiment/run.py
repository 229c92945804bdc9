"""An experiment: every arm trained as a plain run of its flags, rates and checkpoints chosen, methods compared.

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

import torch
from diffusers import DiffusionPipeline

from ...common.errors import InvalidArgument
from ...common.folder import check_held, lent, locked
from ...common.methods import METHODS
from ...common.signals import NOT_BEGUN, StopRequest
from ...common.status import Status
from ...common.together import decided, each
from ...experiment.arms import Arm, values_of
from ...experiment.course import ADAPTERS, Course
from ...experiment.crew import Orders, crew_of, heard
from ...experiment.parts import too_few
from ...experiment.record import EXPERIMENT, Facts, facts_of, read_experiment
from ...experiment.report import About
from ...experiment.run import train, train_and_conclude
from ...experiment.subject import COMPARING, Subject
from ...files import read_object, remove_leftovers
from ...words import counted
from ..arguments import SEVERAL, Flags, in_words
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
from .checks import plain_variants
from .judging import export_chosen, measured
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


def run_experiment(flags: Flags, stop: StopRequest, orders: Orders | None = None) -> None:
    """Trains the arms that the flags name and that have not ended yet, and tells which method does best.

    With orders, it is one of --arms_at_once processes: it trains what it is given, in a folder that the main process
    has locked, checked and noted the settings in.
    """
    if orders:  # TensorBoard reads one file of a folder at a time
        flags = flags.replace(logging_dir=f"{flags.logging_dir}/process-{orders.number}")
    began, plain = time.monotonic(), plain_variants(flags)[0]
    with stop.at_once():
        accelerator = start_accelerator(plain)
    with contextlib.ExitStack() as stack:
        if orders:
            stack.enter_context(lent(Path(flags.output_dir)))
        else:
            decided(lambda: take_folder(flags, stop, stack))
        kinds, context = find_all(plain, accelerator, stop)
        identity = identity_of(kinds, context)
        asked = with_several(context.flags, flags)
        if orders:
            context = dataclasses.replace(context, status=Status())
        else:
            decided(lambda: check_folder(asked, identity))
            check_before_loading(kinds, context)
        check_count(len({mark for images in kinds if not images.of_class for mark in images.marks}), asked)
        pipeline, objective = each(lambda: load_and_check(context))
        each(lambda: check_variants(asked, context))
        if orders or (asked.arms_at_once or 1) == 1:
            start_trackers(context)
        material = material_of(kinds, pipeline, objective, context)
        decided(check_held)
        note_images(material, context, goes_on=(context.folder / EXPERIMENT).exists())
        parts = decided(lambda: parts_of(learnt(material.sources), asked))
        decided(lambda: check_parts(asked, parts, learnt(material.sources)))
        material = with_parts(material, parts, accelerator.num_processes)
        tell_counts(material, context)
        materials = {seed: of_seed(material, seed, pipeline, context) for seed in values_of(asked, "seed")}
        forget_encoder(pipeline, context)
        schedule = with_few_looks(schedule_of(material, context), asked)
        asked = asked.replace(max_train_steps=schedule.steps, validation_steps=schedule.validation_steps)
        decided(lambda: check_same(asked, identity))
        course, setting = Course(asked, began), Setting(pipeline, material, schedule, identity, context)
        bench = Bench(course, setting, materials, parts)
        note_settings(schedule, dataclasses.replace(context, flags=asked), write=not orders)
        if orders:
            for arm in orders.arms(course):
                with heard():
                    train(arm, course, bench)
        else:
            accelerator.print(f"{counted(len(course.arms()), 'arm')} of {counted(schedule.steps, 'step')}; {parts}")
            crew = crew_of(asked, "train_sd.py", functools.partial(run_experiment, flags), stop)
            train_and_conclude(course, bench, crew)
        accelerator.end_training()


def take_folder(flags: Flags, stop: StopRequest, stack: contextlib.ExitStack) -> None:
    """Locks the experiment's folder until the stack closes, and refuses at once what its content does not allow.

    What a killed start has left half-written in it goes away.
    """
    stop.check(NOT_BEGUN)  # what a single process was asked while accelerate started
    stack.enter_context(locked(Path(flags.output_dir)))
    Status(Path(flags.output_dir)).say("preparing")
    check_folder(flags)
    course = Course(flags)
    for folder in map(course.folder_of, course.arms()):
        for place in (folder, folder / "samples", folder / ADAPTERS):
            remove_leftovers(place)


def check_folder(flags: Flags, identity: Identity | None = None) -> None:
    """Refuses to go on with anything else than more methods, rates or seeds, and plain runs in the folder."""
    course = Course(flags)
    check_same(flags, identity)
    for arm in course.arms():
        own, folder = going_on(course.flags_of(arm)), course.folder_of(arm)
        if course.ended(arm):
            check_past(own, folder, read_object(folder / EXPORTS), identity)
        else:
            plan_resume(own, identity, course.place_of(arm))


def going_on(flags: Flags) -> Flags:
    """An arm's flags: it goes on from its newest checkpoint, and nobody has to ask for that."""
    return flags.replace(resume_from_checkpoint="latest")


def check_same(flags: Flags, identity: Identity | None = None) -> None:
    """Refuses to go on with an experiment but with more methods, rates and seeds; and in the folder of a plain run."""
    folder = Path(flags.output_dir)
    there = read_experiment(folder).get("identity")
    if there is None:
        for method in METHODS:
            if checkpoints_of(folder / method) or (folder / method / EXPORTS).exists():
                problem = "holds a run that is no experiment"
                raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")
        return
    check_past(flags, folder, there, identity)
    for name in FIXED:
        value, before = getattr(flags, name), there.get(name)
        settled = value is not None or name == "metric_model"  # of the others the model or the images say it yet
        if settled and before != value:
            problem, fix = f"{folder} was begun with {in_words(before)}", "use that, or choose another --output_dir"
            raise InvalidArgument(f"--{name} {in_words(value)}", problem, fix)


def check_parts(flags: Flags, parts: Parts, images: Mapping[int, ImageDataset]) -> None:
    """Refuses to go on with another split than the experiment was begun with."""
    folder = Path(flags.output_dir)
    there = read_experiment(folder)
    if not there:
        return
    before = there.get("identity", {}).get("parts")
    if before != content_of(parts, images):
        problem = "was begun with another split of these images"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another")


def identity_record(flags: Flags, identity: Identity) -> dict:
    """What `check_same` compares."""
    past = past_of(flags, identity)
    settings = {name: value for name, value in past["settings"].items() if name not in CHANGING}
    return past | {"settings": settings} | {name: getattr(flags, name) for name in FIXED}


def with_few_looks(schedule: Schedule, flags: Flags) -> Schedule:
    """At most MOST_LOOKS at the select images where no number of steps is given: an epoch may be one step."""
    if flags.validation_steps:
        return schedule
    least = math.ceil(schedule.steps / MOST_LOOKS)
    return dataclasses.replace(schedule, validation_steps=max(schedule.validation_steps, least))


def with_several(settled: Flags, given: Flags) -> Flags:
    """The settled flags with all the values that were given for some."""
    several = {name: value for name in SEVERAL if isinstance(value := getattr(given, name), list)}
    return settled.replace(**several, **({"lora_alpha": given.lora_alpha} if "rank" in several else {}))


def check_variants(flags: Flags, context: Context) -> None:
    """Tries the methods with every further rank, shortcut and number of blocks."""
    tried = [context.flags]
    for one in plain_variants(flags):
        if all(any(getattr(one, name) != getattr(other, name) for name in ADAPTER) for other in tried):
            check_methods(one, context)
            tried.append(one)


def of_seed(material: Material, seed: int, pipeline: DiffusionPipeline, context: Context) -> Material:
    """The material as a run with another seed has it: with its random crops and variants of captions, encoded."""
    flags = context.flags.replace(seed=seed)
    context, sources = dataclasses.replace(context, flags=flags), []
    for source in material.sources:
        if source.latents is not None:
            sizes = [source.size(image) for image in range(len(source.images))]
            latents, problems = latents_of(source.images, sizes, pipeline, context)
            for index, problem in problems.items():  # damaged since the other seeds were encoded
                name = source.images.name(index)
                where = f"--seed {seed}, {name}"
                raise InvalidArgument(where, f"{problem}, and not with other seeds", f"remove {cache_folder(flags)}")
            source = dataclasses.replace(source, latents=latents)
        sources.append(source)
    material = dataclasses.replace(material, sources=tuple(sources), flags=flags)
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
        flags = going_on(self.course.flags_of(arm))
        flags = flags.replace(checkpoints_total_limit=flags.checkpoints_total_limit or 1)
        before = self.course.arms().index(arm) if arm in self.course.arms() else 0
        place = self.course.place_of(arm)
        context = dataclasses.replace(self.setting.context, flags=flags, place=place, before=before)
        material = self.materials[arm.seed]
        own = flags.replace(cache_text_embeddings=material.flags.cache_text_embeddings)
        material = dataclasses.replace(material, flags=own)
        return dataclasses.replace(self.setting, material=material, context=context)

    def train(self, arm: Arm) -> None:
        setting = self.setting_of(arm)
        context, (method,) = setting.context, setting.context.flags.method
        resume = decided(lambda: plan_resume(context.flags, setting.identity, context.place))
        if not resume.checkpoints[method]:  # of which a plain run would say that it starts afresh
            flags = context.flags.replace(resume_from_checkpoint=None)
            setting = dataclasses.replace(setting, context=dataclasses.replace(context, flags=flags))
        if context.flags.compile:
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
            "identity": identity_record(self.course.flags, self.setting.identity) | {"parts": self.content},
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

    def export(self, arm: Arm, step: int) -> list[str]:
        return export_chosen(step, self.setting_of(arm))
