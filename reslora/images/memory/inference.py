"""Memory of sampling and exporting: the denoiser without gradients, the autoencoder's decoder, and float32 weights."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...calibration import BUDGET
from ...methods.registry import METHODS
from ...options.images import ValidationOptions
from ...regression import Gram
from ..data.class_images import missing_class_images
from ..data.size import Size
from ..model.families.base import Conditions, Family
from ..model.quantising import block_layers
from ..model.stored import IN_MEMORY
from ..output.sampling import shared
from ..prompts import prompts_of, resolved
from .components import empty_denoiser
from .meta_tensors import tensor_bytes
from .phases import ACTIVATIONS, ADAPTER, AUTOENCODER, BASE, ENCODERS, EXACT, MERGE, OPTIMIZER, Held, Phase, Rehearsal

KEPT = (BASE, ADAPTER, OPTIMIZER)  # components of a training step that stay in memory during sampling and exporting


def drawing_class_images(rehearsal: Rehearsal) -> Phase | None:
    """Return the phase that generates class images with the complete pipeline; None if none are missing."""
    options, missing = rehearsal.options, missing_class_images(rehearsal.options.data, rehearsal.options.output)
    if not missing:
        return None
    denoiser = rehearsal.stage.place(rehearsal.base()).eval()
    count, side = min(options.training.train_batch_size, missing), max(options.data.resolution)
    guided = count * passes(rehearsal.family, options.validation.guidance_scale)

    def peak() -> int:
        """Return the highest number of bytes of activations while images are generated."""
        size, dtype = Size(side, side), rehearsal.dtype
        drawn = denoising(rehearsal, denoiser, guided, size, dtype), decoding(rehearsal, count, size, dtype)
        return max(*drawn, rehearsal.peak_of_encoders)

    held: Held = {
        BASE: tensor_bytes(denoiser),
        ENCODERS: tensor_bytes(*rehearsal.encoders),
        AUTOENCODER: tensor_bytes(rehearsal.pipeline.vae),
        ACTIVATIONS: rehearsal.known("activations of class images", peak),
    }
    return Phase("generating class images", held)


def sampling(rehearsal: Rehearsal, step: Phase) -> Phase | None:
    """Return the phase that generates samples between training steps; None without samples.

    `step`: the phase of a training step, whose weights and optimizer state stay in memory.
    """
    options = rehearsal.options
    if not samples(options.validation):
        return None
    denoiser = rehearsal.stage.place(
        empty_denoiser(rehearsal.model, rehearsal.dtype, options.model.base_precision)
    ).eval()
    draw = partial(drawing, rehearsal, denoiser, rehearsal.dtype, rehearsal.autocast)
    activations = rehearsal.known("activations of sampling", draw)
    found = {name: step.held[name] for name in KEPT} | rehearsal.staying
    return Phase("sampling", found | {ACTIVATIONS: activations, AUTOENCODER: rehearsal.autoencoder()})


def exporting(rehearsal: Rehearsal, method: str, step: Phase, free: int) -> Phase:
    """Return the phase that merges, exports and, with prompts, generates samples in float32.

    `step`: the phase of a training step, whose weights and optimizer state stay in memory. `free`: bytes of the device
    that are free before the run.
    """
    exact = empty_denoiser(rehearsal.model, torch.float32)
    whole, shapes = tensor_bytes(exact), [layer.weight.shape for _, layer in block_layers(exact)]
    rehearsal.stage.place(exact.eval())
    times = 4 // rehearsal.dtype.itemsize
    encoders = times * tensor_bytes(*rehearsal.trained_encoders, trained=False)
    found = {name: step.held[name] for name in KEPT}
    found[BASE] = (found[BASE] or 0) + encoders - encoders // times  # they are converted in place
    activations: int | None = 0
    if samples(rehearsal.options.validation):
        draw = partial(drawing, rehearsal, exact, torch.float32, contextlib.nullcontext)
        activations = rehearsal.known("activations of sampling in float32", draw)
    plain = rehearsal.dtype == torch.float32 and rehearsal.context.holds_base
    if not plain or rehearsal.options.validation.save_best:
        left = (free - step.total) // 2 if rehearsal.stage.device.type == "cuda" else 0
        if whole > max(IN_MEMORY, left) and shapes:  # block weights are then read one at a time
            sizes = [4 * shape.numel() for shape in shapes]
            whole -= sum(sizes) - max(sizes)
        found |= {EXACT: whole + encoders, ADAPTER: 2 * (step.held[ADAPTER] or 0)}
    if METHODS[method].shortcuts and rehearsal.options.adapter.merge_calibration_samples:
        found[MERGE] = merging(rehearsal, exact)
        size, count = rehearsal.size, rehearsal.options.training.train_batch_size
        read = partial(denoising, rehearsal, exact, count, size, torch.float32)
        activations = max(activations or 0, rehearsal.known("activations of the merge", read) or 0)
    stay: Held = {name: times * (size or 0) for name, size in rehearsal.staying.items()}
    return Phase("exporting", found | {ACTIVATIONS: activations, AUTOENCODER: rehearsal.autoencoder(times)} | stay)


def merging(rehearsal: Rehearsal, exact: nn.Module) -> int:
    """Return the bytes that merging needs: calibration batches, and Gram matrices for least squares.

    The Gram matrices take at most BUDGET.
    """
    options = rehearsal.options
    batch = rehearsal.batch(options.training.train_batch_size)
    states = [value for values in (batch.text or {}).values() for value in values]
    read = 4 * sum(value.numel() for value in [*states, batch.noise]) * options.adapter.merge_calibration_samples
    ends = tuple(options.adapter.target_modules)
    widths = {
        name.rpartition(".")[0]: layer.in_features
        for name, layer in block_layers(exact)
        if name.endswith(ends) or len(ends) == 1
    }
    return read // options.training.train_batch_size + min(
        BUDGET, sum(Gram.nbytes(width, 4) for width in widths.values())
    )


def samples(options: ValidationOptions) -> bool:
    """Return whether a run generates samples."""
    return bool(options.validation_prompt and options.num_validation_images)


def drawing(
    rehearsal: Rehearsal,
    denoiser: nn.Module,
    dtype: torch.dtype,
    precision: Callable[[], contextlib.AbstractContextManager],
) -> int:
    """Return the peak memory of activations, in bytes, of the denoiser and the decoder while they generate images."""
    options, family = rehearsal.options, rehearsal.family
    images = options.validation.num_validation_images
    prompts = [resolved(prompt, options.data, options.validation, family) for prompt in prompts_of(options.validation)]
    most = 0
    for prompt, alike in itertools.groupby([(prompt, 0) for prompt in prompts], key=shared):
        count = min(options.training.train_batch_size, len(list(alike)) * images)
        size = Size(prompt.height or 0, prompt.width or 0)
        guided = count * passes(family, prompt.guidance_scale)
        with precision():
            found = denoising(rehearsal, denoiser, guided, size, dtype), decoding(rehearsal, count, size, dtype)
        most = max(most, *found)
    return most


def passes(family: Family, guidance: float | None) -> int:
    """Return how many forward passes an image needs per denoising step: 2 with classifier-free guidance, else 1."""
    return 1 if family.takes_guidance or (guidance or 0) <= family.unguided else 2


def denoising(rehearsal: Rehearsal, denoiser: Any, count: int, size: Size, dtype: torch.dtype) -> int:
    """Return the peak of activations, in bytes, of a denoising step of `count` images."""
    family, stage = rehearsal.family, rehearsal.stage
    shape = family.latent_shape(rehearsal.pipeline, size.height, size.width)
    with torch.no_grad(), stage(denoiser, *rehearsal.encoders) as live:
        noisy, timesteps = stage.empty(count, *shape, dtype=dtype), stage.empty(count)
        text = rehearsal.text(count, dtype)
        if rehearsal.trainable:
            text = family.encode_trained(rehearsal.pipeline, rehearsal.captions(count), text)
            text = tree_map(lambda value: value.to(dtype), text)  # encoders of an export are in float32, too
        of_reference = family.latent_shape(rehearsal.pipeline, *family.reference_size(size.height, size.width))
        references = [stage.empty(count, *of_reference, dtype=dtype)] * rehearsal.options.data.references_per_image
        conditions = Conditions(text, stage.empty(count, 6), references=references)
        denoiser(**family.denoiser_inputs(denoiser.config, noisy, timesteps, conditions), return_dict=False)
    return live.peak


def decoding(rehearsal: Rehearsal, count: int, size: Size, dtype: torch.dtype) -> int:
    """Return the peak of activations, in bytes, of decoding `count` images."""
    stage, vae, shapes = rehearsal.stage, rehearsal.autoencoder_in(dtype), []
    hook = vae.encoder.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with torch.no_grad(), stage(vae):
        rehearsal.family.encode_images(vae, stage.empty(1, 3, size.height, size.width, dtype=dtype))
    hook.remove()
    _, moments, *rest = shapes[0]
    with torch.no_grad(), stage(vae) as live:
        vae.decode(stage.empty(count, moments // 2, *rest, dtype=dtype), return_dict=False)
    return live.peak
