"""Generate samples with the pipeline and the denoiser that is trained."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map

from ...attributes import override_attributes
from ...options.images import DataOptions, TrainingOptions, ValidationOptions
from ...tracing import evaluating
from ..data.batch import stack_texts
from ..data.encoding import Instruction, Texts
from ..data.images import cropped
from ..data.size import Size
from ..generators import derive
from ..model.assistant import without_assistant
from ..model.families.base import Family, Part, Text
from ..prompts import Prompt, resolved


@dataclass
class Sampler:
    """Generates images for prompts with the pipeline and any denoiser; each image has its own seed."""

    pipeline: DiffusionPipeline
    family: Family
    texts: Texts | Mapping[Instruction, Mapping[str, torch.Tensor]]
    data: DataOptions
    training: TrainingOptions
    validation: ValidationOptions
    encoders: Sequence[Part] = ()
    """The pipeline's text encoders that are trained."""
    references: Sequence[tuple[str, Sequence[Image.Image]]] = ()
    """The reference images of an edit model: a hash and the references of one image per item; prompts use items in
    turn.
    """

    def draw(
        self,
        denoiser: nn.Module,
        prompts: Sequence[str | Prompt],
        images: int,
        between_steps: Callable[[], None] = lambda: None,
    ) -> list[np.ndarray]:
        """Generate `images` images for each prompt in eval mode; each image is height x width x 3, in [0, 1].

        An assistant LoRA of the denoiser is disabled. `between_steps` is called between the denoising steps and may
        raise an error. Afterwards the pipeline has its earlier denoiser again, and the models are in their earlier
        mode.
        """
        several = self.family.batches_references or not self.references
        drawn, size = [], self.training.train_batch_size if several else 1
        encoders = [getattr(self.pipeline, part.name) for part in self.encoders]
        with (
            override_attributes(self.pipeline, **{self.family.denoiser: denoiser}),
            evaluating(denoiser, *encoders),
            without_assistant(denoiser),
        ):
            for alike in (list(group) for _, group in itertools.groupby(self.wanted(prompts, images), key=shared)):
                for start in range(0, len(alike), size):
                    drawn += self._batch(alike[start : start + size], between_steps)
        return drawn

    def wanted(self, prompts: Sequence[str | Prompt], images: int) -> list[tuple[Prompt, int]]:
        """For each image to generate, return its prompt with all options resolved, and its seed."""
        found = []
        for number, given in enumerate(prompts):
            prompt = Prompt(given) if isinstance(given, str) else given
            prompt = resolved(prompt, self.data, self.validation, self.family)
            if self.references:
                prompt = dataclasses.replace(prompt, reference=number % len(self.references))
            for image in range(images):
                drawn = derive(self.training.seed, "sample", number, image)
                found.append((prompt, drawn if prompt.seed is None else prompt.seed + image))
        return found

    def _batch(self, wanted: Sequence[tuple[Prompt, int]], between_steps: Callable[[], None]) -> list[np.ndarray]:
        def callback(pipeline: DiffusionPipeline, index: int, timestep: int, tensors: dict) -> dict:
            """Call `between_steps` after each denoising step."""
            between_steps()
            return tensors

        first, _ = wanted[0]
        text = self._text([(one.prompt, one.reference) for one, _ in wanted])
        negatives = wanted if self.references and self.family.reads_references else wanted[:1]
        negative = self._text([(one.negative_prompt, one.reference) for one, _ in negatives])
        drawn = self.pipeline(
            **self.family.sampling_inputs(self.pipeline, text, negative, not first.negative_prompt),
            **self._reference([one for one, _ in wanted]),
            generator=[torch.Generator().manual_seed(seed) for _, seed in wanted],
            num_inference_steps=first.num_inference_steps, **{self.family.guidance: first.guidance_scale},
            height=first.height, width=first.width,
            callback_on_step_end=callback, output_type="np",
        )  # fmt: skip
        return list(drawn.images)

    def _reference(self, prompts: Sequence[Prompt]) -> dict:
        """Return the pipeline's arguments for the prompts' reference images, cropped to the samples' size."""
        if not self.references:
            return {}
        size = Size(*self.family.reference_size(prompts[0].height or 0, prompts[0].width or 0))
        images = [self.references[one.reference or 0][1] for one in prompts]
        how = (0.5, 0.5), size, self.data.image_interpolation_mode
        return self.family.reference_inputs([[cropped(image, *how) for image in some] for some in images])

    def _text(self, prompts: list[tuple[str, int | None]]) -> Text:
        # The pipeline's dtype, because some pipelines create latents in the dtype of the text states.
        vae = self.pipeline.vae

        def to_pipeline(text: Text) -> Text:
            """Return the text states on the pipeline's device, in its dtype."""
            return tree_map(lambda value: value.to(vae.device, vae.dtype, non_blocking=True), text)

        if self.references and self.family.reads_references:
            return to_pipeline(
                stack_texts([self.texts[text, self.references[number or 0][0]] for text, number in prompts])
            )
        captions = [caption for caption, _ in prompts]
        states = to_pipeline(stack_texts([self._states(caption) for caption in captions]))
        if not self.encoders:
            return states
        with torch.no_grad():
            return to_pipeline(self.family.encode_trained(self.pipeline, captions, states))

    def _states(self, caption: str) -> Mapping[str, torch.Tensor]:
        with contextlib.suppress(KeyError):
            return self.texts[caption]
        # If captions are not encoded beforehand, the text encoders are loaded.
        encode = self.family.encode_frozen if self.encoders else self.family.encode_captions
        with torch.no_grad():
            states = encode(self.pipeline, [caption], self.training.max_sequence_length)
        return {name: value[0] for name, value in states.items()}


def shared(wanted: tuple[Prompt, int]) -> Prompt:
    """Return the options of a prompt that must be equal for all images of a batch."""
    return dataclasses.replace(wanted[0], prompt="", seed=None, reference=None)


def as_bytes(drawn: np.ndarray) -> np.ndarray:
    """Return an image (height x width x 3) of finite numbers in [0, 1] as uint8, from 0 to 255."""
    return (drawn * 255).round().astype(np.uint8)


def as_image(drawn: np.ndarray) -> Image.Image:
    """Return an image (height x width x 3) in [0, 1] as a PIL image; NaN becomes black."""
    return Image.fromarray(as_bytes(np.nan_to_num(drawn, nan=0.0, posinf=1.0, neginf=0.0)))
