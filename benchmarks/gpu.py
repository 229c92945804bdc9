"""Measure training on a GPU in one command of at most ten minutes: step times, and memory against its plan.

    python benchmarks/gpu.py --name h100        # models of the size of SD 1.5, SDXL and Flux.1, bf16
    python benchmarks/gpu.py --name try --model sd15 --part steps
    python benchmarks/gpu.py --miniature        # the same measurements with tiny models, on a CPU too

Weights are random: denoisers are made on the device from their configurations, and nothing is downloaded. Results are
printed as a table and written to benchmarks/results/gpu/<name>.json after each measurement. A measurement that fails,
for example for lack of memory or of a library, stores its error, and the next one begins.

- `steps`: seconds of a training step. Steps of all rows alternate on the same frozen weights and the same batch.
  `ResLoRA` rows are compared with stock PEFT LoRA: forward, backward, AdamW. `train_sd.py` rows are this project's
  trainer (`take_step`). These rows are compared with a stock loop as in diffusers' train_text_to_image_lora.py (for
  Flux.1, train_dreambooth_lora_flux.py): accelerate, PEFT LoRA, noise, clipping, and reading the loss in every step.
  Both loops have latents and text states in memory, which diffusers' script for U-Nets would encode in every step.
- `memory`: the peak of allocated bytes in training steps of ResLoRA, and what `--plan` computes for them. The peak is
  `torch.cuda.max_memory_allocated`; on a CPU that of the allocator's events in torch's profiler. The autoencoder's
  decoder, which a run also holds, is in neither.

These measurements have not been made on a GPU yet: none was available. A test runs `--miniature` on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import speed_merge
import speed_steps
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, FluxPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from measured import ROOT, Others, keep
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextConfig, T5Config

sys.path.append(str(ROOT / "tests"))
from pipelines import FAMILIES, image_folder, tiny_tokenizer

import reslora
from reslora.errors import first_line
from reslora.images.accelerator import start_accelerator
from reslora.images.context import ImageContext
from reslora.images.data.batch import Batch
from reslora.images.data.folders import load_folders
from reslora.images.denoising import DenoisingLoss
from reslora.images.initial_lora import add_adapters
from reslora.images.memory.phases import ACTIVATIONS, ADAPTER, BASE, GRADIENTS, OPTIMIZER, Rehearsal
from reslora.images.model.quantising import blocks, pack
from reslora.images.run import resolve_context
from reslora.images.settings import parse_args
from reslora.images.study import ImageStudy
from reslora.runtime.signals import StopRequest
from reslora.training.loop import take_step
from reslora.training.preparing import prepare
from reslora.training.schedule import Schedule
from reslora.training.state import Learner, new_learner
from reslora.training.trained import Trained

RANK, STEPS = 16, 1000
SHORTCUTS = {"input": 1, "block": 4, "middle": 4}
PEFT, STOCK = "PEFT LoRA", "diffusers' loop"
TRAINERS = {"train_sd.py lora": "lora", "train_sd.py reslora": "reslora"}
PLANNED = (BASE, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS)
GIBI = 2**30


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    family: str
    """Key in tests/pipelines.py."""
    denoiser: Callable[[], nn.Module]
    configs: Mapping[str, object]
    """Configurations of the other models, which are only planned, by folder."""
    batch: int
    resolution: int
    flags: tuple[str, ...] = ()


def clip(width: int, layers: int, heads: int) -> CLIPTextConfig:
    """Return the configuration of CLIP's text model, with the token numbers of the tests' tokenizer."""
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def vae(**more: object) -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion or, with other channels, of Flux.1."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        **{"latent_channels": 4} | more,
    )  # fmt: skip


T5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
SIZES = {
    "sd15": Size(
        "stable_diffusion",
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        {"text_encoder": clip(768, 12, 12), "vae": vae}, batch=4, resolution=512,
    ),
    "sdxl": Size(
        "sdxl", lambda: speed_merge.sdxl()[0],
        {"text_encoder": clip(768, 12, 12), "text_encoder_2": clip(1280, 32, 20),
         "vae": functools.partial(vae, scaling_factor=0.13025)}, batch=1, resolution=1024,
    ),
    "flux": Size(
        "flux", lambda: speed_merge.flux()[0],
        {"text_encoder": clip(768, 12, 12), "text_encoder_2": T5,
         "vae": functools.partial(vae, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)},
        batch=1, resolution=512, flags=("--max_sequence_length", "512"),
    ),
}  # fmt: skip


def folder_of(size: Size, miniature: bool, folder: Path) -> Path:
    """Write a pipeline's folder without weights: the tests' tiny pipeline with the configurations of a large one."""
    model = FAMILIES[size.family](folder / "model")
    if miniature:
        return model
    with torch.device("meta"):
        denoiser = size.denoiser()
        name = "transformer" if size.family == "flux" else "unet"
        denoiser.save_config(model / name)
        for part, config in size.configs.items():
            config.save_pretrained(model / part) if part != "vae" else config().save_config(model / part)
    for tokenizer in model.glob("tokenizer*"):
        tiny_tokenizer(512 if (size.family, tokenizer.name) == ("flux", "tokenizer_2") else 77).save_pretrained(
            tokenizer
        )
    # The trainer requires a file of weights; these are made on the device instead.
    save_file({"no weights": torch.zeros(1)}, model / name / "diffusion_pytorch_model.safetensors")
    return model


class Setting:
    """A model in a folder, images, and what the trainer derives from the options."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        self.size, self.miniature = SIZES[name], args.miniature
        self.folder, self.model = folder, folder_of(self.size, args.miniature, folder)
        image_folder(folder / "images", 4)

    def context(self, *more: str) -> tuple[ImageContext, Rehearsal]:
        """Return the context of a run with these options, and its memory plan."""
        size, mini = self.size, self.miniature
        words = ["--pretrained_model_name_or_path", str(self.model), "--train_data_dir", str(self.folder / "images")]
        words += ["--resolution", str(32 if mini else size.resolution), "--max_train_steps", str(STEPS)]
        words += ["--train_batch_size", str(2 if mini else size.batch), "--rank", str(4 if mini else RANK)]
        words += ["--mixed_precision", "bf16", "--output_dir", str(self.folder / "out"), "--report_to", "none"]
        parsed = parse_args([*words, "--no-plan", "--method", "lora", "reslora", *(() if mini else size.flags), *more])
        accelerator = start_accelerator(parsed)
        images = load_folders(parsed.model, parsed.data, parsed.training, parsed.output)
        context = resolve_context(parsed, accelerator, StopRequest())
        return context, Rehearsal(images, context)


def random_denoiser(context: ImageContext) -> nn.Module:
    """Return the frozen denoiser with random weights on the device, quantized and swapped as the options say."""
    model, device, before = context.options.model, context.accelerator.device, torch.get_default_dtype()
    torch.set_default_dtype(context.dtype)
    try:
        with torch.device(device):
            denoiser = context.model.family.denoiser_class.from_config(context.model.denoiser_config())
    finally:
        torch.set_default_dtype(before)
    denoiser.requires_grad_(False)
    pack(denoiser, model.base_precision, device, model.blocks_to_swap)
    return denoiser


def random_batch(rehearsal: Rehearsal) -> Batch:
    """Return a batch of random tensors on the device, with the shapes of the memory plan's largest batch."""
    device, count = rehearsal.stage.device, rehearsal.options.training.train_batch_size

    def real(fake: torch.Tensor) -> torch.Tensor:
        """Return random values on the device, with the shape and dtype of a fake tensor."""
        return torch.randn(fake.shape, device=device).to(fake.dtype)

    batch = Batch(**tree_map_only(torch.Tensor, real, vars(rehearsal.batch(count))))
    sizes = torch.tensor([rehearsal.size.height, rehearsal.size.width, 0, 0] + [rehearsal.size.height] * 2)
    timesteps = rehearsal.objective.at(0.5).to(device).expand(count)
    return dataclasses.replace(batch, timesteps=timesteps, sizes=sizes.to(device).expand(count, 6))


def learner_of(method: str, denoiser: nn.Module, context: ImageContext, rehearsal: Rehearsal) -> Learner:
    """Return a method's learner, prepared for its first step, on the given frozen weights."""
    trained = Trained(
        {context.model.family.denoiser: denoiser},
        DenoisingLoss(context, rehearsal.objective, rehearsal.pipeline, denoiser.config),
    )
    add_adapters(trained, method, STEPS, context)
    learner = new_learner(method, trained, Schedule(STEPS, STEPS, 0, by_epochs=False), context)
    prepare(learner, study_of(context, rehearsal))
    return learner


def study_of(context: ImageContext, rehearsal: Rehearsal) -> ImageStudy:
    """Return a study without images, for single steps."""
    return ImageStudy(Schedule(STEPS, STEPS, 0, by_epochs=False), None, context, rehearsal.pipeline, None)


# -- steps -------------------------------------------------------------------------------------------------------------


class StockLoop:
    """The step of diffusers' scripts for LoRA, with latents and text states in memory."""

    def __init__(self, denoiser: nn.Module, context: ImageContext, inputs: dict, latents: torch.Tensor) -> None:
        options, self.accelerator = context.options, context.accelerator
        targets = options.adapter.target_modules
        denoiser.add_adapter(
            LoraConfig(r=options.adapter.rank, lora_alpha=options.adapter.rank, target_modules=targets)
        )
        cast_training_params(denoiser, dtype=torch.float32)
        parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
        rates = get_scheduler("constant", optimizer=optimizer)
        prepared = self.accelerator.prepare(denoiser.train(), optimizer, rates)
        self.model, self.optimizer, self.rates = prepared
        self.parameters, self.inputs, self.latents, self.dtype = parameters, inputs, latents, context.dtype
        self.is_flow, self.scheduler = context.model.family.objective == "flow", DDPMScheduler()

    def __call__(self) -> float:
        """Train one step, and return the loss."""
        with self.accelerator.accumulate(self.model):
            noise, count = torch.randn_like(self.latents), len(self.latents)
            if self.is_flow:
                sigmas = torch.sigmoid(torch.randn(count, device=noise.device)).view(-1, 1, 1, 1)
                noisy, target = (1 - sigmas) * self.latents + sigmas * noise, noise - self.latents
                packed = FluxPipeline._pack_latents(noisy.to(self.dtype), *noisy.shape)
                own = {"hidden_states": packed, "timestep": sigmas.flatten()}
            else:
                timesteps = torch.randint(0, 1000, (count,), device=noise.device)
                noisy, target = self.scheduler.add_noise(self.latents, noise, timesteps), noise
                own = {"sample": noisy.to(self.dtype), "timestep": timesteps}
            prediction = self.model(**self.inputs | own, return_dict=False)[0]
            if self.is_flow:
                prediction = FluxPipeline._unpack_latents(prediction, *noisy.shape[2:], vae_scale_factor=1)
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
            known = self.accelerator.gather(loss.repeat(count)).mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        return known


def steps(setting: Setting, args: argparse.Namespace) -> dict:
    """Return the median seconds of each row's step, and quartiles of the ratios to the stock rows."""
    context, rehearsal = setting.context()
    device = context.accelerator.device.type
    base, batch = random_denoiser(context), random_batch(rehearsal)
    loss = DenoisingLoss(context, rehearsal.objective, rehearsal.pipeline, base.config)
    inputs, target, _ = loss.inputs(batch)
    adapter = context.options.adapter
    config = LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=adapter.target_modules)
    model_args = argparse.Namespace(device=device, dtype="bfloat16")

    def model_step(shortcut: str = "", pre_num: int = 0) -> Callable[[], object]:
        """Return the step of plain PyTorch with this shortcut; without a shortcut, of PEFT's LoRA."""
        denoiser = speed_steps.twin(base)
        denoiser.add_adapter(config)
        cast_training_params(denoiser, dtype=torch.float32)
        if shortcut:
            reslora.connect(denoiser, reslora.ResLoraConfig(shortcut, pre_num))
        return speed_steps.Step(denoiser, inputs, model_args)

    def trainer_step(method: str) -> Callable[[], object]:
        """Return the step of this project's training loop with a method."""
        learner = learner_of(method, speed_steps.twin(base), context, rehearsal)
        return lambda: take_step(learner, itertools.repeat(batch), study_of(context, rehearsal))

    rows: dict[str, Callable[[], object]] = {PEFT: model_step()}
    rows |= {f"ResLoRA {name}({count})": model_step(name, count) for name, count in SHORTCUTS.items()}
    rows |= {STOCK: StockLoop(speed_steps.twin(base), context, inputs, torch.randn_like(target))}
    rows |= {row: trainer_step(method) for row, method in TRAINERS.items()}
    taken = {row: functools.partial(seconds_of, step, device) for row, step in rows.items()}
    for step in taken.values():  # kernels are chosen, and optimizers make their states
        step()
        step()
    times = speed_steps.turn_about(taken, 2 if setting.miniature else args.rounds)
    found = {}
    for row, values in times.items():
        stock = STOCK if row in TRAINERS else PEFT
        ratios = [ours / theirs for ours, theirs in zip(values, times[stock], strict=True)]
        found[row] = {"seconds": statistics.median(values), "over": stock, "quartiles": statistics.quantiles(ratios)}
    return found


def seconds_of(step: Callable[[], object], device: str) -> float:
    """Return the seconds of a step, until the device has finished it."""
    speed_steps.synchronize(device)
    began = time.perf_counter()
    step()
    speed_steps.synchronize(device)
    return time.perf_counter() - began


# -- memory ------------------------------------------------------------------------------------------------------------


CASES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "checkpointing": ("--gradient_checkpointing",),
    "half swapped": ("--blocks_to_swap", "HALF"),
    "fp8": ("--base_precision", "fp8"),
    "nf4": ("--base_precision", "nf4"),
}
"""Options of each memory case; HALF is half of the model's blocks."""


def half_of_blocks(setting: Setting) -> str:
    """Return half of the number of the denoiser's blocks."""
    context, _ = setting.context()
    return str(max(1, len(blocks(context.model.empty_denoiser())) // 2))


def memory(setting: Setting, case: str) -> dict:
    """Return planned and allocated bytes of ResLoRA's training steps."""
    flags = [half_of_blocks(setting) if flag == "HALF" else flag for flag in CASES[case]]
    large = ("--resolution", "128", "--train_batch_size", "8") if setting.miniature else ()  # activations dominate
    context, rehearsal = setting.context(*flags, *large)
    phase = rehearsal.training("reslora")
    planned = {name: phase.held[name] for name in PLANNED}
    allocated = peak_of(lambda: train(context, rehearsal), context.accelerator.device)
    total = sum(filter(None, planned.values()))
    return {"planned": planned, "planned_bytes": total, "allocated_bytes": allocated, "ratio": total / allocated}


def train(context: ImageContext, rehearsal: Rehearsal) -> None:
    """Train three steps of ResLoRA on random weights; on a GPU, reset the peak once weights and kernels are there."""
    batch, learner = random_batch(rehearsal), learner_of("reslora", random_denoiser(context), context, rehearsal)
    for number in range(3):
        if number == 1 and context.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        take_step(learner, itertools.repeat(batch), study_of(context, rehearsal))


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """Return the peak of the bytes that `work` allocates: on a GPU since it last reset the peak."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(itertools.accumulate(change for _, change in changes))


# -- all of it ---------------------------------------------------------------------------------------------------------


class Results:
    """The results by measurement; each one is stored when it ends, and one that fails stores its error."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ends, self.others = args, time.monotonic() + 60 * args.minutes, Others()
        self.found: dict[str, dict] = {}

    def attempt(self, what: str, measure: Callable[[], dict]) -> None:
        """Measure, and print and store the result or the error."""
        began = time.monotonic()
        if began > self.ends:
            found = {"skipped": f"{self.args.minutes:g} minutes are over"}
        else:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    found = measure()
            except (Exception, SystemExit) as error:  # memory, libraries, drivers: each has its own errors
                found = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.found[what] = found | {"wall_seconds": round(time.monotonic() - began, 1)}
        print("\n".join(lines_of(what, found)), flush=True)
        settings = {"miniature": self.args.miniature, "rounds": self.args.rounds}
        with contextlib.redirect_stdout(sys.stderr):  # stdout has the table only
            keep(f"gpu/{self.args.name}", {"settings": settings, **self.others(), "results": self.found})


def lines_of(what: str, found: dict) -> list[str]:
    """Format one measurement as lines of the table."""
    if problem := found.get("failed") or found.get("skipped"):
        return [f"{what:<32} {problem}"]
    if "planned_bytes" in found:
        planned, allocated = found["planned_bytes"] / GIBI, found["allocated_bytes"] / GIBI
        return [f"{what:<32} planned {planned:.3f} GiB, allocated {allocated:.3f}: ratio {found['ratio']:.3f}"]
    lines = []
    for row, figures in found.items():
        low, middle, high = figures["quartiles"]
        ratio = f"{middle:.3f} ({low:.3f}-{high:.3f}) of {figures['over']}"
        lines.append(f"{what:<16}{row:<24} {1e3 * figures['seconds']:9.1f} ms  {ratio}")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="name of the results; default: the GPU's, or miniature")
    parser.add_argument("--model", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=11, help="how often every step is taken in turn")
    parser.add_argument("--minutes", type=float, default=9, help="no measurement begins after so many")
    parser.add_argument("--miniature", action="store_true", help="tiny models, two rounds")
    args = parser.parse_args(argv)
    if not args.miniature and not torch.cuda.is_available():
        parser.error("there is no GPU; --miniature runs everything on tiny models")
    args.name = args.name or ("miniature" if args.miniature else torch.cuda.get_device_name().replace(" ", "-"))
    results = Results(args)
    for name in args.model:
        with tempfile.TemporaryDirectory() as folder:
            setting = functools.cache(functools.partial(Setting, name, args, Path(folder)))
            if "steps" in args.part:
                results.attempt(f"{name} steps", lambda setting=setting: steps(setting(), args))
            for case in CASES if "memory" in args.part else ():
                measure = lambda setting=setting, case=case: memory(setting(), case)  # noqa: E731
                results.attempt(f"{name} memory {case}", measure)


PARTS = ("steps", "memory")


if __name__ == "__main__":
    main()
