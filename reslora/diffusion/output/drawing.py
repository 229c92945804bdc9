"""Samples: images that the pipeline draws with the denoiser that is being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ..arguments import Flags, listed
from ..data.batch import changed, stack_texts
from ..data.encoding import Texts
from ..model.families.base import Family, Part, Text
from ..seeds import derive
from ..training.denoising import evaluating


class Drawer:
    """Draws prompts with the pipeline around any denoiser; each image has a seed of its own."""

    def __init__(
        self, pipeline: DiffusionPipeline, family: Family, texts: Texts, flags: Flags, encoders: Sequence[Part] = ()
    ) -> None:
        self.pipeline, self.family, self.texts, self.flags = pipeline, family, texts, flags
        self.encoders = encoders  # those of the pipeline that train

    def draw(
        self, denoiser: nn.Module, prompts: Sequence[str], images: int, between_steps: Callable[[], None] = lambda: None
    ) -> list[np.ndarray]:
        """Images (height x width x 3, in [0, 1]), `images` for each prompt, drawn by the denoiser in eval mode.

        `between_steps` is called between the denoising steps and may raise; denoiser and pipeline stay as they were.
        """
        seeds = [
            (prompt, derive(self.flags.seed, "sample", p, i)) for p, prompt in enumerate(prompts) for i in range(images)
        ]
        drawn, size, before = [], self.flags.train_batch_size, getattr(self.pipeline, self.family.denoiser)
        encoders = [getattr(self.pipeline, part.name) for part in self.encoders]
        setattr(self.pipeline, self.family.denoiser, denoiser)
        try:
            with evaluating(denoiser, *encoders):
                for start in range(0, len(seeds), size):
                    drawn += self._batch(seeds[start : start + size], between_steps)
        finally:
            setattr(self.pipeline, self.family.denoiser, before)
        return drawn

    def _batch(self, seeds: Sequence[tuple[str, int]], between_steps: Callable[[], None]) -> list[np.ndarray]:
        def callback(pipeline: DiffusionPipeline, index: int, timestep: int, tensors: dict) -> dict:
            between_steps()
            return tensors

        flags = self.flags
        side = listed(flags.resolution)[0]
        text, empty = self._text([prompt for prompt, _ in seeds]), self._text([""])
        drawn = self.pipeline(
            **self.family.drawing_inputs(self.pipeline, text, empty),
            generator=[torch.Generator().manual_seed(seed) for _, seed in seeds],
            num_inference_steps=flags.num_inference_steps, **{self.family.guidance: flags.guidance_scale},
            height=flags.validation_height or side, width=flags.validation_width or side,
            callback_on_step_end=callback, output_type="np",
        )  # fmt: skip
        return list(drawn.images)

    def _text(self, captions: Sequence[str]) -> Text:
        # In the pipeline's precision: some make the latents in that of the text states.
        vae = self.pipeline.vae

        def ready(text: Text) -> Text:
            return changed(text, lambda value: value.to(vae.device, vae.dtype, non_blocking=True))

        states = ready(stack_texts([self.texts[caption] for caption in captions]))
        if not self.encoders:
            return states
        with torch.no_grad():
            return ready(self.family.encode_trained(self.pipeline, captions, states))


def as_bytes(drawn: np.ndarray) -> np.ndarray:
    """An image in [0, 1] as bytes; raises `ValueError` for pixels that are not finite, which bytes would hide."""
    if not np.isfinite(drawn).all():
        raise ValueError("pixels that are not finite")
    return (drawn * 255).round().astype(np.uint8)


def as_image(drawn: np.ndarray) -> Image.Image:
    """An image in [0, 1] for a file; what is not finite is black."""
    return Image.fromarray(as_bytes(np.nan_to_num(drawn, nan=0.0, posinf=1.0, neginf=0.0)))
