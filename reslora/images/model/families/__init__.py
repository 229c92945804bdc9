"""The families of text-to-image models that can be trained: each has one row in `FAMILIES`, and one module.

A family has everything that differs between models, and nothing else; see `base.Family`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Family

# The class in a pipeline's model_index.json, and the module of its family.
FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "sdxl",
    "ZImagePipeline": "z_image",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux_kontext",
    "StableDiffusion3Pipeline": "sd3",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2_klein",
    "ChromaPipeline": "chroma",
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image_edit",
    "QwenImageEditPlusPipeline": "qwen_image_edit_plus",
    "Krea2Pipeline": "krea2",
    "Lumina2Pipeline": "lumina2",
}


def editing_family(family: Family) -> Family:
    """Return the family that trains the same model on pairs of images; `family` itself if there is no other."""
    if family.editing is None:
        return family
    module, kind = family.editing.split(".")
    return getattr(importlib.import_module(f".{module}", __name__), kind)()


def load_family(pipeline_class: str) -> Family:
    """Return the family of a pipeline class in `FAMILIES`."""
    return importlib.import_module(f".{FAMILIES[pipeline_class]}", __name__).FAMILY
