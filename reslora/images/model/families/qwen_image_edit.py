"""Qwen-Image-Edit: Qwen-Image, whose text encoder and transformer both read a reference image."""

from typing import ClassVar

import torch
from diffusers import QwenImageEditPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from .qwen_autoencoder import packed, without_padding
from .qwen_image import QwenImage

AREA = 1024 * 1024  # of the reference image in pixels, as in the pipeline; it does not depend on the size of the sample


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit, trained as Qwen-Image is; reference images are prepared as in the pipeline.

    The reference image has about a million pixels. Its latents are the mean, not a sample. The text encoder reads the
    complete image with each caption.
    """

    name = "qwen_image_edit"
    pipeline = QwenImageEditPipeline
    text_parts = ("text_encoder", "tokenizer", "processor")
    edits = True
    reads_references = True
    read_area = AREA
    defaults: ClassVar = {name: value for name, value in QwenImage.defaults.items() if name != "max_sequence_length"}

    def reference_size(self, height, width):
        """Return the pipeline's height and width for a reference image of the sample's aspect ratio."""
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(AREA, width / height)
        return height, width

    def encode_captions(self, pipeline, captions, longest):
        """Return `states` of the captions without reference images; only the memory estimate calls this."""
        states, mask = QwenImagePipeline._get_qwen_prompt_embeds(pipeline, captions, pipeline.text_encoder.device)
        return {"states": without_padding(states, mask)}

    def encode_with_references(self, pipeline, caption, references):
        """Return `states` of the caption and the reference images: tokens x width."""
        images = []
        for image in references:
            width, height, *_ = pipeline_qwenimage_edit.calculate_dimensions(self.read_area, image.width / image.height)
            images.append(pipeline.image_processor.resize(image, height, width))
        states, mask = pipeline.encode_prompt([caption], images, device=pipeline.text_encoder.device)
        return {"states": without_padding(states, mask)}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return Qwen-Image's inputs, with the references' tokens and shapes after those of the image."""
        inputs = super().denoiser_inputs(config, noisy, timesteps, conditions)
        more = [(1, reference.shape[2] // 2, reference.shape[3] // 2) for reference in conditions.references]
        return inputs | {
            "hidden_states": torch.cat([inputs["hidden_states"], *map(packed, conditions.references)], 1),
            "img_shapes": [[*shapes, *more] for shapes in inputs["img_shapes"]],
        }

    def reference_inputs(self, references):
        """Return the images; the pipeline scales them to `reference_size`."""
        return {"image": [image for (image,) in references]}


FAMILY = QwenImageEdit()
