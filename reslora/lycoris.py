"""LoHa, LoKr and DoRA layers in LyCORIS's format, which ComfyUI, Forge and kohya's scripts read.

The tensors of a layer (of LyCORIS 4.1), and the weight that programs compute from them and the frozen weight W:

| method | tensors | weight |
|---|---|---|
| LoHa | `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b` | W + s (w1_a w1_b) * (w2_a w2_b), elementwise |
| LoKr | `lokr_w1`, or `lokr_w1_a` and `lokr_w1_b` with w1 = w1_a w1_b; w2 alike | W + s kron(w1, w2) |
| DoRA | `lora_down.weight`, `lora_up.weight`, `dora_scale` | V dora_scale / |V| by rows, V = W + s up down |

s is `alpha` / rank. LyCORIS multiplies by s twice when it merges LoHa and LoKr, and programs ignore the alpha of LoKr
without low-rank factors. So `alpha` is written as the rank here, and the first factor contains the scale.
"""

import os
from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from .export import tensors_hash
from .io import write_tensors

Tensors = Mapping[str, torch.Tensor]


@torch.no_grad()
def tensors_of(layer: BaseTunerLayer, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Return the tensors of a LoHa, LoKr or DoRA layer by LyCORIS's names; the scale is in the first factor."""
    if isinstance(layer, LoraLayer):
        dims = layer.get_base_layer().weight.dim() - 1
        found = {
            "lora_up.weight": layer.lora_B[adapter_name].weight,
            "lora_down.weight": layer.lora_A[adapter_name].weight,
            "dora_scale": layer.lora_magnitude_vector[adapter_name].weight.reshape(-1, *[1] * dims),
        }
    else:
        factors = {name: getattr(layer, name) for name in layer.adapter_layer_names}
        found = {name: values[adapter_name] for name, values in factors.items() if adapter_name in values}
    first = next(iter(found))
    found[first] = found[first] * layer.scaling[adapter_name]
    return found | {"alpha": torch.tensor(float(layer.r[adapter_name]))}


@torch.no_grad()
def merged_weight(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight that programs compute from a layer's tensors and its frozen weight; see the module."""
    found = {name.removesuffix(".weight"): value.to(weight) for name, value in tensors.items()}
    update, rank = _update(found)
    scale = found["alpha"] / rank if rank else 1.0
    value = weight + scale * update.reshape(weight.shape)
    if "dora_scale" in found:
        value *= found["dora_scale"] / value.flatten(1).norm(dim=1).reshape(found["dora_scale"].shape)
    return value


def _update(found: Tensors) -> tuple[torch.Tensor, int]:
    """Return the update without scale, and the rank: 0 if no factor has low rank."""
    if "lora_up" in found:
        down = found["lora_down"].flatten(1)
        return found["lora_up"].flatten(1) @ down, len(down)
    if "hada_w1_a" in found:
        first, second = (found[f"hada_w{number}_a"] @ found[f"hada_w{number}_b"] for number in (1, 2))
        return first * second, len(found["hada_w1_b"])
    ranks = [len(value) for name, value in found.items() if name.endswith("_b")]
    w1, w2 = (
        found[name] if name in found else found[f"{name}_a"] @ found[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2), max(ranks, default=0)


def write_lycoris(path: str | os.PathLike, layers: Mapping[str, Tensors], metadata: Mapping[str, str]) -> None:
    """Write the tensors of each layer, by the layer's name in the file, with strings for the file's header."""
    tensors = {f"{layer}.{name}": value for layer, found in layers.items() for name, value in found.items()}
    header = {"format": "pt", "ss_network_module": "lycoris.kohya", "sshs_model_hash": tensors_hash(tensors)}
    write_tensors(path, tensors, header | dict(metadata))
