"""What train_sd.py's time to the first step and its memory do as images and captions become more.

Each run is a process of its own: the first encodes, the second finds all encoded, the third draws its images afresh.
The models are tiny, but what is kept of an image is as large as Stable Diffusion's: eight variants of 4 x 64 x 64, and
of a caption as wide as T5: 4,096. Two peaks are noted until the last step: `anonymous` is memory of the process's own,
private and written to, which the system can only swap; `resident` also counts the pages of files that it maps, of
libraries above all, which the system takes back when memory is short.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measured import ROOT
from watched import Watched

sys.path.append(str(ROOT / "tests"))
from pipelines import flux, image_folder, stable_diffusion

TRAINER = ROOT / "train_sd.py"
MEBI = 2**20
ENCODER = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",), "mid_block_add_attention": False}
DECODER = {"up_block_types": ("UpDecoderBlock2D",)}
BLOCKS = {
    "sample_size": 64, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def add_arguments(add: Callable) -> None:
    """Options of `trainer.py scale`."""
    add("--images", type=int, nargs="*", default=[100, 1000, 10_000])
    add("--captions", type=int, nargs="*", default=[1000, 100_000], help="of T5's width, a thousand an image")
    add("--tokens", type=int, default=16, help="of each caption")
    add("--steps", type=int, default=20)


def scale(args: argparse.Namespace) -> dict:
    """A row for each size and run."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for count in args.images:
            rows += measure(f"{count} images", *images_of(folder / f"images-{count}", count), args)
        for count in args.captions:
            rows += measure(f"{count} captions", *captions_of(folder / f"captions-{count}", count, args.tokens), args)
    print(f"{'':<16}{'run':<10}{'to the first step':>18}{'anonymous':>14}{'resident':>14}{'encoded':>14}")
    for row in rows:
        sizes = "".join(f"{row[key] / MEBI:>10.0f} MiB" for key in ("anonymous", "resident", "encoded"))
        print(f"{row['data']:<16}{row['run']:<10}{row['until_first_step']:>16.1f} s{sizes}")
    return {"scale": rows}


def images_of(folder: Path, count: int) -> tuple[Path, list[str]]:
    """Images that are not square, at 64 x 64 latents: where the data is, and the flags."""
    model = stable_diffusion(folder / "model", unet=BLOCKS, vae=ENCODER | DECODER)
    image_folder(folder / "images", count)
    return folder, ["--pretrained_model_name_or_path", str(model), "--resolution", "64", "--random_flip"]


def captions_of(folder: Path, count: int, tokens: int) -> tuple[Path, list[str]]:
    """A thousand captions an image, no two of them alike."""
    model = flux(folder / "model", text_encoder_2={"d_model": 4096}, transformer={"joint_attention_dim": 4096})
    image_folder(folder / "images", count // 1000, lambda image: [f"box {image} {i}" for i in range(1000)])
    flags = ["--pretrained_model_name_or_path", str(model), "--resolution", "32", "--max_sequence_length", str(tokens)]
    return folder, [*flags, "--mixed_precision", "bf16", "--random_flip"]


def measure(data: str, folder: Path, flags: list[str], args: argparse.Namespace) -> list[dict]:
    """The runs of one size, of which the data and what was encoded are then removed."""
    flags = [*flags, "--train_data_dir", str(folder / "images"), "--cache_dir", str(folder / "cache")]
    flags += ["--method", "lora", "--report_to", "none", "--num_validation_images", "0", "--train_batch_size", "4"]
    flags += ["--max_train_steps", str(args.steps), "--num_inference_steps", "1"]
    rows = []
    for name, own in (("first", []), ("second", []), ("uncached", ["--no-cache_latents"])):
        output = folder / name
        output.mkdir()
        run = Watched(TRAINER, [*flags, *own, "--output_dir", str(output)], output)
        encoded = sum(path.stat().st_size for path in (folder / "cache").rglob("*.arrow"))
        rows.append({
            "data": data, "run": name, "until_first_step": run.until_first_step, "anonymous": run.peak_anonymous,
            "resident": run.peak_at_last_step, "encoded": encoded,
        })  # fmt: skip
        print(f"{data}, {name} run: first step after {run.until_first_step:.1f} s", flush=True)
    shutil.rmtree(folder)
    return rows
