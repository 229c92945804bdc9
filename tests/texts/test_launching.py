"""train_llm.py under `accelerate launch`: every bundled configuration, DeepSpeed, and signals to the launcher."""

import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from launching import FOLDER, configurations, forked, launch, start, told_by
from waiting import ended, wait_until

from reslora.errors import InvalidArgument, Stopped
from reslora.io import check_checksums
from reslora.runtime.checkpoint_folders import numbered
from reslora.runtime.signals import StopRequest
from reslora.texts import run
from texts.helpers import run_glue, run_llm

from .helpers import SCRIPT, VALIDATED, flags, losses

pytestmark = pytest.mark.exhaustive

FIVES = """
import sys
sys.path[:0] = [{path!r}]
from reslora.texts import llm
answers = llm.generate
llm.generate = lambda *given: ["The answer is 5." for _ in answers(*given)]
import train_llm
sys.exit(train_llm.main())
"""
"""The script, whose model says of everything that it comes to five."""


# Of one_node.yaml there is nothing that two_nodes.yaml has not; FSDP2 is refused, see below. DeepSpeed's launcher is
# started here, torch's for the signals below, and all by tests/images/test_launching.py.
@pytest.mark.parametrize("name", configurations("one_node.yaml", "fsdp2.yaml"))
def test_two_processes_equal_one_with_twice_the_batch(name, tiny, data, single_process, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", *VALIDATED, "--per_device_train_batch_size", 2)
    argv.remove("--use_cpu")  # as documented: it is found out
    exact = not name.startswith("deepspeed")
    told = told_by(name)
    start = partial(launch, name) if name.startswith("deepspeed") else partial(forked, environment=told)
    (script := tmp_path / "fives.py").write_text(FIVES.format(path=str(SCRIPT.parent)))
    printed = start(script, *argv, folder=tmp_path)
    assert printed.count("unmerged") == 1
    assert losses(tmp_path / "run") == pytest.approx(losses(single_process), rel=1e-5 if exact else 1e-2)
    found, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", single_process)
    )
    assert found["steps"] == 3
    for method in ("unmerged", "none", "weights", "lstsq"):  # the norms of `input` are those of rank 0's halves
        figures = expected["table"][method]
        assert found["table"][method]["loss"] == pytest.approx(figures["loss"], rel=1e-4 if exact else 1e-2)
        assert found["table"][method]["accuracy"] == 1 / 6  # the one that rank 1 has, of six
    assert math.isfinite(found["table"]["input"]["loss"])
    check_checksums(tmp_path / "run" / "checkpoint-3")


def test_two_processes_resume_exactly(tiny, data, tmp_path):
    """With dropout, accumulation, and a last step of an epoch that has fewer batches than the others."""
    more = ("--shortcut", "middle", "--lora_dropout", "0.2", "--gradient_accumulation_steps", "3", "--save_steps", "2")
    more += ("--per_device_train_batch_size", "2", "--eval_strategy", "epoch", "--max_steps", "5")
    forked(SCRIPT, *flags(tiny, data, tmp_path / "whole", *more), folder=tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5")
    (tmp_path / "resumed" / "exports.json").unlink()
    forked(
        SCRIPT, *flags(tiny, data, tmp_path / "resumed", *more), "--resume_from_checkpoint", "latest", folder=tmp_path
    )
    for name in ("peft/adapter_model.safetensors", "merge.json", "checkpoint-5/reslora_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")


def test_sharding_by_accelerates_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidArgument, match="accelerate launch: its configuration says FSDP"):
        run_llm(["--output_dir", str(tmp_path / "run"), "--use_cpu"])


# -- signals -----------------------------------------------------------------------------------------------------------


def running(folder: Path) -> list[int]:
    """Return the processes whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has just ended
            continue
        if str(folder).encode() in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(("main", "task"), [(run_llm, ()), (run_glue, ("--task_name", "rte"))], ids=["llm", "glue"])
def test_who_is_asked_to_stop_while_libraries_load_waits_for_no_other_process(main, task, tmp_path, monkeypatch):
    def met(*_):
        raise AssertionError("the others may never come")

    monkeypatch.setattr(run, "start_accelerator", met)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped before training began"):
            main([*task, "--seed", "0", "1", "--output_dir", str(tmp_path)], stop)


@pytest.mark.parametrize(
    ("processes", "number", "everyone"),
    [(1, signal.SIGKILL, False), (2, signal.SIGINT, True)],
)
def test_the_trainer_saves_and_ends_with_its_launcher(processes, number, everyone, tiny, data, tmp_path):
    output = tmp_path / "run"
    words = ["--config_file", str(FOLDER / "cpu_two_processes.yaml"), "--num_processes", str(processes)]
    words += ["--main_process_port", "0", str(SCRIPT), *flags(tiny, data, output, "--max_steps", 100_000)]
    words += ["--save_strategy", "no"]
    words.remove("--use_cpu")
    launcher = start(words, tmp_path / "printed", start_new_session=True)
    wait_until(lambda: (output / "log.jsonl").is_file() and (output / "log.jsonl").read_text(), "a step", launcher)
    (os.killpg if everyone else os.kill)(launcher.pid, number)
    ended(launcher)
    wait_until(lambda: not running(output), "the trainers' end")
    printed = (tmp_path / "printed").read_text()
    (saved,) = numbered(output)
    assert f"stopped after step {saved.name.removeprefix('checkpoint-')}; resume" in printed, printed[-3000:]
    check_checksums(saved)
