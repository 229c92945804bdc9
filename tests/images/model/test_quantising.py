"""--base_precision and --blocks_to_swap: a quantized base computes with the dequantized weights.

Exports have the complete base.
"""

import dataclasses
import json
import shutil
import weakref
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from pipelines import FAMILIES
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reslora
from images.runs import RESUME, digests, main, only, printed, refused
from reslora.export import DIFFUSERS_FILE
from reslora.images.model import quantising, stored
from reslora.images.model.families import load_family
from reslora.images.model.families.base import Conditions, Family
from reslora.images.model.kinds import read_index
from reslora.images.model.loading import Model
from reslora.images.model.quantising import FORMATS, WHOLE, PackedLinear, blocks, pack
from reslora.methods.adapters import attach
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config

HERE = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
precisions = pytest.mark.parametrize("precision", FORMATS)
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # Dettmers et al., 2023


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny pipelines of each family, made when they are first requested."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = FAMILIES[family](tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Family, ModelMixin]:
    family = load_family(read_index(folder, "")["_class_name"])
    denoiser = family.denoiser_class.from_pretrained(folder, subfolder=family.denoiser, torch_dtype=dtype)
    return family, denoiser.requires_grad_(False)


def packed_layers(denoiser: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    return ((name, module) for name, module in denoiser.named_modules() if isinstance(module, PackedLinear))


def packed_and_by_hand(folder: Path, precision: str, dtype: torch.dtype = torch.float32):
    """A family, its denoiser with a quantized base, and a stock one with the dequantized weights."""
    (family, packed), (_, by_hand) = load(folder, dtype), load(folder, dtype)
    pack(packed, precision, HERE)
    for name, layer in packed_layers(packed):
        by_hand.get_submodule(name).weight.copy_(layer.weight)
    return family, packed, by_hand


def adapted(denoiser: ModelMixin, family: Family, method: str = "reslora", shortcut: str = "input") -> ModelMixin:
    targets = list(family.defaults["target_modules"])
    targets = targets[0] if len(targets) == 1 else targets
    config = adapter_config(method, AdapterSettings(r=3, alpha=6, dropout=0.0, targets=targets, total_steps=100))
    torch.manual_seed(0)
    shortcuts = reslora.ResLoraConfig(shortcut=shortcut, pre_num=4) if method == "reslora" else None
    return attach(denoiser, config, shortcuts)


def randomly_adapted(denoiser: ModelMixin, family: Family, *how: str) -> None:
    adapted(denoiser, family, *how)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 0.2 * torch.randn(parameter.shape)


def loss_and_gradients(denoiser: ModelMixin, family: Family) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=random).to(denoiser.dtype)
    states = torch.randn(2, 8, 16, generator=random).to(denoiser.dtype)
    text = {"states": list(states) if family.name == "z_image" else states}
    inputs = family.denoiser_inputs(
        denoiser.config, noisy, torch.tensor([100, 700]), Conditions(text, torch.zeros(2, 6))
    )
    output = family.prediction(denoiser.train()(**inputs, return_dict=False), noisy)
    loss = (output.float() - 1).square().mean()
    denoiser.zero_grad()
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in denoiser.named_parameters() if value.requires_grad}
    assert gradients and all(bool(value.abs().max() > 0) for value in gradients.values())
    return loss.detach(), gradients


# -- formats -----------------------------------------------------------------------------------------------------------


def packed(weight: torch.Tensor, precision: str) -> PackedLinear:
    linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return PackedLinear(linear.requires_grad_(False), FORMATS[precision], HERE)


def by_hand(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """Return weights as their nearest codes; the largest of a row, or of a block of 64, gets the largest code."""
    if precision == "nf4":
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        codes = torch.tensor(NF4)
        nearest = (blocks.div(largest)[..., None] - codes).abs().argmin(dim=-1)
        return (codes[nearest] * largest).view_as(weight)
    codes = torch.arange(-127.0, 128) if precision == "int8" else torch.arange(256).byte().view(torch.float8_e4m3fn)
    codes = codes.float()[codes.float().isfinite()]
    scales = weight.abs().amax(dim=1, keepdim=True) / codes.max()
    nearest = (weight.div(scales)[..., None] - codes).abs().argmin(dim=-1)
    return codes[nearest] * scales


@precisions
def test_weights_are_packed_as_by_hand(precision):
    torch.manual_seed(0)
    weight = torch.randn(6, 128) * torch.tensor([1e-3, 1e-2, 0.1, 1, 10, 1000])[:, None]
    torch.testing.assert_close(packed(weight, precision).weight, by_hand(weight, precision), rtol=1e-6, atol=0)


@precisions
def test_nothing_unpacked_waits_for_the_backward(precision):
    """Otherwise a quantized base would need more memory than a plain one."""
    layer, made = packed(torch.randn(8, 64), precision), []
    unpack = layer.unpacked
    layer.unpacked = lambda dtype: made.append(weakref.ref(weight := unpack(dtype))) or weight
    x = torch.randn(2, 3, 64, requires_grad=True)
    output = layer(x)
    assert len(made) == 1 and made[0]() is None
    output.sum().backward()
    assert len(made) == 2 and made[1]() is None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand_as(x))


# -- denoisers ---------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_of_the_blocks_are_packed_and_nothing_else(folders, family):
    _, plain = load(folders(family))
    _, denoiser = load(folders(family))
    pack(denoiser, "int8", HERE)
    around = ("embed", "time_", "norm_out", "proj_out", "final_layer", "time_guidance", "modulation")
    around += ("distilled_guidance",)  # of Chroma, its first and last layer
    around += ("img_in", "txt_in", "text_fusion")  # of the last, the projector; its blocks are packed
    linear = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    kept = {name for name, module in denoiser.named_modules() if type(module) is nn.Linear}
    assert {name for name, _ in packed_layers(denoiser)} == linear - kept
    assert all(any(word in name.split(".")[0] for word in around) for name in kept)
    assert len(kept) < 12 < len(linear - kept)
    for name, module in denoiser.named_modules():
        if not isinstance(module, PackedLinear):
            theirs = plain.get_submodule(name)._parameters
            assert all(
                torch.equal(value, theirs[key]) for key, value in module._parameters.items() if value is not None
            )
    assert denoiser.dtype == torch.float32


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "shortcut", "precision"),  # each with each but once: a packed layer knows neither family nor shortcut
    [
        ("stable_diffusion", "input", "fp8"),
        ("stable_diffusion", "block", "int8"),
        ("stable_diffusion", "middle", "nf4"),
        ("z_image", "input", "int8"),
        ("z_image", "block", "nf4"),
        ("z_image", "middle", "fp8"),
    ],
)
def test_loss_and_gradients_are_those_of_the_unpacked_weights(folders, family, shortcut, precision):
    family, denoiser, stock = packed_and_by_hand(folders(family), precision)
    for model in (denoiser, stock):
        randomly_adapted(model, family, "reslora", shortcut)
    expected = loss_and_gradients(stock, family)
    torch.testing.assert_close(loss_and_gradients(denoiser, family), expected, rtol=1e-4, atol=1e-7)
    reslora.enable_gradient_checkpointing(denoiser)
    torch.testing.assert_close(loss_and_gradients(denoiser, family), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("method", "precision"),
    list(zip([name for name in METHODS if name != "reslora"], cycle(FORMATS), strict=False)),
)
def test_other_adapters_train_on_it(folders, method, precision):
    family, denoiser, stock = packed_and_by_hand(folders("stable_diffusion"), precision)
    for model in (denoiser, stock):
        randomly_adapted(model, family, method)
    expected = loss_and_gradients(stock, family)
    torch.testing.assert_close(loss_and_gradients(denoiser, family), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.exhaustive
@precisions
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_merge_by_weights_reads_what_is_packed(folders, shortcut, precision):
    family, denoiser, stock = packed_and_by_hand(folders("z_image"), precision)
    alphas = []
    for model in (denoiser, stock):
        randomly_adapted(model, family, "reslora", shortcut)
        report = reslora.merge(model, method="weights")
        alphas.append([block.alpha for block in report.blocks])
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                assert layer.lora_A["default"].weight.dtype == torch.float32, name
    found, expected = map(torch.tensor, (flat(alphas[0]), flat(alphas[1])))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not found.allclose(torch.ones(()))


def flat(alphas: list) -> list[float]:
    return [value for alpha in alphas for value in (alpha if isinstance(alpha, list) else [alpha])]


# -- swapped blocks ----------------------------------------------------------------------------------------------------


class Apart(TorchDispatchMode):
    """A stand-in for a GPU's memory: codes of swapped layers may be copied to it, any other use fails."""

    def __init__(self, denoiser: nn.Module, monkeypatch) -> None:
        super().__init__()
        swapped = [layer for _, layer in packed_layers(denoiser) if "codes" in vars(layer)]
        assert swapped
        self.away = {layer.codes.untyped_storage().data_ptr() for layer in swapped}
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most, self.copies = 0, 0
        monkeypatch.setattr(quantising, "on_device", self.copy)

    def copy(self, codes: torch.Tensor, device: torch.device) -> torch.Tensor:
        if codes.untyped_storage().data_ptr() not in self.away:
            return codes
        self.alive.add(there := codes.clone())
        self.copies, self.most = self.copies + 1, max(self.most, len(self.alive))
        return there

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        used = {
            value.untyped_storage().data_ptr()
            for value in tree_leaves((args, kwargs or {}))
            if isinstance(value, torch.Tensor) and not value.is_meta
        }
        assert operation is torch.ops.aten.clone.default or not used & self.away, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.exhaustive
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "precision", "shortcut"),
    [("stable_diffusion", "no", "input"), ("z_image", "nf4", "block")],
)
def test_swapped_blocks_train_as_others_and_are_off_the_device_between_uses(
    folders, monkeypatch, family, precision, shortcut, checkpointing
):
    (family, here), (_, away) = load(folders(family)), load(folders(family))
    pack(here, precision, HERE)
    pack(away, precision, HERE, len(blocks(away)) - 1)
    for denoiser in (here, away):
        randomly_adapted(denoiser, family, "reslora", shortcut)
        if checkpointing:
            reslora.enable_gradient_checkpointing(denoiser)
    (loss, gradients), apart = loss_and_gradients(here, family), Apart(away, monkeypatch)
    after_forward = []
    monkeypatch.setattr(nn.Module, "zero_grad", lambda self: after_forward.append((len(apart.alive), apart.copies)))
    with apart:
        found, their_gradients = loss_and_gradients(away, family)
    torch.testing.assert_close(found, loss)  # swapped blocks run without gradients first: not bit for bit
    torch.testing.assert_close(their_gradients, gradients)
    assert apart.most == 1 and not apart.alive and after_forward[0][0] == 0
    assert apart.copies > after_forward[0][1] >= len(apart.away)  # the backward has fetched them again


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_blocks_to_swap(folders, family):
    _, plain = load(folders(family))
    _, denoiser = load(folders(family))
    names = blocks(plain)
    assert len(names) > 1 and all(
        isinstance(plain.get_submodule(name.rpartition(".")[0]), nn.ModuleList) for name in names
    )
    pack(denoiser, "no", HERE, 2)
    swapped = {name for name, _ in packed_layers(denoiser)}
    start = tuple(f"{name}." for name in names[:2])
    linear = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    assert swapped == {name for name in linear if name.startswith(start)}
    weights = {f"{name}.weight" for name in swapped}
    assert plain.state_dict().keys() - denoiser.state_dict().keys() == weights
    for name in swapped:
        assert torch.equal(denoiser.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_a_swapped_weight_stays_where_it_is_and_is_traced_without_a_copy(folders, monkeypatch):
    family, stock = load(folders("z_image"))
    _, denoiser = load(folders("z_image"))
    pack(denoiser, "no", HERE, len(blocks(denoiser)))
    _, layer = next(packed_layers(denoiser))
    before, codes = layer.weight.clone(), layer.codes
    for model in (denoiser, stock):
        adapted(model, family, "lora")
    with monkeypatch.context() as patch, Apart(denoiser, patch) as apart:
        patch.setattr(torch.Tensor, "__deepcopy__", lambda value, memo: pytest.fail("copied"))
        assert reslora.chains(denoiser) == reslora.chains(stock)
    assert apart.copies == 0
    denoiser.to(torch.bfloat16).to("meta")
    assert layer.codes is codes and torch.equal(codes, before) and layer.weight.is_meta


def test_what_waits_for_a_gpu_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: value + 1)
    layer = PackedLinear(nn.Linear(2, 2).requires_grad_(False), WHOLE, HERE)
    before = layer.weight.clone()
    layer.swap(torch.device("cuda"))
    assert torch.equal(layer.weight, before + 1)


# -- runs --------------------------------------------------------------------------------------------------------------


def flags_of(model: Path, data: Path, output: Path, *more) -> list:
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", output]
    flags += ["--resolution", 32, "--max_train_steps", 3, "--train_batch_size", 2, "--rank", 2, "--method", "reslora"]
    flags += ["--learning_rate", "0.05", "--num_validation_images", 1, "--num_inference_steps", 1]
    return [*flags, "--merge_calibration_samples", 2, "--report_to", "none", *more]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "precision"), [("stable_diffusion", "fp8"), ("z_image", "nf4")])
def test_a_run_exports_the_whole_base_and_the_update(folders, data, tmp_path, monkeypatch, family, precision):
    """For Z-Image as for a large model, whose weights stay in their files."""
    monkeypatch.setattr(stored, "IN_MEMORY", 0 if family == "z_image" else stored.IN_MEMORY)
    folder, out = folders(family), tmp_path / "out"
    more = ["--gradient_checkpointing", "--base_precision", precision]
    assert main(*flags_of(folder, data, out, *more)) == 0
    family, denoiser = load(folder)
    pack(denoiser, precision, HERE)
    packed_names = {name for name, _ in packed_layers(denoiser)}
    record = json.loads((out / "reslora" / "exports.json").read_text())["read_back"]
    assert set(record) == {DIFFUSERS_FILE, *family.lora_files, "peft", family.denoiser} and max(record.values()) < 1e-6
    lora = load_file(out / "reslora" / DIFFUSERS_FILE)
    base = load_file(folder / family.denoiser / WEIGHTS)
    merged = load_file(out / "reslora" / family.denoiser / WEIGHTS)
    assert base.keys() == merged.keys()
    changed = 0
    for name, value in base.items():
        key = f"{family.denoiser}.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in lora:
            changed += name.removesuffix(".weight") in packed_names
            value = value + lora[key.format("B")] @ lora[key.format("A")]
            assert not torch.equal(merged[name], base[name])
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert changed == len(lora) // 2


@pytest.mark.exhaustive
def test_a_run_goes_on_with_the_precision_it_had(folders, data, tmp_path, capsys):
    flags = flags_of(folders("z_image"), data, tmp_path / "out", "--method", "lora")
    assert main(*flags, "--base_precision", "int8") == 0
    capsys.readouterr()
    longer = [*flags, "--max_train_steps", 4, *RESUME]
    for other in (["--base_precision", "fp8"], []):
        line = refused(capsys, *longer, *other)
        assert f"--base_precision {other[1] if other else 'no'}: " in line and "was trained with int8" in line
    assert main(*longer, "--base_precision", "int8") == 0


@pytest.mark.exhaustive
def test_swapped_blocks_go_on_from_a_plain_run_and_write_the_same_bytes(folders, data, tmp_path, monkeypatch):
    """Merged weights too, if they are written from memory, as for a base whose files have other names."""
    monkeypatch.setattr(quantising, "on_device", lambda codes, device: codes.clone())  # as on a GPU
    monkeypatch.setattr(Model, "stored_denoiser", lambda model: {})
    plain, swapped = tmp_path / "plain", tmp_path / "swapped"
    more = ["--max_train_steps", 2, "--checkpointing_steps", 1, "--gradient_checkpointing", "--method", "lora"]
    assert main(*flags_of(folders("z_image"), data, plain, *more)) == 0
    shutil.copytree(plain / "lora" / "checkpoint-1", swapped / "lora" / "checkpoint-1")
    lines = printed(*flags_of(folders("z_image"), data, swapped, *more, *RESUME, "--blocks_to_swap", 2))
    assert "saves no memory" in only(lines, "--blocks_to_swap 2")
    written = digests(plain, "lora/**/*.safetensors")
    del written["lora/checkpoint-1/adapter.safetensors"]
    assert len(written) > 3 and written.items() <= digests(swapped, "lora/**/*.safetensors").items()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_device_that_cannot_is_refused_before_encoding(folders, data, tmp_path, capsys, monkeypatch):
    def fails(weight):
        raise NotImplementedError("no kernel for Float8_e4m3fn\nlong story")

    monkeypatch.setitem(FORMATS, "fp8", dataclasses.replace(FORMATS["fp8"], pack=fails))
    flags = flags_of(folders("stable_diffusion"), data, tmp_path / "out", "--base_precision", "fp8")
    line = refused(capsys, *flags, quiet=False)
    assert "--base_precision fp8: does not work on cpu here (no kernel for Float8_e4m3fn); give another" in line
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_more_blocks_than_there_are_are_refused(folders, data, tmp_path, capsys):
    line = refused(capsys, *flags_of(folders("z_image"), data, tmp_path / "out"), "--blocks_to_swap", 99, quiet=False)
    count = len(blocks(load(folders("z_image"))[1]))
    assert f"--blocks_to_swap 99: the transformer of z_image has {count} blocks; give {count} or fewer" in line


def test_a_compiler_that_would_keep_what_they_save_is_refused(folders, data, tmp_path, capsys):
    saving = ("--blocks_to_swap", "1")
    flags = flags_of(folders("z_image"), data, tmp_path / "out", "--shortcut", "block", "--compile", *saving)
    line = refused(capsys, *flags)
    assert "--compile: stores the complete weights for the backward pass" in line and saving[0] in line
    assert "add --gradient_checkpointing" in line and not (tmp_path / "out").exists()
