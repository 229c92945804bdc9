"""Names of a model's layers in diffusers, kohya's scripts, ComfyUI and PEFT, from the table of the model's family."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ....checkpoint import PEFT_PREFIX
from ....errors import InvalidArgument
from ....export import Factors
from ..families.base import Family, numbered

Parts = dict[str, dict[str, Factors]]
"""The plain LoRA of each layer: by the part's name in the pipeline, then by the layer's name in the part."""
Layer = tuple[str, str]
"""The name of a part of the pipeline, and the name of a layer in that part."""

DEEPEST_TEXT_ENCODER = 64  # layers; CLIP and T5 have 32 at most


@dataclass(frozen=True)
class Fused:
    """A layer of the model's original code. Its rows are those of one or several layers in diffusers."""

    layers: tuple[Layer, ...]
    outputs: tuple[int, ...] = (1,)
    """The number of rows of each diffusers layer; only the proportions matter."""
    swapped: bool = False
    """Whether the two halves of the rows are swapped: diffusers' last norms have the scale before the shift."""

    def split(self, factors: Factors) -> dict[Layer, Factors]:
        """Split the factors of the fused layer into the factors of each diffusers layer.

        A layer gets its rows of B without zero columns, and the corresponding rows of A. Therefore a layer that `join`
        has put into a block-diagonal B gets its own rank back. A layer whose rows of B are all zero is left out. Raises
        `ValueError` if the number of rows does not fit.
        """
        down, up, scale = factors
        if self.swapped:
            up = torch.cat(up.chunk(2)[::-1])
        if len(self.layers) == 1:
            return {self.layers[0]: Factors(down, up, scale)}
        rows = [len(up) * width // sum(self.outputs) for width in self.outputs]
        if sum(rows) != len(up):
            raise ValueError(f"the fused B has {len(up)} rows, which cannot be split into {len(self.layers)} layers")
        found = {}
        for layer, piece in zip(self.layers, up.split(rows), strict=True):
            if (used := piece.any(0)).any():
                found[layer] = Factors(down[used], piece[:, used], scale)
        return found

    def join(self, parts: Mapping[Layer, Factors]) -> Factors:
        """Join the factors of diffusers' layers into the factors of the fused layer.

        If all layers have the same A, the factors are that A, and [s_1 B_1; s_2 B_2; ...]. Otherwise they are
        [A_1; A_2; ...], and a block-diagonal matrix of the s_i B_i. A layer that is missing from `parts` gets rows of
        zeros.
        """
        if len(self.layers) == 1:
            down, up, scale = parts[self.layers[0]]
            return Factors(down, torch.cat(up.chunk(2)[::-1]) if self.swapped else up, scale)
        given = [parts.get(layer) for layer in self.layers]
        first = next(factors for factors in given if factors)
        share = next(len(f.up) / width for f, width in zip(given, self.outputs, strict=True) if f)
        heights = [round(width * share) for width in self.outputs]
        scaled = [
            first.up.new_zeros(height, 0) if factors is None else factors.up * factors.scale
            for factors, height in zip(given, heights, strict=True)
        ]
        if all(factors is not None and torch.equal(factors.down, first.down) for factors in given):
            return Factors(first.down, torch.cat(scaled), 1.0)
        return Factors(torch.cat([f.down for f in given if f]), torch.block_diag(*scaled), 1.0)


def shaped(factors: Factors, inputs: Sequence[int]) -> Factors:
    """Reshape factors for a weight with these inputs: the columns or, for a convolution, channels and kernel size."""
    down, up, scale = factors
    return Factors(down.reshape(len(down), *inputs), up.reshape(*up.shape[:2], *[1] * (len(inputs) - 1)), scale)


def spelled(prefix: str, name: str) -> str:
    """Return a layer's name in a file: with a prefix that ends in an underscore, dots become underscores, too."""
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


@dataclass
class Names:
    """The layers of a family's denoiser and text encoders, and their names in all formats."""

    family: Family
    config: FrozenDict
    shapes: dict[str, torch.Size]
    """Shapes of the weights of the denoiser's linear layers and convolutions, by name in diffusers."""
    original: dict[str, Fused]
    """The denoiser's layers by their names in the model's own code, without prefix."""
    kohya: dict[str, Fused]
    """The denoiser's layers by their names in kohya's scripts, without prefix."""
    modules: frozenset[str]
    """The names of all modules of the denoiser."""
    exact: bool
    """Whether `shapes` are those of the model itself, and not those of its family's published model."""
    known: dict[str, Fused] = field(default_factory=dict)
    """The layers by every name that a file may use for them, with prefixes."""

    def __post_init__(self) -> None:
        self._know(self.kohya, "lora_unet_", "lycoris_")
        self._know(self.original, "diffusion_model.", "lora_unet_", PEFT_PREFIX, "")
        part = self.family.denoiser
        own = {name: Fused(((part, name),)) for name in self.shapes}
        self._know(own, f"{part}.", PEFT_PREFIX, "diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_", "")
        for part, (kohya, comfyui) in self.family.text_names.items():
            text = {name: Fused(((part, name),)) for name in text_layers()}
            short = {name.removeprefix("text_model."): fused for name, fused in text.items()}
            self._know(text | short, f"{part}.", f"{kohya}_", f"{comfyui}.")

    def _know(self, names: Mapping[str, Fused], *prefixes: str) -> None:
        for prefix in prefixes:
            for name, fused in names.items():
                self.known.setdefault(spelled(prefix, name), fused)

    def to_kohya(self, parts: Parts) -> dict[str, Factors]:
        """Return the layers by kohya's names; raises `InvalidArgument` for a layer without one."""
        return self._named(parts, "lora_unet_", self.kohya)

    def to_comfyui(self, parts: Parts) -> dict[str, Factors]:
        """Return the layers by ComfyUI's names, and text encoders' layers by kohya's; raises as `to_kohya`."""
        return self._named(parts, "diffusion_model.", self.original)

    def _named(self, parts: Parts, prefix: str, table: Mapping[str, Fused]) -> dict[str, Factors]:
        part, found = self.family.denoiser, {}
        layers = {(part, layer): factors for layer, factors in parts.get(part, {}).items()}
        left = dict(layers)
        for name, fused in table.items():
            if given := {layer: layers[layer] for layer in fused.layers if layer in layers}:
                found[spelled(prefix, name)] = fused.join(given)
                for layer in given:
                    left.pop(layer, None)
        if left:
            fix = "write it with --to diffusers or peft"
            raise InvalidArgument(".".join(next(iter(left))), "this format has no name for the layer", fix)
        for part, (kohya, _) in self.family.text_names.items():
            found |= {spelled(f"{kohya}_", name): factors for name, factors in parts.get(part, {}).items()}
        return found


def names_of(family: Family, config: Mapping | None = None) -> Names:
    """Return the names of a denoiser's layers, and of its family's text encoders, in all formats.

    `config`: configuration of the denoiser; None stands for the published denoiser of the family.
    """
    return _published(family) if config is None else _names_in(family, config, exact=True)


@functools.cache
def _published(family: Family) -> Names:
    return _names_in(family, family.published, exact=False)


def _names_in(family: Family, config: Mapping, exact: bool) -> Names:
    with torch.device("meta"):
        denoiser = family.denoiser_class.from_config(dict(config))
    modules = dict(denoiser.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    order = {template: number for number, template in enumerate(family.original)}
    swapped = {name for name in layers if isinstance(modules[name.rpartition(".")[0]], AdaLayerNormContinuous)}

    def fused_by_name(call: Callable[[FrozenDict, str], str | None]) -> dict[str, Fused]:
        """Return the layers that get the same name from `call`, by this name."""
        groups: dict[str, list[str]] = {}
        for name in layers:
            if (given := call(denoiser.config, name)) is not None:
                groups.setdefault(given, []).append(name)
        return {given: fused(given, members) for given, members in groups.items()}

    def fused(given: str, members: list[str]) -> Fused:
        """Return the `Fused` layer of the layers `members`, which share the name `given`."""
        members = sorted(members, key=lambda name: order.get(numbered(name)[0], 0))
        outputs = tuple(layers[name].weight.shape[0] for name in members)
        turned = given != members[0] and members[0] in swapped
        return Fused(tuple((family.denoiser, name) for name in members), outputs, turned)

    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    original, kohya = fused_by_name(family.original_name), fused_by_name(family.kohya_name)
    return Names(family, denoiser.config, shapes, original, kohya, frozenset(modules), exact)


@functools.cache
def text_layers() -> tuple[str, ...]:
    """Return the names of the linear layers of CLIP's and T5's text encoders in LoRA files, for any depth."""
    deep, small = DEEPEST_TEXT_ENCODER, {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    clip = CLIPTextConfig(**small, num_hidden_layers=deep, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    t5 = T5Config(**small, num_layers=deep, d_model=8, d_kv=4, d_ff=8, num_heads=2, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        encoders = CLIPTextModelWithProjection(clip), T5EncoderModel(t5)
    return tuple(name for model in encoders for name, module in model.named_modules() if isinstance(module, nn.Linear))
