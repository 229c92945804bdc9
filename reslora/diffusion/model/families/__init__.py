"""The families of text-to-image models that can be trained: a row each, and a module of the same name.

A family is what differs between models, and nothing else; `base.Family` says what that is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Family

# The class in a pipeline's model_index.json, and the module that knows its models.
FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z_image",
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "Krea2Pipeline": "krea2",
}


def load_family(pipeline_class: str) -> Family:
    """The family of a pipeline class in `FAMILIES`."""
    return importlib.import_module(f".{FAMILIES[pipeline_class]}", __name__).FAMILY
