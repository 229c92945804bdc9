"""What differs between families of text-to-image models, and nothing else: no optimizer, flag or folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from ....export import KOHYA_FILE

FLOW = {"resolution": 512, "num_inference_steps": 28, "weighting_scheme": "none", "max_sequence_length": 512}
"""Options' values that most families of flow matching have."""
Text = Mapping[str, torch.Tensor | list[torch.Tensor]]
"""What the text encoders make of captions, by name, batch first: a list where captions differ in length."""


@dataclass(frozen=True)
class Part:
    """A text encoder that can be trained beside the denoiser."""

    name: str
    """Its attribute in the pipeline, its folder, and the prefix of its layers in diffusers' files."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Ends of the names of the layers that get an adapter, as in diffusers' scripts."""
    reads_last: bool = True
    """Whether the denoiser reads what the last layer returns; an adapter there would have no gradient otherwise."""

    def targets_in(self, encoder: nn.Module) -> list[str] | str:
        """The layers of the encoder that get an adapter, as PEFT takes them."""
        if self.reads_last:
            return list(self.targets)
        last = encoder.config.num_hidden_layers - 1
        return rf".*\.layers\.(?!{last}\.)\d+\..*\.({'|'.join(self.targets)})"


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is told beside the noisy latents and the timesteps."""

    text: Text
    sizes: torch.Tensor
    """Batch x 6: height and width of the original image, top and left of the crop, height and width trained on."""
    guidance: float = 1.0
    """For models that are told the guidance they shall imitate."""


def in_chat(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], thinking: bool) -> list[str]:
    """Captions in a language model's template, as what a user says."""
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return [tokenizer.apply_chat_template([{"role": "user", "content": caption}], **how) for caption in captions]


def numbered(name: str) -> tuple[str, list[str]]:
    """A layer's name with `{}` for the number of its block, and that number where there is one."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return name, []
    return f"{name[: number.start()]}{{}}{name[number.end() :]}", [number[0]]


class Family:
    """A family of models: data, and the few functions that a model's formulas need. Subclasses say what is theirs."""

    name: str
    pipeline: type[DiffusionPipeline]
    denoiser: str = "unet"
    """The denoiser's attribute in the pipeline, folder, and prefix of its layers in exported files."""
    denoiser_class: type[ModelMixin]
    objective: str = "ddpm"
    """`ddpm` (noise or v) or `flow` (velocity)."""
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Parts of the pipeline that only encoding captions needs."""
    trainable: tuple[Part, ...] = ()
    """The text encoders that can be trained."""
    lora_files: tuple[str, ...] = (KOHYA_FILE,)
    """Plain LoRA files beside diffusers', keys of `exports.LORA_FILES`."""
    unused_parts: tuple[str, ...] = ()
    """Parts of the pipeline that are not loaded at all."""
    unread: tuple[str, ...] = ()
    """Parts of the last of `transformer_blocks` whose results nothing reads."""
    defaults: ClassVar[Mapping[str, object]] = {}
    """Options' values for this family, where the user gave none."""
    original: ClassVar[Mapping[str, str]] = {}
    """Layers' names in the model's own code, by their names in diffusers, with `{}` for the block's number. Several
    that share one are one layer there, with their rows in this order. Empty where ComfyUI and kohya's scripts know
    diffusers' names."""
    published: ClassVar[Mapping[str, object]] = {}
    """What differs in the published denoiser's configuration (the deepest one's, where there are several) from the
    class's defaults, as far as layers' names depend on it."""
    version: tuple[str, str]
    """What kohya's scripts call the base model, and its architecture's name in Stability AI's specification. Families
    with several have a `model_version` in its place."""
    marks: tuple[str, ...] = ()
    """How the base model's names begin that kohya's scripts and Stability AI's specification write into LoRA files."""
    comfyui_words: tuple[str, str] = ("lora_A", "lora_B")
    """What A and B are called in ComfyUI's files, such that diffusers reads them too, where it can."""
    text_names: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Text encoders that LoRA files may be for, trainable here or not: how kohya's names of their layers begin, and
    ComfyUI's."""
    is_told_guidance: bool = False
    """Whether guidance is a number that the denoiser is told, so that a negative prompt means nothing to it."""
    patch: int = 0
    """How many latents across a token is, where an image must be whole tokens."""
    latents_per_token: int = 4
    """How many places of the latents are one token of the denoiser, in height and width together."""
    one_size: bool = False
    """Whether all its denoisers are of the published size, so that layers of other sides are known not to be theirs."""
    unguided: float = 1.0
    """The pipeline's number for no guidance: 1 where it computes `negative + g (positive - negative)`, 0 where
    `positive + g (positive - negative)`."""
    guidance: str = "guidance_scale"
    """The pipeline's argument for classifier-free guidance; by any other name it needs a negative prompt as well."""
    encodes_in_float32: bool = False
    """Whether the autoencoder overflows in half precision where its configuration asks for `force_upcast`."""

    @property
    def frozen_text_parts(self) -> tuple[str, ...]:
        """Those of `text_parts` that never train."""
        trainable = {part.name for part in self.trainable}
        return tuple(name for name in self.text_parts if name.replace("tokenizer", "text_encoder") not in trainable)

    def unread_weights(self, denoiser: nn.Module) -> dict[str, list[nn.Parameter]]:
        """The weights that train although nothing reads what comes of them, by part of the last block."""
        found: dict[str, list[nn.Parameter]] = {}
        for part in self.unread:
            start = f"transformer_blocks.{denoiser.config.num_layers - 1}.{part}."
            weights = [p for name, p in denoiser.named_parameters() if p.requires_grad and name.startswith(start)]
            found |= {part: weights} if weights else {}
        return found

    def unfit(self, parts: Mapping[str, Mapping]) -> str | None:
        """Why this pipeline cannot be trained, as its parts' configurations show, by name; None where it can."""
        return None

    def pixel_multiple(self, pipeline: DiffusionPipeline) -> int:
        """What width and height of an image must be multiples of."""
        factor = pipeline.vae_scale_factor
        return factor * self.patch if self.patch else math.lcm(factor, 8)

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the latents of an image of so many pixels: channels, height, width."""
        factor = pipeline.vae_scale_factor
        return (pipeline.vae.config.latent_channels, height // factor, width // factor)

    def token_counts(
        self, pipeline: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]
    ) -> list[int]:
        """How many tokens each caption is, uncut, with what the pipeline puts around it; only those that are read."""
        return list(map(len, tokenizer(list(captions)).input_ids))

    def encode_captions(self, pipeline: DiffusionPipeline, captions: Sequence[str], longest: int | None) -> Text:
        """What the denoiser reads of the captions; a family's own where no encoder can be trained.

        `longest` is how many tokens a caption may have, where the pipeline asks for that.
        """
        return self.encode_trained(pipeline, captions, self.encode_frozen(pipeline, captions, longest))

    def encode_frozen(self, pipeline: DiffusionPipeline, captions: Sequence[str], longest: int | None) -> Text:
        """What the encoders that never train make of the captions."""
        return {}

    def encode_trained(self, pipeline: DiffusionPipeline, captions: Sequence[str], frozen: Text) -> Text:
        """What `encode_captions` returns, with what `encode_frozen` has made of the same captions."""
        raise NotImplementedError

    def encode_images(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the latents (batch x 2 x channels x height x width) of pixels in [-1, 1]."""
        posterior = vae.encode(pixels).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def scale_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser knows them: `(x - shift) * scale`, with the autoencoder's own shift and scale."""
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    def denoiser_inputs(
        self, config: Mapping, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> dict:
        """Keyword arguments of the denoiser for a batch of noisy latents (batch x channels x height x width)."""
        raise NotImplementedError

    def prediction(self, output: tuple, noisy: torch.Tensor) -> torch.Tensor:
        """What the objective compares, in the shape of `noisy`, of what the denoiser returned."""
        return output[0]

    def original_name(self, config: Mapping, name: str) -> str | None:
        """The name of a denoiser's layer in the model's own code, which ComfyUI has; None where it has none."""
        if not self.original:
            return name
        template, numbers = numbered(name)
        found = self.original.get(template)
        return found.format(*numbers) if found else None

    def kohya_name(self, config: Mapping, name: str) -> str | None:
        """The name of a denoiser's layer in kohya's scripts; None where it has none."""
        return self.original_name(config, name)

    def model_version(self, config: Mapping, predicts_v: bool = False) -> tuple[str, str]:
        """As `version`, of a base model that its denoiser's `config` shows.

        `predicts_v`: whether it predicts v, where others of its kind predict the noise.
        """
        return self.version

    def drawing_inputs(self, pipeline: DiffusionPipeline, text: Text, negative: Text, empty: bool = True) -> dict:
        """Keyword arguments of the pipeline that say what to draw, and what not to.

        `negative` is the negative prompt, batch 1; `empty`: whether that is the empty caption.
        """
        raise NotImplementedError
