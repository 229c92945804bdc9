"""Two real processes: they resume, stop and fail together, with and without the launcher."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from launching import FOLDER, forked, start, start_forked
from pipelines import qwen_image
from waiting import ended, wait_until

from images.runs import RESUME, SCRIPT, assert_same, digests, final_weights, main
from reslora.runtime.checkpoint_folders import numbered

pytestmark = pytest.mark.exhaustive

STEPS = 5
CONFIGURATION = "cpu_two_processes.yaml"


@pytest.fixture(scope="module")
def flags(few_flags) -> list[str]:
    return [
        *few_flags,
        *("--max_train_steps", str(STEPS), "--train_batch_size", "2"),
        *("--validation_prompt", "red disc", "--num_validation_images", "1", "--validation_steps", "2"),
        *("--validation_split", "0.3", "--checkpointing_steps", "2", "--num_inference_steps", "1"),
        *("--merge_calibration_samples", "2", "--blocks_to_swap", "2"),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    forked(SCRIPT, *flags, "--output_dir", str(folder / "out"), folder=folder)
    return folder / "out"


# What happens while a checkpoint is written.
SLOW = """
import pathlib, sys, time
sys.path[:0] = {path!r}
from reslora.training import checkpoints
write_checkpoint = checkpoints.write_checkpoint
def slowly(*arguments):
    folder, end = pathlib.Path({folder!r}), time.monotonic() + 600
    (folder / "saving").touch()
    {meanwhile}
    write_checkpoint(*arguments)
checkpoints.write_checkpoint = slowly
import train_sd
sys.exit(train_sd.main())
"""
# A disk that is slow until the signal has come, in the midst of it.
UNTIL_HEARD = 'while not (folder / "heard").exists() and time.monotonic() < end: time.sleep(0.01)'
FULL = "raise OSError(28, 'No space left on device', 'checkpoint-2')"


def test_a_stop_while_the_first_saves_is_met_by_all(flags, whole, tmp_path):
    output, script, printed = tmp_path / "out", tmp_path / "slow.py", tmp_path / "stopped.txt"
    script.write_text(SLOW.format(path=[str(FOLDER.parent.parent)], folder=str(tmp_path), meanwhile=UNTIL_HEARD))
    words = [str(script), *flags, "--output_dir", str(output)]
    launcher = start(["--config_file", str(FOLDER / CONFIGURATION), "--main_process_port", "0", *words], printed)
    wait_until((tmp_path / "saving").exists, "the first checkpoint", launcher)
    workers = processes_of(launcher)
    os.kill(launcher.pid, signal.SIGTERM)
    wait_until(lambda: "stopping after this step" in printed.read_text(errors="replace"), "its answer", launcher)
    (tmp_path / "heard").touch()
    ended(launcher)
    _, alive = psutil.wait_procs(workers, timeout=600)
    assert not alive
    printed = printed.read_text(errors="replace")
    assert "stopped after step" in printed, printed
    assert "wait" not in printed and "timeout" not in printed.lower()
    (newest, *_) = numbered(output / "reslora")
    printed = forked(SCRIPT, *flags, "--output_dir", str(output), *RESUME, folder=tmp_path)
    assert printed.count("resuming from") == 1 and "damaged" not in printed
    assert newest.name in ("checkpoint-2", "checkpoint-3")
    assert_same(final_weights(output, step=STEPS), final_weights(whole, step=STEPS))
    for pattern in ("reslora/samples/**/*.png", "reslora/peft/*.safetensors", "reslora/unet/*.safetensors"):
        assert digests(output, pattern) == digests(whole, pattern)


def test_what_one_process_cannot_write_ends_both_in_one_line(flags, tmp_path):
    """The main process's disk is full: the other process must not wait forever."""
    output = tmp_path / "out"
    broken = SLOW.format(path=[str(FOLDER.parent.parent)], folder=str(tmp_path), meanwhile=FULL)
    (tmp_path / "broken.py").write_text(broken)
    words = [str(tmp_path / "broken.py"), *flags, "--output_dir", str(output)]
    processes = start_forked(*words, printed=tmp_path / "printed.txt")
    assert [ended(process) for process in processes] == [1, 1]
    printed = (tmp_path / "printed.txt").read_text(errors="replace")
    assert printed.count("train_sd.py: [Errno 28] No space left on device: 'checkpoint-2'") == 1, printed
    assert 'File "' not in printed, printed


def test_other_settings_are_refused_by_both_at_once(flags, whole, tmp_path):
    words = [str(SCRIPT), *flags, "--output_dir", str(whole), "--rank", "2"]
    processes = start_forked(*words, printed=tmp_path / "printed.txt")
    assert [ended(process) for process in processes] == [2, 2]
    printed = (tmp_path / "printed.txt").read_text(errors="replace")
    assert printed.count("train_sd.py: error: --rank 2:") == 1, printed


def test_layers_that_the_output_does_not_depend_on_do_not_end_them(flags, tmp_path):
    """In Qwen-Image's last block, the output of the text stream is unused: `to_add_out` has no gradient there."""
    words = [*flags[2:], "--pretrained_model_name_or_path", str(qwen_image(tmp_path / "qwen")), "--method", "lora"]
    words += ["--target_modules", "to_q", "to_add_out", "--num_validation_images", "0", "--validation_split", "0"]
    words += ["--gradient_checkpointing", "--gradient_accumulation_steps", "2", "--max_train_steps", "2"]
    printed = forked(SCRIPT, *words, "--output_dir", str(tmp_path / "two"), folder=tmp_path)
    assert printed.count("lora: the output of attn.to_add_out in the last block is unused") == 1
    assert main(*words, "--train_batch_size", "4", "--output_dir", tmp_path / "one") == 0
    two, one = (final_weights(tmp_path / name, "lora", 2) for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert {name for name, value in two.items() if "to_add_out.lora_B" in name and value.any()} == {
        f"transformer_blocks.{block}.attn.to_add_out.lora_B.default.weight" for block in (0, 1)
    }


@pytest.mark.exhaustive
def test_both_have_the_same_initial_factors(flags, tmp_path):
    """Two processes train like one process with twice the batch size."""
    words = ["--method", "lora", "--init_lora_weights", "pissa_niter_2", "--num_validation_images", "0"]
    words += ["--blocks_to_swap", "0"]
    forked(SCRIPT, *flags, *words, "--output_dir", str(tmp_path / "two"), folder=tmp_path)
    assert main(*flags, *words, "--train_batch_size", "4", "--output_dir", tmp_path / "one") == 0
    two, one = (final_weights(tmp_path / name, "lora", STEPS) for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert any(name.endswith("lora_initial_A.default") for name in two)


def processes_of(launcher) -> list[psutil.Process]:
    """Return the two training processes, by rank."""
    found = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "LOCAL_RANK" in p.environ()]
    return sorted(found, key=lambda process: process.environ()["LOCAL_RANK"])
