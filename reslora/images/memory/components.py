"""Modules of a pipeline without weights, with the same classes, shapes and dtypes as the loaded modules."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map

from ...errors import refused_as
from ..model.loading import Model
from ..model.quantising import pack
from .meta_tensors import Live, Stage, tensors_of

META = torch.device("meta")


def empty_denoiser(model: Model, dtype: torch.dtype, base_precision: str = "no", blocks_to_swap: int = 0) -> nn.Module:
    """Return the frozen denoiser on the meta device, quantized and swapped like the loaded one."""
    denoiser = cast(model.empty_denoiser(), dtype).requires_grad_(False)
    pack(denoiser, base_precision, META, blocks_to_swap)
    return denoiser


def empty_part(model: Model, name: str, dtype: torch.dtype) -> nn.Module | None:
    """Return the pipeline component `name`, frozen, on the meta device; None if it has no weights."""
    library, kind_name = model.index[name]
    kind = getattr(importlib.import_module(library), kind_name)
    if not issubclass(kind, nn.Module):
        return None
    folder: Path | str = model.folder / name
    flag, fix = model.flag, "repair the folder"
    if name == "vae" and model.vae:
        folder, flag, fix = model.vae, model.vae_flag, "check the name and the files"
    with refused_as(flag, fix), torch.device(META):
        if hasattr(kind, "config_class"):
            part = kind(kind.config_class.from_pretrained(folder))
        else:
            part = kind.from_config(kind.load_config(folder, cache_dir=model.cache_dir))
    return cast(part, dtype).requires_grad_(False).eval()


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a module to `dtype`, except modules that its class keeps in float32."""
    wide = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    nn.Module.to(module, dtype)
    for name, owner in module.named_modules():
        if any(part in wide for part in name.split(".")):
            nn.Module.to(owner, torch.float32)
    return module


def empty_pipeline(model: Model, dtype: torch.dtype, stage: Stage) -> DiffusionPipeline:
    """Return the pipeline without its denoiser, with its other models as fake tensors."""
    given = model.without()
    for name, kind in model.index.items():
        if name not in given and isinstance(kind, list) and isinstance(kind[0], str):
            part = empty_part(model, name, dtype)
            given |= {} if part is None else {name: stage.place(part)}
    with refused_as(model.flag, "repair the folder"):
        pipeline = model.family.pipeline.from_pretrained(model.folder, **given)
    model.complete(pipeline)
    return pipeline


def outline(model: Model) -> DiffusionPipeline:
    """Return a pipeline with only its scheduler and an autoencoder without weights, which determine valid sizes."""
    parts = {name for name, kind in model.index.items() if isinstance(kind, list) and isinstance(kind[0], str)}
    given = model.without(*parts - {"scheduler"}) | {"vae": empty_part(model, "vae", torch.float32)}
    with refused_as(model.flag, "repair the folder"):
        return model.family.pipeline.from_pretrained(model.folder, **given)


class Reader:
    """Makes text encoders run on fake tensors and return zeros in the shapes of one caption's text states.

    `peak`: the peak memory of their activations, in bytes, when each call encodes `at_once` captions.
    """

    def __init__(self, encoders: Iterable[nn.Module], stage: Stage, at_once: int) -> None:
        self.stage, self.at_once, self.peak = stage, at_once, 0
        for encoder in encoders:
            self._watch(encoder)

    def _watch(self, encoder: nn.Module) -> None:
        forward = encoder.forward

        def measured(*args: object, **kwargs: object) -> object:
            """Call the encoder with fake tensors for `at_once` captions, and record the peak of its memory."""
            with torch.no_grad(), self.stage.mode, Live(tensors_of(encoder)) as live:
                many, named = tree_map(self._repeated, (args, kwargs))
                result = forward(*many, **named)
                self.peak = max(self.peak, live.peak)
            return tree_map(self._first, result)

        encoder.forward = measured

    def _repeated(self, value: Any) -> Any:
        """Return a fake tensor for `at_once` captions, given a tensor for one caption; other values are unchanged."""
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or 1 not in value.shape[:2]:
            return value
        axis = value.shape.index(1)
        return self.stage.empty(*value.shape[:axis], self.at_once, *value.shape[axis + 1 :], dtype=value.dtype)

    def _first(self, value: Any) -> Any:
        """Return zeros in the shape of the first caption's output; values other than tensors are unchanged."""
        if not isinstance(value, torch.Tensor):
            return value
        many = value.dim() > 1 and value.shape[0] == self.at_once
        shape = (1, *value.shape[1:]) if many else value.shape
        return torch.zeros((), dtype=value.dtype, device=self.stage.device).expand(shape)
