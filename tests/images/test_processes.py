"""Decisions before the first step: the precision of the frozen weights, and the kind of attention."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import train_sd
from images.runs import RESUME, main, refused
from reslora.images import accelerator as setup
from reslora.images.settings import ASSETS, parse_args
from reslora.training.accelerator import set_threads, warn_of_single_process
from reslora.training.preparing import attention_of


@pytest.fixture
def bf16(monkeypatch):
    """Simulate a CPU with bf16 instructions, without a precision from accelerate."""
    monkeypatch.setattr(setup, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(setup, "is_initialized", lambda: False)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("pipeline", ["pipeline", "pipeline-flow"])
def test_bundled_pipelines_train_in_bf16_where_the_processor_does(bf16, monkeypatch, capsys, pipeline):
    flags = parse_args(["--pretrained_model_name_or_path", str(ASSETS / pipeline)])
    assert setup.precision_of(flags.model) == "bf16"
    assert "bf16" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` says without a wish
    assert setup.precision_of(flags.model) == "bf16"
    monkeypatch.setattr(setup, "cpu_has_bf16", lambda: False)
    capsys.readouterr()
    assert setup.precision_of(flags.model) is None and not capsys.readouterr().out


def test_whoever_has_a_wish_about_precision_gets_it(bf16, monkeypatch, model, data):
    assert setup.precision_of(parse_args(["--mixed_precision", "no"]).model) == "no"
    named = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)]
    assert setup.precision_of(parse_args(named).model) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert setup.precision_of(parse_args([]).model) is None
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setattr(setup, "is_initialized", lambda: True)  # accelerate takes one precision in a process
    assert setup.precision_of(parse_args([]).model) is None
    monkeypatch.setattr(setup, "is_initialized", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert setup.precision_of(parse_args([]).model) is None  # accelerate takes its own


def test_accelerates_fp8_is_refused(brief_flags, monkeypatch, capsys, tmp_path):
    """Its layers would replace others, among them PEFT's."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    line = refused(capsys, *brief_flags, "--output_dir", tmp_path / "out")
    assert "fp8" in line and "--mixed_precision" in line and not (tmp_path / "out" / "config.json").exists()


def test_fsdp_of_before_is_refused_before_accelerate_starts(brief_flags, monkeypatch, capsys, tmp_path):
    """accelerate itself would raise an error on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr(setup, "Accelerator", None)
    line = refused(capsys, *brief_flags, "--output_dir", tmp_path / "out")
    assert "accelerate launch: " in line and "FSDP 1" in line and "fsdp2.yaml" in line
    assert not (tmp_path / "out" / "config.json").exists()


def test_only_a_processor_with_the_instructions_computes_in_bf16(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for names, expected in (((), False), (("avx512_bf16",), True), (("amx_bf16",), True), (("avx512_f",), False)):
        found = dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert setup.cpu_has_bf16() is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert setup.cpu_has_bf16() is False


ACCELERATE, TORCHRUN = "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"


@pytest.mark.parametrize(
    ("launcher", "given", "threads", "said"),
    [(None, None, 3, False), (ACCELERATE, "1", 3, True), (ACCELERATE, "2", 2, False)],
)  # fmt: skip
def test_the_number_of_threads_is_the_users_and_how_to_give_it_is_printed(
    monkeypatch, capsys, launcher, given, threads, said
):
    """Six cores for two processes; a launcher sets 1 by itself."""
    for name in (ACCELERATE, TORCHRUN, "OMP_NUM_THREADS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ((launcher, "no"), ("OMP_NUM_THREADS", given)):
        if name and value:
            monkeypatch.setenv(name, value)
    used = [int(given or 0)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    set_threads(2)
    assert used[-1] == threads
    line = "3 threads per process: OMP_NUM_THREADS=1 is ignored, because launchers set it"
    assert (line in capsys.readouterr().out) == said
    assert "OMP_NUM_THREADS" in train_sd.__doc__  # which --help shows


@pytest.mark.parametrize(
    ("variables", "processes", "warned"),
    [((ACCELERATE, "MASTER_ADDR"), 1, True), ((ACCELERATE,), 1, False)],
)
def test_one_process_instead_of_several_is_warned_of(monkeypatch, capsys, variables, processes, warned):
    """`accelerate launch --cpu --num_processes 2` starts one process, which would train on half of the batch."""
    for name in (ACCELERATE, "MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, "0")
    warn_of_single_process(processes)
    assert ("warning: accelerate launch has started one process" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    "device, precision, shape, plain",
    [("cpu", "bf16", (4, 8, 8), True), ("cpu", "bf16", (4, 16, 8), False)],
)
def test_plain_attention_is_for_few_tokens_in_bf16_on_a_cpu(device, precision, shape, plain):
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    before = torch.backends.cuda.flash_sdp_enabled()
    with attention_of(accelerator, [shape, (4, 2, 2)]):
        assert torch.backends.cuda.flash_sdp_enabled() is (before and not plain)
    assert torch.backends.cuda.flash_sdp_enabled() is before


def test_a_run_keeps_its_precision_and_goes_on_in_no_other(run, capsys, tmp_path):
    """The fixture `run` gave no precision; that of accelerate is stored as if it had been given."""
    assert json.loads((run / "config.json").read_text())["mixed_precision"] == "no"
    folder = shutil.copytree(run, tmp_path / "run")
    flags = ["--config", folder / "config.json", "--output_dir", folder, *RESUME]
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate takes one precision in a process
    line = refused(capsys, *flags, "--mixed_precision", "bf16", quiet=False)
    assert "--mixed_precision bf16" in line and "trained with no" in line
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(*flags) == 0
