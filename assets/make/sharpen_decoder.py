"""Train the autoencoder's decoder to draw sharply what a denoiser leaves vague.

    OMP_NUM_THREADS=1 nice python assets/make/sharpen_decoder.py                # rerun to continue

A denoiser that is unsure of a detail draws the mean of what it could be, and a decoder that has only seen encoded
images shows that as blur. So two thirds of what this one sees are a U-Net's guesses of images from their noised
latents, and beside the errors of `train_vae.py` a critic says which of image and decoded image is the real one. The
encoder stays as it is, and with it all latents: denoisers and LoRA files of before draw with the new decoder.

The emoji are those of `train_vae.py`, and so are those held out; loss.jsonl follows how sharp these come back, encoded
("exact") and guessed ("vague").
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from augment import SETS, held_out, load_pixels, mirrorable, move
from captions import is_known
from checkpoint import load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.training_utils import EMAModel
from sharpness import compared, psnr
from torch import nn
from tqdm import tqdm
from train_vae import image_error

PENALTY_EVERY = 8
"""Steps between two penalties of the critic's slope, each for so many: it costs a second derivative."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="assets/build")
    parser.add_argument("--sets", default=[*SETS, "openmoji"], nargs="+")
    parser.add_argument("--pipeline", default="assets/pipeline", help="its U-Net guesses, its autoencoder is trained")
    parser.add_argument("--output", default="assets/build/decoder")
    parser.add_argument("--variants", type=int, default=3, help="of each image, moved, encoded and guessed beforehand")
    parser.add_argument("--noisiest", type=int, default=600, help="timestep below which images are noised for a guess")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--critic_lr", type=float, default=1e-3)
    parser.add_argument("--penalty", type=float, default=0.1, help="weight of the critic's squared slope at images")
    parser.add_argument("--critic_from", type=int, default=100, help="first step at which the decoder hears the critic")
    parser.add_argument("--share", type=float, default=0.5, help="critic's gradient over the errors' in the last layer")
    parser.add_argument("--largest", type=float, default=0.3, help="weight of the critic at most")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save_minutes", type=float, default=3)
    parser.add_argument("--report_every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Examples:
    """Images with what the decoder gets of them."""

    images: torch.Tensor
    """(N, 3, 64, 64), in bytes."""
    exact: torch.Tensor
    """Their latents (N, C, 8, 8), unscaled, fp16."""
    vague: torch.Tensor
    """The U-Net's guesses of these."""
    unseen: torch.Tensor
    """Which are held out (N)."""


@torch.no_grad()
def guess(pipeline: DiffusionPipeline, latents: torch.Tensor, captions: list[str], noisiest: int) -> torch.Tensor:
    """The U-Net's guess of scaled latents (N, C, 8, 8) from these with noise of a random timestep below `noisiest`."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    timesteps = torch.randint(20, noisiest, (len(latents),))
    noisy = scheduler.add_noise(latents, torch.randn_like(latents), timesteps)
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    predicted = pipeline.unet(noisy, timesteps, pipeline.text_encoder(tokens)[0]).sample
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted
    return (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()


@torch.no_grad()
def make_examples(args: argparse.Namespace, pipeline: DiffusionPipeline) -> Examples:
    """All images of all sets, moved in each of several ways."""
    vae, found = pipeline.vae, []
    generator = torch.Generator().manual_seed(args.seed)
    for name in args.sets:
        pixels, rows = load_pixels(f"{args.data}/{name}-128")
        unseen = torch.tensor([held_out(row) for row in rows])
        may = torch.tensor([mirrorable(row["text"]) for row in rows])
        captions = [row["text"] if is_known(row) else "" for row in rows]
        parts = torch.arange(len(rows)).split(64) * args.variants
        for part in tqdm(parts, desc=name, mininterval=10):
            images = move(pixels[part] / 127.5 - 1, generator, may[part])
            latents = vae.encode(images).latent_dist.mean
            scale = vae.config.scaling_factor
            guessed = guess(pipeline, latents * scale, [captions[i] for i in part], args.noisiest) / scale
            images = ((images + 1) * 127.5).round().to(torch.uint8)
            found.append((images, latents.half(), guessed.half(), unseen[part]))
    return Examples(*map(torch.cat, zip(*found, strict=True)))


def new_critic() -> nn.Sequential:
    """Images (N, 3, 64, 64) to how real each of 16x16 neighbourhoods looks (N, 1, 16, 16)."""
    layers = []
    for width, wider, side, stride in ((3, 32, 3, 1), (32, 64, 4, 2), (64, 96, 4, 2), (96, 96, 3, 1)):
        layers += [nn.Conv2d(width, wider, side, stride, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(96, 1, 3, padding=1))


def decoder_loss(
    vae: AutoencoderKL, critic: nn.Module, made: torch.Tensor, images: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """The errors, and how sure the critic is that not the decoded image but the image is real, weighed so that its
    gradient is `args.share` of theirs."""
    error = image_error(made - images)
    if not args.largest:
        return error
    told = F.softplus(critic(images) - critic(made)).mean()
    last = vae.decoder.conv_out.weight
    of_error, of_critic = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, told))
    return error + (args.share * of_error / (of_critic + 1e-6)).clamp(max=args.largest) * told


def critic_loss(critic: nn.Module, made: torch.Tensor, images: torch.Tensor, penalty: float) -> torch.Tensor:
    """How sure the critic is that not the image but what was decoded of it is real, and the penalty of its slope.

    An image and its own decoded one are compared: what they show cancels, which else hides how sharp they are.
    """
    images = images.detach().requires_grad_(penalty > 0)
    real = critic(images)
    loss = F.softplus(critic(made.detach()) - real).mean()
    if not penalty:
        return loss
    (slope,) = torch.autograd.grad(real.mean((1, 2, 3)).sum(), images, create_graph=True)
    return loss + penalty * slope.square().sum((1, 2, 3)).mean()


class Training:
    """The decoder and its critic, and what trains both; whatever a checkpoint holds."""

    def __init__(self, vae: AutoencoderKL, args: argparse.Namespace) -> None:
        self.args = args
        # The quicker layout for convolutions.
        self.vae, self.critic = vae.to(memory_format=torch.channels_last), new_critic()
        vae.encoder.requires_grad_(False)
        self.trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
        pairs = ((self.trained, args.lr), (self.critic.parameters(), args.critic_lr))
        self.optimizers = [torch.optim.AdamW(of, lr=lr, betas=(0.5, 0.99), weight_decay=0) for of, lr in pairs]
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(of, self.fall) for of in self.optimizers]
        self.ema = EMAModel(self.trained, decay=args.ema, use_ema_warmup=True, power=0.75)
        numbered = {f"optimizer {i}": of for i, of in enumerate(self.optimizers)}
        numbered |= {f"scheduler {i}": of for i, of in enumerate(self.schedulers)}
        self.parts = {"vae": vae, "critic": self.critic, "ema": self.ema, **numbered}

    def fall(self, step: int) -> float:
        return min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 - step / self.args.steps))

    def step(self, step: int, examples: Examples) -> None:
        """One of the decoder, one of the critic; the batch is of the seed and the step alone."""
        args, seen = self.args, (~examples.unseen).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        which = seen[torch.randint(len(seen), (args.batch,), generator=generator)]
        images, third = examples.images[which] / 127.5 - 1, args.batch // 3
        latents = torch.cat([examples.exact[which[:third]], examples.vague[which[third:]]]).float()
        made = self.vae.decode(latents).sample
        self.critic.requires_grad_(False)
        heard = args if step >= args.critic_from else argparse.Namespace(largest=0)
        decoder_loss(self.vae, self.critic, made, images, heard).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.critic.requires_grad_(True)
        penalty = 0 if step % PENALTY_EVERY else PENALTY_EVERY * args.penalty
        critic_loss(self.critic, made, images, penalty).backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        self.ema.step(self.trained)

    @torch.no_grad()
    def report(self, step: int, examples: Examples) -> None:
        """How sharp what is held out comes back, and the folder that diffusers loads, in half precision."""
        unseen = examples.unseen.nonzero()[:, 0]
        check = unseen[:: max(1, len(unseen) // 128)]
        images, line = examples.images[check] / 127.5 - 1, {"step": step}
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        for name in ("exact", "vague"):
            parts = getattr(examples, name)[check].float().split(48)
            made = torch.cat([self.vae.decode(part).sample for part in parts]).clamp(-1, 1)
            line |= {name: {"psnr": psnr(made, images), **compared(made, images)}}
        with (Path(self.args.output) / "loss.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({**line, "time": time.time()}) + "\n")
        self.vae.to(torch.float16).save_pretrained(self.args.output)
        self.vae.to(torch.float32)
        self.ema.restore(self.trained)


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    examples = make_examples(args, pipeline)
    training = Training(pipeline.vae, args)
    start, saved = load_checkpoint(output / "checkpoint.pt", training.parts), time.monotonic()
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="decoder", mininterval=10):
        training.step(step, examples)
        done = step + 1 == args.steps
        if (step + 1) % args.report_every == 0 or done:
            training.report(step + 1, examples)
        if time.monotonic() - saved > 60 * args.save_minutes or done:
            save_checkpoint(output / "checkpoint.pt", training.parts, step + 1)
            saved = time.monotonic()


if __name__ == "__main__":
    main()
