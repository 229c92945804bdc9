"""Measure the overhead of train_sd.py per step on a simulated device: the fraction of time in which it is idle.

The denoiser has the weights of a LoRA of Stable Diffusion 1.5 and computes nothing. Forward, backward and optimizer
together take the device `--device_ms` from their launch, and reading a loss waits until the device has computed it. All
else is the real trainer: samples of 4 x 64 x 64 latents and 77 x 768 text states read from disk, collation, noise,
clipping, the log, TensorBoard. The time in which the host launches the denoiser's kernels is not included.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from measured import ROOT

from reslora.attributes import override_attributes
from reslora.images.accelerator import start_accelerator
from reslora.images.context import ImageContext
from reslora.images.data.encoding import Variants, encode_images, encode_texts
from reslora.images.data.folders import load_folders
from reslora.images.data.samples import TrainingData
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.denoising import DenoisingLoss
from reslora.images.model.families.stable_diffusion import StableDiffusion
from reslora.images.model.objective import DdpmObjective
from reslora.images.output.reports import ImageReports
from reslora.images.schedule import schedule_of, steps_of
from reslora.images.settings import parse_args, with_family
from reslora.images.study import ImageStudy
from reslora.runtime.signals import StopRequest
from reslora.training import loop
from reslora.training.preparing import prepare
from reslora.training.state import Learner, new_optimizer
from reslora.training.trackers import note_settings, start_trackers
from reslora.training.trained import Trained

sys.path.append(str(ROOT / "tests"))
from pipelines import image_folder

WIDTHS = [320] * 5 + [640] * 5 + [1280] * 6  # of the attention layers of SD 1.5
RANK = 16


def add_arguments(add: Callable) -> None:
    """Add the options of `trainer.py overhead`."""
    add("--device_ms", type=float, nargs="+", default=[100, 300], help="what a step takes the device")
    add("--batch", type=int, nargs="+", default=[4, 16])
    add("--steps", type=int, default=100)


class Device:
    """A simulated device that takes the same time for every step, in sequence."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free, self.idle = seconds, 0.0, []

    def launch(self) -> None:
        """Queue one more step."""
        now = time.perf_counter()
        self.idle.append(max(0.0, now - self.free))
        self.free = max(now, self.free) + self.seconds


class Loss:
    """A loss on the device, which is known when its step has ended."""

    def __init__(self, value: torch.Tensor, device: Device) -> None:
        self.value, self.known = value, device.free

    def __float__(self) -> float:
        time.sleep(max(0.0, self.known - time.perf_counter()))
        return float(self.value)


class NoDenoiser(torch.nn.Module):
    """The weights of a LoRA on q, k, v and out of every self- and cross-attention; returns its input."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [shape for width in WIDTHS for _ in range(8) for shape in ((RANK, width), (width, RANK))]
        self.lora = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.one = torch.nn.Parameter(torch.ones(()))
        self.config = {}

    def forward(self, sample: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        """Return the sample."""
        return (sample * self.one,)


class NoEncoders(StableDiffusion):
    """A family with random text states and latents."""

    def encode_captions(self, pipeline, captions, longest):
        """Return random text states of 77 x 768."""
        return {"states": torch.randn(len(captions), 77, 768)}

    def encode_images(self, vae, pixels):
        """Return random moments of 4 x 64 x 64."""
        return torch.randn(len(pixels), 2, 4, 64, 64)


def overhead(args: argparse.Namespace) -> dict:
    """Return the idle fraction of the device, by batch size and by the duration of a step."""
    found = {}
    for batch in args.batch:
        with tempfile.TemporaryDirectory() as folder:
            training_data, context = load_training_data(Path(folder), batch, args.steps)
            for milliseconds in args.device_ms:
                device = Device(milliseconds / 1e3)
                host = train_on(device, training_data, context, Path(folder))
                idle = statistics.mean(device.idle[1:])
                name = f"batch {batch}, {milliseconds:g} ms a step"
                found[name] = {"idle": idle / (idle + device.seconds), "host_seconds": host / args.steps}
                print(f"{name}: the device is idle {100 * found[name]['idle']:.1f}% of the time", flush=True)
            context.accelerator.end_training()
    return {"overhead": found}


def load_training_data(folder: Path, batch: int, steps: int) -> tuple[TrainingData, ImageContext]:
    """Return 64 images and captions, as train_sd.py would have encoded them."""
    flags = ["--pretrained_model_name_or_path", "someone/model", "--train_data_dir", str(folder / "images")]
    flags += ["--resolution", "64", "--train_batch_size", str(batch), "--max_train_steps", str(steps)]
    image_folder(folder / "images", 64, lambda number: f"caption {number}")
    flags = parse_args([*flags, "--random_flip", "--method", "lora", "--output_dir", str(folder / "run")])
    family = NoEncoders()
    flags = with_family(flags.replace(validation_steps=steps + 1, checkpointing_steps=steps + 1), family.defaults)
    context = ImageContext(
        flags,
        SimpleNamespace(family=family),
        start_accelerator(flags),
        StopRequest(),
    )
    images, size = (
        load_folders(flags.model, flags.data, flags.training, flags.output)[0],
        Size(*flags.data.resolution * 2),
    )
    latents, _ = encode_images(
        Variants(images, [size] * len(images), flags.data, flags.training, family), "", no_vae(), context
    )
    texts = encode_texts([text for options in images.captions for text in options], "", lambda: None, context)
    source = Source(images, latents, tuple(range(len(images))), (), (size,) * len(images))
    parts = flags.adapter, flags.data, flags.training, flags.validation
    training_data = TrainingData((source,), texts, DdpmObjective(DDPMScheduler()), {size: (4, 64, 64)}, family, *parts)
    start_trackers(context, "train_sd")
    note_settings(context.options, steps_of(schedule_of(training_data.updates(1), context)), context.accelerator)
    return training_data, context


def no_vae() -> SimpleNamespace:
    """Return the attributes of an autoencoder that the trainer reads."""
    return SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, config=SimpleNamespace(scaling_factor=0.18215)
    )


class Unmeasured(ImageStudy):
    """The study of a run that is not validated."""

    def validate(self, *_: object) -> None:
        """Skip validation, because there are no images for it."""


def train_on(device: Device, training_data: TrainingData, context: ImageContext, folder: Path) -> float:
    """Train to the end; return the processor seconds of the host."""
    denoiser, pipeline = NoDenoiser(), SimpleNamespace(vae=no_vae())
    optimizer = new_optimizer(
        list(denoiser.parameters()), context.options.training, context.options.optimizer, context.accelerator
    )
    rates = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trained = Trained({"unet": denoiser}, DenoisingLoss(context, training_data.objective, pipeline, denoiser.config))
    learner = Learner("lora", trained, optimizer, rates, None, trained, name="lora")
    schedule = schedule_of(training_data.updates(1), context)
    prepare(learner, Unmeasured(schedule, None, context, pipeline, training_data))
    reports = ImageReports(folder / "log", learner, schedule, context.accelerator)
    context = dataclasses.replace(context, accelerator=simulated(context.accelerator, device))
    study = Unmeasured(schedule, None, context, pipeline, training_data)
    began = time.process_time()
    with override_attributes(loop, save_checkpoint=lambda *_: None):
        loop.train(learner, study, reports)
    reports.close()
    return time.process_time() - began


def simulated(accelerator: Accelerator, device: Device) -> Accelerator:
    """Return the accelerator with steps and losses on the simulated device."""
    backward = Accelerator.backward.__get__(accelerator)
    accelerator.backward = lambda loss: (backward(loss), device.launch())
    accelerator.reduce = lambda loss, _: Loss(loss, device)
    return accelerator
