"""What a chosen checkpoint does on the test images: merged and in float32, as the file does that is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ...common.folder import check_held
from ...common.methods import METHODS
from ...common.recovery import adapter_folder
from ...experiment.course import reading_adapter
from ...experiment.subject import COMPARING
from ...tracing import evaluating
from ..data.batch import Batch
from ..data.samples import losses_of
from ..output.exports import (
    Parts,
    as_float32,
    as_plain_lora,
    base_parts,
    exact_products,
    in_float32,
    kohya_metadata,
    saved_parts,
    write_adapters,
)
from ..study import ImageStudy as Setting
from ..training.denoising import DenoisingLoss
from .drawn import similarities
from .split import Image


def measured(step: int, images: Sequence[Image], setting: Setting) -> dict:
    """Losses on the test images of an arm's checkpoint, and what `similarities` says."""
    with chosen_parts(step, setting) as (parts, loss):
        losses = image_losses(parts, loss, images, setting)
        found = similarities(parts, loss, images, setting) if setting.context.options.validation.metric_model else {}
        return losses | {"similarities": found}


def base_losses(images: Sequence[Image], setting: Setting) -> dict:
    """Return the base model's losses on the test images."""
    context, pipeline = setting.context, setting.pipeline
    with exact_products(), in_float32(pipeline):
        loss = DenoisingLoss(context, setting.material.objective, pipeline, context.model.empty_denoiser().config)
        parts = base_parts(loss, context)
        with evaluating(*parts.values()):
            return image_losses(parts, loss, images, setting)


def image_losses(parts: Parts, loss: DenoisingLoss, images: Sequence[Image], setting: Setting) -> dict:
    """Return the mean loss of each test image, and over all of them at each timestep."""
    denoiser = next(iter(parts.values()))

    def check_and_measure(batch: Batch) -> torch.Tensor:
        setting.context.stop.check(COMPARING)
        return exact_loss(loss, denoiser, batch)

    losses = losses_of(check_and_measure, setting.material, images)
    return {"losses": numbers(losses.mean(1)), "by_timestep": numbers(losses.mean(0))}


@contextmanager
def chosen_parts(step: int, setting: Setting) -> Iterator[tuple[Parts, DenoisingLoss]]:
    """What an arm has trained, the denoiser first, as it was at that step, merged as exports are; and its loss."""
    context, pipeline, (method,) = setting.context, setting.pipeline, setting.context.options.adapter.method
    with exact_products(), in_float32(pipeline):
        loss = DenoisingLoss(context, setting.material.objective, pipeline, context.model.empty_denoiser().config)
        folder = context.folder_of(method)
        with reading_adapter(folder):
            parts = saved_parts(method, adapter_folder(folder, step), loss, setting.schedule, context)
        parts, _ = as_plain_lora(parts, method, loss, setting.material)
        with evaluating(*parts.values()):
            yield parts, loss


def exact_loss(loss: DenoisingLoss, denoiser: nn.Module, batch: Batch) -> torch.Tensor:
    """The unweighted loss of each sample, all in float32."""
    inputs, target, _ = loss.inputs(loss.encoded(batch))
    output = denoiser(**as_float32(inputs), return_dict=False)
    prediction = loss.family.prediction(output, target).float()
    return loss.squared(prediction, target.float(), batch)


def numbers(losses: torch.Tensor) -> list[float | None]:
    """As JSON has them: None where they are not finite."""
    return [float(value) if value.isfinite() else None for value in losses]


def export_chosen(step: int, setting: Setting) -> list[str]:
    """Writes the files of an arm's checkpoint into the experiment's folder, in the place of an earlier choice's; their
    names."""
    context, metadata = setting.context, None
    schedule = dataclasses.replace(setting.schedule, steps=step)
    with chosen_parts(step, setting) as (parts, _):
        if METHODS[context.options.adapter.method[0]].plain_lora:
            metadata = kohya_metadata(next(iter(parts.values())).config, setting.material, schedule, context)
        check_held()
        return write_adapters(parts, context.folder, context.model.family, metadata)
