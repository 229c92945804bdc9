"""A run: flags -> model -> images -> encoded -> samples -> each method trained and exported -> figures."""

from __future__ import annotations

import contextlib
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..common.errors import InvalidArgument
from ..common.signals import StopRequest
from ..common.together import decided, each, gathered
from .arguments import Flags
from .checks import check_base_precision, check_methods, check_pipeline, with_rank
from .data.dataset import ImageDataset, data_flag, load_images
from .data.encoding import Latents, Texts, Variants, encode_images, encode_texts, without_damaged
from .data.samples import Material, split
from .folder import locked
from .model.loading import Model, cache_folder, find_model, weight_dtype
from .output.drawing import Drawer
from .output.exports import export_method
from .output.reports import Reports, Validation
from .output.summary import hub_repository, print_summary, publish, write_figures
from .settings import with_family
from .setup import attention_of, objective_of, schedule_of, start_accelerator, start_trackers
from .training.checkpoints import Identity, Resume, plan_resume, restore, save_checkpoint, write_exports
from .training.denoising import DenoisingLoss, wide_enough
from .training.loop import train
from .training.objective import Objective
from .training.preparing import prepare, renew_scaler
from .training.state import Schedule, new_trainee


def run(flags: Flags, stop: StopRequest) -> None:
    """Trains, merges and exports every method that the flags name, and shows what came of it."""
    accelerator = start_accelerator(flags)
    flags = flags.replace(mixed_precision=accelerator.mixed_precision)
    with contextlib.ExitStack() as stack:
        decided(lambda: take_folder(flags, stack))
        images = each(lambda: load_images(flags))
        model = find_model(flags, accelerator)
        flags = with_rank(with_family(flags, model.family.defaults), model, accelerator)
        identity = identity_of(flags, model, images)
        resume = decided(lambda: plan_resume(flags, identity))
        for line in resume.notes:
            accelerator.print(line)
        if resume.finished == flags.method and decided((Path(flags.output_dir) / "loss.png").is_file):
            decided(lambda: show_again(flags))
            return
        if flags.push_to_hub:
            decided(lambda: hub_repository(flags))
        pipeline, objective = each(lambda: load_and_check(flags, model, accelerator))
        material = encode(flags, model, images, pipeline, objective, accelerator, stop)
        schedule, material = schedule_of(flags, material, accelerator.num_processes)
        start_trackers(material.flags, accelerator)
        for method in flags.method:
            if method not in resume.finished:
                train_and_export(method, model, pipeline, material, schedule, identity, resume, accelerator, stop)
        decided(lambda: show(material))
        accelerator.end_training()


def take_folder(flags: Flags, stack: contextlib.ExitStack) -> None:
    """Locks the run's folder until the stack closes, and refuses at once what its content does not allow."""
    stack.enter_context(locked(Path(flags.output_dir)))
    plan_resume(flags)


def identity_of(flags: Flags, model: Model, images: ImageDataset) -> Identity:
    """What the run is trained from; refuses other content on another machine."""
    identity = Identity(model.fingerprint(), images.fingerprint, model.flag, data_flag(flags))
    for other in gathered(identity):
        for flag, same in (
            (model.flag, other.model == identity.model),
            (data_flag(flags), other.images == identity.images),
        ):
            if not same:
                fix = "give all machines the same files"
                raise InvalidArgument(flag, "its content differs between the processes", fix)
    return identity


def load_and_check(flags: Flags, model: Model, accelerator: Accelerator) -> tuple[DiffusionPipeline, Objective]:
    """The pipeline without its denoiser, and the objective; refuses whatever can be refused before encoding."""
    dtype, device = weight_dtype(accelerator.mixed_precision), accelerator.device
    check_base_precision(flags, dtype, accelerator)
    pipeline = model.load_pipeline(dtype, device, encoders=not flags.cache_text_embeddings)
    check_pipeline(flags, pipeline, model.family)
    objective = objective_of(flags, model, pipeline)
    check_methods(flags, model, accelerator)
    return pipeline, objective


def encode(
    flags: Flags,
    model: Model,
    images: ImageDataset,
    pipeline: DiffusionPipeline,
    objective: Objective,
    accelerator: Accelerator,
    stop: StopRequest,
) -> Material:
    """Captions and images encoded, or found encoded on disk; what only encoding needs leaves the memory."""
    texts = texts_of(flags, model, images, pipeline, accelerator, stop)
    images, latents = latents_of(flags, model, images, pipeline, accelerator, stop)
    if flags.cache_latents:
        pipeline.vae.encoder = None  # samples need the decoder alone
    for line in (*images.notes, *(f"left out: {line}" for line in images.left_out[:20])):
        accelerator.print(line)
    if images.left_out:
        accelerator.print(f"left out {len(images.left_out)} images, kept {len(images)}")
    train_on, held_out = split(len(images), flags)
    shape = model.family.latent_shape(pipeline, flags.resolution)
    return Material(images, latents, texts, train_on, held_out, objective, shape, flags)


def texts_of(
    flags: Flags,
    model: Model,
    images: ImageDataset,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    stop: StopRequest,
) -> Texts:
    """Text states of the prompts and, where they are encoded beforehand, of all captions."""
    family, dtype = model.family, weight_dtype(accelerator.mixed_precision)
    key = (family.name, model.fingerprint(*family.text_parts), str(dtype))
    captions = images.captions
    prompts = ["", *(flags.validation_prompt or captions[0][:1])]

    def load_encoders() -> DiffusionPipeline:
        if not flags.cache_text_embeddings:
            return pipeline
        return model.load_pipeline(dtype, accelerator.device, encoders=True, vae=False)

    wanted = prompts + ([text for options in captions for text in options] if flags.cache_text_embeddings else [])
    return encode_texts(
        wanted, key, family, flags.max_sequence_length, load_encoders, cache_folder(flags), accelerator, stop
    )


def latents_of(
    flags: Flags,
    model: Model,
    images: ImageDataset,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    stop: StopRequest,
) -> tuple[ImageDataset, Latents | None]:
    """Latents of all images, without the damaged ones; None where images are encoded as they are drawn."""
    if not flags.cache_latents:
        return images, None
    vae, family = pipeline.vae, model.family
    key = (family.name, model.fingerprint("vae"), str(vae.dtype))
    with wide_enough(family, vae):
        latents, problems = encode_images(
            Variants(images, flags), key, family, vae, cache_folder(flags), accelerator, stop
        )
    return without_damaged(images, latents, problems, flags)


def train_and_export(
    method: str,
    model: Model,
    pipeline: DiffusionPipeline,
    material: Material,
    schedule: Schedule,
    identity: Identity,
    resume: Resume,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """One method from its newest whole checkpoint, or from the start, to its exports."""
    flags, dtype = material.flags, weight_dtype(accelerator.mixed_precision)
    folder, candidates = Path(flags.output_dir) / method, resume.checkpoints[method]
    denoiser = model.load_denoiser(dtype, accelerator.device, flags.base_precision)
    loss = DenoisingLoss(model.family, material.objective, pipeline, denoiser.config, dtype, flags)
    drawer = Drawer(pipeline, model.family, material.texts, flags)
    renew_scaler(accelerator)
    trainee = new_trainee(method, denoiser, flags, schedule, accelerator)
    if method in resume.merge_anew:
        accelerator.print(f"{method} is trained: merging and exporting it anew with --merge {flags.merge}")
    elif flags.resume_from_checkpoint and not candidates:
        accelerator.print(f"--resume_from_checkpoint latest: no checkpoint in {folder}, {method} starts afresh")
    restore(trainee, candidates, flags, accelerator)
    prepare(trainee, flags, accelerator)

    def save() -> None:
        save_checkpoint(trainee, folder, flags, identity, accelerator)

    def export() -> None:
        differences = export_method(trainee, model, material, loss, drawer, schedule, folder, accelerator)
        write_exports(folder, flags, identity, schedule, differences)

    validation = Validation(loss, material, drawer, accelerator, stop)
    reports = Reports(folder, trainee, flags, schedule, accelerator)
    with contextlib.closing(reports), attention_of(accelerator, material.latent_shape):
        train(trainee, loss, material, schedule, validation, reports, save, accelerator, stop)
    decided(export)


def show(material: Material) -> None:
    """Figures, a summary, and an upload where that is asked for."""
    write_figures(material.flags, len(material.held_out))
    print_summary(material.flags)
    if material.flags.push_to_hub:
        publish(material.flags)


def show_again(flags: Flags) -> None:
    """What a run that is finished already has made."""
    print(f"{flags.output_dir} holds this run already, finished; nothing to do")
    print_summary(flags)
    if flags.push_to_hub:
        publish(flags)
