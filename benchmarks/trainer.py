"""Measure train_sd.py: compared with diffusers' script, and with more and more images.

    python benchmarks/trainer.py diffusers      # the bundled pipeline, 64 x 64 pixels, batch 16
    python benchmarks/trainer.py diffusers --model sd15 --mixed_precision bf16
                                                # SD 1.5's size with random weights, 512 x 512, batch 4: needs a GPU
    python benchmarks/trainer.py scale          # time to the first step and memory by images and captions: scale.py

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
import json
import shutil
import statistics
import sys
import tempfile
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import scale
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measured import ROOT, Others, keep, machine
from scale import MEBI, TRAINER
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from watched import Watched

EXAMPLE = "examples/text_to_image/train_text_to_image_lora.py"


def main() -> None:
    """Run the chosen measurement, and write its result."""
    args = build_parser().parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None), flush=True)
    name = f"diffusers-{args.model}" if args.what == "diffusers" else args.what
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    others = Others()
    figures = {"diffusers": diffusers, "scale": scale.scale}[args.what](args)
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
    scale.add_arguments(commands.add_parser("scale", help="memory and time to the first step, by images").add_argument)
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


def photographs(folder: Path, count: int) -> Path:
    """Write `count` JPEG files of 512 x 512 pixels with the detail of a photograph."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number in range(count):
            path = folder / f"{number:05d}.jpg"
            coarse = PIL.Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((512, 512), PIL.Image.Resampling.BICUBIC), dtype=np.int16)
            pixels = (pixels + random.integers(-12, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(path, quality=90)
            metadata.write(json.dumps({"file_name": path.name, "text": f"photograph {number}"}) + "\n")
    return folder


if __name__ == "__main__":
    main()
