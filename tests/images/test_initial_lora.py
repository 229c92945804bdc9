"""--init_lora: training starts from a LoRA. Before the first step, the output is that of base plus LoRA."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from images.model.lora_files.loras import names, random_factors, random_lora, read, tiny, update
from images.runs import RESUME, assert_same, final_weights, main, refused, without
from reslora.export import Factors, write_diffusers, write_kohya, write_peft
from reslora.images.initial_lora import add_adapter, config_of, expression_of, read_start, with_start
from reslora.images.model.families import load_family
from reslora.images.model.loading import Model
from reslora.options.images import Options

STARTS = [("lora", "kohya.safetensors"), ("lora", "peft"), ("lora", "diffusers.safetensors")]
STARTS += [("lora_x2", "kohya.safetensors"), ("reslora", "kohya.safetensors")]


def some_lora() -> dict[str, dict[str, Factors]]:
    """Return a small float32 LoRA of attention layers and one convolution, with two ranks and two scales."""
    found = random_lora("stable_diffusion", lambda name: ".attn" in name or name == "conv_in")["unet"]
    return {"unet": {name: Factors(0.1 * f.down.float(), f.up.float(), f.scale) for name, f in found.items()}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write one LoRA in every tool's format."""
    folder, parts = tmp_path_factory.mktemp("loras"), some_lora()
    write_diffusers(folder / "diffusers.safetensors", parts)
    write_kohya(folder / "kohya.safetensors", names("stable_diffusion").to_kohya(parts))
    write_peft(folder / "peft", parts["unet"])
    return folder


def started(path, method: str) -> torch.nn.Module:
    """Return the tiny U-Net in float64 with the adapter that a run trains."""
    flags = Options.of(
        init_lora=str(path), rank=None, lora_alpha=None, target_modules=None, lora_dropout=0.0, seed=0,
        rank_pattern=None, alpha_pattern=None,
        shortcut="none", pre_num=4, head="repeat",
    )  # fmt: skip
    model = Model(tiny("stable_diffusion"), load_family("StableDiffusionPipeline"), "--model")
    start = read_start(str(path), str(tiny("stable_diffusion")), model)
    unet = UNet2DConditionModel.from_pretrained(tiny("stable_diffusion") / "unet")
    flags = with_start(flags, start)
    add_adapter(unet, method, flags.adapter, flags.training, config_of(method, flags.adapter, 4, start=start))
    start.copy_to(unet)
    return unet.double().eval()


@torch.no_grad()
def predicted(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, states = (torch.randn(shape, generator=generator).double() for shape in ((2, 4, 8, 8), (2, 8, 16)))
    return unet(sample, torch.tensor([3, 700]), states).sample


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "file"), STARTS)
def test_the_first_output_is_that_of_the_base_plus_the_lora(files, method, file):
    unet = UNet2DConditionModel.from_pretrained(tiny("stable_diffusion") / "unet").double().eval()
    before = predicted(unet)
    for layer, factors in some_lora()["unet"].items():
        weight = unet.get_submodule(layer).weight
        weight.data += update(factors).reshape(weight.shape)
    wanted = predicted(unet)
    assert float((wanted - before).abs().max()) > 1e-2
    torch.testing.assert_close(predicted(started(files / file, method)), wanted, rtol=0, atol=1e-5)


def test_layers_ranks_and_alphas_are_the_files(files):
    """Doubled if the method doubles alpha."""
    unet = started(files / "peft", "lora_x2")
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert layers.keys() == some_lora()["unet"].keys()
    for name, factors in some_lora()["unet"].items():
        assert layers[name].r["default"] == factors.rank
        assert layers[name].lora_alpha["default"] == pytest.approx(2 * factors.scale * factors.rank)
        assert layers[name].scaling["default"] == pytest.approx(2 * factors.scale)


@pytest.mark.parametrize(
    ("wanted", "every"),
    [
        (["a.0.to_q", "a.1.to_q"], ["a.0.to_q", "a.1.to_q", "a.0.to_k", "b.a.0.to_q"]),
        (["out", "x.to_out.0"], ["out", "x.out", "x.to_out.0", "x.to_out.1"]),
    ],
)
def test_the_expression_fits_these_layers_alone(wanted, every):
    assert [name for name in every if re.fullmatch(expression_of(wanted, every), name)] == wanted


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(data, files):
    """Flags for two steps of LoRA from a kohya file, for the pipeline with its layers."""
    return [
        *("--pretrained_model_name_or_path", str(tiny("stable_diffusion")), "--train_data_dir", str(data)),
        *("--resolution", "32", "--train_batch_size", "2", "--learning_rate", "1e-3", "--report_to", "none"),
        *("--method", "lora", "--max_train_steps", "2", "--checkpointing_steps", "1", "--num_validation_images", "0"),
        *("--num_inference_steps", "1", "--init_lora", str(files / "kohya.safetensors")),
    ]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert main(*flags, "--output_dir", output) == 0
    return output


@pytest.mark.exhaustive
def test_training_goes_on_from_the_file(run, files):
    """Adam changes each number by at most the learning rate per step; a fresh adapter would be far from the file."""
    found = final_weights(run, "lora", 2)
    parts = some_lora()["unet"]
    assert found.keys() == {f"{name}.lora_{letter}.default.weight" for name in parts for letter in "AB"}
    for name, factors in parts.items():
        moved = found[f"{name}.lora_A.default.weight"] - factors.down
        assert 0 < float(moved.abs().max()) < 5e-3
    assert read(run / "lora", names("stable_diffusion")).keys() == {f"unet.{name}" for name in parts}
    config = json.loads((run / "config.json").read_text())
    assert config["rank"] == 2 and config["init_lora"] == str(files / "kohya.safetensors")


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one(run, flags, files, tmp_path, monkeypatch):
    """By its own configuration, from any folder: it contains the file's path, layers, rank and alpha."""
    first = [*without(without(flags, "--max_train_steps"), "--init_lora"), "--output_dir", tmp_path / "out"]
    monkeypatch.chdir(files)
    assert main(*first, "--max_train_steps", 1, "--init_lora", "kohya.safetensors") == 0
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "out" / "config.json"
    assert main("--config", config, "--max_train_steps", 2, *RESUME) == 0
    assert_same(final_weights(tmp_path / "out", "lora", 2), final_weights(run, "lora", 2))


@pytest.mark.exhaustive
def test_another_lora_or_none_does_not_go_on(run, flags, files, capsys, tmp_path):
    parts = some_lora()
    parts["unet"]["conv_in"].up.mul_(2)
    write_kohya(tmp_path / "other.safetensors", names("stable_diffusion").to_kohya(parts))
    more = ["--output_dir", run, *RESUME]
    other = [*without(flags, "--init_lora"), "--init_lora", tmp_path / "other.safetensors"]
    line = refused(capsys, *other, *more)
    assert "other.safetensors" in line and "was started from another LoRA" in line
    own = json.loads((run / "config.json").read_text())
    same = ["--rank", own["rank"], "--lora_alpha", own["lora_alpha"], "--target_modules", *own["target_modules"]]
    assert "--init_lora: " in refused(capsys, *without(flags, "--init_lora"), *same, *more)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--rank 3", "--rank 3: --init_lora has 2"),
        ("--rank 2 3 --learning_rate 1e-3 2e-3", "--rank 2 3: --init_lora has ranks of its own"),
        ("--lora_alpha 9", "--lora_alpha 9: --init_lora has"),
        ("--target_modules to_q", "--target_modules to_q: its layers are others"),
        ("--method adalora", "--method adalora has no plain LoRA weights"),
        ("--method lora loha", "--method loha has no plain LoRA weights"),
        ("--method lokr", "--method lokr has no plain LoRA weights"),
        *((f"--method reslora --shortcut {name}", f"with --shortcut {name}") for name in ("input", "block", "middle")),
        ("--init_lora nowhere.safetensors", "--init_lora nowhere.safetensors: no such file or folder"),
    ],
)
def test_what_does_not_go_with_it_is_refused(more, words, flags, capsys, tmp_path):
    assert words in refused(capsys, *flags, *more.split(), "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_with_alpha_0_is_refused(flags, capsys, tmp_path):
    """Its scale is 0, so neither its B nor its A would ever change."""
    parts = some_lora()
    parts["unet"]["conv_in"] = parts["unet"]["conv_in"]._replace(scale=0.0)
    write_peft(tmp_path / "peft", parts["unet"])
    line = refused(capsys, *flags, "--init_lora", tmp_path / "peft", "--output_dir", tmp_path / "out")
    assert f"--init_lora {tmp_path / 'peft'}: conv_in has alpha 0" in line


def test_only_the_files_that_are_read_are_hashed(tmp_path):
    """The folder may be a run's, with checkpoints and samples."""
    write_peft(tmp_path, some_lora()["unet"])
    model = Model(tiny("stable_diffusion"), load_family("StableDiffusionPipeline"), "--model")
    marks = []
    for name in ("notes.txt", "adapter_config.json"):
        marks.append(read_start(str(tmp_path), str(tiny("stable_diffusion")), model).mark)
        with (tmp_path / name).open("a") as file:
            file.write("\n")
    marks.append(read_start(str(tmp_path), str(tiny("stable_diffusion")), model).mark)
    assert marks[0] == marks[1] != marks[2]


def test_a_lora_of_text_encoders_or_another_family_is_refused(flags, capsys, tmp_path):
    parts = some_lora() | {"text_encoder": {"text_model.encoder.layers.0.mlp.fc1": random_factors((32, 16), 2, 1.0, 0)}}
    write_diffusers(tmp_path / "text.safetensors", parts)
    write_diffusers(tmp_path / "flux.safetensors", random_lora("flux", lambda name: "attn" in name))
    for name, words in (
        ("text", "layers of text_encoder, and only the denoiser can start from a LoRA"),
        ("flux", "is not a layer of"),
    ):
        given = ["--init_lora", tmp_path / f"{name}.safetensors", "--output_dir", tmp_path / "out"]
        assert words in refused(capsys, *flags, *given)
