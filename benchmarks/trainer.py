"""Measure train_sd.py: compared with diffusers' script, loading many images, and after generating samples.

    python benchmarks/trainer.py diffusers      # the bundled pipeline, 64 x 64 pixels, batch 16
    python benchmarks/trainer.py diffusers --model sd15 --mixed_precision bf16
                                                # SD 1.5's size with random weights, 512 x 512, batch 4: needs a GPU
    python benchmarks/trainer.py loader         # 10,000 images through the trainer's two loading paths, no model
    python benchmarks/trainer.py memory         # step time and memory before, between and after validation samples
    python benchmarks/trainer.py scale          # time to the first step and memory by images and captions: scale.py
    python benchmarks/trainer.py overhead       # overhead per step, on a simulated device (overhead.py)
    python benchmarks/trainer.py first_step     # time until training begins / time to load the files (whole_runs.py)
    python benchmarks/trainer.py default --before CHECKOUT   # README's first command compared with an earlier commit
    python benchmarks/trainer.py buckets        # a step with buckets compared with one without

`diffusers` runs `train_sd.py --method lora` and diffusers' train_text_to_image_lora.py alternately. Each is a separate
process with the same model, images, batch size, resolution, rank and number of steps, otherwise with its own defaults.
A ratio is the median over the rounds, with the lowest and the highest. Steps are timed from one optimizer step to the
next, without the first ones. The time before them (imports, loading, for train_sd.py encoding once) is printed
separately, and so is that of the complete process, which for train_sd.py includes merging, exporting and reading back.
The figures are printed and written to benchmarks/results/trainer/; `paper.py report` creates tables from them.

The sd15 form has not been run yet, for lack of a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import overhead
import PIL.Image
import scale
import torch
import whole_runs
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measured import ROOT, Others, keep, machine
from scale import MEBI, TRAINER
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from watched import WARM_UP, Watched

from reslora.images.context import ImageContext
from reslora.images.data.batch import Batch
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.encoding import Variants, encode_images, encode_texts
from reslora.images.data.folders import load_folders
from reslora.images.data.samples import TrainingData, training_loader
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.model.families.base import Family
from reslora.images.model.objective import DdpmObjective
from reslora.images.settings import parse_args
from reslora.options.images import Options
from reslora.runtime.signals import StopRequest

EXAMPLE = "examples/text_to_image/train_text_to_image_lora.py"


def main() -> None:
    """Run the chosen measurement, and write its result."""
    args = build_parser().parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None), flush=True)
    name = f"diffusers-{args.model}" if args.what == "diffusers" else args.what
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    others = Others()
    own = {"diffusers": diffusers, "loader": loader, "memory": memory}
    own |= {"first_step": lambda args: whole_runs.first_step(args, sd15, TRAINER), "default": whole_runs.default_run}
    own |= {"buckets": lambda args: whole_runs.buckets(args, bundled, TRAINER)}
    figures = {**own, "scale": scale.scale, "overhead": overhead.overhead}[args.what](args)
    keep(f"trainer/{name}", {"settings": settings, **others(), **figures})


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    add = commands.add_parser(
        "diffusers", help="samples per second and peak memory beside diffusers' script"
    ).add_argument
    add("--script", type=Path, help=f"diffusers' {EXAMPLE}; default: downloaded for the installed version")
    add("--model", choices=("bundled", "sd15"), default="bundled")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=40)
    add("--batch", type=int, help="default: 16, or 4 with sd15")
    add("--rank", type=int, default=16)
    add = commands.add_parser("loader", help="images per second and worker").add_argument
    add("--images", type=int, default=10_000)
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--rate", type=float, default=30, help="samples per second that a GPU takes, for the consumer")
    add("--batch", type=int, default=4)
    add = commands.add_parser("memory", help="what validation samples leave behind").add_argument
    add("--steps", type=int, default=60)
    add("--every", type=int, default=15, help="steps between samples")
    add("--rounds", type=int, default=3)
    add = commands.add_parser("first_step", help="time until training begins, Stable Diffusion 1.5's size").add_argument
    add("--rounds", type=int, default=2)
    add = commands.add_parser("default", help="README's first command beside an earlier commit's").add_argument
    add("--before", type=Path, required=True, help="a checkout of that commit")
    add("--rounds", type=int, default=3)
    add = commands.add_parser("buckets", help="a step with buckets beside one without").add_argument
    add("--steps", type=int, default=60)
    add("--rounds", type=int, default=5)
    scale.add_arguments(commands.add_parser("scale", help="memory and time to the first step, by images").add_argument)
    overhead.add_arguments(commands.add_parser("overhead", help="what is added to a step").add_argument)
    return parser


def spread(values: list[float], digits: int = 2) -> str:
    """Format median, lowest and highest value."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# -- compared with diffusers -----------------------------------------------------------------------------------------


def diffusers(args: argparse.Namespace) -> dict:
    """Compare train_sd.py with diffusers' script."""
    batch = args.batch or (4 if args.model == "sd15" else 16)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script = args.script or downloaded(folder)
        model, data, resolution = MODELS[args.model](folder)
        images = len((data / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--seed", "0"]
        flags += ["--resolution", str(resolution), "--train_batch_size", str(batch), "--rank", str(args.rank)]
        flags += ["--max_train_steps", str(args.steps), "--mixed_precision", args.mixed_precision]
        flags += ["--max_train_samples", str(images // batch * batch)]  # so that diffusers' last batch is full
        runs: dict[str, list[Watched]] = {"theirs": [], "ours": []}
        for number in range(args.rounds):
            order = list(runs) if number % 2 else list(reversed(runs))
            for name in order:
                output = folder / f"{name}-{number}"
                own = ["--method", "lora"] if name == "ours" else []
                output.mkdir()
                runs[name].append(
                    Watched(TRAINER if name == "ours" else script, [*flags, *own, "--output_dir", str(output)], output)
                )
                shutil.rmtree(output)
            report_round(number, runs, batch)
        ratios = ratios_of(runs)
        for what, values in ratios.items():
            print(f"  {what:<42} {spread(values) if values else 'never'}")
        return {"ratios": ratios, "runs": {name: [run.figures() for run in found] for name, found in runs.items()}}


def report_round(number: int, runs: dict[str, list[Watched]], batch: int) -> None:
    """Print the figures of both scripts in one round."""
    for name, title in (("theirs", "diffusers"), ("ours", "train_sd")):
        run = runs[name][-1]
        print(
            f"round {number + 1}  {title:<10} {batch / run.step:7.2f} samples/s ({run.step * 1e3:.0f} ms a step)"
            f"   first step after {run.until_first_step:.1f} s   whole process {run.seconds:.1f} s"
            f"   peak {run.peak_at_last_step / MEBI:.0f} MiB in training, {run.peak_of_process / MEBI:.0f} MiB RSS",
            flush=True,
        )


def ratios_of(runs: dict[str, list[Watched]]) -> dict[str, list[float]]:
    """Return the ratios of train_sd.py to diffusers' script, by round."""
    pairs = list(zip(runs["theirs"], runs["ours"], strict=True))
    more = [ours.until_first_step - theirs.until_first_step for theirs, ours in pairs]
    saved = [theirs.step - ours.step for theirs, ours in pairs]
    return {
        "samples per second": [theirs.step / ours.step for theirs, ours in pairs],
        "peak memory in training": [ours.peak_at_last_step / theirs.peak_at_last_step for theirs, ours in pairs],
        "peak memory of the process": [ours.peak_of_process / theirs.peak_of_process for theirs, ours in pairs],
        "seconds more before the first step": more,
        "steps that make up for them": [s / gain for s, gain in zip(more, saved, strict=True) if gain > 0],
    }


def downloaded(folder: Path) -> Path:
    """Download diffusers' example script of the installed version from its repository."""
    address = f"https://raw.githubusercontent.com/huggingface/diffusers/v{version('diffusers')}/{EXAMPLE}"
    print(f"downloading {address}", flush=True)
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        sys.exit(f"{address} cannot be had ({error}); give a copy with --script")
    path = folder / Path(EXAMPLE).name
    path.write_bytes(content)
    return path


def bundled(folder: Path) -> tuple[Path, Path, int]:
    """Copy the bundled pipeline, because train_sd.py has special defaults for the original."""
    shutil.copytree(ROOT / "assets" / "pipeline", folder / "model")
    return folder / "model", ROOT / "assets" / "openmoji", 64


def sd15(folder: Path) -> tuple[Path, Path, int]:
    """Create a model of Stable Diffusion 1.5's shapes with random weights, and 64 images of 512 x 512."""
    sd15_pipeline("cuda" if torch.cuda.is_available() else "cpu").to("cpu").save_pretrained(folder / "model")
    return folder / "model", photographs(folder / "images", 64), 512


def sd15_pipeline(device: str) -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion 1.5's shapes with random weights; on the meta device, without weights."""
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768,
    )  # fmt: skip
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(text)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "assets" / "pipeline" / "tokenizer", model_max_length=77),
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


MODELS = {"bundled": bundled, "sd15": sd15}


# -- loading ---------------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int, different: int = 64) -> Path:
    """Write `count` JPEG files of 512 x 512 pixels with the detail of a photograph, `different` of them distinct."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number in range(count):
            path = folder / f"{number:05d}.jpg"
            if number < different:
                coarse = PIL.Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((512, 512), PIL.Image.Resampling.BICUBIC), dtype=np.int16)
                pixels = (pixels + random.integers(-12, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(path, quality=90)
            else:
                same = (folder / f"{number % different:05d}.jpg").read_bytes()
                path.write_bytes(same + str(number).encode())  # the appended bytes change its content hash
            metadata.write(json.dumps({"file_name": path.name, "text": f"photograph {number}"}) + "\n")
    return folder


class CostlessFamily(Family):
    """Stable Diffusion 1.5's shapes with encoders that take no time, so that only loading is measured."""

    name = "costless"

    def encode_captions(self, pipeline, captions, longest):
        """Return text states of zeros."""
        return {"states": torch.zeros(len(captions), 77, 768)}

    def encode_images(self, vae, pixels):
        """Return moments of zeros."""
        return torch.zeros(len(pixels), 2, 4, 64, 64)


def loader(args: argparse.Namespace) -> dict:
    """Measure loading by number of worker processes."""
    torch.set_num_threads(1)  # as in the worker processes
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder) / "images", args.images)
        flags = ["--pretrained_model_name_or_path", "someone/model", "--train_data_dir", str(data), "--random_flip"]
        flags += ["--resolution", "512", "--train_batch_size", str(args.batch), "--max_train_steps", "1000000"]
        flags = parse_args([*flags, "--output_dir", str(Path(folder) / "run")])
        began = time.perf_counter()
        images = load_folders(flags.model, flags.data, flags.training, flags.output)[0]
        found = {"scan_seconds": time.perf_counter() - began, "workers": {}}
        print(f"finding {args.images} images and checking their headers: {found['scan_seconds']:.1f} s", flush=True)
        for workers in args.workers:
            flags = flags.replace(dataloader_num_workers=workers)
            found["workers"][str(workers)] = loading(args, flags, images, Path(folder) / f"cache-{workers}")
            shutil.rmtree(Path(folder) / f"cache-{workers}")
    return found


def loading(args: argparse.Namespace, flags: Options, images: ImageDataset, cache: Path) -> dict[str, float]:
    """Return rates of encoding (without the encoders' own time), and of loading encoded and unencoded samples."""
    workers, size = flags.data.dataloader_num_workers, Size(*flags.data.resolution * 2)
    flags, model = flags.replace(cache_dir=str(cache)), SimpleNamespace(family=CostlessFamily())
    context = ImageContext(flags, model, Accelerator(cpu=True), StopRequest())
    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    began = time.perf_counter()
    variants = Variants(images, [size] * len(images), flags.data, flags.training, model.family)
    latents, _ = encode_images(variants, "", vae, context)
    rates = {"encoding, images/s": args.images / (time.perf_counter() - began)}
    print(f"{workers} workers  encoding  {rates['encoding, images/s']:8.1f} images/s", flush=True)
    texts = encode_texts([text for options in images.captions for text in options], "", lambda: None, context)
    objective, numbers = DdpmObjective(DDPMScheduler()), tuple(range(len(images)))
    for what, encoded in (("not cached", None), ("cached", latents)):
        source = Source(images, encoded, numbers, (), (size,) * len(images))
        parts = flags.adapter, flags.data, flags.training, flags.validation
        training_data = TrainingData((source,), texts, objective, {size: (4, 64, 64)}, model.family, *parts)
        rates[f"{what}, samples/s"] = loading_rate(what, batches_of(training_data), args.images, workers)
        rates[f"{what}, share waited"] = consume(args, workers, what, batches_of(training_data))
    return rates


def batches_of(training_data: TrainingData) -> Iterator[Batch]:
    """Return the training batches of one pass over the images."""
    count = len(training_data.sources[0].train) // training_data.training.train_batch_size
    return iter(training_loader(training_data, range(count), processes=1, rank=0, pin=False))


def loading_rate(what: str, stream: Iterator, images: int, workers: int) -> float:
    """Return images per second of a stream that yields `images` of them."""
    next(stream)  # the workers start
    began, count = time.perf_counter(), 1
    for _ in stream:
        count += 1
    seconds = time.perf_counter() - began
    rate = images * (count - 1) / count / seconds
    print(f"{workers} workers  {what:<32} {rate:8.1f} images/s, {rate / max(1, workers):.1f} per worker", flush=True)
    return rate


def consume(args: argparse.Namespace, workers: int, what: str, stream: Iterator, seconds: float = 20) -> float:
    """Take batches at a GPU's rate; return the fraction of time spent waiting for them."""
    next(stream)
    began, waited, batches = time.perf_counter(), 0.0, 0
    for _ in range(int(seconds * args.rate / args.batch)):
        asked = time.perf_counter()
        if next(stream, None) is None:
            break
        waited += time.perf_counter() - asked
        batches += 1
        time.sleep(args.batch / args.rate)
    share, rate = waited / (time.perf_counter() - began), batches * args.batch / (time.perf_counter() - began)
    what = f"consumer of {args.rate:g} samples/s, {what}"
    print(f"{workers} workers  {what:<45} gets {rate:.1f}, waits {share:.1%} of the time", flush=True)
    return share


# -- sampling --------------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> dict:
    """Compare the same run with and without validation samples, alternately."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, data, resolution = bundled(folder)
        flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--method", "lora"]
        flags += ["--resolution", str(resolution), "--max_train_steps", str(args.steps)]
        prompts = ["--validation_prompt", "cat face", "sailboat", "--validation_steps", str(args.every)]
        found: dict[str, list[float]] = {}
        for number in range(args.rounds):
            runs = {}
            for name in ("without", "with") if number % 2 else ("with", "without"):
                output = folder / f"{name}-{number}"
                output.mkdir()
                own = prompts if name == "with" else []
                runs[name] = Watched(TRAINER, [*flags, *own, "--output_dir", str(output)], output)
                shutil.rmtree(output)
            for what, value in left_behind(runs["with"], runs["without"], args).items():
                found.setdefault(what, []).append(value)
    print(f"sampled every {args.every} of {args.steps} steps, beside the same run without: median (lowest-highest)")
    for what, values in found.items():
        print(f"  {what:<62} {spread(values, 3)}")
    return {"rounds": found}


def left_behind(sampling: Watched, without: Watched, args: argparse.Namespace) -> dict[str, float]:
    """Return how sampling changes time and memory of the steps around it, and what stays in memory afterwards."""
    sampled = tuple(range(0, args.steps + 1, args.every))
    step, plain = statistics.median(sampling.durations(sampled)), statistics.median(without.durations(sampled))
    first, last = sampling.ends[WARM_UP : args.every], sampling.ends[-args.every + 1 :]
    return {
        "step time, with over without": step / plain,
        "step time, after the last sample over before the second": median_step(last) / median_step(first),
        "MiB in use, after the last sample less after the second": (
            sampling.resident[-1] - sampling.resident[args.every]
        )
        / MEBI,
        "peak memory in training, with over without": sampling.peak_at_last_step / without.peak_at_last_step,
    }


def median_step(ends: list[float]) -> float:
    """Return the median duration between consecutive ends of steps."""
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


if __name__ == "__main__":
    main()
