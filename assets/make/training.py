"""What the trainings of both pipelines share: examples encoded once, a warm-up, a loop that survives being killed."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from augment import STYLES, load_pictures, mirrorable, move, restyle, styled_caption
from captions import VALIDATION_PROMPTS, is_held_out, is_known, words
from checkpoint import load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel
from evaluate import contact_sheet, draw
from torch import nn
from tqdm import tqdm

HELD_OUT_VARIANTS = 2
# Details need repetition: in the cooldown so many of four examples are one of a picture's first plain variants.
SETTLED_VARIANTS, SETTLED_QUARTERS = 6, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both trainings have; the defaults of --output, --vae, --batch and --steps are theirs."""
    parser.add_argument("--data", default="assets/build/noto")
    parser.add_argument("--cooldown", type=int, default=4000, help="last steps, in which the learning rate falls to 0")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--warm_up_steps", type=int, default=2000, help="text encoder's own steps, at first")
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)


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
def encode_variants(
    pictures: torch.Tensor, rows: list[dict], vae: AutoencoderKL, styles: list[str], seed: int
) -> torch.Tensor:
    """Latents (N, V + HELD_OUT_VARIANTS, 16, 8, 8) of every picture moved, and drawn in each of V styles."""
    generator = torch.Generator().manual_seed(seed)
    mirror = torch.tensor([mirrorable(row["text"]) for row in rows])
    variants = []
    for style in tqdm(styles + ["plain"] * HELD_OUT_VARIANTS, desc="encode"):
        moved = restyle(move(pictures, generator, mirror, largest=1.0, reach=2), style, generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in moved.split(64)])
        variants.append((latents * vae.config.scaling_factor).half())
    return torch.stack(variants, 1)


def make_examples(args: argparse.Namespace, vae: AutoencoderKL, counts: dict, tokenize) -> Examples:
    """Read the pictures, choose the captions, and encode `counts` variants of each style unless an earlier run has.

    `tokenize` turns a list of captions into their token ids (N, length).
    """
    pictures, rows = load_pictures(args.data)
    known_words = {word for row in rows if is_known(row) for word in words(row["text"])}
    chosen = [i for i, row in enumerate(rows) if is_known(row)]
    known = len(chosen)
    chosen += [i for i, row in enumerate(rows) if is_held_out(row, known_words)]
    captions = [rows[i]["text"] for i in chosen]
    styles = [style for style, count in counts.items() for _ in range(count)]
    cache = Path(args.output) / "latents.pt"
    if not cache.is_file():
        torch.save(encode_variants(pictures[chosen], [rows[i] for i in chosen], vae, styles, args.seed), cache)
    tokens = tokenize([styled_caption(caption, style) for caption in captions for style in STYLES])
    return Examples(captions, known, styles, tokens.view(len(captions), len(STYLES), -1), torch.load(cache))


def warm_up(text_encoder: nn.Module, read: Callable, width: int, examples: Examples, steps: int, seed: int) -> None:
    """Let the text encoder foretell the latents from the caption alone, so that captions of unlike pictures differ
    from the denoiser's first step on; finding that out through the denoiser takes it thousands of steps.

    `read` turns token ids (N, length) into what the denoiser will see of them, as (N, width).
    """
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, examples.latents[0, 0].numel())
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    bar = tqdm(range(steps), desc="warm up text encoder", mininterval=10)
    for _ in bar:
        which = torch.randint(examples.known, (128,), generator=generator)
        latents, tokens = examples.batch(which, torch.randint(len(examples.styles), (128,), generator=generator))
        loss = F.mse_loss(head(read(tokens)), latents.flatten(1))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(mse=f"{loss.item():.3f}", refresh=False)


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


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision; afterwards it is as it was, but for what half precision has rounded."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    pipeline.to(dtype=torch.float32)
    # Where no type is asked for, transformers loads the one named here, and diffusers everything else in float32.
    config = folder / "text_encoder" / "config.json"
    named = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(named, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    args: argparse.Namespace,
    modules: dict[str, nn.Module],
    pipeline: DiffusionPipeline,
    examples: Examples,
    empty: torch.Tensor,
    loss_of: Callable,
    begin: Callable,
) -> None:
    """Train `modules`, parts of the pipeline, until --steps, and write it to --output; go on from a checkpoint there.

    `loss_of(latents, token ids, generator)` is the loss of a batch, `empty` the token ids of no caption, and `begin()`
    is called before the first step of a run that has no checkpoint.
    """
    output, steady = Path(args.output), args.steps - args.cooldown
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer, schedule = new_optimizer(parameters, args)
    ema = EMAModel(parameters, decay=args.ema)
    parts = {**modules, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    cooling = output / f"cooldown-{args.steps}.pt"
    start = load_checkpoint(cooling if cooling.is_file() else output / "checkpoint.pt", parts)
    if start == 0:
        begin()
        ema = parts["ema"] = EMAModel(parameters, decay=args.ema)

    def report(step: int, recent: list[float]) -> None:
        ema.store(parameters)
        ema.copy_to(parameters)
        with accelerator.autocast():
            losses = {"train": sum(recent) / len(recent), **held_out_losses(loss_of, examples)}
        if step % (2 * args.save_every) == 0 or step == args.steps:
            with accelerator.autocast():
                sheet = contact_sheet(draw(pipeline, sample_prompts(examples)))
            (output / "samples").mkdir(exist_ok=True)
            sheet.save(output / "samples" / f"{step:06}.png")
        if step == args.steps:
            save_pipeline(pipeline, output / "pipeline")
        ema.restore(parameters)
        with (output / "loss.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **losses, "time": time.time()}) + "\n")

    recent = []
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train", mininterval=30)
    for step in bar:
        batch = training_batch(examples, step, empty, args)
        with accelerator.autocast():
            loss = loss_of(*batch)
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
