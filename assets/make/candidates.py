"""Which set to fine-tune on: what the bundled autoencoder keeps of each set's edges and dark outlines.

    python assets/make/candidates.py assets/build/openmoji assets/build/twemoji assets/build/fluent

Writes benchmarks/results/bundled/candidates.json. Of the emoji that `train_vae.py` holds out: PSNR and gradients as in
sharpness.py; `image_energy`, the gradient energy of the images themselves, which is what a denoiser has to learn; and
of the dark outlines, the fraction of all pixels that are dark (`dark`), and how much of the gradient energy at their
edges is kept (`dark_energy`).
"""

import argparse
import json
from pathlib import Path

import torch
from augment import held_out, load_pictures
from diffusers import AutoencoderKL
from sharpness import gradients, psnr, reconstruct

from reslora.bundled import ASSETS

DARK = -0.5  # brightness in [-1, 1], a quarter of the range


def dark_energy(pictures: torch.Tensor, real: torch.Tensor) -> float:
    """Return the sum of squared steps between neighboring pixels of which one is dark in the real image."""
    dark = real.mean(1, keepdim=True) < DARK
    across = (dark[..., 1:] | dark[..., :-1]) * pictures.diff(dim=-1).square()
    down = (dark[..., 1:, :] | dark[..., :-1, :]) * pictures.diff(dim=-2).square()
    return (across.sum() + down.sum()).item()


def measure(vae: AutoencoderKL, folder: str) -> dict[str, float]:
    """Return the numbers of one set, over the emoji that the autoencoder has not seen."""
    pictures, rows = load_pictures(folder)
    real = pictures[torch.tensor([held_out(row) for row in rows])]
    made = reconstruct(vae, real)
    return {
        "images": len(real),
        "psnr": psnr(made, real),
        "gradient_energy": round(gradients(made)[1] / gradients(real)[1], 4),
        "image_energy": round(gradients(real)[1], 4),
        "dark": round((real.mean(1) < DARK).float().mean().item(), 4),
        "dark_energy": round(dark_energy(made, real) / dark_energy(real, real), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="imagefolders, as make_data.py writes them")
    parser.add_argument("--vae", default=str(ASSETS / "pipeline" / "vae"))
    parser.add_argument("--output", default="benchmarks/results/bundled/candidates.json")
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    result = {Path(folder).name: measure(vae, folder) for folder in args.folders}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
