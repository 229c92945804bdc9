"""An experiment: every arm trained as a plain run of its flags, rates and checkpoints chosen, methods compared.

Arms share the model and what is encoded, and by seed noise and order. They differ from plain runs in the images alone,
of which the content says what is trained on. What an arm writes is in a folder of its own, and what is on disk decides
what is left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ...common.errors import Diverged, EndedElsewhere, Stopped
from ...common.signals import StopRequest
from ...common.together import decided, each, is_main
from ...files import read_object, remove_leftovers
from ..arguments import SEVERAL, Flags
from ..checks import check_methods
from ..context import Context
from ..data.material import latents_of, material_of, with_texts
from ..data.samples import Material
from ..folder import locked
from ..memory import forget_peak, peak_memory
from ..output.trackers import start_trackers
from ..processes import start_accelerator
from ..run import Setting, find_all, forget_encoder, identity_of, load_and_check, train_method
from ..training.checkpoints import EXPORTS, Identity, check_past, plan_resume
from ..training.schedule import Schedule, schedule_of
from .arms import Arm, plain_variants, values_of
from .course import Course
from .measure import ADAPTERS, SelectLoss
from .results import Results, check_same
from .split import check_count, learnt, parts_of, with_parts

MOST_LOOKS = 10


def run_experiment(flags: Flags, stop: StopRequest) -> None:
    """Trains the arms that the flags name and that have not ended yet, and tells which method does best."""
    began, plain = time.monotonic(), plain_variants(flags)[0]
    accelerator = start_accelerator(plain)
    with contextlib.ExitStack() as stack:
        decided(lambda: take_folder(flags, stack))
        kinds, context = find_all(plain, accelerator, stop)
        identity = identity_of(kinds, context)
        asked = with_several(context.flags, flags)
        decided(lambda: check_folder(asked, identity))
        check_count(len({mark for images in kinds if not images.of_class for mark in images.marks}), asked)
        pipeline, objective = each(lambda: load_and_check(context))
        each(lambda: check_variants(asked, context))
        material = material_of(kinds, pipeline, objective, context)
        parts = decided(lambda: parts_of(learnt(material.sources), asked))
        material = with_parts(material, parts)
        materials = {seed: of_seed(material, seed, pipeline, context) for seed in values_of(asked, "seed")}
        forget_encoder(pipeline, context)
        schedule = with_few_looks(schedule_of(material, context), asked)
        asked = asked.replace(max_train_steps=schedule.steps, validation_steps=schedule.validation_steps)
        decided(lambda: check_same(asked, identity))
        start_trackers(schedule, dataclasses.replace(context, flags=asked))
        bench = Bench(Course(asked, began), Setting(pipeline, material, schedule, identity, context), materials)
        accelerator.print(f"{len(bench.course.arms())} arms of {schedule.steps} steps; {parts}")
        train_and_conclude(bench, Results(bench.course, bench.setting, parts, bench.setting_of))
        accelerator.end_training()


def train_and_conclude(bench: Bench, results: Results) -> None:
    """Trains what is next until nothing is, and tells what came of it."""
    course = bench.course
    try:
        while arm := decided(course.next_arm):
            course.running = arm
            decided(results.write)
            bench.train(arm)
    except Stopped:
        course.running = None
        if is_main():  # alone: the others may have left otherwise
            results.write()
        raise
    course.running = None
    decided(results.conclude)


def take_folder(flags: Flags, stack: contextlib.ExitStack) -> None:
    """Locks the experiment's folder until the stack closes, and refuses at once what its content does not allow.

    What a killed start has left half-written in it goes away.
    """
    stack.enter_context(locked(Path(flags.output_dir)))
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
        own, folder = course.flags_of(arm), course.folder_of(arm)
        if course.ended(arm):
            check_past(own, folder, read_object(folder / EXPORTS), identity)
        else:
            plan_resume(own, identity, course.place_of(arm))


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
    """Tries the methods with every further rank and shortcut."""
    tried = [context.flags]
    for one in plain_variants(flags):
        if all((one.rank, one.shortcut) != (other.rank, other.shortcut) for other in tried):
            check_methods(one, context.model, context.accelerator, context.start)
            tried.append(one)


def of_seed(material: Material, seed: int, pipeline: DiffusionPipeline, context: Context) -> Material:
    """The material as a run with another seed has it: with its random crops and variants of captions, encoded."""
    flags = context.flags.replace(seed=seed)
    context, sources = dataclasses.replace(context, flags=flags), []
    for source in material.sources:
        if source.latents is not None:
            sizes = [source.size(image) for image in range(len(source.images))]
            source = dataclasses.replace(source, latents=latents_of(source.images, sizes, pipeline, context)[0])
        sources.append(source)
    material = dataclasses.replace(material, sources=tuple(sources), flags=flags)
    return with_texts(material, pipeline, context) if any(source.recipe.rewrites for source in sources) else material


@dataclass(frozen=True)
class Bench:
    """What the arms of an experiment are trained on."""

    course: Course
    setting: Setting
    materials: Mapping[int, Material]
    """By seed."""

    def setting_of(self, arm: Arm) -> Setting:
        """As a plain run of the arm has it, but that one checkpoint is kept unless more are asked for."""
        flags = self.course.flags_of(arm)
        flags = flags.replace(checkpoints_total_limit=flags.checkpoints_total_limit or 1)
        before = self.course.arms().index(arm) if arm in self.course.arms() else 0
        place = self.course.place_of(arm)
        context = dataclasses.replace(self.setting.context, flags=flags, place=place, before=before)
        material = self.materials[arm.seed]
        own = flags.replace(cache_text_embeddings=material.flags.cache_text_embeddings)
        material = dataclasses.replace(material, flags=own)
        return dataclasses.replace(self.setting, material=material, context=context)

    def train(self, arm: Arm) -> None:
        """Trains an arm from where it stands to its exports; one that diverges has ended too, and the others go on."""
        started, setting, reason = time.monotonic(), self.setting_of(arm), ""
        context, (method,) = setting.context, setting.context.flags.method
        resume = decided(lambda: plan_resume(context.flags, setting.identity, context.place))
        if not resume.checkpoints[method]:  # of which a plain run would say that it starts afresh
            flags = context.flags.replace(resume_from_checkpoint=None)
            setting = dataclasses.replace(setting, context=dataclasses.replace(context, flags=flags))
        if context.flags.compile:
            torch.compiler.reset()  # or it gives up after as many models as it remembers
        forget_peak(context.accelerator.device)
        try:
            if method not in resume.finished:
                train_method(method, resume, setting, SelectLoss)
        except Diverged as error:
            reason = str(error)
        except EndedElsewhere as error:
            if not error.diverged:
                raise
        context.accelerator.free_memory()
        memory = peak_memory(context.accelerator.device)
        decided(lambda: self.course.end(arm, reason, memory))
        self.course.longest = max(self.course.longest, time.monotonic() - started)
