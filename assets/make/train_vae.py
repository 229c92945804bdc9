"""Train the autoencoder on six emoji sets: 64x64 pixels to 8x8 latents of 32 channels and back.

    OMP_NUM_THREADS=1 nice python assets/make/train_vae.py                      # rerun to continue
    OMP_NUM_THREADS=1 nice python assets/make/train_vae.py --init assets/pipeline/vae   # start with these

The sets are varied in place and style, so that the autoencoder is at home in drawings it has not seen. It never sees
one emoji in sixteen in any set, nor any of Twemoji and Fluent; loss.jsonl follows how sharp those come back. Often
the first sixteen channels are all that the decoder gets: they hold what is coarse, and the others detail.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from augment import SETS, STYLES, held_out, load_pixels, move, restyle
from checkpoint import load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from tqdm import tqdm

COARSE = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="assets/build")
    parser.add_argument("--sets", default=[*SETS, "openmoji"], nargs="+")
    parser.add_argument("--output", default="assets/build/vae")
    parser.add_argument("--init", metavar="VAE", help="start with these weights")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the mean KL of a latent number")
    parser.add_argument("--edges", type=float, default=1.0, help="weight of the error of differences between pixels")
    parser.add_argument("--coarse", type=float, default=0.25, help="share decoded from the first 16 channels alone")
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--save_minutes", type=float, default=3)
    parser.add_argument("--report_every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_vae(channels: int = 32) -> AutoencoderKL:
    """A small autoencoder that starts as little more than a blur: residual branches at zero, resampling convolutions
    that average or repeat. Colours then pass from the first steps on, which they otherwise learn last."""
    widths = (24, 48, 96, 96)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
        elif name.endswith("samplers.0.conv"):
            torch.nn.init.dirac_(module.weight)
            if "downsamplers" in name:
                module.weight.data = module.weight.data.sum((2, 3), keepdim=True).expand(-1, -1, 3, 3).clone() / 9
    return vae


def batch_at(step: int, pictures: torch.Tensor, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Generator]:
    """Step's own batch, from the seed and the step alone: a resumed run sees what an unbroken one would have."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    chosen = torch.randint(len(pictures), (args.batch,), generator=generator)
    batch = move(pictures[chosen] / 127.5 - 1, generator)
    # Two thirds stay plain; the rest is dealt out to the other styles.
    share = args.batch // (3 * (len(STYLES) - 1))
    for number, style in enumerate(STYLES[1:]):
        part = slice(number * share, (number + 1) * share)
        batch[part] = restyle(batch[part], style, generator)
    return batch, generator


def image_error(error: torch.Tensor, edges: float = 1.0) -> torch.Tensor:
    """L1 of the picture and of its differences between neighbouring pixels, which keep edges sharp; and the squared
    error, from which colours are learnt much sooner."""
    differences = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return error.abs().mean() + edges * differences + error.square().mean()


def loss_of(vae: AutoencoderKL, batch: torch.Tensor, generator: torch.Generator, args: argparse.Namespace) -> tuple:
    """The error of the picture and the weighted mean KL. Returns the sum, and L1 and KL alone."""
    posterior = vae.encode(batch).latent_dist
    latents = posterior.sample(generator)
    coarse = torch.rand(len(batch), generator=generator) < args.coarse
    fine = torch.arange(latents.shape[1]) >= COARSE
    latents = latents * ~(coarse[:, None] & fine)[..., None, None]
    error = vae.decode(latents).sample.float() - batch
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return image_error(error, args.edges) + args.kl * kl, error.abs().mean(), kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """PSNR of reconstructions in dB, mean over images."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample.float() for part in pictures.split(48)]
    errors = (torch.cat(parts).clamp(-1, 1) - pictures).square().mean((1, 2, 3)).clamp(min=1e-8)
    return round((10 * torch.log10(4 / errors)).mean().item(), 2)


@torch.no_grad()
def finish(vae: AutoencoderKL, pictures: torch.Tensor, output: Path) -> None:
    """Set the scaling factor that gives latents unit variance, and write the folder diffusers loads, in half
    precision."""
    parts = torch.nn.functional.avg_pool2d(pictures[:512] / 127.5 - 1, 2).split(64)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.to(torch.float16).save_pretrained(output)
    vae.to(torch.float32)


def load_sets(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures at 128x128 of all sets to learn from, and those of emoji that are held out, in bytes."""
    seen, unseen = [], []
    for name in args.sets:
        pictures, rows = load_pixels(f"{args.data}/{name}-128")
        out = torch.tensor([held_out(row) for row in rows])
        seen.append(pictures[~out])
        unseen.append(pictures[out])
    seen, unseen = torch.cat(seen), torch.cat(unseen)
    return seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(args.seed))], unseen


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pictures, unseen = load_sets(args)
    check = torch.nn.functional.avg_pool2d(unseen[:: max(1, len(unseen) // 96)] / 127.5 - 1, 2)
    vae = new_vae()
    if args.init:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32).state_dict())
    # The quicker layout for convolutions.
    vae = vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 - step / args.steps) ** 1.5)
    )
    ema = EMAModel(parameters, decay=args.ema, use_ema_warmup=True, power=0.75)
    parts = {"vae": vae, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    start = load_checkpoint(output / "checkpoint.pt", parts)
    output.mkdir(parents=True, exist_ok=True)
    saved = time.monotonic()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="vae", mininterval=10)
    for step in bar:
        batch, generator = batch_at(step, pictures, args)
        with accelerator.autocast():
            loss, l1, kl = loss_of(vae, batch, generator, args)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.step(parameters)
        done = step + 1 == args.steps
        if (step + 1) % args.report_every == 0 or done:
            ema.store(parameters)
            ema.copy_to(parameters)
            with accelerator.autocast():
                line = {"step": step + 1, "l1": l1.item(), "kl": kl.item(), "psnr": psnr(vae, check)}
            with (output / "loss.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({**line, "time": time.time()}) + "\n")
            bar.set_postfix(l1=f"{l1:.4f}", psnr=f"{line['psnr']:.2f}")
            finish(vae, pictures, output)
            ema.restore(parameters)
        if time.monotonic() - saved > 60 * args.save_minutes or done:
            save_checkpoint(output / "checkpoint.pt", parts, step + 1)
            saved = time.monotonic()


if __name__ == "__main__":
    main()
