"""Train the pipeline's autoencoder on the two emoji sets: 64x64 pixels to 8x8 latents of 16 channels and back.

    python assets/make/train_vae.py                 # about 20 minutes on one core; rerun to continue

The two sets are varied in place and style, so that the autoencoder is at home in drawings it has not seen.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from augment import STYLES, load_pictures, move, restyle
from checkpoint import load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=["assets/build/noto", "assets/build/openmoji"], nargs="+")
    parser.add_argument("--output", default="assets/build/vae")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the mean KL of a latent number")
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--save_every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_vae() -> AutoencoderKL:
    """A small autoencoder that starts as little more than a blur: residual branches at zero, resampling convolutions
    that average or repeat. Colours then pass from the first steps on, which they otherwise learn last."""
    widths = (24, 48, 96, 96)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=16,
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
    batch = move(pictures[chosen], generator)
    # Two thirds stay plain; the rest is dealt out to the other styles.
    share = args.batch // (3 * (len(STYLES) - 1))
    for number, style in enumerate(STYLES[1:]):
        part = slice(number * share, (number + 1) * share)
        batch[part] = restyle(batch[part], style, generator)
    return batch, generator


def loss_of(vae: AutoencoderKL, batch: torch.Tensor, generator: torch.Generator, kl_weight: float) -> tuple:
    """L1 of the picture and of its differences between neighbouring pixels, which keep edges sharp; the squared error,
    from which colours are learnt much sooner; and the weighted mean KL. Returns the sum, and L1 and KL alone."""
    posterior = vae.encode(batch).latent_dist
    error = vae.decode(posterior.sample(generator)).sample.float() - batch
    l1 = error.abs().mean()
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return l1 + edges + error.square().mean() + kl_weight * kl, l1, kl


@torch.no_grad()
def finish(vae: AutoencoderKL, pictures: torch.Tensor, output: Path) -> None:
    """Set the scaling factor that gives latents unit variance, and write the folder diffusers loads."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    decoded = torch.cat([vae.decode(part).sample for part in latents[:256].split(64)])
    print(f"reconstruction L1 {(decoded - pictures[:256]).abs().mean():.4f}, latent std {latents.std():.4f}")
    vae.save_pretrained(output)


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    pictures = torch.cat([load_pictures(folder)[0] for folder in args.data])
    pictures = pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(args.seed))]
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 - step / args.steps) ** 1.5)
    )
    vae, optimizer = accelerator.prepare(vae, optimizer)
    parts = {"vae": accelerator.unwrap_model(vae), "optimizer": optimizer, "scheduler": scheduler}
    start = load_checkpoint(output / "checkpoint.pt", parts)
    output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="vae", mininterval=10)
    for step in bar:
        batch, generator = batch_at(step, pictures, args)
        with accelerator.autocast():
            loss, l1, kl = loss_of(accelerator.unwrap_model(vae), batch, generator, args.kl)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{l1:.4f}", kl=f"{kl:.2f}")
            line = {"step": step, "loss": loss.item(), "l1": l1.item(), "kl": kl.item(), "time": time.time()}
            with (output / "loss.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(output / "checkpoint.pt", parts, step + 1)
    finish(accelerator.unwrap_model(vae), pictures, output)


if __name__ == "__main__":
    main()
