"""A run: options -> model -> images -> encoded -> samples -> each method trained and exported -> figures."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ..common.controls import Settings, put_on
from ..common.errors import Diverged, EndedElsewhere, InvalidArgument
from ..common.folder import check_held, filling, locked
from ..common.gauge import gauged
from ..common.methods import METHODS
from ..common.recovery import memory_reported
from ..common.signals import NOT_BEGUN, StopRequest
from ..common.status import Status
from ..common.together import decided, each, gathered
from ..experiment.record import EXPERIMENT
from ..options.grid import Grid
from ..options.images import Options
from .checks import (
    check_base_precision,
    check_blocks_to_swap,
    check_encoders,
    check_family,
    check_held_out,
    check_methods,
    check_pipeline,
    with_rank,
)
from .context import Context
from .data.class_images import load_class_images, missing_class_images
from .data.dataset import ImageDataset, data_flag
from .data.folders import load_folders
from .data.material import material_of, note_images, tell_counts
from .data.samples import CalibrationSamples, Material
from .model.loading import find_model
from .model.lora_files.combining import in_short
from .model.objective import Objective, objective_of
from .output.drawing import Drawer
from .output.exports import export_method
from .output.hub import check_upload, publish
from .output.metric import load_metric
from .output.reports import FINISHED, Reports, Validation
from .output.summary import print_summary, write_figures
from .output.trackers import note_settings, start_trackers
from .planning.plan import check_memory
from .processes import start_accelerator
from .settings import with_family
from .training.best import best_of, go_on_from
from .training.checkpoints import (
    OF_CLASS,
    Identity,
    Resume,
    check_length,
    plan_resume,
    restore,
    save_checkpoint,
    write_exports,
)
from .training.denoising import DenoisingLoss
from .training.loop import Watch, train
from .training.preparing import attention_of, prepare, renew_scaler
from .training.schedule import Schedule, schedule_of
from .training.sharding import cuts_base, units_of
from .training.start import read_start, with_start
from .training.state import Learner, check_optimizer, new_learner, shortcuts_of
from .training.trained import Trained


@dataclass(frozen=True)
class Setting:
    """What is trained from: the same for all methods of a run."""

    pipeline: DiffusionPipeline
    material: Material
    schedule: Schedule
    identity: Identity
    context: Context


def run(options: Options, stop: StopRequest) -> None:
    """Trains, merges and exports every method that the options name, and shows what came of it."""
    with stop.at_once():
        accelerator = start_accelerator(options)
    with contextlib.ExitStack() as stack:
        decided(lambda: take_folder(options, stop, stack))
        kinds, context = find_all(options, accelerator, stop)
        identity = identity_of(kinds, context)
        resume = decided(lambda: plan_resume(context.options, identity))
        for line in resume.notes:
            accelerator.print(line)
        if resume.finished == context.options.adapter.method and decided((context.folder / FINISHED).is_file):
            decided(lambda: show_again(context))
            return
        if context.options.output.push_to_hub:
            decided(lambda: check_upload(context.options.output))
        check_before_loading(kinds, context)
        pipeline, objective = each(lambda: load_and_check(context))
        start_trackers(context)
        material = material_of(kinds, pipeline, objective, context)
        decided(check_held)
        note_images(material, context, goes_on=bool(resume.finished or any(resume.checkpoints.values())))
        tell_counts(material, context)
        forget_encoder(pipeline, context)
        setting = Setting(pipeline, material, schedule_of(material, context), identity, context)
        decided(lambda: check_length(context.options.training, resume, setting.schedule.steps))
        note_settings(context.options.flat(), setting.schedule, context.accelerator)
        for method in context.options.adapter.method:
            if method not in resume.finished:
                train_method(method, resume, setting)
        decided(lambda: show(material, context))
        accelerator.end_training()


def find_all(options: Options, accelerator: Accelerator, stop: StopRequest) -> tuple[list[ImageDataset], Context]:
    """The images to be learnt, and class images where there are any, and all that is settled before they are used."""
    images = each(lambda: load_folders(options.model, options.data, options.training, options.output))
    context = settle(options, accelerator, stop)
    if decided(lambda: missing_class_images(context.options.data, context.options.output)):
        # To draw them takes minutes. What is checked is checked again once they are there, and told then.
        told, unheard = io.StringIO(), dataclasses.replace(context)
        try:
            with contextlib.redirect_stdout(told):
                check_before_loading(images, unheard)
                each(lambda: load_and_check(unheard))
        except Exception:
            print(told.getvalue(), end="", flush=True)  # notes may say why
            raise
    return [*images, *load_class_images(context)], context


def settle(options: Options, accelerator: Accelerator, stop: StopRequest) -> Context:
    """The model, and the options with all that it and accelerate decide; from here on they do not change."""
    model = find_model(options.model, options.output, accelerator)
    check_family(options.adapter, options.training, model)
    init_lora = options.adapter.init_lora
    start = (
        each(lambda: read_start(init_lora, options.model.pretrained_model_name_or_path, model)) if init_lora else None
    )
    if start is not None:
        options = with_start(options, start)
        accelerator.print(f"--init_lora {options.adapter.init_lora}: {in_short({'': start.layers})}")
    options = with_family(options.replace(mixed_precision=accelerator.mixed_precision), model.family.defaults)
    status = Status(Path(options.output.output_dir), accelerator.device)
    return Context(with_rank(options, model, accelerator), model, accelerator, stop, start=start, status=status)


def take_folder(options: Options, stop: StopRequest, stack: contextlib.ExitStack) -> None:
    """Locks the run's folder until the stack closes, and refuses at once what its content does not allow."""
    stop.check(NOT_BEGUN)  # what a single process was asked while accelerate started
    stack.enter_context(locked(Path(options.output.output_dir)))
    Status(Path(options.output.output_dir)).say("preparing")
    if (Path(options.output.output_dir) / EXPERIMENT).exists():
        fix = "give its rates and seeds, or choose another"
        raise InvalidArgument(f"--output_dir {options.output.output_dir}", "holds an experiment", fix)
    plan_resume(options)


def identity_of(kinds: Sequence[ImageDataset], context: Context) -> Identity:
    """What the run is trained from; refuses other content on another machine."""
    model, images_flag = context.model, data_flag(context.options.data)
    groups = [[images.fingerprint for images in kinds if images.of_class == kind] for kind in (False, True)]
    content = OF_CLASS.join("; ".join(group) for group in groups if group)
    start, lora_flag = context.start, f"--init_lora {context.options.adapter.init_lora}"
    identity = Identity(model.fingerprint(), content, model.flag, images_flag, start.mark if start else "", lora_flag)
    for other in gathered(identity):
        for name, flag in (("model", model.flag), ("images", images_flag), ("lora", lora_flag)):
            if getattr(other, name) != getattr(identity, name):
                raise InvalidArgument(flag, "its content differs between the processes", "give all the same files")
    return identity


def show_plan(asked: Options | Grid[Options], stop: StopRequest) -> None:
    """Tells how much memory the run would hold, and refuses one that does not fit; writes nothing.

    Of an experiment, its arm of the highest rank.
    """
    options = asked.run(rank=max(asked.values("rank"))) if isinstance(asked, Grid) else asked
    with stop.at_once():
        accelerator = start_accelerator(options)
    images, context = (
        each(lambda: load_folders(options.model, options.data, options.training, options.output)),
        settle(options, accelerator, stop),
    )
    check_before_loading(images, context)


def check_before_loading(kinds: Sequence[ImageDataset], context: Context) -> None:
    """Refuses what can be refused without weights: methods, optimizers, and a run that takes too much memory."""
    options, model, accelerator = context.options, context.model, context.accelerator

    def check() -> None:
        check_held_out(kinds, context)
        check_base_precision(options.model, context.dtype, accelerator)
        check_blocks_to_swap(options.model, model, accelerator)
        check_methods(options.adapter, options.training, context)
        if cuts_base(accelerator):
            units_of(model.empty_denoiser(), accelerator)
        check_optimizer(context)

    each(check)
    decided(lambda: check_memory(kinds, context))


def load_and_check(context: Context) -> tuple[DiffusionPipeline, Objective]:
    """The pipeline without its denoiser, and the objective; refuses whatever can be refused before encoding."""
    options, model, accelerator = context.options, context.model, context.accelerator
    context.status.say("loading the model")
    pipeline = model.load_pipeline(
        context.dtype,
        accelerator.device,
        encoders=not options.data.cache_text_embeddings,
        trainable=bool(context.encoders),
    )
    check_pipeline(options.data, options.validation, pipeline, model.family)
    objective = objective_of(options.model, options.training, model.family, pipeline)
    check_encoders(pipeline, context)
    if options.validation.metric_model and accelerator.is_main_process:
        load_metric(options.validation.metric_model, str(accelerator.device))
    return pipeline, objective


def forget_encoder(pipeline: DiffusionPipeline, context: Context) -> None:
    """Frees what encodes images, once all are encoded: samples need the decoder alone."""
    if context.options.data.cache_latents:
        pipeline.vae.encoder = nn.Identity()  # and not None: Qwen-Image's counts its layers even to decode


def train_method(method: str, resume: Resume, setting: Setting, validation: type[Validation] = Validation) -> Learner:
    """A method from where it stands to its exports; what it was measured by is `validation`."""
    folder = setting.context.folder_of(method)
    with memory_reported(folder), contextlib.ExitStack() as stack:
        decided(lambda: stack.enter_context(filling(folder)))
        learner = start_method(method, setting)
        if METHODS[method].measured and not resume.checkpoints[method]:
            put_control_on(learner, setting)
        go_on(learner, resume, setting.context)
        train_and_export(learner, setting, validation)
    return learner


def start_method(method: str, setting: Setting) -> Learner:
    """A method at its start."""
    context = setting.context
    context.status.say("loading the model", context.name_of(method))
    options, device = context.options, context.accelerator.device
    device = torch.device("cpu") if cuts_base(context.accelerator) else device
    denoiser = context.model.load_denoiser(
        context.dtype, device, options.model.base_precision, options.model.blocks_to_swap
    )
    parts = {context.model.family.denoiser: denoiser} | context.model.load_encoders(context.encoders, setting.pipeline)
    loss = DenoisingLoss(context, setting.material.objective, setting.pipeline, denoiser.config)
    renew_scaler(context.accelerator)
    return new_learner(method, Trained(parts, loss), setting.schedule, context)


def put_control_on(learner: Learner, setting: Setting) -> None:
    """What a few training samples say of a control, on what is to be trained; a checkpoint has it as it was."""
    options, accelerator, trained = setting.context.options, setting.context.accelerator, learner.trained
    samples = CalibrationSamples(setting.material)

    def measured() -> list[Settings]:
        with contextlib.ExitStack() as stack, accelerator.autocast():
            gauges = [
                stack.enter_context(gauged(learner.method, part, shortcuts_of(options.adapter)))
                for part in trained.parts.values()
            ]
            for batch in samples.batches(options.adapter.merge_calibration_samples, accelerator.num_processes):
                trained.loss(trained.denoiser, batch)
            return [gauge.settings(options.training.seed) for gauge in gauges]

    for part, settings in zip(trained.parts.values(), decided(measured), strict=True):
        put_on(part, settings)


def go_on(learner: Learner, resume: Resume, context: Context) -> None:
    """Brings the learner to where an earlier run left it, and makes it ready for its steps."""
    name, options, candidates = learner.name, context.options, resume.checkpoints[learner.method]
    if learner.method in resume.merge_anew:
        context.accelerator.print(
            f"{name} is trained: merging and exporting it anew with --merge {options.adapter.merge}"
        )
    elif options.output.resume_from_checkpoint and not candidates:
        where = context.folder / name
        context.accelerator.print(f"--resume_from_checkpoint latest: no checkpoint in {where}, {name} starts afresh")
    restore(learner, candidates, options.output, context.accelerator)
    if options.validation.save_best:
        decided(lambda: go_on_from(context.folder / name, learner.step))
    prepare(learner, context)


def train_and_export(learner: Learner, setting: Setting, validation: type[Validation]) -> None:
    """The steps that are left of a method, and its exports."""
    material, schedule, identity, context = setting.material, setting.schedule, setting.identity, setting.context
    options, accelerator, folder = context.options, context.accelerator, context.folder / learner.name
    loss = learner.trained.loss
    drawer = Drawer(
        loss.pipeline,
        context.model.family,
        material.texts,
        options.data,
        options.training,
        options.validation,
        context.encoders,
    )

    def export() -> None:
        differences = export_method(learner, material, drawer, schedule, context)
        check_held()
        write_exports(folder, options, identity, schedule, differences)

    decided(check_held)
    reports = Reports(folder, learner, schedule, accelerator)
    look = validation(loss, material, drawer, accelerator, context.stop)
    watch = Watch(reports, look, lambda: save_checkpoint(learner, folder, options, identity, accelerator))
    try:
        with contextlib.closing(reports), attention_of(accelerator, material):
            train(learner, material, schedule, watch, context)
    except (Diverged, EndedElsewhere) as error:
        best = options.validation.save_best and has_diverged(error) and decided(lambda: best_of(folder))
        if not best:
            raise
        accelerator.free_memory()
        accelerator.print(f"{learner.name}: training has diverged; exporting the best adapter, of step {best.step}")
        decided(lambda: export_method(learner, material, drawer, schedule, context))
        raise  # and no `exports.json`: the method is not finished
    schedule = dataclasses.replace(schedule, steps=learner.step, is_over=learner.over)
    with learner.averaged():
        decided(export)


def has_diverged(error: Diverged | EndedElsewhere) -> bool:
    """Whether training has diverged, which all processes find together."""
    return isinstance(error, Diverged) or error.diverged


def show(material: Material, context: Context) -> None:
    """Figures, a summary, and an upload where that is asked for."""
    context.status.say("finishing")
    write_figures(
        context.options.adapter,
        context.options.validation,
        context.options.output,
        len(material.held_out),
        material.learnt,
    )
    print_summary(context.options.adapter, context.options.output)
    if context.options.output.push_to_hub:
        publish(context)


def show_again(context: Context) -> None:
    """What a run that is finished already has made."""
    print(f"{context.folder} holds this run already, finished; nothing to do")
    print_summary(context.options.adapter, context.options.output)
    if context.options.output.push_to_hub:
        publish(context)
