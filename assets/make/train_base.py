"""Train the pipeline's text encoder and U-Net on Noto emoji, on latents encoded once; write a diffusers folder.

    python assets/make/train_base.py                # after train_vae.py; rerun to continue
    python assets/make/train_base.py --steps 40000  # later: go on from where the steady learning rate had come to
    python assets/make/train_base.py --init assets/pipeline   # without checkpoints: go on from the shipped weights

The learning rate is steady until the last --cooldown steps, where it falls to 0 for the weights that are shipped, on
fewer variants of each picture. A longer run continues from before the cooldown. Losses go to loss.jsonl, pictures of
fixed prompts to samples/.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from augment import STYLES, load_pictures, mirrorable, move, restyle, styled_caption
from captions import VALIDATION_PROMPTS, is_held_out, is_known, new_tokenizer, words
from checkpoint import load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from evaluate import contact_sheet, draw
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

# How many of each picture's cached variants are drawn in each style.
VARIANTS = {"plain": 20, "tinted": 3, "grey": 3, "posterised": 3, "outlined": 3}
HELD_OUT_VARIANTS = 2
# Details need repetition: in the cooldown so many of four examples are one of a picture's first plain variants.
SETTLED_VARIANTS, SETTLED_QUARTERS = 6, 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="assets/build/noto")
    parser.add_argument("--vae", default="assets/build/vae")
    parser.add_argument("--output", default="assets/build/base")
    parser.add_argument("--init", metavar="PIPELINE", help="start with the text encoder and U-Net of this pipeline")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--cooldown", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--warm_up_steps", type=int, default=2000, help="text encoder's own steps before the U-Net's")
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (Path(args.vae) / "config.json").is_file():
        raise SystemExit(f"{args.vae}: no autoencoder there; train it with train_vae.py first")
    return args


def new_scheduler() -> DDIMScheduler:
    """Zero terminal SNR with trailing steps: without it the white ground comes out grey."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """Two levels of two (down) and three (up) layers; captions enter by cross-attention, and pooled beside the time."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    # On a CPU, plain matrix products are half as fast again as the fused attention for pictures this small.
    unet.set_attn_processor(AttnProcessor())
    return unet


@dataclass
class Examples:
    """The known captions, the held-out ones behind them, and every picture's cached latents."""

    captions: list[str]
    known: int
    styles: list[str]
    """Style of each of the first V variants; HELD_OUT_VARIANTS plain ones follow, which training never sees."""
    tokens: torch.Tensor
    """Token ids (captions, styles in the order of STYLES, length)."""
    latents: torch.Tensor
    """Scaled latents (captions, V + HELD_OUT_VARIANTS, 16, 8, 8), fp16."""

    def batch(self, which: torch.Tensor, variant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and token ids of these pictures' variants."""
        styles = self.styles + ["plain"] * HELD_OUT_VARIANTS
        style = torch.tensor([STYLES.index(style) for style in styles])[variant]
        return self.latents[which, variant].float(), self.tokens[which, style]


@torch.no_grad()
def encode_variants(pictures: torch.Tensor, rows: list[dict], vae: AutoencoderKL, seed: int) -> torch.Tensor:
    """Latents (N, V + HELD_OUT_VARIANTS, 16, 8, 8) of every picture moved and restyled in all ways of VARIANTS."""
    generator = torch.Generator().manual_seed(seed)
    mirror = torch.tensor([mirrorable(row["text"]) for row in rows])
    styles = [style for style, count in VARIANTS.items() for _ in range(count)] + ["plain"] * HELD_OUT_VARIANTS
    variants = []
    for style in tqdm(styles, desc="encode"):
        moved = restyle(move(pictures, generator, mirror, largest=1.0, reach=2), style, generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in moved.split(64)])
        variants.append((latents * vae.config.scaling_factor).half())
    return torch.stack(variants, 1)


def make_examples(args: argparse.Namespace, vae: AutoencoderKL) -> tuple[Examples, PreTrainedTokenizerFast]:
    """Read the pictures, choose the captions, and encode the variants unless an earlier run has."""
    pictures, rows = load_pictures(args.data)
    known_words = {word for row in rows if is_known(row) for word in words(row["text"])}
    chosen = [i for i, row in enumerate(rows) if is_known(row)]
    known = len(chosen)
    chosen += [i for i, row in enumerate(rows) if is_held_out(row, known_words)]
    # All captions' words get a token, so that a later run or a fine-tuning can teach more of them.
    tokenizer = new_tokenizer([row["text"] for row in rows])
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init, subfolder="tokenizer")
    captions = [rows[i]["text"] for i in chosen]
    cache = Path(args.output) / "latents.pt"
    if not cache.is_file():
        torch.save(encode_variants(pictures[chosen], [rows[i] for i in chosen], vae, args.seed), cache)
    texts = [styled_caption(caption, style) for caption in captions for style in STYLES]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = tokens.view(len(captions), len(STYLES), -1)
    styles = [style for style, count in VARIANTS.items() for _ in range(count)]
    return Examples(captions, known, styles, tokens, torch.load(cache)), tokenizer


def warm_up(text_encoder: CLIPTextModel, examples: Examples, steps: int, seed: int) -> None:
    """Let the text encoder foretell the latents from the caption alone, so that captions of unlike pictures differ
    from the U-Net's first step on; finding that out through the U-Net takes it thousands of steps."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(text_encoder.config.hidden_size, examples.latents[0, 0].numel())
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    bar = tqdm(range(steps), desc="warm up text encoder", mininterval=10)
    for _ in bar:
        which = torch.randint(examples.known, (128,), generator=generator)
        latents, tokens = examples.batch(which, torch.randint(len(examples.styles), (128,), generator=generator))
        foretold = head(text_encoder(tokens).last_hidden_state.mean(1))
        loss = F.mse_loss(foretold, latents.flatten(1))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(mse=f"{loss.item():.3f}")


def start_from(pipeline: str, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Load the weights of an earlier pipeline, made with the same data and sizes, in float32."""
    for part, name in ((unet, "unet"), (text_encoder, "text_encoder")):
        saved = type(part).from_pretrained(pipeline, subfolder=name, torch_dtype=torch.float32)
        part.load_state_dict(saved.state_dict())


def denoising_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of v, with the near-noiseless steps weighted down as if their SNR were at most 4 (min-SNR)."""
    noise = torch.randn(latents.shape, generator=generator)
    # Stratified over the batch: each batch covers all noise levels evenly.
    steps = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(latents)
    timesteps = (steps * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample.float()
    weight = (5 / (compute_snr(scheduler, timesteps) + 1)).clamp(max=1)
    return ((predicted - target).square().mean((1, 2, 3)) * weight).mean()


def training_batch(examples: Examples, step: int, empty: torch.Tensor, args: argparse.Namespace) -> tuple:
    """Step's own batch, from the seed and the step alone: a resumed run sees what an unbroken one would have."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    # The validation prompts are drawn three times as often.
    weights = torch.tensor([3.0 if c in VALIDATION_PROMPTS else 1.0 for c in examples.captions[: examples.known]])
    which = torch.multinomial(weights, args.batch, replacement=True, generator=generator)
    variant = torch.randint(len(examples.styles), (args.batch,), generator=generator)
    if step >= args.steps - args.cooldown:
        settled = torch.rand(args.batch, generator=generator) < SETTLED_QUARTERS / 4
        variant = torch.where(settled, variant % SETTLED_VARIANTS, variant)
    latents, tokens = examples.batch(which, variant)
    tokens[torch.rand(args.batch, generator=generator) < args.caption_dropout] = empty
    return latents, tokens, generator


@torch.no_grad()
def held_out_losses(loss_of, examples: Examples) -> dict[str, float]:
    """Loss on variants that training sees, on variants it never sees, and on captions it never sees."""
    spread = torch.arange(0, examples.known, max(1, examples.known // 128))
    last, unseen = len(examples.styles), torch.arange(examples.known, len(examples.captions)).repeat(7)
    parts = {"seen": (spread, 0), "held_out_variants": (spread, last), "held_out_captions": (unseen, last)}
    losses = {}
    for name, (which, variant) in parts.items():
        batch = examples.batch(which, torch.full_like(which, variant))
        losses[name] = loss_of(*batch, torch.Generator().manual_seed(1)).item()
    return losses


def sample_prompts(examples: Examples) -> list[str]:
    """16 validation prompts, 16 spread over the other known captions, and 8 held-out captions."""
    others = [caption for caption in examples.captions[: examples.known] if caption not in VALIDATION_PROMPTS]
    return [*VALIDATION_PROMPTS, *others[17 :: len(others) // 16][:16], *examples.captions[examples.known :][:8]]


def new_optimizer(parameters: list, args: argparse.Namespace) -> tuple:
    """AdamW, with a learning rate that warms up over 300 steps and falls to zero over the cooldown."""
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 300, max(0, args.steps - step) / args.cooldown)
    )
    return optimizer, schedule


def new_pipeline(*parts) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        *parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    (output / "samples").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae)
    examples, tokenizer = make_examples(args, vae)
    text_encoder, unet, scheduler = new_text_encoder(tokenizer), new_unet(), new_scheduler()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer, schedule = new_optimizer(parameters, args)
    steady = args.steps - args.cooldown
    ema = EMAModel(parameters, decay=args.ema)
    parts = {"unet": unet, "text_encoder": text_encoder, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    cooling = output / f"cooldown-{args.steps}.pt"
    start = load_checkpoint(cooling if cooling.is_file() else output / "checkpoint.pt", parts)
    if start == 0 and args.init:
        start_from(args.init, unet, text_encoder)
    elif start == 0 and args.warm_up_steps:
        warm_up(text_encoder, examples, args.warm_up_steps, args.seed)
    if start == 0:
        ema = parts["ema"] = EMAModel(parameters, decay=args.ema)
    pipeline = new_pipeline(vae, text_encoder, tokenizer, unet, scheduler)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss_of(latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with accelerator.autocast():
            return denoising_loss(unet, text_encoder, scheduler, latents, tokens, generator)

    def report(step: int, recent: list[float]) -> None:
        ema.store(parameters)
        ema.copy_to(parameters)
        losses = {"train": sum(recent) / len(recent), **held_out_losses(loss_of, examples)}
        if step % (2 * args.save_every) == 0 or step == args.steps:
            with accelerator.autocast():
                contact_sheet(draw(pipeline, sample_prompts(examples))).save(output / "samples" / f"{step:06}.png")
        if step == args.steps:
            pipeline.to(dtype=torch.float16)
            # transformers loads a text encoder in the type it was saved in, diffusers everything else in float32.
            pipeline.text_encoder.float()
            pipeline.save_pretrained(output / "pipeline")
            pipeline.to(dtype=torch.float32)
        ema.restore(parameters)
        with (output / "loss.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **losses, "time": time.time()}) + "\n")

    recent = []
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="base", mininterval=30)
    for step in bar:
        loss = loss_of(*training_batch(examples, step, empty, args))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(parameters)
        recent.append(loss.item())
        if (step + 1) % args.save_every == 0 or step + 1 in (steady, args.steps):
            save_checkpoint(output / "checkpoint.pt" if step < steady else cooling, parts, step + 1)
            report(step + 1, recent)
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
            recent = []


if __name__ == "__main__":
    main()
