"""train_llm.py with DeepSpeed, on the CPU."""

import json
import shutil

import pytest
from launching import forked, needs_deepspeed, start_alone, told_by
from waiting import ended

from .helpers import SCRIPT, VALIDATED, flags, losses

pytestmark = [pytest.mark.exhaustive, needs_deepspeed]
ZERO = told_by("deepspeed_zero2.yaml")


def test_a_run_with_deepspeed_goes_on_as_if_it_never_stopped(tiny, data, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", "--shortcut", "input", "--max_steps", "3", "--save_steps", "1")
    forked(SCRIPT, *argv, folder=tmp_path, environment=ZERO)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-3")
    (tmp_path / "resumed" / "exports.json").unlink()
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "resumed")
    more = ("--resume_from_checkpoint", "latest")
    forked(SCRIPT, *argv, *more, folder=tmp_path, environment=ZERO)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "run")
    for file in ("peft/adapter_model.safetensors", "merge.json"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_one_process_with_the_flag_trains_with_deepspeed_without_a_launcher(tiny, data, single_process, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", *VALIDATED, "--deepspeed")
    assert ended(start_alone(SCRIPT, *argv, printed=tmp_path / "printed")) == 0
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "trainer.json").read_text())["settings"]["deepspeed"]
    assert losses(tmp_path / "run") == pytest.approx(losses(single_process), rel=1e-5)


def test_deepspeed_is_not_left_out_silently(tiny, data, tmp_path):
    argv, cpu = flags(tiny, data, tmp_path / "run", "--deepspeed"), {"ACCELERATE_USE_CPU": "true"}  # by --cpu
    assert ended(start_alone(SCRIPT, *argv, printed=tmp_path / "printed", environment=cpu)) == 2
    assert "error: --deepspeed: accelerate ignores it with --cpu" in (tmp_path / "printed").read_text()
