"""Experiments on a Ray cluster: two nodes on this machine, each with one CPU core."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipelines import image_folder
from waiting import ended, wait_until

from images.runs import SCRIPT

TEN = ("--method", "lora", "reslora", "--seed", "0", "1", "2", "3", "4", "--learning_rate", "1e-2")
STORE = 100 * 2**20


@pytest.fixture
def cluster() -> Iterator[Any]:
    Cluster = pytest.importorskip("ray.cluster_utils").Cluster
    own = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE}
    found = Cluster(initialize_head=True, head_node_args=own)
    try:
        yield found
    finally:
        found.shutdown()


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory) -> list[str]:
    images = image_folder(tmp_path_factory.mktemp("images") / "images", count=8)
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--resolution", "32"),
        *("--max_train_steps", "20", "--validation_steps", "10", "--checkpointing_steps", "1", "--rank", "2"),
        *("--train_batch_size", "2", "--num_validation_images", "0", "--merge_calibration_samples", "2"),
        *("--report_to", "none", "--select_split", "0.2", "--test_split", "0.2", "--shortcut", "block"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]


def start(*flags: object, printed: Path) -> subprocess.Popen:
    """Start the script with one thread; its output is added to a file."""
    with printed.open("a") as file:
        return subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, flags)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def in_runs(out: Path, name: str) -> list[Path]:
    """Return the files of this name in the folders of runs; `rglob` fails if a temporary folder vanishes meanwhile."""
    return list(out.glob(f"*/lr-*/seed-*/{name}"))


def begun(out: Path) -> list[Path]:
    """Return the checkpoints of runs that have trained only a few steps: each node trains one run at a time."""
    return [path for path in in_runs(out, "checkpoint-[1-6]") if not (path.parent / "arm.json").exists()]


def results(folder: Path) -> tuple:
    found = json.loads((folder / "experiment.json").read_text())
    arms = [(a["label"], a["seed"], a["status"], a["select_by_step"], a["test"]) for a in found["arms"]]
    return found["verdicts"], found["ranking"], found["chosen"], found["best"], found["readings"], arms


@pytest.mark.exhaustive
def test_ten_runs_outlive_a_node_and_the_main_process(cluster, flags, tmp_path):
    """With the results, and the exported LoRA, of one process without Ray, to the last bit."""
    alone, out, printed = tmp_path / "alone", tmp_path / "out", tmp_path / "printed.txt"
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    there = ("--executor", "ray", "--ray_address", cluster.address, "--arms_at_once", "2", "--output_dir", out)
    first = start(*flags, *TEN, *there, printed=printed)
    try:
        wait_until(lambda: in_runs(out, "arm.json") and len(begun(out)) == 2, "two runs, after the first one", first)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: "submitted again, time 1 of 3" in printed.read_text(), "a run to be submitted again", first)
        before = len(in_runs(out, "arm.json"))
        wait_until(lambda: len(in_runs(out, "arm.json")) > before, "another run", first)
    finally:
        first.kill()
        first.wait()
    assert len(in_runs(out, "arm.json")) < 10, printed.read_text()
    assert ended(start(*flags, *TEN, *there, printed=printed)) == 0, printed.read_text()
    assert ended(start(*flags, *TEN, "--output_dir", alone, printed=printed)) == 0, printed.read_text()
    assert results(out) == results(alone)
    exported = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(exported) >= 2 and exported == sorted(path.name for path in out.glob("*.safetensors"))
    for name in exported:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.exhaustive
def test_a_stop_saves_all_runs(cluster, flags, tmp_path):
    """Ray's own handler of SIGTERM would end the main process at once."""
    out, printed = tmp_path / "out", tmp_path / "printed.txt"
    there = ("--executor", "ray", "--ray_address", cluster.address, "--max_train_steps", "2000", "--output_dir", out)
    process = start(*flags, *TEN, *there, printed=printed)
    wait_until(lambda: in_runs(out, "checkpoint-*"), "a checkpoint", process)
    process.terminate()
    assert ended(process) == 143 and "run the same command to resume" in printed.read_text()
    (log,) = in_runs(out, "log.jsonl")
    last = max(json.loads(line)["step"] for line in log.read_text().splitlines())
    assert (log.parent / f"checkpoint-{last}").is_dir() and not (out / ".stop").exists()


@pytest.mark.exhaustive
def test_refusals_of_ray(cluster, flags, tmp_path):
    """Before anything is loaded: no cluster at the address, and a directory that is not shared."""
    import ray

    from reslora.errors import RunFailed
    from reslora.experiment import executors, ray_executor

    printed = tmp_path / "printed.txt"
    wrong = ("--executor", "ray", "--ray_address", "127.0.0.1:1", "--output_dir", tmp_path / "out")
    assert ended(start(*flags, *TEN, *wrong, printed=printed)) == 2
    assert "error: --ray_address 127.0.0.1:1: " in printed.read_text().splitlines()[-1]
    ray.init(cluster.address, logging_level="warning")
    try:
        ray_executor.check_shared(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executors, "SEEN_WITHIN", 0.0)
            patch.setattr(ray_executor, "answer_file", lambda start, path: path.with_name("lost"))
            with pytest.raises(RunFailed, match="lost: another process has written it, but it is not seen here"):
                ray_executor.check_shared(tmp_path / "out")
    finally:
        ray.shutdown()
