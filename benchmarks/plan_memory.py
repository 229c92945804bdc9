"""Compare the memory plan of `train_sd.py --plan` with the memory that the run takes: small models of the families.

    python benchmarks/plan_memory.py                        # each case in a separate process
    python benchmarks/plan_memory.py --sd15                 # README's command for Stable Diffusion, only planned

`allocated` is the peak of PyTorch's CPU allocator in each phase since the run began, as the profiler records it. It
does not contain weights in mapped files. `resident` is the growth of the process, with pages of files, kernels' own
memory and the C library's caches. Images and batches are large for these models, so that activations dominate, as they
do in large models.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measured import ROOT, keep

sys.path.append(str(ROOT / "tests"))
import torch
import trainer
from pipelines import FAMILIES, image_folder
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

import train_sd
from reslora.images.accelerator import start_accelerator
from reslora.images.data import encoding
from reslora.images.data.folders import load_folders
from reslora.images.memory.plan import plan_of
from reslora.images.run import resolve_context
from reslora.images.settings import parse_args
from reslora.runtime.peak_memory import free_memory, peak_memory
from reslora.runtime.signals import StopRequest
from reslora.runtime.status import Status
from reslora.training import loop

CASES = (
    ("stable_diffusion", "128"), ("stable_diffusion", "128", "--gradient_checkpointing"), ("flux", "128"),
    ("qwen_image", "128"), ("sdxl", "128"), ("pipeline", "96"), ("pipeline-flow", "96"),
)  # fmt: skip
SD15 = ["--method", "lora", "reslora", "--mixed_precision", "bf16", "--max_train_steps", "1000"]
SD15 += ["--validation_prompt", "a cat in a hat", "--num_validation_images", "1"]
SD15_CASES = (
    ("--train_batch_size", "4", "--gradient_checkpointing"), ("--train_batch_size", "4"),
    ("--train_batch_size", "1", "--gradient_checkpointing"),
)  # fmt: skip
PHASES = {  # phases of the run's status, and of the plan
    "encoding image": "encoding images", "encoding captions": "encoding captions", "step": "training",
    "sampling": "sampling", "merging": "exporting", "writing files": "exporting", "reading back": "exporting",
}  # fmt: skip
CPU = torch.device("cpu")
MEBI = 2**20


def flags_of(family: str, side: str, more: list[str], folder: Path) -> list[str]:
    """Return the options of a run of two steps with samples."""
    model = FAMILIES[family](folder / "model") if family in FAMILIES else ROOT / "assets" / family
    image_folder(folder / "images", 8)
    given = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "images"), "--rank", "4"]
    given += ["--resolution", side, "--train_batch_size", "8", "--max_train_steps", "2", "--report_to", "none"]
    given += ["--validation_prompt", "red disc", "--num_validation_images", "2", "--num_inference_steps", "2"]
    given += ["--validation_steps", "2", "--output_dir", str(folder / "out"), "--random_flip", "--no-plan"]
    return [*given, "--merge_calibration_samples", "8", *more]


def plan_sd15() -> None:
    """Plan README's command with the shapes of Stable Diffusion 1.5, with more and less memory for a step."""
    rows = []
    for case in SD15_CASES:
        with tempfile.TemporaryDirectory() as folder:
            phases = planned([*sd15_flags(Path(folder)), *case])
        del phases["seconds"]
        rows.append({"case": " ".join(case), "planned": phases})
        said = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in phases.items())
        print(f"{rows[-1]['case']}: planned GiB: {said}", flush=True)
    keep("plan/sd15", {"flags": SD15, "cases": rows})


def sd15_flags(folder: Path) -> list[str]:
    """Return the options of a run with Stable Diffusion 1.5's configurations, without weights."""
    pipeline, model = trainer.sd15_pipeline("meta"), folder / "model"
    pipeline.save_config(model)
    for name, part in pipeline.components.items():
        if part is not None:
            save = part.config.save_pretrained if name == "text_encoder" else getattr(part, "save_config", None)
            (save or part.save_pretrained)(model / name)
    # The trainer requires a file of weights, but a plan reads only its shapes.
    save_file({"conv_in.bias": torch.zeros(320)}, model / "unet" / "diffusion_pytorch_model.safetensors")
    image_folder(folder / "images", 8)
    given = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "images")]
    return [*given, "--output_dir", str(folder / "out"), "--no-plan", *SD15]


def planned(flags: list[str]) -> dict:
    """Return the planned bytes by phase, and the seconds of planning."""
    parsed = parse_args(flags)
    accelerator = start_accelerator(parsed)
    images, context = (
        load_folders(parsed.model, parsed.data, parsed.training, parsed.output),
        resolve_context(parsed, accelerator, StopRequest()),
    )
    began = time.perf_counter()
    plan = plan_of(images, context, free_memory(CPU))
    return {"seconds": round(time.perf_counter() - began, 2), **{phase.name: phase.total for phase in plan.phases}}


@contextlib.contextmanager
def phases_noted(said: list[tuple[int, str]]) -> Iterator[None]:
    """Record the phases that the run enters, with the time in nanoseconds."""

    def watch(owner: object, name: str, phase: str = "") -> None:
        """Record each call of a function: with `phase`, or with the phase in its first argument."""
        before = getattr(owner, name)

        def recorded(*given: object, **named: object) -> object:
            """Record the time, and call the function."""
            said.append((time.time_ns(), phase or str(given[1])))
            return before(*given, **named)

        stack.callback(setattr, owner, name, before)
        setattr(owner, name, recorded)

    with contextlib.ExitStack() as stack:
        watch(Status, "say")
        watch(loop, "take_step", "step")  # the status counts finished steps
        watch(encoding, "encoded", "encoding image")
        yield


def consume_request(flags: list[str]) -> dict:
    """Return the run's peak bytes: allocated by phase, and resident in total."""
    said: list[tuple[int, str]] = []
    gc.collect()
    before = peak_now()
    with phases_noted(said), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        assert train_sd.main(flags) == 0
    resident = (peak_memory(CPU) or 0) - before
    peaks: dict[str, int] = {}
    now, phase = 0, ""
    for _, change in sorted([*memory_changes(found), *said], key=lambda one: one[0]):
        if isinstance(change, str):
            phase = next((plan for start, plan in PHASES.items() if change.startswith(start)), phase)
        else:
            now += change
            peaks[phase] = max(peaks.get(phase, 0), now)
    return {"resident": resident, **{name: peak for name, peak in peaks.items() if name}}


def memory_changes(found: profile) -> list[tuple[int, int]]:
    """Return the bytes that each allocation adds or frees, with the time in nanoseconds, in order."""
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted((event.start_ns(), event.nbytes()) for event in events)


def peak_now() -> int:
    """Reset the peak of resident memory, and return it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(CPU) or 0


def main() -> None:
    """Run every case, and compare it with its plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # for the child processes
    parser.add_argument("--sd15", action="store_true", help="plan README's command for Stable Diffusion 1.5")
    arguments = parser.parse_args()
    if arguments.sd15:
        plan_sd15()
        return
    if arguments.case:
        family, side, *more = arguments.case
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            flags = flags_of(family, side, more, Path(folder))
            result = {"planned": planned(flags), "allocated": consume_request(flags)}
        print(json.dumps(result))
        return
    rows = []
    for case in CASES:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--case", *case]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=3600)
        row = {"case": " ".join(case), **json.loads(ended.stdout.splitlines()[-1])}
        plan, real = row["planned"], row["allocated"]
        names = [name for name in real if name != "resident"]
        most, of = max(real[name] for name in names), max(plan[name] for name in names)
        row |= {"resident": real.pop("resident"), "ratio": round(of / most, 3)}
        rows.append(row)
        told = ", ".join(f"{name} {plan[name] / MEBI:.1f}/{real[name] / MEBI:.1f}" for name in names)
        resident = row["resident"] / MEBI
        print(f"{row['case']}: planned/allocated MiB: {told}; of the peaks {row['ratio']:.3f}; resident {resident:.1f}")
        keep("trainer/plan", {"cases": rows})


if __name__ == "__main__":
    main()
