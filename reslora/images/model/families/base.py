"""The interface of model families: the code that differs between text-to-image models.

A family does not depend on optimizers, options or folders.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL.Image import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from ....export import KOHYA_FILE

FLOW = {"resolution": 512, "num_inference_steps": 28, "weighting_scheme": "none", "max_sequence_length": 512}
"""Defaults of options that most flow-matching families have in common."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The projections of the image, and then of the text, in the joint attention of Flux and Stable Diffusion 3."""
LAYERS = {
    "attention": rf".*\.attn[12]?\.({'|'.join(map(re.escape, ATTENTION))})",
    "mlp": r".*\.(ff|ff_context|img_mlp|txt_mlp)\.net\.(0\.proj|2)",
}
"""Presets of --layers that most families have in common."""
Text = Mapping[str, torch.Tensor | list[torch.Tensor]]
"""Text states by name, batch first: a tensor, or a list if captions differ in length."""


@dataclass(frozen=True)
class Part:
    """A text encoder that can be trained together with the denoiser."""

    name: str
    """The encoder's attribute in the pipeline, also its folder, and the prefix of its layers in diffusers' files."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Suffixes of the names of the layers that get an adapter, as in diffusers' scripts."""
    reads_last: bool = True
    """Whether the denoiser uses the output of the last layer; if not, an adapter there would get no gradient."""

    def targets_in(self, encoder: nn.Module) -> list[str] | str:
        """Return the layers of the encoder that get an adapter, as PEFT's `target_modules`."""
        if self.reads_last:
            return list(self.targets)
        last = encoder.config.num_hidden_layers - 1
        return rf".*\.layers\.(?!{last}\.)\d+\..*\.({'|'.join(self.targets)})"


@dataclass(frozen=True)
class Conditions:
    """The conditioning of the denoiser, in addition to the noisy latents and the timesteps."""

    text: Text
    sizes: torch.Tensor
    """Batch x 6: height and width of the original image, top and left of the crop, height and width of the crop."""
    guidance: float = 1.0
    """The guidance scale that models with distilled guidance have as an input."""
    references: Sequence[torch.Tensor] = ()
    """The latents of each reference image that an edit model reads, batch x channels x height x width each."""


def numbered(name: str) -> tuple[str, list[str]]:
    """Return a layer's name with `{}` in place of its block's number, and a list with that number, or [] if none."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return name, []
    return f"{name[: number.start()]}{{}}{name[number.end() :]}", [number[0]]


class Family:
    """A family of models: attributes, and functions that prepare the denoiser's inputs and read its output.

    Subclasses override what differs from the defaults here.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    denoiser: str = "transformer"
    """The denoiser's attribute in the pipeline, also its folder, and the prefix of its layers in exported files."""
    denoiser_class: type[ModelMixin]
    objective: str = "flow"
    """`ddpm` (epsilon or v) or `flow` (velocity)."""
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Parts of the pipeline that are used only to encode captions."""
    trainable: tuple[Part, ...] = ()
    """The text encoders that can be trained."""
    lora_files: tuple[str, ...] = (KOHYA_FILE,)
    """Plain LoRA files, kohya's or ComfyUI's, that are exported in addition to diffusers' file."""
    unused_parts: tuple[str, ...] = ()
    """Parts of the pipeline that are never loaded."""
    unread: tuple[str, ...] = ()
    """Submodules of the last block in `transformer_blocks` whose output is unused."""
    defaults: ClassVar[Mapping[str, object]] = {}
    """Defaults of options for this family."""
    layers: ClassVar[Mapping[str, str]] = LAYERS
    """Presets of --layers, in addition to `all`: regular expressions of complete names of layers."""
    original: ClassVar[Mapping[str, str]] = {}
    """Names of layers in the model's original code, by their names in diffusers; `{}` stands for the block's number.

    diffusers' layers with the same name here are one layer in the original code, with their rows in this table's order.
    The table is empty if ComfyUI and kohya's scripts know diffusers' names.
    """
    published: ClassVar[Mapping[str, object]] = {}
    """The published denoiser's configuration fields that determine layer names and differ from the class's defaults.

    If several denoisers are published, the deepest denoiser counts.
    """
    largest: ClassVar[Mapping[str, object] | None] = None
    """The configuration of the largest published denoiser, if `published` mixes several denoisers."""
    version: tuple[str, str]
    """The base model's name in kohya's metadata, and its architecture in Stability AI's ModelSpec. Families with
    several base models override `model_version` instead."""
    marks: tuple[str, ...] = ()
    """Prefixes of the base model's names that kohya's scripts and ModelSpec write into LoRA files."""
    comfyui_words: tuple[str, str] = ("lora_A", "lora_B")
    """The names of A and B in ComfyUI's files. With these names diffusers reads the files too, if it can."""
    text_names: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Text encoders that LoRA files may contain, trainable here or not: the prefixes of kohya's and ComfyUI's names."""
    most_tokens: int | None = None
    """The highest number of a caption's tokens that the denoiser reads; None if it reads any number."""
    takes_guidance: bool = False
    """Whether guidance is an input of the denoiser, so that a negative prompt has no effect."""
    thinking: bool | None = None
    """Whether the chat template of captions enables the text encoder's thinking mode; None without a template."""
    patch: int = 0
    """The patch size in latents, if image sizes must be multiples of it."""
    channels: str = "latent_channels"
    """The autoencoder's own name of its number of latent channels."""
    latents_per_token: int = 4
    """The number of latent positions per token of the denoiser."""
    one_size: bool = False
    """Whether all denoisers of the family have the published size, so that layers of another size belong to another
    family.
    """
    derived: bool = False
    """Whether another family has layers of the same names and sizes, to which LoRA files without metadata belong."""
    unguided: float = 1.0
    """The guidance scale g with which the pipeline applies no guidance: 1 if the pipeline computes `negative + g
    (positive - negative)`, 0 if it computes `positive + g (positive - negative)`."""
    guidance: str = "guidance_scale"
    """The pipeline's argument for classifier-free guidance. A pipeline with an argument of another name than
    `guidance_scale` applies guidance only if it also gets a negative prompt."""
    edits: bool = False
    """Whether the family edits a reference image. Such a family has the layers of another family."""
    editing: str | None = None
    """Module and class of the family to use if the data have reference images; None if there is no such family."""
    batches_references: bool = True
    """Whether the pipeline can generate several images with different reference images at a time."""
    most_references: int | None = 1
    """The maximum number of reference images per image; None without a limit."""
    reads_references: bool = False
    """Whether the text encoder reads the reference images together with the caption."""
    read_area: int = 0
    """Area, in pixels, of a reference image that the text encoder reads."""
    encodes_in_float32: bool = False
    """Whether the autoencoder overflows in half precision if its configuration has `force_upcast`."""

    @property
    def frozen_text_parts(self) -> tuple[str, ...]:
        """The members of `text_parts` that cannot be trained."""
        trainable = {part.name for part in self.trainable}
        return tuple(name for name in self.text_parts if name.replace("tokenizer", "text_encoder") not in trainable)

    def unused_weights(self, denoiser: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the trainable weights that get no gradient because their output is unused.

        The keys are submodules of the last block, as in `unread`.
        """
        found: dict[str, list[nn.Parameter]] = {}
        for part in self.unread:
            start = f"transformer_blocks.{denoiser.config.num_layers - 1}.{part}."
            weights = [p for name, p in denoiser.named_parameters() if p.requires_grad and name.startswith(start)]
            found |= {part: weights} if weights else {}
        return found

    def unfit(self, parts: Mapping[str, Mapping]) -> str | None:
        """Return the reason why a pipeline cannot be trained, or None.

        `parts` are the configurations of the pipeline's parts, by name.
        """
        return None

    def pixel_multiple(self, pipeline: DiffusionPipeline) -> int:
        """Return the number of pixels that image height and width must be multiples of."""
        factor = pipeline.vae_scale_factor
        return factor * self.patch if self.patch else math.lcm(factor, 8)

    def latent_shape(self, pipeline: DiffusionPipeline, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of an image of that height and width in pixels."""
        factor = pipeline.vae_scale_factor
        return (getattr(pipeline.vae.config, self.channels), height // factor, width // factor)

    def token_counts(
        self, pipeline: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase, captions: list[str]
    ) -> list[int]:
        """Return the number of tokens of each caption without truncation.

        Tokens of the chat template are counted if the denoiser reads their text states.
        """
        if self.thinking is not None:
            how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.thinking}
            messages = [[{"role": "user", "content": caption}] for caption in captions]
            captions = [tokenizer.apply_chat_template(message, **how) for message in messages]
        return list(map(len, tokenizer(captions).input_ids))

    def encode_captions(self, pipeline: DiffusionPipeline, captions: list[str], longest: int | None) -> Text:
        """Return the text states of the captions; families without a trainable text encoder override this.

        `longest` is the highest number of tokens of a caption, if the pipeline needs it.
        """
        return self.encode_trained(pipeline, captions, self.encode_frozen(pipeline, captions, longest))

    def encode_frozen(self, pipeline: DiffusionPipeline, captions: list[str], longest: int | None) -> Text:
        """Return the output of the text encoders that cannot be trained."""
        return {}

    def encode_trained(self, pipeline: DiffusionPipeline, captions: list[str], frozen: Text) -> Text:
        """Return the text states of the captions, given the result of `encode_frozen` for the same captions."""
        raise NotImplementedError

    def encode_images(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Return mean and standard deviation of the latents of pixels in [-1, 1].

        The shape is batch x 2 x channels x height x width.
        """
        posterior = vae.encode(pixels).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def scale_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's input latents, in the shape of `latents` (batch x channels x height x width).

        The input latents are `(x - shift) * scale`, with the autoencoder's shift and scale.
        """
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    def denoiser_inputs(
        self, config: Mapping, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> dict:
        """Return the denoiser's keyword arguments for noisy latents (batch x channels x height x width)."""
        raise NotImplementedError

    def prediction(self, output: tuple, noisy: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's prediction in the shape of `noisy`, for the objective."""
        return output[0]

    def own_tokens(self, output: tuple, noisy: torch.Tensor) -> torch.Tensor:
        """Return the output for the tokens of the noisy latents (batch x tokens x width).

        Tokens of a reference image follow in the output, and are left out. `noisy`: batch x channels x height x width.
        """
        return output[0][:, : math.prod(noisy.shape[2:]) // self.latents_per_token]

    def original_name(self, config: Mapping, name: str) -> str | None:
        """Return a denoiser layer's name in the model's original code, which ComfyUI uses; None without such a name."""
        if not self.original:
            return name
        template, numbers = numbered(name)
        found = self.original.get(template)
        return found.format(*numbers) if found else None

    def kohya_name(self, config: Mapping, name: str) -> str | None:
        """Return a denoiser layer's name in kohya's scripts; None without such a name."""
        return self.original_name(config, name)

    def model_version(self, config: Mapping, predicts_v: bool) -> tuple[str, str]:
        """Return `version` for a base model with this denoiser configuration.

        `predicts_v`: whether the model predicts v, in a family that also has models that predict epsilon.
        """
        return self.version

    def metadata(self, config: Mapping, predicts_v: bool) -> dict[str, str]:
        """Return the fields of a LoRA file's header that name the base model, for kohya's scripts and ModelSpec."""
        version, architecture = self.model_version(config, predicts_v)
        return {
            "ss_base_model_version": version,
            "ss_v2": str(version.startswith("sd_v2")),  # A1111 distinguishes 2.x from 1.x by this
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{architecture}/lora",
        }

    def sampling_inputs(self, pipeline: DiffusionPipeline, text: Text, negative: Text, empty: bool) -> dict:
        """Return the pipeline's keyword arguments for the prompt and the negative prompt.

        `text`: the prompt's text states. `negative`: the negative prompt's text states, with batch size 1. `empty`:
        whether the negative prompt is the empty caption. Families override this if `states` is not a tensor, or if the
        pipeline has other arguments.
        """
        arguments = {"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        found: dict[str, Any] = {arguments[name]: value for name, value in text.items()}
        for name, value in () if self.takes_guidance else dict[str, Any](negative).items():
            states = found[arguments[name]]
            found[f"negative_{arguments[name]}"] = value.to(states).expand_as(states)
        return found

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the reference images of an image of that height and width."""
        return height, width

    def encode_with_references(self, pipeline: DiffusionPipeline, caption: str, references: Sequence[Image]) -> Text:
        """Return the text states of a caption and its reference images, if `reads_references`."""
        raise NotImplementedError

    def reference_inputs(self, references: Sequence[list[Image]]) -> dict:
        """Return the pipeline's keyword arguments for the reference images of each sample, of `reference_size`."""
        raise NotImplementedError
