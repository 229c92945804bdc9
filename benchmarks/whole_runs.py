"""Measure complete runs of train_sd.py: its default run, the time until training begins, and steps with buckets.

README's first command is compared with that of another checkout; a run's time is that of its process, from the launcher
to the last line. The time until training begins is measured with everything encoded by an earlier run. It is the time
to the end of the first step, without the step itself, over that of a process that imports diffusers and loads the same
pipeline with `from_pretrained`. A step with buckets is compared with one without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measured import ROOT
from watched import WARM_UP, Watched

LOAD = "import sys; from diffusers import StableDiffusionPipeline; StableDiffusionPipeline.from_pretrained(sys.argv[1])"


def seconds_of(command: list[str], **environment: str) -> float:
    """Return the wall time of a command that must succeed, run in an empty folder."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        subprocess.run(
            command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
    return time.perf_counter() - began


def default_run(args: argparse.Namespace) -> dict:
    """Time README's first command in this checkout and in that of `--before`, alternately."""
    checkouts = {"before": args.before.resolve(), "now": ROOT}
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    for number in range(args.rounds):
        for name in reversed(checkouts) if number % 2 else checkouts:
            with tempfile.TemporaryDirectory() as output:
                command = [sys.executable, "-m", "accelerate.commands.launch", str(checkouts[name] / "train_sd.py")]
                taken = seconds_of([*command, "--output_dir", output], PYTHONPATH=str(checkouts[name]))
            seconds[name].append(taken)
            print(f"round {number + 1}  {name:<7} {taken:.1f} s", flush=True)
    ratios = [now / before for before, now in zip(seconds["before"], seconds["now"], strict=True)]
    print(f"{statistics.median(ratios):.2f} of the time")
    return {"ratios": {"time of README's first command / its time at an earlier commit": ratios}, "runs": seconds}


def buckets(args: argparse.Namespace, bundled: Callable[[Path], tuple[Path, Path, int]], trainer: Path) -> dict:
    """Compare a step with buckets with one without, on square images, where both compute the same."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, data, resolution = bundled(folder)
        flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--method", "lora"]
        flags += ["--resolution", str(resolution), "--max_train_steps", str(args.steps), "--num_validation_images", "0"]
        flags += ["--cache_dir", str(folder / "cache")]
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        for number in range(args.rounds):
            for name in reversed(seconds) if number % 2 else seconds:
                output = folder / f"{name}-{number}"
                output.mkdir()
                own = ["--use_aspect_ratio_buckets"] if name == "on" else []
                seconds[name].append(Watched(trainer, [*flags, *own, "--output_dir", str(output)], output).step)
                print(f"round {number + 1}  buckets {name:<3} {1e3 * seconds[name][-1]:.1f} ms a step", flush=True)
    ratios = [on / off for off, on in zip(seconds["off"], seconds["on"], strict=True)]
    print(f"{statistics.median(ratios):.3f} of the time")
    return {"ratios": {"step time with buckets / without buckets": ratios}, "seconds a step": seconds}


def first_step(args: argparse.Namespace, pipeline_of: Callable[[Path], tuple[Path, Path, int]], trainer: Path) -> dict:
    """Divide the time until training begins by the time to load the files; the first run, which encodes, is ignored."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, data, _ = pipeline_of(folder)
        flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "64"]
        flags += ["--max_train_steps", str(WARM_UP + 3), "--train_batch_size", "1", "--method", "lora"]
        flags += ["--num_validation_images", "0", "--cache_dir", str(folder / "cache")]
        ratios, runs = [], []
        for number in range(args.rounds + 1):
            loading = seconds_of([sys.executable, "-c", LOAD, str(model)])
            output = folder / f"run-{number}"
            output.mkdir()
            run = Watched(trainer, [*flags, "--output_dir", str(output)], output)
            print(f"loading {loading:.1f} s, until training begins {run.until_first_step:.1f} s", flush=True)
            if number:
                ratios.append(run.until_first_step / loading)
                runs.append({"loading": loading, "until_first_step": run.until_first_step})
        return {"ratios": {"time until training begins / time to load the files": ratios}, "runs": runs}
