"""Samples of additional prompts that a user requests during training, generated with the current weights."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from ..errors import InvalidArgument
from .context import ImageContext
from .data.encoding import Instruction
from .model_checks import check_prompts
from .output.sampling import Sampler
from .prompts import Prompt, of_lines


def read_prompts(text: str, file: str, pipeline: DiffusionPipeline, context: ImageContext) -> list[Prompt]:
    """Return the prompts of a request, one per line with kohya's options.

    If a prompt is invalid, print a warning and return [], because an invalid request must not end training.
    """
    try:
        prompts = of_lines(text, file)
        check_prompts(prompts, file, pipeline, context.model.family)
    except InvalidArgument as error:
        context.accelerator.print(f"warning: no samples: {error}")
        return []
    return prompts


def with_prompts(sampler: Sampler, prompts: Sequence[Prompt], context: ImageContext) -> Sampler:
    """Return the sampler with the text states of other prompts.

    Loads the text encoders if they were freed after the captions were encoded, and frees them again.
    """
    family, longest, references = sampler.family, sampler.training.max_sequence_length, sampler.references
    if not sampler.data.cache_text_embeddings or (context.live_encoders and not family.frozen_text_parts):
        return sampler  # text encoders are still loaded
    pipeline = context.model.load_pipeline(context.dtype, context.accelerator.device, encoders=True, vae=False)
    found: dict[Instruction, Mapping] = {}
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            for text in (prompt.prompt, prompt.negative_prompt):
                if references and family.reads_references:
                    mark, images = references[number % len(references)]
                    states = family.encode_with_references(pipeline, text, images)
                    found[text, mark] = {name: value[0] for name, value in states.items()}
                else:
                    encode = family.encode_frozen if context.live_encoders else family.encode_captions
                    found[text] = {name: value[0] for name, value in encode(pipeline, [text], longest).items()}
    return dataclasses.replace(sampler, texts=found)
