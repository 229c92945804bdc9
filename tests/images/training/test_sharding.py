"""FSDP2 on the CPU: a base sharded over two processes, with the results of one process."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from launching import forked, told_by
from PIL import Image
from safetensors.torch import load_file

from images import exact_steps
from images.runs import RESUME, SCRIPT, final_weights, losses, parts
from reslora.errors import InvalidArgument
from reslora.images.settings import parse_args
from reslora.training.sharding import cuts_base, share, take_plugin, units_of

from .sharded_steps import RUNS
from .test_training import assert_equal_but_for_rounding

CUT = told_by("fsdp2.yaml")


@pytest.fixture(scope="module")
def steps(model, tmp_path_factory) -> Path:
    """The state of both processes after each step of `RUNS`."""
    folder = tmp_path_factory.mktemp("steps")
    forked(Path(__file__).with_name("sharded_steps.py"), str(model), str(folder), folder=folder, environment=CUT)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RUNS)
def test_steps_on_a_cut_base_are_those_of_one_process(name, model, steps):
    first, second = (load_file(steps / f"{name}-{rank}.safetensors") for rank in (0, 1))
    whole = exact_steps.trained(model, 4, 1, *RUNS[name])
    for found in (first, second):
        assert found["processes"] == 2 and whole["processes"] == 1
        assert_equal_but_for_rounding(found, whole)
        assert 0.4 * whole["base"] < found["base"] < 0.6 * whole["base"]
    assert whole["base"] <= first["base"] + second["base"]


@pytest.fixture(scope="module")
def resumed(run, base_flags, tmp_path_factory) -> Path:
    """A run that one process began with the complete base, and that two with shards resumed from step 2."""
    folder = tmp_path_factory.mktemp("resumed")
    kept = shutil.ignore_patterns("lora", "checkpoint-4", "exports.json", "step-000004")
    output = shutil.copytree(run, folder / "out", ignore=kept)
    flags = [*base_flags, "--train_batch_size", "1", "--method", "reslora", "--output_dir", str(output), *RESUME]
    printed = forked(SCRIPT, *flags, folder=folder, environment=CUT)
    assert printed.count("checkpoint-2") == 1, printed
    return output


@pytest.mark.exhaustive
def test_a_cut_run_resumes_validates_draws_and_saves_as_one_process_does(resumed, run):
    assert [row[:2] for row in losses(resumed)] == [row[:2] for row in losses(run)]
    assert [row[2] for row in losses(resumed)] == pytest.approx([row[2] for row in losses(run)], rel=1e-5)
    found, expected = final_weights(resumed), final_weights(run)
    assert found.pop("reslora.norms").shape == expected.pop("reslora.norms").shape  # of the first process's samples
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    samples = sorted((run / "reslora" / "samples").glob("*/*.png"))
    assert len(samples) == 6
    for path in samples:
        found = resumed / path.relative_to(run)
        assert np.abs(pixels(found) - pixels(path)).max() <= 1
    assert sorted(path.name for path in (resumed / "reslora").iterdir()) == sorted(
        path.name for path in (run / "reslora").iterdir()
    )


@pytest.mark.exhaustive
def test_stock_diffusers_reads_the_exports_of_a_cut_run(resumed, run):
    found, expected = (UNet2DConditionModel.from_pretrained(output / "reslora" / "unet") for output in (resumed, run))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-4)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fsdp(monkeypatch) -> None:
    """Set the environment that `accelerate launch` sets by assets/accelerate/fsdp2.yaml."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")


@pytest.mark.parametrize(
    ("said", "flags", "words"),
    [
        ({"FSDP_VERSION": "1"}, {}, ["accelerate launch: ", "FSDP 1", "fsdp_version: 2"]),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, ["fsdp_reshard_after_forward", "set it to true"]),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, ["fsdp_offload_params", "set it to false"]),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, ["shortcuts", "--gradient_checkpointing"]),
        ({"FSDP_AUTO_WRAP_POLICY": "NONE"}, {}, ["auto wrap policy", "fsdp_config"]),
        ({}, {"compile": True}, ["--compile", "leave it out"]),
        ({}, {"blocks_to_swap": 2}, ["--blocks_to_swap 2", "leave it out"]),
        ({}, {"plan": True}, ["--plan", "leave it out"]),
        ({}, {"method": ["lora", "lora_matched"]}, ["--method lora_matched", "without FSDP2"]),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(fsdp, monkeypatch, said, flags, words):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument) as error:
        take_plugin(
            *parts(parse_args([]).replace(**flags), "model", "adapter", "training", "output"),
        )
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_block_that_the_denoiser_has_not_is_refused(fsdp, model):
    denoiser = UNet2DConditionModel.from_pretrained(model / "unet")
    accelerator = SimpleNamespace(num_processes=2, state=SimpleNamespace())
    share(
        take_plugin(*parts(parse_args([]), "model", "adapter", "training", "output")),
        accelerator,
    )
    assert units_of(denoiser, accelerator) == [
        "BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
    ]  # fmt: skip
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = ["ResnetBlock2D", "LlamaDecoderLayer"]
    with pytest.raises(InvalidArgument, match=r"LlamaDecoderLayer.*or give BasicTransformerBlock,ResnetBlock2D"):
        units_of(denoiser, accelerator)


def test_one_process_has_the_whole_base_and_is_told_so(fsdp):
    lines: list[str] = []
    accelerator = SimpleNamespace(num_processes=1, state=SimpleNamespace(), print=lines.append)
    share(
        take_plugin(*parts(parse_args([]), "model", "adapter", "training", "output")),
        accelerator,
    )
    assert not cuts_base(accelerator) and "FSDP2" in lines[0]


def test_without_fsdp_nothing_is_cut(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert take_plugin(*parts(parse_args([]), "model", "adapter", "training", "output")) is None
