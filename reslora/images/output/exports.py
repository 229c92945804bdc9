"""Export a trained method: merged weights and plain LoRA in every format, each read back and compared."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map_only

from ... import export
from ...attributes import override_attributes
from ...errors import Diverged, RunFailed, first_line
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from ...io import Damaged, check_checksums, remove, replacing, write_json
from ...linking import Chains, chains
from ...methods.adapters import load_adapter
from ...methods.conversion import convert, is_plain, with_lora
from ...methods.own import CONVERSION, conversion_in_words
from ...methods.registry import METHODS, Method
from ...methods.updates import delta_error
from ...model import MergeReport, merge
from ...runtime.checkpoint_folders import EXPORTS
from ...runtime.folder_lock import check_held
from ...tracing import evaluating
from ...training.best import Best, to_export
from ...training.embeddings import load_embeddings
from ...training.schedule import Schedule
from ...training.state import Learner
from ...training.trained import Trained
from ..context import ImageContext
from ..data.samples import CalibrationSamples, TrainingData
from ..denoising import DenoisingLoss
from ..initial_lora import add_adapters
from ..model.families.base import Family
from ..model.lora_files.writing import peft_folder
from ..model.new_tokens import embeddings_in, exported, write_embeddings
from ..prompts import prompts_of
from .calibration_file import write_calibration
from .lycoris_file import write_lycoris_file
from .merged_weights import write_merged
from .reading_back import PEFT_FOLDER, Parts, peft_parts, read_back, values_of
from .reports import FINISHED, MERGED, save_images
from .sampling import Sampler, as_image

TRAINED_IMAGES = "reslora.images"
"""Field of a LoRA file's metadata: `short_marks` of the training images. reslora-compare recognizes images by it."""


@dataclass(frozen=True)
class Merged:
    """The result of merging one model's ResLoRA shortcuts, with the chains of blocks and the calibration batches."""

    plan: Chains
    report: MergeReport
    calibration: list[dict]


def export_method(
    learner: Learner, training_data: TrainingData, sampler: Sampler, schedule: Schedule, context: ImageContext
) -> dict[str, float]:
    """Merge the adapter that the learner has trained, and export it; see `export_merged`.

    With --save_best, export the best adapter or average of checkpoints instead, if there is one.
    """
    method = learner.method
    save_best, folder = context.options.validation.save_best, context.folder_of(method)
    best = to_export(folder, schedule.steps) if save_best else None
    context.accelerator.print(f"{context.name_of(method)}: merging, exporting and comparing")
    context.status.say("merging", context.name_of(method))
    with in_float32(sampler.pipeline):
        parts = exact_parts(learner, best, schedule, context)
        trained = dataclasses.replace(schedule, steps=best.step) if best else schedule
        parts, merged = as_plain_lora(parts, method, learner.trained.loss, training_data)
        return export_merged(parts, merged, method, training_data, sampler, trained, context)


def export_merged(
    parts: Parts,
    merged: Mapping[str, Merged],
    method: str,
    training_data: TrainingData,
    sampler: Sampler,
    schedule: Schedule,
    context: ImageContext,
) -> dict[str, float]:
    """Generate images with the merged model, write every format, and read each file back.

    `parts` and `merged` are the result of `as_plain_lora`; afterwards the parts have no adapters. `schedule` ends at
    the step of the adapter. Returns, for each file, the largest relative difference of a layer from the merged model.

    Raises `Diverged`, without exporting, if training has diverged, and `RunFailed` if a file differs (see `read_back`).
    """
    options, accelerator = context.options, context.accelerator
    name, folder = context.name_of(method), context.folder_of(method)
    denoiser = next(iter(parts.values()))
    refuse_diverged(name, "its weights are", values_of(parts).values())
    drawn = sampler.draw(denoiser.eval(), prompts_of(options.validation), options.validation.num_validation_images)
    refuse_diverged(name, "it generates pixels that are", map(torch.from_numpy, drawn))
    check_held()
    for path in (folder / EXPORTS, context.folder / FINISHED):
        path.unlink(missing_ok=True)  # written again when all files of this merge are complete
    remove(folder / MERGED)
    if merged:
        write_merge(merged, folder)
    for number, (part, found) in enumerate(merged.items()):
        accelerator.print(f"{name}: {f'{part} ' if number else ''}{found.report}")
    context.status.say("writing files", name)
    converted = as_converted(parts, method, context) if METHODS[method].own else None
    metadata = kohya_metadata(denoiser.config, training_data, schedule, context)
    write_formats(parts, method, metadata, context, converted)
    tokens = options.adapter.words_of_tokens
    write_embeddings(folder, exported(sampler.pipeline, context.model.family, tokens))
    if drawn:
        save_images(folder / MERGED, list(map(as_image, drawn)), options.validation.validation_prompt)
    context.status.say("checking the exported files", name)
    return read_back(parts, method, sampler.pipeline, context, converted)


def as_converted(parts: Parts, method: str, context: ImageContext) -> Parts | None:
    """Return the trained modules of a user's own method, converted to plain LoRA for LoRA files; None if impossible.

    PEFT converts an adapter that is not LoRA. The error of the conversion is printed and written to `conversion.json`.
    """
    note, rank = context.folder_of(method) / CONVERSION, context.options.adapter.rank
    note.unlink(missing_ok=True)
    if all(map(is_plain, parts.values())):
        return parts
    found = {name: result for name, part in parts.items() if (result := convert(part, rank))}
    if len(found) < len(parts):
        return None
    record = {
        "rank": rank,
        "error": max(error for _, error in found.values()),
        "delta_error": max(map(delta_error, parts.values())),
    }
    write_json(note, record)
    context.accelerator.print(f"{context.name_of(method)}: {conversion_in_words(record)}")
    return {name: with_lora(part, found[name][0]) for name, part in parts.items()}


def refuse_diverged(name: str, what: str, values: Iterable[torch.Tensor]) -> None:
    """Raise `Diverged` if values are not finite; `name` and `what` begin the message."""
    if not all(torch.isfinite(value).all() for value in values):
        problem = f"{name}: {what} not finite: training has diverged"
        raise Diverged(problem, "start again with a lower --learning_rate")


@contextlib.contextmanager
def in_float32(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Convert the pipeline to float32 for the body, and back afterwards.

    TF32 is disabled, because merged weights and test losses must be exact.
    """
    dtype = pipeline.vae.dtype
    with (
        override_attributes(torch.backends.cuda.matmul, allow_tf32=False),
        override_attributes(torch.backends.cudnn, allow_tf32=False),
    ):
        pipeline.to(torch.float32)
        try:
            yield
        finally:
            pipeline.to(dtype)


def exact_parts(learner: Learner, best: Best | None, schedule: Schedule, context: ImageContext) -> dict[str, nn.Module]:
    """Return the trained modules by name in float32; with --save_best, of the `best` checkpoint if it exists.

    The modules are loaded from disk if the best checkpoint is exported, or if the base in memory is in half precision,
    quantized, swapped, sharded or has an assistant.
    """
    options, saved = context.options, context.folder_of(learner.method) / f"checkpoint-{learner.step}"
    if best:
        saved = best.path
        try:
            check_checksums(saved)
        except Damaged as error:
            raise RunFailed(f"{first_line(error)}; remove {saved} to export the previous adapter") from None
    elif options.validation.save_best:
        print(f"{learner.name}: no validation loss was measured, so --save_best exports the last adapter", flush=True)
    if not best and context.holds_base and learner.denoiser.dtype == torch.float32:
        return dict(learner.trained.parts)
    return saved_parts(learner.method, saved, learner.trained.loss, schedule, context)


def saved_parts(
    method: str, adapters: Path, loss: DenoisingLoss, schedule: Schedule, context: ImageContext
) -> dict[str, nn.Module]:
    """Return the trained modules by name, in float32, with the method's saved adapters; nothing is merged."""
    parts, family = base_parts(loss, context), context.model.family
    trained = Trained(parts, loss, embeddings_in(loss.pipeline, family, context.options.adapter.words_of_tokens))
    add_adapters(trained, method, schedule.steps, context)
    for place, part in trained.places(adapters):
        load_adapter(part, place)
    load_embeddings(trained, adapters)
    return parts


def base_parts(loss: DenoisingLoss, context: ImageContext) -> dict[str, nn.Module]:
    """Return the trained modules without their adapters: by name, in float32, the denoiser first."""
    denoiser = context.model.load_exact_denoiser(context.accelerator.device)
    return {context.model.family.denoiser: denoiser} | context.model.load_encoders(context.encoders, loss.pipeline)


# -- merging -----------------------------------------------------------------------------------------------------------


def as_plain_lora(
    parts: Parts, method: str, loss: DenoisingLoss, training_data: TrainingData
) -> tuple[dict[str, nn.Module], dict[str, Merged]]:
    """Merge the shortcuts of all modules, and convert the modules to plain LoRA if the method permits it.

    Returns the modules by name, and the results of merging by name. The results are empty for a method without
    shortcuts.
    """
    merged = merge_reslora(parts, loss, training_data) if METHODS[method].shortcuts else {}
    plain_lora = METHODS[method].plain_lora or (lambda part: part)
    return {name: plain_lora(part) for name, part in parts.items()}, merged


def merge_reslora(parts: Parts, loss: DenoisingLoss, training_data: TrainingData) -> dict[str, Merged]:
    """Merge the shortcuts into plain LoRA weights, module by module; raises `Diverged` if weights are not finite."""
    merged, denoiser = {}, next(iter(parts))
    with calls_of_encoders(loss) as calibration:
        calibration[denoiser] = calibration_batches(loss, training_data)
    for name, part in parts.items():
        plan = chains(part)
        try:
            report = merge(part, method=training_data.adapter.merge, calibration=calibration[name] or None)
        except ValueError as error:
            advice = "if numbers are not finite, training has diverged: start again with a lower --learning_rate"
            raise Diverged(f"reslora: it cannot be merged ({first_line(error)})", advice) from None
        merged[name] = Merged(plan, report, calibration[name])
    return merged


@torch.no_grad()
def calibration_batches(loss: DenoisingLoss, training_data: TrainingData) -> list[dict]:
    """Return the denoiser's keyword arguments, in float32, for --merge_calibration_samples training samples."""
    read = CalibrationSamples(training_data).batches(
        training_data.adapter.merge_calibration_samples, PartialState().num_processes
    )
    with evaluating(*loss.encoders):
        return [as_float32(loss.inputs(loss.encoded(batch))[0]) for batch in read]


@contextlib.contextmanager
def calls_of_encoders(loss: DenoisingLoss) -> Iterator[dict[str, list[dict]]]:
    """Record the keyword arguments (tokenized captions) of all calls of trained text encoders in this context."""
    calls: dict[str, list[dict]] = {part.name: [] for part in loss.parts}

    def record_call(found: list[dict], encoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record the keyword arguments of a call of a text encoder."""
        found.append({"input_ids": args[0]} | kwargs)

    with contextlib.ExitStack() as stack:
        for found, encoder in zip(calls.values(), loss.encoders, strict=True):
            hook = encoder.register_forward_pre_hook(functools.partial(record_call, found), with_kwargs=True)
            stack.callback(hook.remove)
        yield calls


def as_float32(values: dict) -> dict:
    """Convert floating-point tensors, at any depth, to float32."""
    return tree_map_only(torch.Tensor, lambda value: value.float() if value.is_floating_point() else value, values)


def write_merge(merged: Mapping[str, Merged], folder: Path) -> None:
    """Write `chains.json`, `merge.json` and the calibration batches.

    In both JSON files, text encoders have entries under their names. The calibration batches of each text encoder have
    a separate file.
    """
    denoiser = next(iter(merged))
    for file, found in (
        ("chains.json", {name: part.plan.to_dict() for name, part in merged.items()}),
        ("merge.json", {name: part.report.to_dict() for name, part in merged.items()}),
    ):
        write_json(folder / file, found.pop(denoiser) | found)
    for name, part in merged.items():
        if part.calibration:
            mark = "" if name == denoiser else f"-{name}"
            write_calibration(folder / f"calibration{mark}.safetensors", part.calibration)


# -- exporting ---------------------------------------------------------------------------------------------------------


def write_formats(
    parts: Parts, method: str, metadata: dict[str, str], context: ImageContext, converted: Parts | None = None
) -> None:
    """Write every format that the method supports; the small files first, in case the disk becomes full."""
    family, folder = context.model.family, context.folder_of(method)
    write_adapters(parts, folder, family, METHODS[method], metadata, converted)
    for name, part in parts.items() if context.writes_merged else ():
        if name == family.denoiser:
            write_merged(part, folder / name, context.model.stored_denoiser())
        else:
            export.export_merged(part, folder / name)


def write_adapters(
    parts: Parts,
    folder: Path,
    family: Family,
    method: Method,
    metadata: dict[str, str],
    converted: Parts | None = None,
) -> None:
    """Write PEFT's folder, and the method's plain LoRA files or its file in LyCORIS's format.

    There is a LoRA file for each of the family's formats, and each contains all modules. An earlier run's files in
    other formats are removed last, so that they remain if the disk is full. `converted`: the result of `as_converted`
    for a user's own method.
    """
    lora = converted if method.own else parts if method.plain_lora else None
    with replacing(folder / PEFT_FOLDER) as temporary:
        for name, part in peft_parts(parts, converted).items():
            export.export_peft(part, peft_folder(temporary, name, family))
    written: set[str] = set()
    if lora:
        write_lora(lora, folder, family, metadata)
        written = {*family.lora_files, DIFFUSERS_FILE}
    elif method.lycoris:
        write_lycoris_file(parts, folder / LYCORIS_FILE, family, metadata)
        written = {LYCORIS_FILE}
    for file in {DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, LYCORIS_FILE} - written:
        (folder / file).unlink(missing_ok=True)


def write_lora(parts: Parts, folder: Path, family: Family, metadata: dict[str, str]) -> None:
    """Write plain LoRA in diffusers' format and in the family's other formats; each file contains all modules."""
    denoiser = parts[family.denoiser]
    export.export_diffusers(parts, folder, metadata=metadata)
    if KOHYA_FILE in family.lora_files:
        prefixes = {family.denoiser: "lora_unet"} | {name: kohya for name, (kohya, _) in family.text_names.items()}
        named = {prefixes[name]: part for name, part in parts.items()}
        kohyas = functools.partial(family.kohya_name, denoiser.config)
        export.export_kohya(named, folder / KOHYA_FILE, metadata=metadata, rename=lambda name: kohyas(name) or name)
    if COMFYUI_FILE in family.lora_files:  # these families have neither trainable text encoders nor fused layers
        names, path = functools.partial(family.original_name, denoiser.config), folder / COMFYUI_FILE
        export.export_comfyui(denoiser, path, metadata=metadata, rename=lambda name: names(name) or name)


def kohya_metadata(
    config: Mapping, training_data: TrainingData, schedule: Schedule, context: ImageContext
) -> dict[str, str]:
    """Return the metadata by which model managers recognize a LoRA (Stability AI's ModelSpec 1.0.0)."""
    options, predicted = context.options, getattr(training_data.objective, "prediction_type", None)  # None for flows
    sides, base = options.data.resolution, Path(options.model.pretrained_model_name_or_path).name
    # sd-scripts writes `epsilon` or `v`.
    prediction = {"modelspec.prediction_type": predicted.removesuffix("_prediction")} if predicted else {}
    return (
        context.model.family.metadata(config, predicted == "v_prediction")
        | prediction
        | {
            "ss_base_model": base,
            "ss_learning_rate": str(options.optimizer.learning_rate),
            "ss_seed": str(options.training.seed),
            "ss_steps": str(schedule.steps),
            "ss_resolution": " ".join(map(str, sides)),
            "ss_enable_bucket": str(options.data.use_aspect_ratio_buckets),
            "modelspec.implementation": "diffusers",
            "modelspec.title": f"LoRA for {base}",
            "modelspec.resolution": f"{sides[0]}x{sides[0]}",
            TRAINED_IMAGES: " ".join(sorted(short_marks(trained_marks(training_data)))),
        }
    )


def trained_marks(training_data: TrainingData) -> set[str]:
    """Return the hashes of the content of the training images, without class images."""
    sources = [source for source in training_data.sources if not source.images.of_class]
    return {source.images.marks[number] for source in sources for number in source.train}


def short_marks(marks: Iterable[str]) -> set[str]:
    """Return the first 8 digits of each image's hash.

    `marks`: strings with the size and hash of each image and of its mask.
    """
    return {mark.partition("+")[0].rpartition(":")[2][:8] for mark in marks}
