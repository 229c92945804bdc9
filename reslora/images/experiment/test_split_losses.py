"""Evaluate a chosen checkpoint of an arm, that is a run of the experiment, on the test split, and export it.

The checkpoint is merged and evaluated in float32, so that its losses are those of its exported file.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ...experiment.schedule import reading_adapter
from ...experiment.study import COMPARING
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from ...io import read_object, replacing, write_json
from ...methods.registry import METHODS
from ...runtime.checkpoint_folders import EXPORTED, EXPORTS, adapter_folder
from ...runtime.folder_lock import check_held, writing_into
from ...tracing import evaluating
from ...training.checkpoints import write_exports
from ..data.batch import Batch
from ..data.samples import losses_of
from ..denoising import DenoisingLoss
from ..output.exports import (
    PEFT_FOLDER,
    Parts,
    as_float32,
    as_plain_lora,
    base_parts,
    export_merged,
    in_float32,
    kohya_metadata,
    saved_parts,
    write_adapters,
)
from ..study import ImageStudy as Setting
from .similarity import similarities
from .split import Image


def test_and_export(
    step: int,
    images: Sequence[Image],
    setting: Setting,
    keep: Callable[[dict], None] | None,
    export: bool,
    noises: int,
) -> None:
    """Merge an arm's checkpoint once, to test it and, if `export`, to export it into the arm's folder.

    `step`: the step of the checkpoint. `keep` takes the losses on the test `images` and, with --metric_model, the
    similarities; None: do not test. `noises`: number of noises per timestep and image. The exports are
    compared as those of a single run; `exports.json` is written last.
    """
    context, (method,) = setting.context, setting.context.options.adapter.method
    folder = context.folder_of(method)
    with writing_into(folder), trained_parts(step, setting) as (trained, loss):
        parts, merged = as_plain_lora(trained, method, loss, setting.training_data)
        if keep:
            with evaluating(*parts.values()):
                keep(measured(parts, loss, images, setting, noises))
        if export:
            until = dataclasses.replace(setting.schedule, steps=step)
            found = export_merged(parts, merged, method, setting.training_data, setting.sampler, until, context)
            write_exports(folder, context.options, setting.identity, setting.schedule, found)
            write_json(folder / EXPORTS, read_object(folder / EXPORTS) | {EXPORTED: step})


def measured(parts: Parts, loss: DenoisingLoss, images: Sequence[Image], setting: Setting, noises: int) -> dict:
    """Return the losses of an arm's merged modules on the test images and, with --metric_model, their similarities."""
    losses = image_losses(parts, loss, images, setting, noises)
    found = similarities(parts, images, setting) if setting.context.options.validation.metric_model else {}
    return losses | {"similarities": found}


def base_losses(images: Sequence[Image], setting: Setting, noises: int) -> dict:
    """Return the base model's losses on the test images."""
    context, pipeline = setting.context, setting.pipeline
    with in_float32(pipeline):
        loss = DenoisingLoss(context, setting.training_data.objective, pipeline, context.model.empty_denoiser().config)
        parts = base_parts(loss, context)
        with evaluating(*parts.values()):
            return image_losses(parts, loss, images, setting, noises)


def image_losses(parts: Parts, loss: DenoisingLoss, images: Sequence[Image], setting: Setting, noises: int) -> dict:
    """Return the mean loss of each test image, and the mean loss of all test images at each timestep."""
    denoiser = next(iter(parts.values()))

    def check_and_measure(batch: Batch) -> torch.Tensor:
        """Return the loss of each example of the batch; raises `Stopped` if a stop was requested."""
        setting.context.stop.check(COMPARING)
        return exact_loss(loss, denoiser, batch)

    losses = losses_of(check_and_measure, setting.training_data, images, noises)
    return {"losses": numbers(losses.mean(1)), "by_timestep": numbers(losses.mean(0))}


@contextmanager
def trained_parts(step: int, setting: Setting) -> Iterator[tuple[Parts, DenoisingLoss]]:
    """Yield an arm's trained modules at a step, the denoiser first, in float32, and the loss function."""
    context, pipeline, (method,) = setting.context, setting.pipeline, setting.context.options.adapter.method
    with in_float32(pipeline):
        loss = DenoisingLoss(context, setting.training_data.objective, pipeline, context.model.empty_denoiser().config)
        folder = context.folder_of(method)
        with reading_adapter(folder):
            parts = saved_parts(method, adapter_folder(folder, step), loss, setting.schedule, context)
        yield parts, loss


@contextmanager
def chosen_parts(step: int, setting: Setting) -> Iterator[tuple[Parts, DenoisingLoss]]:
    """Yield an arm's trained modules at a step, merged as for exports, and the loss function."""
    (method,) = setting.context.options.adapter.method
    with trained_parts(step, setting) as (trained, loss):
        parts, _ = as_plain_lora(trained, method, loss, setting.training_data)
        with evaluating(*parts.values()):
            yield parts, loss


def exact_loss(loss: DenoisingLoss, denoiser: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the unweighted loss of each sample, of shape (batch,), in float32."""
    inputs, target, _ = loss.inputs(loss.encoded(batch))
    prediction = loss.family.prediction(denoiser(**as_float32(inputs), return_dict=False), target).float()
    return loss.squared(prediction, target.float(), batch)


def numbers(losses: torch.Tensor) -> list[float | None]:
    """Return the losses, of shape (samples,), as a list for JSON, with None for a loss that is not finite."""
    return [float(value) if value.isfinite() else None for value in losses]


def export_chosen(step: int, setting: Setting, is_exported: bool) -> list[str]:
    """Write the LoRA files of an arm's checkpoint to the experiment's folder; return their names.

    They are copies of the arm's own files, if it `is_exported`. The new files replace those of an earlier export.
    """
    context, metadata = setting.context, None
    folder = context.folder_of(context.options.adapter.method[0])
    if is_exported:
        return copy_files(folder, context.folder, context.model.family.lora_files)
    schedule = dataclasses.replace(setting.schedule, steps=step)
    with chosen_parts(step, setting) as (parts, _):
        if METHODS[context.options.adapter.method[0]].plain_lora:
            metadata = kohya_metadata(next(iter(parts.values())).config, setting.training_data, schedule, context)
        check_held()
        return write_adapters(parts, context.folder, context.model.family, metadata)


def copy_files(folder: Path, into: Path, formats: Sequence[str]) -> list[str]:
    """Copy the LoRA files that `write_adapters` has written to `folder`, and return their names.

    `formats`: the names of the family's files besides that of diffusers.
    """
    names = [name for name in (*formats, DIFFUSERS_FILE, PEFT_FOLDER) if (folder / name).exists()]
    for name in names:
        with replacing(into / name) as temporary:
            copy = shutil.copytree if (folder / name).is_dir() else shutil.copyfile
            copy(folder / name, temporary)
    for file in {DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE} - set(names):
        (into / file).unlink(missing_ok=True)
    return names
