"""Merged weights written tensor by tensor equal those that diffusers writes of the model in memory."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from live_tensors import reads_at_a_time
from peft import LoraConfig, OFTConfig, PeftConfig

from reslora.export import export_merged
from reslora.images.model.stored import StoredLinear, stored_weights
from reslora.images.output import merged_weights
from reslora.images.output.merged_weights import write_merged


@pytest.fixture
def unet(model) -> UNet2DConditionModel:
    """A U-Net with a LoRA of linear layers and convolutions."""
    return with_adapter(model, LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False))


def with_adapter(model: Path, config: PeftConfig) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    torch.manual_seed(0)
    unet.add_adapter(config)
    return unet


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_bytes_as_from_memory(unet, model, tmp_path):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    export_merged(unet, tmp_path / "memory")
    write_merged(unet, tmp_path / "files", stored_weights(model / "unet"))
    assert content(tmp_path / "files") == content(tmp_path / "memory")
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["to_q", "to_out.0"], init_lora_weights=False),
        LoraConfig(r=2, lora_bias=True, target_modules=["to_out.0"], init_lora_weights=False),
        OFTConfig(oft_block_size=4, target_modules=["to_q", "to_out.0"], init_weights=False),
    ],
    ids=["dora", "bias", "oft"],
)
def test_so_it_is_where_the_update_is_no_sum(config, model, tmp_path):
    unet, weights = with_adapter(model, config), stored_weights(model / "unet")
    export_merged(unet, tmp_path / "memory")
    write_merged(unet, tmp_path / "files", weights)
    assert content(tmp_path / "files") == content(tmp_path / "memory")
    # As a large one is loaded: its linear layers have no weights of their own.
    for name, layer in list(unet.named_modules()):
        if name.endswith("base_layer"):
            found = weights[name.removesuffix("base_layer") + "weight"]
            unet.get_submodule(name.rpartition(".")[0]).base_layer = StoredLinear(layer, found, torch.device("cpu"))
    write_merged(unet, tmp_path / "again", weights)
    assert content(tmp_path / "again") == content(tmp_path / "memory")


def test_of_a_base_in_memory_only_the_adapter_is_read(unet, model, tmp_path):
    export_merged(unet, tmp_path / "memory")
    for name, value in unet.named_parameters():
        if "lora_" not in name:
            value.data.fill_(torch.nan)
    write_merged(unet, tmp_path / "files", stored_weights(model / "unet"))
    assert content(tmp_path / "files") == content(tmp_path / "memory")


def test_the_same_shards(unet, model, tmp_path, monkeypatch):
    monkeypatch.setattr(merged_weights, "LARGEST_FILE", "100KB")
    export_merged(unet, tmp_path / "memory")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "memory")
    plain.save_pretrained(tmp_path / "memory", max_shard_size="100KB")
    write_merged(unet, tmp_path / "files", stored_weights(model / "unet"))
    found, expected = content(tmp_path / "files"), content(tmp_path / "memory")
    assert len(found) > 4 and {name for name in expected if "-of-" in name} == {
        name for name in found if "-of-" in name
    }
    assert all(found[name] == expected[name] for name in found if "-of-" in name)
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert json.loads(found[index]) == json.loads(expected[index])


def test_one_weight_of_the_base_is_in_memory_at_a_time(unet, model, tmp_path, monkeypatch):
    most = reads_at_a_time(monkeypatch)
    write_merged(unet, tmp_path / "files", stored_weights(model / "unet"))
    assert len(most) > 12 and max(most) <= 2  # the one before goes when the next is there
