"""Add a plain LoRA to the layers of a model, in memory."""

from collections.abc import Mapping
from typing import TypeVar

from peft import inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from ....errors import InvalidArgument
from ....export import Factors, lora_config
from ....linking import lora_layers

T = TypeVar("T")


def in_names_of(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors by the names of the model's parameters.

    Names in CLIP's files begin with `text_model.`; in newer versions of transformers, parameter names do not.
    """
    flat = isinstance(model, PreTrainedModel) and not hasattr(model, "text_model")
    return {name.replace("text_model.", "", 1) if flat else name: value for name, value in tensors.items()}


def add_lora(model: nn.Module, layers: Mapping[str, Factors], strength: float) -> None:
    """Inject a plain LoRA into a model's layers.

    `layers`: factors by layer, of shapes (rank, in, *kernel) for `down` and (out, rank) for `up`. `strength` multiplies
    each layer's scale.
    """
    folded = {name: Factors(f.down, f.up * (f.scale * strength), 1.0) for name, f in layers.items()}
    folded = in_names_of(model, folded)
    inject_adapter_in_model(lora_config(folded), model)
    adapted = lora_layers(model, "default")
    for name, (down, up, _) in folded.items():
        layer = adapted[name]
        for matrix, value in ((layer.lora_A, down), (layer.lora_B, up)):
            matrix["default"].weight = nn.Parameter(value.to(layer.weight.device), requires_grad=False)


def check_fit(flag: str, part: str, model: nn.Module, layers: Mapping[str, Factors]) -> None:
    """Raise `InvalidArgument` for a layer that a model lacks or has in another shape.

    `flag`: the file, for the message. `part`: the model's name in the pipeline. The model may be on the meta device.
    """
    modules = dict(model.named_modules())
    for name, (down, up, _) in in_names_of(model, layers).items():
        weight, found = getattr(modules.get(name), "weight", None), (len(up), *down.shape[1:])
        if weight is None or weight.shape != found:
            has = "does not have it" if weight is None else f"has {' x '.join(map(str, weight.shape))}"
            problem = f"{part}.{name} is {' x '.join(map(str, found))}, and the model {has}"
            raise InvalidArgument(flag, problem, "give the model that it was made for")
