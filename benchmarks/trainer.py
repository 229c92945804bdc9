"""Measure how train_sd.py's time to the first step and memory grow with images and captions.

    python benchmarks/trainer.py

Each run is a separate process: the first encodes, the second finds everything encoded, the third encodes in each step.
The models are tiny, but the stored items have realistic sizes: eight variants of 4 x 64 x 64 per image, as for Stable
Diffusion, and captions as wide as T5's, 4,096. Two peaks are recorded until the last step. `anonymous` is private
memory, which the system can only swap. `resident` also counts pages of mapped files, mostly libraries, which the system
reclaims if memory is short. The figures are printed and written to benchmarks/results/trainer/scale.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measured import ROOT, Others, keep
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


def main() -> None:
    """Measure each size, and write a row for each of its runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument(
        "--captions", type=int, nargs="*", default=[1000, 100_000], help="of T5's width, a thousand an image"
    )
    parser.add_argument("--tokens", type=int, default=16, help="of each caption")
    parser.add_argument("--steps", type=int, default=20)
    args, others, rows = parser.parse_args(), Others(), []
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
    keep("trainer/scale", {"settings": vars(args), **others(), "scale": rows})


def images_of(folder: Path, count: int) -> tuple[Path, list[str]]:
    """Create non-square images for 64 x 64 latents; return the folder and the options."""
    model = stable_diffusion(folder / "model", unet=BLOCKS, vae=ENCODER | DECODER)
    image_folder(folder / "images", count)
    return folder, ["--pretrained_model_name_or_path", str(model), "--resolution", "64", "--random_flip"]


def captions_of(folder: Path, count: int, tokens: int) -> tuple[Path, list[str]]:
    """Create a thousand different captions per image; return the folder and the options."""
    model = flux(folder / "model", text_encoder_2={"d_model": 4096}, transformer={"joint_attention_dim": 4096})
    image_folder(folder / "images", count // 1000, lambda image: [f"box {image} {i}" for i in range(1000)])
    flags = ["--pretrained_model_name_or_path", str(model), "--resolution", "32", "--max_sequence_length", str(tokens)]
    return folder, [*flags, "--mixed_precision", "bf16", "--random_flip"]


def measure(data: str, folder: Path, flags: list[str], args: argparse.Namespace) -> list[dict]:
    """Return the rows of one size, and remove its data and encoded files."""
    flags = [*flags, "--train_data_dir", str(folder / "images"), "--cache_dir", str(folder / "cache")]
    flags += ["--method", "lora", "--report_to", "none", "--num_validation_images", "0", "--train_batch_size", "4"]
    flags += ["--max_train_steps", str(args.steps), "--num_inference_steps", "1"]
    rows = []
    for name, own in (("first", []), ("second", []), ("uncached", ["--no-cache_latents"])):
        output = folder / name
        output.mkdir()
        run = Watched(TRAINER, [*flags, *own, "--output_dir", str(output)], output)
        encoded = sum(path.stat().st_size for path in (folder / "cache").rglob("*.safetensors"))
        rows.append({
            "data": data, "run": name, "until_first_step": run.until_first_step, "anonymous": run.peak_anonymous,
            "resident": run.peak_at_last_step, "encoded": encoded,
        })  # fmt: skip
        print(f"{data}, {name} run: first step after {run.until_first_step:.1f} s", flush=True)
    shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    main()
