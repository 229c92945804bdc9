"""Samples: images that the pipeline draws with the denoiser that is being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ..arguments import Flags
from ..data.batch import changed, stack_texts
from ..data.encoding import Texts
from ..model.families.base import Family, Text
from ..seeds import derive


class Drawer:
    """Draws prompts with the pipeline around any denoiser; each image has a seed of its own."""

    def __init__(self, pipeline: DiffusionPipeline, family: Family, texts: Texts, flags: Flags) -> None:
        self.pipeline, self.family, self.texts, self.flags = pipeline, family, texts, flags

    def draw(
        self, denoiser: nn.Module, prompts: Sequence[str], images: int, between_steps: Callable[[], None] = lambda: None
    ) -> list[np.ndarray]:
        """Images (height x width x 3, in [0, 1]), `images` for each prompt, drawn by the denoiser in eval mode.

        `between_steps` is called between the denoising steps and may raise; denoiser and pipeline stay as they were.
        """
        seeds = [
            (prompt, derive(self.flags.seed, "sample", p, i)) for p, prompt in enumerate(prompts) for i in range(images)
        ]
        training, drawn, size = denoiser.training, [], self.flags.train_batch_size
        before = getattr(self.pipeline, self.family.denoiser)
        setattr(self.pipeline, self.family.denoiser, denoiser.eval())
        try:
            for start in range(0, len(seeds), size):
                drawn += self._batch(seeds[start : start + size], between_steps)
        finally:
            setattr(self.pipeline, self.family.denoiser, before)
            denoiser.train(training)
        return drawn

    def _batch(self, seeds: Sequence[tuple[str, int]], between_steps: Callable[[], None]) -> list[np.ndarray]:
        def callback(pipeline: DiffusionPipeline, index: int, timestep: int, tensors: dict) -> dict:
            between_steps()
            return tensors

        flags = self.flags
        text, empty = self._text([prompt for prompt, _ in seeds]), self._text([""])
        drawn = self.pipeline(
            **self.family.drawing_inputs(self.pipeline, text, empty),
            generator=[torch.Generator().manual_seed(seed) for _, seed in seeds],
            num_inference_steps=flags.num_inference_steps, guidance_scale=flags.guidance_scale,
            height=flags.validation_height or flags.resolution, width=flags.validation_width or flags.resolution,
            callback_on_step_end=callback, output_type="np",
        )  # fmt: skip
        return list(drawn.images)

    def _text(self, captions: Sequence[str]) -> Text:
        # In the pipeline's precision: some make the latents in that of the text states.
        vae = self.pipeline.vae
        states = stack_texts([self.texts[caption] for caption in captions])
        return changed(states, lambda value: value.to(vae.device, vae.dtype, non_blocking=True))


def as_bytes(drawn: np.ndarray) -> np.ndarray:
    """An image in [0, 1] as bytes; raises `ValueError` for pixels that are not finite, which bytes would hide."""
    if not np.isfinite(drawn).all():
        raise ValueError("pixels that are not finite")
    return (drawn * 255).round().astype(np.uint8)


def as_image(drawn: np.ndarray) -> Image.Image:
    """An image in [0, 1] for a file; what is not finite is black."""
    return Image.fromarray(as_bytes(np.nan_to_num(drawn, nan=0.0, posinf=1.0, neginf=0.0)))
