"""Where the blur comes from: what the autoencoder keeps of an image's edges, and what the denoiser draws of them.

    python assets/make/sharpness.py --vaes assets/pipeline/vae --pipelines assets/pipeline assets/pipeline-flow \
        --output benchmarks/results/bundled/sharpness.json

For each autoencoder and set: over emoji that `train_vae.py` holds out, the mean PSNR of reconstructions, and their
gradients over those of the images (1: as sharp). For each pipeline: gradients of its samples over those of the real
images of the same captions, and over those of what its autoencoder makes of these. `gradients` is the mean absolute
difference between neighbouring pixels, `gradient_energy` the mean squared one, which weighs strong edges more.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import SETS, held_out, load_pictures, move, styled_caption
from captions import is_known
from diffusers import AutoencoderKL, DiffusionPipeline
from evaluate import as_tensor, draw

ALL_SETS = (*SETS, "openmoji", "twemoji", "fluent")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", default=[], nargs="+")
    parser.add_argument("--linear", type=int, default=[], nargs="+", help="best linear codes of so many channels")
    parser.add_argument("--pipelines", default=[], nargs="+")
    parser.add_argument("--data", default="assets/build")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--set", default="noto", help="set that the pipelines draw")
    parser.add_argument("--captions_of", metavar="FOLDER", help="of those captions that this imagefolder has, too")
    parser.add_argument("--name_set", action="store_true", help='ask for it: "red apple, noto style"')
    parser.add_argument("--output", required=True, help="file for the numbers")
    return parser.parse_args()


def gradients(pictures: torch.Tensor) -> tuple[float, float]:
    """Mean absolute and mean squared difference of neighbouring pixels."""
    steps = torch.cat([pictures.diff(dim=-1).flatten(), pictures.diff(dim=-2).flatten()])
    return steps.abs().mean().item(), steps.square().mean().item()


def compared(pictures: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    absolute, squared = (a / b for a, b in zip(gradients(pictures), gradients(real), strict=True))
    return {"gradients": round(absolute, 4), "gradient_energy": round(squared, 4)}


def psnr(made: torch.Tensor, pictures: torch.Tensor) -> float:
    """In dB, mean over images."""
    errors = (made - pictures).square().mean((1, 2, 3)).clamp(min=1e-8)
    return round((10 * torch.log10(4 / errors)).mean().item(), 2)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.float() for part in pictures.split(48)]
    return torch.cat(parts).clamp(-1, 1)


def reconstruction(vae: AutoencoderKL, pictures: torch.Tensor) -> dict[str, float]:
    """PSNR in dB, mean over images, and the gradients of what the autoencoder makes of pictures in [-1, 1]."""
    made = reconstruct(vae, pictures)
    return {"psnr": psnr(made, pictures), **compared(made, pictures)}


def linear_reconstruct(pictures: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    patches = F.unfold(pictures, 8, stride=8).transpose(1, 2) - mean
    return F.fold((patches @ basis @ basis.T + mean).transpose(1, 2), pictures.shape[-2:], 8, stride=8)


def measure_linear(channels: int, data: str) -> dict:
    """What the best linear code of each 8x8 patch in so many numbers keeps: an autoencoder should do better."""
    sets = {name: load_pictures(f"{data}/{name}") for name in ALL_SETS}
    out = {name: torch.tensor([held_out(row) for row in rows]) for name, (_, rows) in sets.items()}
    seen = torch.cat([sets[name][0][~out[name]] for name in (*SETS, "openmoji")])
    patches = F.unfold(seen, 8, stride=8).transpose(1, 2).flatten(0, 1)
    basis = torch.linalg.eigh(patches.T.cov())[1][:, -channels:]
    result = {}
    for name, (pictures, _) in sets.items():
        unseen = pictures[out[name]]
        made = linear_reconstruct(unseen, basis, patches.mean(0)).clamp(-1, 1)
        result[name] = {"images": len(unseen), "psnr": psnr(made, unseen), **compared(made, unseen)}
    return result


def measure_autoencoder(folder: Path, data: str) -> dict:
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    result = {}
    for name in ALL_SETS:
        pictures, rows = load_pictures(f"{data}/{name}")
        unseen = pictures[torch.tensor([held_out(row) for row in rows])]
        result[name] = {"images": len(unseen), **reconstruction(vae, unseen)}
    return result


def measure_pipeline(folder: Path, args: argparse.Namespace) -> dict:
    """Samples of captions that the pipeline knows, against the real images of these captions."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures, rows = load_pictures(f"{args.data}/{args.set}")
    known = [i for i, row in enumerate(rows) if is_known(row)]
    if args.captions_of:
        learnt = {row["text"] for row in load_pictures(args.captions_of)[1]}
        known = [i for i in known if rows[i]["text"] in learnt]
    chosen = known[:: math.ceil(len(known) / args.samples)]
    captions = [styled_caption(rows[i]["text"], of=args.set if args.name_set else None) for i in chosen]
    real = pictures[chosen]
    large = load_pictures(f"{args.data}/{args.set}-128")[0][chosen]
    samples, made = as_tensor(draw(pipeline, captions)), reconstruct(pipeline.vae, real)
    return {
        "images": len(chosen),
        "samples over real": compared(samples, real),
        "reconstructions over real": compared(made, real),
        "samples over reconstructions": compared(samples, made),
        "moved at 64x64 over real": compared(move(real, torch.Generator().manual_seed(0), largest=1.0), real),
        "moved at 128x128 over real": compared(move(large, torch.Generator().manual_seed(0), largest=1.0), real),
    }


def main() -> None:
    args = parse_args()
    result = {
        "linear codes": {channels: measure_linear(channels, args.data) for channels in args.linear},
        "autoencoders": {folder: measure_autoencoder(Path(folder), args.data) for folder in args.vaes},
        "pipelines": {folder: measure_pipeline(Path(folder), args) for folder in args.pipelines},
    }
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
