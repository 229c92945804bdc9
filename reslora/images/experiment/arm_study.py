"""The study of an arm, that is a run of an experiment: evaluates a checkpoint on the test split, and exports it.

The checkpoint is merged and evaluated in float32, so that its losses are those of its exported file.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...experiment.schedule import reading_adapter
from ...experiment.study import COMPARING, ArmStudy, numbers
from ...io import read_object, write_json
from ...runtime.checkpoint_folders import EXPORTED, EXPORTS, adapter_folder
from ...runtime.folder_lock import make_folder
from ...tracing import evaluating
from ...training.checkpoints import write_exports
from ...training.trained import Trained
from ..context import ImageContext
from ..data.batch import Batch
from ..data.samples import losses_of
from ..denoising import DenoisingLoss
from ..initial_lora import add_adapters
from ..output.exports import (
    Merged,
    Parts,
    as_float32,
    as_plain_lora,
    base_parts,
    export_merged,
    in_float32,
    saved_parts,
)
from ..study import ImageStudy
from .similarity import similarities
from .split import Image

TEST_NOISES = 1
"""Number of noises per timestep and image for the losses on the test split."""


@dataclass(frozen=True)
class ImageArmStudy(ArmStudy, ImageStudy):
    """The study of an arm of an image experiment."""

    context: ImageContext

    def test_and_export(
        self, step: int, images: Sequence[Image], keep: Callable[[dict], None] | None, to_export: bool
    ) -> None:
        """Merge the checkpoint of a step once, to test it and, if `to_export`, to export it into the arm's folder.

        `keep` is called with the losses on the test `images` and, with --metric_model, the similarities. If `keep` is
        None, the checkpoint is not tested. The exports are checked as in a single run; `exports.json` is written last.
        """
        context, (method,) = self.context, self.context.options.adapter.method
        folder = context.folder_of(method)
        make_folder(folder)
        with self.merged(step) as (parts, merged, loss):
            if keep:
                with evaluating(*parts.values()):
                    losses, metric = self.losses_of(parts, loss, images), context.options.validation.metric_model
                    keep(losses | {"similarities": similarities(parts, images, self) if metric else {}})
            if to_export:
                until = dataclasses.replace(self.schedule, steps=step)
                found = export_merged(parts, merged, method, self.training_data, self.sampler, until, context)
                write_exports(folder, context.options, self.identity, self.schedule, found)
                write_json(folder / EXPORTS, read_object(folder / EXPORTS) | {EXPORTED: step})

    @contextmanager
    def merged(self, step: int) -> Iterator[tuple[Parts, Mapping[str, Merged], DenoisingLoss]]:
        """Yield the result of `as_plain_lora` for the modules of a step, in float32, and the loss function."""
        context, (method,) = self.context, self.context.options.adapter.method
        with in_float32(self.pipeline):
            loss, folder = self.new_loss(), context.folder_of(method)
            with reading_adapter(folder):
                trained = saved_parts(method, adapter_folder(folder, step), loss, self.schedule, context)
            yield *as_plain_lora(trained, method, loss, self.training_data), loss

    def base_losses(self, images: Sequence[Image]) -> dict:
        """Return the losses on the test images before training: of the base model, with the LoRA of --init_lora."""
        (method,) = self.context.options.adapter.method
        with in_float32(self.pipeline):
            loss = self.new_loss()
            parts = base_parts(loss, self.context)
            if self.context.start:
                add_adapters(Trained(parts, loss), method, self.schedule.steps, self.context)
            with evaluating(*parts.values()):
                return self.losses_of(parts, loss, images)

    def new_loss(self) -> DenoisingLoss:
        """Return the loss function of the base model."""
        config = self.context.model.empty_denoiser().config
        return DenoisingLoss(self.context, self.training_data.objective, self.pipeline, config)

    def losses_of(self, parts: Parts, loss: DenoisingLoss, images: Sequence[Image]) -> dict:
        """Return the mean loss of each test image, and the mean loss of all test images at each timestep."""
        denoiser = next(iter(parts.values()))

        def check_and_measure(batch: Batch) -> torch.Tensor:
            """Return the loss of each example of the batch; raises `Stopped` if a stop was requested."""
            self.context.stop.check(COMPARING)
            return exact_loss(loss, denoiser, batch)

        losses = losses_of(check_and_measure, self.training_data, images, TEST_NOISES)
        return {"losses": numbers(losses.mean(1).tolist()), "by_timestep": numbers(losses.mean(0).tolist())}


def exact_loss(loss: DenoisingLoss, denoiser: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the unweighted loss of each sample, of shape (batch,), in float32."""
    inputs, target, _ = loss.inputs(loss.encoded(batch))
    prediction = loss.family.prediction(denoiser(**as_float32(inputs), return_dict=False), target).float()
    return loss.squared(prediction, target.float(), batch)
