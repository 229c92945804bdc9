"""Adapters that are not in PEFT: a module for each adapted layer, whose output is added to that of the layer.

class Mine(nn.Module):                                 # an `Update`; its parameters are trained and saved
    def forward(self, x): ...                          # what is added to the layer's output for the input x
    def delta(self): ...                               # the same as a change of the layer's weight, for merging

def mine(model, settings):                             # --method my_module:mine
    return {name: Mine(layer, settings.r) for name, layer in layers(model, settings).items()}

Such a layer is one of PEFT's layers, so that checkpoints, merged weights and PEFT's conversion to LoRA work as for all
of PEFT's tuners.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import speaks
from ..linking import base_model
from ..tracing import evaluating
from .controls import DEFAULT
from .targets import targeted


class Update(Protocol):
    """The change of a linear layer: a `torch.nn.Module` with one function more.

    Modules may share parameters. Updates whose `forward` depends on more than the input, such as the timestep, are
    exported as the constant change that `delta` returns.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to the layer's output; `x`: the input of the layer, of shape (..., inputs)."""

    def delta(self) -> torch.Tensor:
        """Return the change of the layer's weight, of shape (outputs, inputs): `forward(x) = x @ delta().T`."""


class UpdatesConfig(LoraConfig):
    """The configuration of an adapter made of updates.

    PEFT adds LoRA to these layers, freezes the model and adds `modules_to_save`; `put` replaces LoRA by the updates.
    """

    updates: Mapping[str, Any]


def layers(model: nn.Module, settings: Any) -> dict[str, nn.Module]:
    """Return the linear layers that --target_modules names, by name; `settings` are `AdapterSettings`."""
    config = LoraConfig(target_modules=settings.shared["target_modules"], modules_to_save=settings.modules_to_save)
    return {name: layer for name, layer in targeted(model, config) if isinstance(layer, (nn.Linear, Conv1D))}


def sides(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a linear layer."""
    rows, columns = cast(torch.Tensor, layer.weight).shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def config_of_updates(updates: Mapping[str, Any], model: nn.Module, settings: Any) -> UpdatesConfig:
    """Return the configuration of an adapter made of these updates, by the names of their layers in `model`.

    Raises `ValueError` for a layer that is no unquantized linear layer of the model, and for an update of another form.
    """
    known = dict(model.named_modules())
    for name, update in updates.items():
        layer = known.get(name)
        if not isinstance(layer, (nn.Linear, Conv1D)) or not layer.weight.is_floating_point():
            raise ValueError(f"{name!r} is no linear layer of {type(model).__name__} with unquantized weights")
        if not isinstance(update, nn.Module) or not callable(getattr(update, "delta", None)):
            raise ValueError(f"the update of {name} is {type(update).__name__}, not a torch.nn.Module with delta()")
        with torch.no_grad():
            found = tuple(update.delta().shape)
        if found != sides(layer):
            raise ValueError(f"delta() of {name} has the shape {found}, and the layer {sides(layer)}")
    if not updates:
        raise ValueError("it returned an empty dict, and nothing would be trained")
    targets = "|".join(map(re.escape, sorted(updates)))
    shared = settings.shared | {"target_modules": targets}
    config = UpdatesConfig(r=settings.r, **shared)
    config.updates = updates
    return config


def put(adapted: nn.Module, config: UpdatesConfig) -> None:
    """Replace PEFT's LoRA layers by layers with the updates of the configuration.

    Warns if an update is not zero, because training then does not begin at the base model.
    """
    base = base_model(adapted)
    for name, update in config.updates.items():
        with torch.no_grad():
            delta = update.delta()
        if not delta.is_meta and bool(delta.any()):
            warn_of_start(name)
        parent, _, last = name.rpartition(".")
        layer = cast(nn.Module, base.get_submodule(name).get_base_layer())
        setattr(base.get_submodule(parent), last, UpdatedLayer(layer, update.to(layer.weight.device)))
    del config.updates  # they are parts of the model now, and copies of the configuration need none


@cache
def warn_of_start(layer: str) -> None:
    """Print once that the update of a layer is not zero at the start."""
    if speaks():
        print(f"warning: the update of {layer} is not zero at the start: training begins at another model", flush=True)


def has_updates(model: nn.Module) -> bool:
    """Return whether the model's adapter is made of updates, so that PEFT has no format for it."""
    return isinstance(getattr(base_model(model), "peft_config", {}).get(DEFAULT), UpdatesConfig)


@torch.no_grad()
def delta_error(model: nn.Module) -> float:
    """Return the largest relative difference of an update's `forward` from its `delta`, for random inputs.

    0 for adapters that are not made of updates. A difference is expected if `forward` also depends on the timestep.
    """
    largest = 0.0
    for layer in base_model(model).modules():
        if isinstance(layer, UpdatedLayer):
            update = layer.update[DEFAULT]
            delta = update.delta()
            x = torch.randn(1, 8, delta.shape[1], generator=torch.Generator().manual_seed(0)).to(delta)
            with evaluating(update):
                found, expected = update(x), x @ delta.T
            difference, size = float((found - expected).norm()), float(expected.norm())
            largest = max(largest, difference / size if size else float(difference > 0))
    return largest


class UpdatedLayer(nn.Module, BaseTunerLayer):
    """A linear layer with an update, as one of PEFT's layers."""

    adapter_layer_names = ("update",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.update = base_layer, nn.ModuleDict({DEFAULT: update})
        self.merged_adapters: list[str] = []

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output plus the update."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        update = self.update[DEFAULT]
        dtype = next((value.dtype for value in update.parameters()), x.dtype)
        return result + update(x.to(dtype)).to(result.dtype)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return the change of the weight, in the weight's shape."""
        delta = self.update[adapter_name].delta()
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change to the layer's weight."""
        self._add(1)
        self.merged_adapters.append(DEFAULT)

    def unmerge(self) -> None:
        """Subtract the change from the layer's weight."""
        self._add(-1)
        self.merged_adapters.clear()

    @torch.no_grad()
    def _add(self, sign: int) -> None:
        weight = self.get_base_layer().weight
        weight.data += sign * self.get_delta_weight(DEFAULT).to(weight)

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Return that PEFT can convert the layer to LoRA."""
        return True
