"""Runs for the tests of the application: made by hand, and made by the trainer."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from filelock import FileLock
from pipelines import image_folder, stable_diffusion
from waiting import LIMIT

import train_sd
from app.generation_request import Drawn, Request
from app.library import Library
from app.runs import Run, Weights
from app.studio import Studio

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = ["..", "../..", "/etc", "/etc/passwd", "a/../..", ".", "", "run\0", "<b>run</b>", "C:\\", None, 7, ["run"]]
REQUEST = Request(prompt="red disc", steps=2, seed=5, width=32, height=32)


def write_run(folder: Path, steps=(0, 2, 4), methods=("lora", "reslora"), **config) -> Path:
    """Write a run as the trainer does, with images of 8x8 pixels whose color depends on method and step."""
    folder.mkdir(parents=True)
    settings = {
        "method": list(methods),
        "max_train_steps": 4,
        "validation_prompt": ["red disc", "<script>alert(1)</script> ${1} {{2}}"],
        "train_batch_size": 2,
        "shortcut": "input",
        "rank": 2,
        "learning_rate": 1e-3,
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    for m, method in enumerate(methods):
        rows = [{"step": s, "split": "train", "loss": 1 / s, "lr": 1e-3, "seconds": s} for s in range(1, 5)]
        rows += [{"step": s, "split": "validation", "loss": 2 / (s + 1), "lr": 1e-3, "seconds": s} for s in steps]
        (folder / method).mkdir()
        (folder / method / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in steps:
            write_samples(folder / method / "samples" / f"step-{step:06d}", 40 * m + 10 * step)
    return folder


def write_samples(folder: Path, value: int) -> None:
    folder.mkdir(parents=True)
    for prompt in range(2):
        PIL.Image.new("RGB", (8, 8), (value, 100 * prompt, 0)).save(folder / f"{prompt}-0.png")


def write_exports(run: Run, step=4, **record) -> None:
    """Write the records of a run's exported methods, as the trainer does."""
    for method in run.methods:
        (run.folder / method / "exports.json").write_text(json.dumps({"step": step, **record}))


def trained(factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA and ResLoRA by the trainer, which one process of `pytest -n` makes for all; the folder of runs."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock", timeout=LIMIT):
        if not (done := folder / "done").exists():
            train(folder)
            done.touch()
    return folder / "runs"


def train(folder: Path) -> None:
    flags = ["--pretrained_model_name_or_path", stable_diffusion(folder / "model")]
    flags += ["--train_data_dir", image_folder(folder / "images"), "--output_dir", folder / "runs" / "tiny"]
    flags += ["--method", "lora", "reslora", "--resolution", 32, "--rank", 2, "--learning_rate", 0.05]
    flags += ["--max_train_steps", 4, "--validation_steps", 2, "--checkpointing_steps", 2, "--train_batch_size", 2]
    flags += ["--validation_prompt", "red disc", "blue box", "--num_inference_steps", 2, "--report_to", "none"]
    flags += ["--merge_calibration_samples", 4]
    assert train_sd.main([str(word) for word in flags]) == 0


def own_runs(factory: pytest.TempPathFactory) -> Path:
    """Return a module's own copy of the runs of `trained`, which its tests may change."""
    runs = factory.mktemp("own") / "runs"
    shutil.copytree(trained(factory), runs)
    return runs


def pixels(drawn: Iterable[Drawn]) -> list[np.ndarray]:
    """Return the images of a request."""
    return [np.asarray(one.image).astype(int) for one in drawn]


def image_of(studio: Studio, run: Run, weights: Weights, request: Request = REQUEST) -> np.ndarray:
    """Return the only image of a request."""
    (image,) = pixels(studio.generate(run, [weights], request))
    return image


def run_by_hand(folder: Path) -> Run:
    """Return the run of `write_run`, in a folder of runs."""
    write_run(folder / "runs" / "run")
    return Library(folder / "runs").find("run")
