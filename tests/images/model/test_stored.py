"""A denoiser whose weights stay in its files computes, traces and merges like one in memory."""

from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from live_tensors import reads_at_a_time
from peft import LoraConfig
from pipelines import FAMILIES

import reslora
from reslora.images.model import stored
from reslora.images.model.families import load_family
from reslora.images.model.families.base import Conditions, Family
from reslora.images.model.kinds import read_index
from reslora.images.model.stored import Stored, StoredLinear, empty_model, load_exact, stays_stored, stored_weights

HERE = torch.device("cpu")


@pytest.fixture(scope="module", params=["stable_diffusion", "z_image"])
def base(request, tmp_path_factory) -> tuple[Family, Path]:
    """A family, and the folder of its denoiser with weights in bf16, in several files."""
    pipeline = FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")
    family = load_family(read_index(pipeline, "")["_class_name"])
    denoiser = family.denoiser_class.from_pretrained(pipeline, subfolder=family.denoiser)
    folder = tmp_path_factory.mktemp("base")
    denoiser.bfloat16().save_pretrained(folder, max_shard_size="50KB")
    return family, folder


@pytest.fixture
def both(base, monkeypatch) -> tuple[ModelMixin, ModelMixin]:
    """The denoiser in memory, and the one that reads its files."""
    kind, folder = base[0].denoiser_class, base[1]
    whole = kind.from_pretrained(folder).requires_grad_(False)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    return whole, load_exact(kind, folder, HERE)


def inputs_of(family: Family, denoiser: ModelMixin) -> dict:
    random = torch.Generator().manual_seed(1)
    noisy, states = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 8, 16, generator=random)
    text = {"states": list(states) if family.name == "z_image" else states}
    return family.denoiser_inputs(denoiser.config, noisy, torch.tensor([100, 700]), Conditions(text, torch.zeros(2, 6)))


@torch.no_grad()
def output_of(family: Family, denoiser: ModelMixin) -> torch.Tensor:
    output = denoiser.eval()(**inputs_of(family, denoiser), return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


def test_it_computes_what_the_one_in_memory_does_and_holds_no_weight_of_a_block(base, both):
    whole, files = both
    layers = [module for module in files.modules() if isinstance(module, StoredLinear)]
    assert torch.equal(output_of(base[0], files), output_of(base[0], whole))
    in_files = sum(layer.in_features * layer.out_features for layer in layers)
    assert sum(value.numel() for value in whole.parameters()) == in_files + sum(v.numel() for v in files.parameters())
    assert len(layers) > 12 and files.dtype == torch.float32
    assert dict(files.config) | {"_name_or_path": ""} == dict(whole.config) | {"_name_or_path": ""}


def test_its_weights_are_gone_when_they_are_used(base, both, monkeypatch):
    most = reads_at_a_time(monkeypatch)
    output_of(base[0], both[1])
    assert len(most) > 12 and max(most) == 1


@pytest.mark.exhaustive
def test_shortcuts_are_traced_without_reading_and_merged_alike(base, both, monkeypatch):
    family, found = base[0], []
    method = "lstsq" if family.name == "stable_diffusion" else "weights"  # which read inputs, and the frozen weights
    for denoiser in both:
        torch.manual_seed(0)
        targets = family.defaults["target_modules"]
        denoiser.add_adapter(LoraConfig(r=2, target_modules=list(targets) if len(targets) > 1 else targets[0]))
        with monkeypatch.context() as patch:
            patch.setattr(Stored, "read", None)
            assert reslora.chains(denoiser).links > 0
        reslora.connect(denoiser, reslora.ResLoraConfig("input"))
        for name, value in denoiser.named_parameters():
            if "lora_" in name:
                value.data = torch.randn(value.shape) * 0.1
        reslora.merge(denoiser, method, calibration=[inputs_of(family, denoiser)] if method == "lstsq" else None)
        found.append({name: value for name, value in denoiser.state_dict().items() if "lora_" in name})
    torch.testing.assert_close(found[0], found[1])


def test_a_gpu_gives_half_of_what_it_has_free(base, monkeypatch):
    empty, files = empty_model(base[0].denoiser_class, base[1]), stored_weights(base[1])
    size = sum(value.nbytes for value in empty.state_dict().values())
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    for free, stays in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert stays_stored(empty, files, torch.device("cuda", 0)) == stays
    assert stays_stored(empty, files, HERE)
