"""train_llm.py with DeepSpeed, on the CPU; not collected where DeepSpeed cannot run (see `launching.DEEPSPEED`)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import launch, start
from waiting import LIMIT, ended

from .helpers import SCRIPT, VALIDATED, flags, losses

NAME = "deepspeed_zero2.yaml"


def test_a_run_with_deepspeed_goes_on_as_if_it_never_stopped(tiny, data, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", "--shortcut", "input", "--max_steps", "3", "--save_steps", "1")
    launch(NAME, SCRIPT, *argv, folder=tmp_path, launcher=("--mixed_precision", "no"))
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-3")
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "resumed")
    more = ("--resume_from_checkpoint", "latest")
    launch(NAME, SCRIPT, *argv, *more, folder=tmp_path, launcher=("--mixed_precision", "no"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "run")
    for file in ("peft/adapter_model.safetensors", "merge.json"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_one_process_with_the_flag_trains_with_deepspeed_without_a_launcher(tiny, data, alone, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", *VALIDATED, "--deepspeed")
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    environment["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    subprocess.run([sys.executable, str(SCRIPT), *argv], env=environment, check=True, timeout=LIMIT)
    assert (tmp_path / "run" / "checkpoint-3" / "latest").is_file()  # DeepSpeed's
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_flags_that_differ_from_deepspeeds_configuration_are_one_line(tiny, data, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", "--gradient_accumulation_steps", "2")
    with pytest.raises(AssertionError, match=r"error: DeepSpeed's configuration: differs from the flags: ds gradient_"):
        launch(NAME, SCRIPT, *argv, folder=tmp_path, launcher=("--num_processes", "1"))


def test_deepspeed_is_not_left_out_silently(tiny, data, tmp_path):
    argv = ["--cpu", "--num_processes", "1", str(SCRIPT), *flags(tiny, data, tmp_path / "run", "--deepspeed")]
    assert ended(start(argv, tmp_path / "printed")) != 0
    assert "error: --deepspeed: accelerate leaves it out with --cpu" in (tmp_path / "printed").read_text()
