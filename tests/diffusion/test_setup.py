"""What a run decides before its first step: the precision of the frozen parts, and the kind of attention."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from diffusion.runs import RESUME, main, refused
from reslora.diffusion import setup
from reslora.diffusion.arguments import Flags
from reslora.diffusion.samples import Material
from reslora.diffusion.settings import ASSETS, parse_args


@pytest.fixture
def bf16(monkeypatch):
    """As on a CPU with instructions for bf16, and nothing said by accelerate."""
    monkeypatch.setattr(setup, "computes_in_bf16", lambda: True)
    monkeypatch.setattr(setup, "is_initialized", lambda: False)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("pipeline", ["pipeline", "pipeline-flow"])
def test_bundled_pipelines_train_in_bf16_where_the_processor_does(bf16, monkeypatch, capsys, pipeline):
    flags = parse_args(["--pretrained_model_name_or_path", str(ASSETS / pipeline)])
    assert setup.precision_of(flags) == "bf16"
    assert "bf16" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` says without a wish
    assert setup.precision_of(flags) == "bf16"
    monkeypatch.setattr(setup, "computes_in_bf16", lambda: False)
    capsys.readouterr()
    assert setup.precision_of(flags) is None and not capsys.readouterr().out


def test_whoever_has_a_wish_about_precision_gets_it(bf16, monkeypatch, model, data):
    assert setup.precision_of(parse_args(["--mixed_precision", "no"])) == "no"
    named = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)]
    assert setup.precision_of(parse_args(named)) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert setup.precision_of(parse_args([])) is None
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setattr(setup, "is_initialized", lambda: True)  # accelerate takes one precision in a process
    assert setup.precision_of(parse_args([])) is None
    monkeypatch.setattr(setup, "is_initialized", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert setup.precision_of(parse_args([])) is None  # accelerate takes its own


def test_accelerates_fp8_is_refused(brief_flags, monkeypatch, capsys, tmp_path):
    """Its layers take the place of others, PEFT's among them."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    line = refused(capsys, *brief_flags, "--output_dir", tmp_path / "out")
    assert "fp8" in line and "--mixed_precision" in line and not (tmp_path / "out" / "config.json").exists()


def test_only_a_processor_with_the_instructions_computes_in_bf16(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for names, expected in (((), False), (("avx512_bf16",), True), (("amx_bf16",), True), (("avx512_f",), False)):
        found = dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert setup.computes_in_bf16() is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert setup.computes_in_bf16() is False


@pytest.mark.parametrize(
    "device, precision, shape, plain",
    [
        ("cpu", "bf16", (4, 8, 8), True),
        ("cpu", "bf16", (4, 16, 8), False),
        ("cpu", "no", (4, 8, 8), False),
        ("cuda", "bf16", (4, 8, 8), False),
    ],
)
def test_plain_attention_is_for_few_tokens_in_bf16_on_a_cpu(device, precision, shape, plain):
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    before = torch.backends.cuda.flash_sdp_enabled()
    with setup.attention_of(accelerator, shape):
        assert torch.backends.cuda.flash_sdp_enabled() is (before and not plain)
    assert torch.backends.cuda.flash_sdp_enabled() is before


def test_a_run_keeps_its_precision_and_goes_on_in_no_other(run, capsys, tmp_path):
    """`run` said nothing of precision; accelerate's word is kept as if it had been given."""
    assert json.loads((run / "config.json").read_text())["mixed_precision"] == "no"
    folder = shutil.copytree(run, tmp_path / "run")
    flags = ["--config", folder / "config.json", "--output_dir", folder, *RESUME]
    line = refused(capsys, *flags, "--mixed_precision", "bf16", quiet=False)
    assert "--mixed_precision bf16" in line and "trained with no" in line
    assert main(*flags) == 0


# -- how long a run trains ---------------------------------------------------------------------------------------------


def scheduled(processes: int = 1, images: int = 10, **flags) -> setup.Schedule:
    """The schedule of a run on so many images, in batches of 2 and two of them a step."""
    defaults = {
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": None, "num_train_epochs": 4,
        "validation_steps": None, "validation_epochs": 1, "lr_warmup_steps": None, "method": ["lora"],
    }  # fmt: skip
    made = Flags(**defaults | flags)
    material = Material(None, None, None, tuple(range(images)), (), None, (4, 8, 8), made)
    schedule, material = setup.schedule_of(made, material, processes)
    assert material.flags.max_train_steps == schedule.steps
    assert material.flags.validation_steps == schedule.validation_steps
    return schedule


def test_an_epoch_is_as_many_steps_as_its_images_need():
    """10 images are 5 batches and 3 steps; of two processes each has 3 batches, in 2 steps."""
    assert (scheduled().steps, scheduled().validation_steps, scheduled().by_epochs) == (12, 3, True)
    assert (scheduled(processes=2).steps, scheduled(processes=2).validation_steps) == (8, 2)
    assert scheduled(images=1).steps == 4
    assert (scheduled(max_train_steps=7).steps, scheduled(max_train_steps=7).by_epochs) == (7, False)
    assert scheduled(validation_steps=5).validation_steps == 5


@pytest.mark.parametrize(
    ("steps", "given", "warmup"),
    [(39, None, 3), (5_000, None, 500), (20_000, None, 500), (20_000, 900, 900), (9, 0, 0)],
)
def test_warm_up_is_a_tenth_and_at_most_500_steps_unless_it_is_given(steps, given, warmup):
    assert scheduled(max_train_steps=steps, lr_warmup_steps=given).warmup_steps == warmup
