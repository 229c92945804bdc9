"""A run: options -> model -> images -> encoded data -> samples -> each method trained and exported -> figures."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ..errors import InvalidArgument
from ..experiment.record import EXPERIMENT
from ..options.contradictions import check_averages
from ..options.images import Options
from ..runtime.folder_lock import locked
from ..runtime.processes import all_gather, broadcast_from_main, on_all
from ..runtime.signals import NOT_BEGUN, StopRequest
from ..runtime.status import Status
from ..training.checkpoints import OF_CLASS, Identity, Resume, check_length, plan_resume
from ..training.loop import train_method
from ..training.sharding import cuts_base, units_of
from ..training.state import check_optimizer
from ..training.trackers import note_settings, start_trackers
from .accelerator import start_accelerator
from .context import ImageContext
from .data.class_images import generate_missing, load_class_images, missing_class_images
from .data.dataset import ImageDataset, data_flag
from .data.folders import load_folders
from .data.samples import TrainingData
from .data.training_data import load_training_data, note_images, print_folder_counts, print_large_batch
from .initial_lora import read_start, with_start
from .layers import preset_targets
from .memory.components import outline
from .memory.plan import check_memory
from .model.families import editing_family
from .model.loading import Model, find_model
from .model.lora_files.reducing import in_short
from .model.new_tokens import add_tokens
from .model.objective import Objective, objective_of
from .model_checks import (
    check_base_precision,
    check_blocks_to_swap,
    check_encoders,
    check_family,
    check_held_out,
    check_learning_rates,
    check_methods,
    check_new_tokens,
    check_pipeline,
    check_reads_references,
    with_rank,
)
from .output.hub import check_upload, publish
from .output.metric import load_metric
from .output.reports import FINISHED
from .output.summary import print_summary, write_figures
from .schedule import schedule_of, steps_of
from .settings import with_family
from .study import ImageStudy


def run(options: Options, stop: StopRequest) -> None:
    """Train, merge and export every method of the options, and write figures and a summary."""
    with contextlib.ExitStack() as stack:
        kinds, context, identity = begin(options, stop, stack, lambda: check_folder(options))
        resume = broadcast_from_main(lambda: make_plan(kinds, context, identity))
        if resume is None:
            return
        pipeline, training_data = prepare(kinds, context, resume)
        study = build(pipeline, training_data, context, identity, resume)
        for method in context.options.adapter.method:
            if method not in resume.finished:
                train_method(method, resume, study)
        broadcast_from_main(lambda: show(context, training_data))
        context.accelerator.end_training()


def begin(
    options: Options,
    stop: StopRequest,
    stack: contextlib.ExitStack,
    check: Callable[[], object],
    lock: Callable[[Path], contextlib.AbstractContextManager] = locked,
) -> tuple[list[ImageDataset], ImageContext, Identity]:
    """Lock the run's directory until `stack` closes; return the images, the context, and the identity of both.

    `check` raises `InvalidArgument` if the directory's content does not allow the run.
    """
    with stop.at_once():
        accelerator = start_accelerator(options)

    def lock_folder() -> None:
        """Lock the output folder until the run ends, and check its content."""
        stop.check(NOT_BEGUN)  # a signal may have come while accelerate started
        stack.enter_context(lock(Path(options.output.output_dir)))
        check()

    broadcast_from_main(lock_folder)
    kinds, context = find_all(options, accelerator, stop)
    return kinds, context, identity_of(kinds, context)


def make_plan(kinds: Sequence[ImageDataset], context: ImageContext, identity: Identity) -> Resume | None:
    """Return the remaining training of the run, after all checks that need no weights; None if the run is finished.

    The main process makes the plan and broadcasts it.
    """
    resume = plan_resume(context.options, identity)
    for line in resume.notes:
        context.accelerator.print(line)
    if resume.finished == context.options.adapter.method and (context.folder / FINISHED).is_file():
        show(context)
        return None
    if context.options.output.push_to_hub:
        check_upload(context.options.output)
    check_before_loading(kinds, context)
    return resume


def prepare(
    kinds: Sequence[ImageDataset], context: ImageContext, resume: Resume
) -> tuple[DiffusionPipeline, TrainingData]:
    """Return the pipeline with the parts that samples need, and the encoded images and captions."""
    pipeline, training_data = encode(kinds, context, resume.resuming)
    print_large_batch(training_data, context)
    print_folder_counts(training_data, context)
    free_encoder(pipeline, context)
    return pipeline, training_data


def build(
    pipeline: DiffusionPipeline, training_data: TrainingData, context: ImageContext, identity: Identity, resume: Resume
) -> ImageStudy:
    """Return the study of the run; the training data determine its number of steps."""
    schedule = schedule_of(training_data.updates(context.accelerator.num_processes), context)
    check_length(context.options, resume, schedule.steps)
    check_averages(context.options, schedule.steps)
    note_settings(context.options, steps_of(schedule), context.accelerator)
    return ImageStudy(schedule, identity, context, pipeline, training_data)


def encode(
    kinds: Sequence[ImageDataset], context: ImageContext, resuming: bool, track: bool = True
) -> tuple[DiffusionPipeline, TrainingData]:
    """Return the pipeline without its denoiser, and the encoded images and captions.

    `resuming`: whether the run is resumed.
    """
    pipeline, objective = on_all(lambda: load_and_check(context))
    if track:
        start_trackers(context, "train_sd")
    training_data = load_training_data(kinds, pipeline, objective, context)
    note_images(training_data, context, resuming)
    return pipeline, training_data


def find_all(options: Options, accelerator: Accelerator, stop: StopRequest) -> tuple[list[ImageDataset], ImageContext]:
    """Return the training images, followed by the class images if there are any, and the context."""
    images = on_all(lambda: load_folders(options.model, options.data, options.training, options.output))
    context = resolve_context(options, accelerator, stop)

    def generate() -> None:
        """Generate missing class images; as this takes minutes, all checks of the run are made before it."""
        if missing_class_images(context.options.data, context.options.output):
            check_before_loading(images, context)
            load_and_check(context)
            generate_missing(context)

    broadcast_from_main(generate)
    return [*images, *on_all(lambda: load_class_images(context.options))], context


def resolve_context(options: Options, accelerator: Accelerator, stop: StopRequest) -> ImageContext:
    """Return the context: the model, and the options with all defaults resolved."""
    model = find_model(options.model, options.output, accelerator)
    if options.data.reference_flag:
        model = dataclasses.replace(model, family=editing_family(model.family))
    return on_all(lambda: resolve_with(model, options, accelerator, stop))


def resolve_with(model: Model, options: Options, accelerator: Accelerator, stop: StopRequest) -> ImageContext:
    """Return the context with all options resolved, including defaults that depend on the model or on accelerate."""
    check_family(options.adapter, options.training, model)
    check_reads_references(options.data, options.training, options.validation, model)
    start = assistant = None
    base = options.model.pretrained_model_name_or_path
    if file := options.model.assistant_lora:
        assistant = read_start(file, base, model, "assistant_lora")
        accelerator.print(f"--assistant_lora {file}: {in_short({'': assistant.layers})}; active in training only")
    if lora := options.adapter.init_lora:
        start = read_start(lora, base, model)
        options = with_start(options, start)
        accelerator.print(f"--init_lora {lora}: {in_short({'': start.layers})}")
    if names := options.adapter.layers:
        options = options.replace(target_modules=preset_targets(names, options.adapter.target_modules, model))
    options = with_family(options.replace(mixed_precision=accelerator.mixed_precision), model.family.defaults)
    status = Status(Path(options.output.output_dir), accelerator.device)
    options = with_rank(options, model, accelerator)
    return ImageContext(options, model, accelerator, stop, start=start, assistant=assistant, status=status)


def check_folder(options: Options) -> None:
    """Raise `InvalidArgument` for a directory whose content does not allow the run."""
    folder = Path(options.output.output_dir)
    Status(folder).say("preparing")
    if (folder / EXPERIMENT).exists():
        fix = "give its rates and seeds, or choose another"
        raise InvalidArgument(f"--output_dir {folder}", "contains an experiment", fix)
    plan_resume(options)


def identity_of(kinds: Sequence[ImageDataset], context: ImageContext) -> Identity:
    """Return the content hashes of images, model and LoRA.

    Raises `InvalidArgument` if the files' content differs between processes.
    """
    model, images_flag = context.model, data_flag(context.options.data)
    groups = [[images.fingerprint for images in kinds if images.of_class == kind] for kind in (False, True)]
    content = OF_CLASS.join("; ".join(group) for group in groups if group)
    lora, assistant = (one.mark if one else "" for one in (context.start, context.assistant))
    identity = Identity(
        model.fingerprint(), content, model.flag, images_flag,
        f"--class_data_dir {context.options.data.class_data_dir}",
        lora, f"--init_lora {context.options.adapter.init_lora}",
        assistant, f"--assistant_lora {context.options.model.assistant_lora}",
    )  # fmt: skip
    everywhere = all_gather(identity)
    for name in ("model", "images", "lora", "assistant"):
        if len({getattr(found, name) for found in everywhere}) > 1:
            flag = getattr(identity, f"{name}_flag")
            raise InvalidArgument(
                flag, "its content differs between the processes", "give every process the same files"
            )
    return identity


def check_before_loading(kinds: Sequence[ImageDataset], context: ImageContext) -> None:
    """Validate everything that needs no weights: methods, optimizers and the required memory.

    Only the main process calls this function. Lines that were already printed are not printed again.
    """
    options, model, accelerator = context.options, context.model, context.accelerator
    check_held_out(kinds, context)
    check_new_tokens(kinds, context)
    check_base_precision(options.model, context.dtype, accelerator)
    check_blocks_to_swap(options.model, model, context)
    check_pipeline(options.data, options.validation, outline(model), model.family)
    check_methods(options.adapter, options.training, context)
    if cuts_base(accelerator):
        units_of(model.empty_denoiser(), accelerator)
    check_optimizer(context)
    check_memory(kinds, context)


def load_and_check(context: ImageContext) -> tuple[DiffusionPipeline, Objective]:
    """Return the pipeline without its denoiser, and the objective, after all validation that precedes encoding."""
    options, model, accelerator = context.options, context.model, context.accelerator
    context.status.say("loading the model")
    pipeline = model.load_pipeline(
        context.dtype,
        accelerator.device,
        encoders=not options.data.cache_text_embeddings,
        trainable=bool(context.live_encoders),
    )
    add_tokens(pipeline, model.family, options.adapter.words_of_tokens)
    objective = objective_of(options.model, options.training, model.family, pipeline)
    check_encoders(pipeline, context)
    check_learning_rates(pipeline, context)
    if options.validation.metric_model and accelerator.is_main_process:
        load_metric(options.validation.metric_model, str(accelerator.device))
    return pipeline, objective


def free_encoder(pipeline: DiffusionPipeline, context: ImageContext) -> None:
    """Free the image encoder after encoding: samples need only the decoder, except the samples of an edit model."""
    if context.options.data.cache_latents and not context.model.family.edits:
        # not None: Qwen-Image's autoencoder reads `encoder` to count its layers even when it decodes
        pipeline.vae.encoder = nn.Identity()


def show(context: ImageContext, training_data: TrainingData | None = None) -> None:
    """Write figures and a summary, and upload the run if --push_to_hub is given.

    `training_data`: None for a run that was already finished.
    """
    options = context.options
    if training_data:
        context.status.say("finishing")
        write_figures(
            options.adapter,
            options.validation,
            options.output,
            len(training_data.held_out),
            training_data.training_images,
        )
    else:
        print(f"{context.folder} contains this run, which is finished; nothing to do")
    print_summary(options.adapter, options.output)
    if options.output.push_to_hub:
        publish(context)
