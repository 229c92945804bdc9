"""--assistant_lora: training as on a base with the LoRA fused; samples, merges and exports as without it."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel

from images.model.lora_files.loras import names, random_factors, random_lora, tiny, update
from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main, only, printed, refused, without
from images.test_initial_lora import predicted, some_lora
from reslora.config import ResLoraConfig
from reslora.export import Factors, write_diffusers, write_kohya
from reslora.images.model.assistant import add_assistant, without_assistant
from reslora.images.model.quantising import pack
from reslora.methods.adapters import attach
from reslora.methods.registry import AdapterSettings, adapter_config

CPU = torch.device("cpu")
add = partial(add_assistant, dtype=torch.float64, device=CPU)


def small(lora: dict[str, Factors]) -> dict[str, Factors]:
    return {name: Factors(0.3 * f.down, f.up, f.scale) for name, f in lora.items()}


def assistant() -> dict[str, Factors]:
    """A LoRA of attention, feed-forward and time layers and of convolutions, one of them with a stride."""
    parts = ("attn", "ff.", "conv_in", "downsamplers", "time_emb")
    return small(random_lora("stable_diffusion", lambda name: any(part in name for part in parts))["unet"])


def base() -> torch.nn.Module:
    return UNet2DConditionModel.from_pretrained(tiny("stable_diffusion") / "unet").requires_grad_(False)


@torch.no_grad()
def fuse(unet: torch.nn.Module, layers: dict[str, Factors]) -> torch.nn.Module:
    """Replace W by `W + s B A` in the base, by the formula."""
    for name, factors in layers.items():
        weight = unet.get_submodule(name).weight
        weight += update(factors).reshape(weight.shape).to(weight)
    return unet


def test_predictions_and_gradients_are_those_of_a_base_with_it_fused():
    layers, found = assistant(), []
    assert any(f.down.dim() == 4 and f.down.shape[-1] == 3 for f in layers.values())
    plain = predicted(base().double().eval())
    for fused in (False, True):
        unet = base().double()
        unet = fuse(unet, layers) if fused else unet
        if not fused:
            add(unet, layers)
            with without_assistant(unet):
                assert torch.equal(predicted(unet.eval()), plain)
        torch.manual_seed(0)
        config = adapter_config("reslora", AdapterSettings(2, 4, 0.0, ["to_q", "to_k"], 10))
        attach(unet, config, ResLoraConfig("middle", 2), in_place=True)
        unet.double().train()
        draws = torch.Generator().manual_seed(1)
        trained = [p for p in unet.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
        with torch.enable_grad():
            output = predicted.__wrapped__(unet)
            output.square().mean().backward()
        found.append([output.detach(), *(parameter.grad for parameter in trained)])
    assert (found[0][0] - plain).abs().max() > 1e-2 and len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_weights_stay_as_they_are_and_may_be_packed():
    layers, unet, fused = assistant(), base(), base()
    for one in (unet, fused):
        pack(one, "int8", CPU)
    for name in layers:  # what a packed layer stands for, and the assistant in full precision
        owner, layer = name.rpartition(".")[0], fused.get_submodule(name)
        if hasattr(layer, "codes"):
            whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            whole.weight.data, whole.bias = layer.weight.clone(), layer.bias
            setattr(fused.get_submodule(owner), name.rpartition(".")[2], whole)
    fuse(fused, layers)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    add_assistant(unet, layers, torch.float32, CPU)
    after = {name: value for name, value in unet.state_dict().items() if "assistant_" not in name}
    assert_same(after, before)
    found, expected = predicted32(unet), predicted32(fused)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in unet.parameters())


@torch.no_grad()
def predicted32(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return unet.eval()(sample, torch.tensor([3, 700]), states).sample


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("assistant") / "assistant.safetensors"
    write_diffusers(path, {"unet": small(some_lora()["unet"])})
    return path


@pytest.fixture(scope="module")
def flags(data) -> list:
    return [
        *("--pretrained_model_name_or_path", tiny("stable_diffusion"), "--train_data_dir", data, "--resolution", "32"),
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--train_batch_size", "2", "--rank", "4"),
        *("--validation_prompt", "red disc", "--num_validation_images", "1", "--validation_steps", "2"),
        *("--num_inference_steps", "2", "--learning_rate", "1e-2", "--validation_split", "0.3", "--method", "reslora"),
        *("--merge_calibration_samples", "4", "--report_to", "none", "--mixed_precision", "no"),
    ]


@pytest.fixture(scope="module")
def run(flags, file, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    lines = printed(*flags, "--assistant_lora", file, "--output_dir", output)
    assert only(lines, f"--assistant_lora {file}: ", "active in training only")
    return output


@pytest.mark.exhaustive
def test_losses_are_those_of_a_fused_base_and_samples_those_of_the_base(run, flags, tmp_path):
    model = shutil.copytree(tiny("stable_diffusion"), tmp_path / "fused")
    fuse(base(), small(some_lora()["unet"])).save_pretrained(model / "unet")
    assert main(*flags[2:], flags[0], model, "--output_dir", tmp_path / "on") == 0
    found, fused = losses(run), losses(tmp_path / "on")
    assert [row[:2] for row in found] == [row[:2] for row in fused]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in fused], rel=1e-3)  # training and validation
    assert main(*flags, "--output_dir", tmp_path / "plain") == 0
    assert losses(tmp_path / "plain")[0][2] != pytest.approx(found[0][2], rel=1e-3)
    first, plain, on = (
        folder / "reslora/samples/step-000000/0-0.png" for folder in (run, tmp_path / "plain", tmp_path / "on")
    )
    assert first.read_bytes() == plain.read_bytes() != on.read_bytes()


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one_and_another_assistant_is_refused(run, flags, file, tmp_path, capsys):
    whole = shutil.copytree(run, tmp_path / "whole")
    killed_after(2, whole, tmp_path / "parts")
    words = [*flags, "--assistant_lora", file, "--output_dir", tmp_path / "parts", *RESUME]
    assert main(*words) == 0
    assert losses(tmp_path / "parts") == losses(run)
    assert_same(final_weights(tmp_path / "parts"), final_weights(run))
    parts = some_lora()
    parts["unet"]["conv_in"].up.mul_(2)
    write_kohya(tmp_path / "other.safetensors", names("stable_diffusion").to_kohya(parts))
    more = ["--output_dir", run, *RESUME]
    line = refused(capsys, *flags, "--assistant_lora", tmp_path / "other.safetensors", *more, quiet=False)
    assert "--assistant_lora" in line and "was trained with another LoRA" in line
    line = refused(capsys, *flags, *more, quiet=False)
    assert "--assistant_lora: " in line and "was trained with another LoRA" in line
    assert json.loads((run / "config.json").read_text())["assistant_lora"] == str(file)


def test_refusals(flags, file, capsys, tmp_path):
    words = [*flags, "--output_dir", tmp_path / "out"]
    line = refused(capsys, *words, "--assistant_lora", "nowhere.safetensors")
    assert "--assistant_lora nowhere.safetensors: no such file or folder" in line
    several = [*without(words, "--learning_rate"), "--learning_rate", "1e-3", "2e-3", "--assistant_lora", file]
    line = refused(capsys, *without(several, "--validation_split"))
    assert "--assistant_lora: this is an experiment; leave it out: " in line
    parts = some_lora() | {"text_encoder": {"text_model.encoder.layers.0.mlp.fc1": random_factors((32, 16), 2, 1.0, 0)}}
    write_diffusers(tmp_path / "text.safetensors", parts)
    line = refused(capsys, *words, "--assistant_lora", tmp_path / "text.safetensors")
    assert "layers of text_encoder, and only the denoiser can have an assistant" in line
    assert "and give --assistant_lora FOLDER" in line
