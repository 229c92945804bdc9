"""LoHa, LoKr and DoRA in LyCORIS's format: the tensors give PEFT's merged weights by the formulas, written out here."""

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

from reslora.lycoris import merged_weight, tensors_of, write_lycoris

LORA = {"r": 3, "lora_alpha": 2, "use_dora": True}
OTHER = {"r": 3, "alpha": 2}
LINEAR, CONVOLUTION = (lambda: nn.Linear(12, 8)), (lambda: nn.Conv2d(6, 8, 3))
CASES = {
    "LoHa": (peft.LoHaConfig, OTHER, LINEAR),
    "LoHa of a convolution": (peft.LoHaConfig, OTHER, CONVOLUTION),
    "LoKr": (peft.LoKrConfig, OTHER | {"decompose_factor": 2, "r": 2}, lambda: nn.Linear(24, 16)),
    "LoKr, both factors of low rank": (
        peft.LoKrConfig,
        OTHER | {"decompose_both": True, "decompose_factor": 6, "r": 1},
        lambda: nn.Linear(36, 36),
    ),
    "LoKr without low rank": (peft.LoKrConfig, OTHER, LINEAR),
    "LoKr of a convolution": (peft.LoKrConfig, OTHER | {"decompose_factor": 2, "r": 1}, CONVOLUTION),
    "LoKr of a convolution without low rank": (peft.LoKrConfig, OTHER | {"r": 8}, CONVOLUTION),
    "DoRA": (peft.LoraConfig, LORA, LINEAR),
    "DoRA of a convolution": (peft.LoraConfig, LORA, CONVOLUTION),
}


def adapted(name: str) -> nn.Module:
    """Return a layer with an adapter of random values in float64."""
    torch.manual_seed(0)
    kind, settings, layer = CASES[name]
    model = peft.get_peft_model(nn.Sequential(layer()), kind(target_modules=["0"], **settings)).double()
    found = model.base_model.model[0]
    for key, value in found.named_parameters():
        if not key.startswith("base_layer"):
            value.data = torch.rand_like(value) + 0.5  # magnitudes are positive
    return found


def by_hand(tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return LyCORIS's weight: Hadamard and Kronecker products as sums over indices, and the norm of each row."""
    t = {name: value.double() for name, value in tensors.items()}
    if "hada_w1_a" in t:
        scale = t["alpha"] / t["hada_w1_b"].shape[0]
        factors = (t[name] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
        return weight + scale * torch.einsum("or,ri,os,si->oi", *factors).reshape(weight.shape)
    if "lora_up.weight" in t:
        scale = t["alpha"] / t["lora_down.weight"].shape[0]
        up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1)
        rows = weight.flatten(1) + scale * torch.einsum("or,ri->oi", up, down)
        lengths = t["dora_scale"].flatten()
        return torch.stack([n * row / row.square().sum().sqrt() for n, row in zip(lengths, rows, strict=True)]).reshape(
            weight.shape
        )
    w1, w2 = (t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"] for name in ("lokr_w1", "lokr_w2"))
    low = [t[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in t]
    scale = t["alpha"] / low[0] if low else 1.0
    return weight + scale * torch.einsum("ab,cd...->acbd...", w1, w2).reshape(weight.shape)


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_give_pefts_merged_weight(name):
    layer = adapted(name)
    weight, tensors = layer.get_base_layer().weight.detach().clone(), tensors_of(layer)
    layer.merge()
    merged = layer.get_base_layer().weight.detach()
    assert (merged - weight).abs().max() > 0.1
    tolerance = 1e-6 if "LoHa" in name else 1e-12  # PEFT rounds LoHa's scale to float32
    torch.testing.assert_close(by_hand(tensors, weight), merged, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(merged_weight(tensors, weight), by_hand(tensors, weight), rtol=1e-12, atol=1e-12)


def test_the_cases_have_all_forms_of_lokr():
    keys = {name: set(tensors_of(adapted(name))) for name in CASES if name.startswith("LoKr")}
    low, high = {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2"}
    assert keys["LoKr"] == {"lokr_w1", "alpha"} | low == keys["LoKr of a convolution"]
    assert keys["LoKr, both factors of low rank"] == {"lokr_w1_a", "lokr_w1_b", "alpha"} | low
    assert keys["LoKr without low rank"] == {"lokr_w1", "alpha"} | high
    assert keys["LoKr of a convolution without low rank"] == {"lokr_w1", "alpha"} | high


def test_every_alpha_is_the_rank():
    """Programs apply another alpha differently: LyCORIS merges LoHa and LoKr with its square, ComfyUI ignores some."""
    assert {tensors_of(adapted(name))["alpha"].item() for name in CASES if "LoKr" not in name} == {3.0}


def test_another_alpha_multiplies_the_update():
    layer = adapted("LoHa")
    weight, tensors = layer.get_base_layer().weight.detach(), tensors_of(layer)
    update = merged_weight(tensors, weight) - weight
    doubled = merged_weight(tensors | {"alpha": 2 * tensors["alpha"]}, weight) - weight
    torch.testing.assert_close(doubled, 2 * update, rtol=1e-12, atol=1e-12)


def test_the_file_has_kohyas_header(tmp_path):
    write_lycoris(tmp_path / "x.safetensors", {"lora_unet_a": tensors_of(adapted("LoKr"))}, {"ss_seed": "3"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert keys == {f"lora_unet_a.{name}" for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")}
    assert metadata["ss_network_module"] == "lycoris.kohya" and metadata["ss_seed"] == "3"
    assert len(metadata["sshs_model_hash"]) == 64
