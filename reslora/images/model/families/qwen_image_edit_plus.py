"""Qwen-Image-Edit-2509 and -2511: Qwen-Image-Edit with several reference images."""

from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

from .qwen_image_edit import QwenImageEdit


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit-2509 or -2511, trained as Qwen-Image-Edit is; reference images are prepared as in the pipeline.

    For the latents, each reference image has about a million pixels; for the text encoder, about 384 x 384.
    """

    name = "qwen_image_edit_plus"
    pipeline = QwenImageEditPlusPipeline
    most_references = None
    batches_references = False
    read_area = CONDITION_IMAGE_SIZE

    def reference_inputs(self, references):
        """Return the images of a single sample; the pipeline scales them to `reference_size`."""
        return {"image": references[0]}


FAMILY = QwenImageEditPlus()
