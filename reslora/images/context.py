"""The context of an image run: resolved options, model, processes, and LoRA files to start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..options.images import Options
from ..training.context import Context
from ..training.sharding import cuts_base

if TYPE_CHECKING:
    from .model.families.base import Part
    from .model.loading import Model
    from .model.start import Start


@dataclass(frozen=True)
class ImageContext(Context):
    """The context of an image run."""

    options: Options
    model: Model
    start: Start | None = None
    """The LoRA file that training starts from."""
    assistant: Start | None = None
    """The LoRA file that is active only in training."""

    @property
    def writes_merged(self) -> bool:
        """Whether to export merged weights; the runs of an experiment, which may be many, export none."""
        return not self.place

    @property
    def encoders(self) -> tuple[Part, ...]:
        """Text encoders that are trained."""
        return self.model.family.trainable if self.options.adapter.train_text_encoder else ()

    @property
    def live_encoders(self) -> tuple[Part, ...]:
        """Text encoders that encode captions in every step, because they or new tokens are trained."""
        return self.model.family.trainable if self.options.adapter.new_tokens else self.encoders

    @property
    def holds_base(self) -> bool:
        """Whether the denoiser in memory has the base's own weights: not quantized, swapped, sharded or assisted."""
        model = self.options.model
        whole = model.base_precision == "no" and not model.blocks_to_swap
        return whole and self.assistant is None and not cuts_base(self.accelerator)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return weight_dtype(self.accelerator.mixed_precision)


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of the frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
