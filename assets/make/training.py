"""What the trainings of both pipelines share: examples encoded once, a warm-up, a loop that survives being killed."""

import argparse
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from augment import SETS, STYLES, load_pictures, load_pixels, mirrorable, move, restyle, styled_caption
from captions import VALIDATION_PROMPTS, is_held_out, is_known, words
from checkpoint import load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

HELD_OUT_VARIANTS = 2
SETTLED_VARIANTS = 4  # of each picture: the first plain ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both trainings have; the defaults of --output, --vae, --batch and --steps are theirs."""
    parser.add_argument("--data", default="assets/build", help="what make_data.py wrote")
    parser.add_argument("--sets", default=list(SETS), nargs="+", choices=SETS)
    parser.add_argument(
        "--captions_of",
        metavar="FOLDER",
        help="learn this imagefolder's captions and the validation prompts only",
    )
    parser.add_argument("--cooldown", type=int, default=10000, help="last steps, in which the learning rate falls to 0")
    parser.add_argument(
        "--settled", type=int, default=0, help="of four examples of the cooldown, how many are of a few variants"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--caption_dropout", type=float, default=0.1, help="share of examples without any caption")
    parser.add_argument("--subject_dropout", type=float, default=0.05, help="share whose caption names the set alone")
    parser.add_argument("--set_dropout", type=float, default=0.3, help="share whose caption does not name the set")
    parser.add_argument("--warm_up_steps", type=int, default=2000, help="text encoder's own steps, at first")
    parser.add_argument("--mixed_precision", default="bf16", choices=["no", "bf16"])
    parser.add_argument("--variants", type=int, default=12, help="of each image's plain variants, encoded beforehand")
    parser.add_argument("--report_every", type=int, default=500, help="steps between held-out losses")
    parser.add_argument("--save_minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)


@dataclass
class Examples:
    """The pictures of known captions, those of held-out ones behind them, and every picture's cached latents."""

    captions: list[str]
    """Caption of each picture, without its set."""
    sets: list[str]
    """Set of each picture."""
    known: int
    styles: list[str]
    """Style of each of the first V variants; HELD_OUT_VARIANTS plain ones follow, which training never sees."""
    tokens: torch.Tensor
    """Token ids (pictures, styles in the order of STYLES, with and without the set, length)."""
    no_subject: torch.Tensor
    """Token ids (pictures, length) of captions that name the set alone."""
    latents: torch.Tensor
    """Scaled latents (pictures, V + HELD_OUT_VARIANTS, C, 8, 8), fp16."""

    def batch(
        self, which: torch.Tensor, variant: torch.Tensor, unnamed: torch.Tensor | int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of these pictures' variants, and token ids of their captions; where `unnamed`, without the set."""
        styles = self.styles + ["plain"] * HELD_OUT_VARIANTS
        style = torch.tensor([STYLES.index(style) for style in styles])[variant]
        return self.latents[which, variant].float(), self.tokens[which, style, unnamed]


@torch.no_grad()
def encode_variants(
    pictures: torch.Tensor, rows: list[dict], vae: AutoencoderKL, styles: list[str], seed: int
) -> torch.Tensor:
    """Latents (N, V + HELD_OUT_VARIANTS, C, 8, 8) of every picture (N, 3, 128, 128; bytes) moved, and drawn in each of
    V styles."""
    generator = torch.Generator().manual_seed(seed)
    mirror = torch.tensor([mirrorable(row["text"]) for row in rows])
    variants = []
    for style in tqdm(styles + ["plain"] * HELD_OUT_VARIANTS, desc="encode"):
        latents = []
        for part, may in zip(pictures.split(64), mirror.split(64), strict=True):
            moved = restyle(move(part / 127.5 - 1, generator, may, largest=1.0, reach=2), style, generator)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encode(moved).latent_dist.mean.float() * vae.config.scaling_factor)
        variants.append(torch.cat(latents).half())
    return torch.stack(variants, 1)


def load_sets(args: argparse.Namespace) -> tuple[torch.Tensor, list[dict], int]:
    """Pictures (N, 3, 128, 128; bytes) and rows of all sets, each row with its "set"; the first ones, as many as the
    number says, are of known captions, the others of held-out ones."""
    pictures, rows = [], []
    for name in args.sets:
        found, its_rows = load_pixels(f"{args.data}/{name}-128")
        pictures.append(found)
        rows += [row | {"set": name} for row in its_rows]
    known_words = {word for row in rows if is_known(row) for word in words(row["text"])}
    known = [i for i, row in enumerate(rows) if is_known(row)]
    if args.captions_of:
        learnt = {*VALIDATION_PROMPTS, *(row["text"] for row in load_pictures(args.captions_of)[1])}
        known = [i for i in known if rows[i]["text"] in learnt]
    held_out = [i for i, row in enumerate(rows) if row["set"] == args.sets[0] and is_held_out(row, known_words)]
    chosen = [*known, *held_out]
    return torch.cat(pictures)[chosen], [rows[i] for i in chosen], len(known)


def make_examples(args: argparse.Namespace, vae: AutoencoderKL, tokenize) -> Examples:
    """Read the pictures, choose the captions, and encode variants in each style unless an earlier training of
    either pipeline has.

    `tokenize` turns a list of captions into their token ids (N, length).
    """
    pictures, rows, known = load_sets(args)
    captions, sets = ([row[key] for row in rows] for key in ("text", "set"))
    styles = ["plain"] * args.variants + list(STYLES[1:])
    weights = sum(parameter.double().sum().item() for parameter in vae.parameters())
    made_of = repr((weights, args.sets, captions[:known], styles, args.seed))
    cache = Path(args.data) / f"latents-{zlib.crc32(made_of.encode()):08x}.pt"
    if not cache.is_file():
        latents = encode_variants(pictures, rows, vae, styles, args.seed)
        torch.save(latents, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").replace(cache)
    texts = [
        styled_caption(row["text"], style, of) for row in rows for style in STYLES for of in (row["set"], None)
    ] + [styled_caption("", of=row["set"]) for row in rows]
    tokens = tokenize(texts).split(len(texts) - len(rows))
    by_style = tokens[0].view(len(rows), len(STYLES), 2, -1)
    return Examples(captions, sets, known, styles, by_style, tokens[1], torch.load(cache))


def start_from(pipeline: str, modules: dict[str, nn.Module]) -> None:
    """Load the weights of an earlier pipeline, made with the same tokenizer, in float32.

    Weights of another size stay new and are named: those that read and write an autoencoder of other channels.
    """
    for name, module in modules.items():
        saved = type(module).from_pretrained(pipeline, subfolder=name, torch_dtype=torch.float32).state_dict()
        own = module.state_dict()
        new = [key for key in own if saved[key].shape != own[key].shape]
        module.load_state_dict(own | {key: value for key, value in saved.items() if key not in new})
        if new:
            print(f"{name}: new, as {pipeline} has them in another size: {', '.join(new)}")


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
    """Step's own batch, from the seed and the step alone: a resumed run sees what an unbroken one would have.

    No caption names the set where there is one alone.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    # What many sets draw is met more often, each drawing of it less. Validation prompts are three times as frequent.
    known = examples.captions[: examples.known]
    frequency = Counter(known)
    set_dropout, subject_dropout = (args.set_dropout, args.subject_dropout) if len(args.sets) > 1 else (1.0, 0.0)
    weights = torch.tensor([(3.0 if c in VALIDATION_PROMPTS else 1.0) / frequency[c] ** 0.5 for c in known])
    which = torch.multinomial(weights, args.batch, replacement=True, generator=generator)
    variant = torch.randint(len(examples.styles), (args.batch,), generator=generator)
    if step >= args.steps - args.cooldown:
        settled = torch.rand(args.batch, generator=generator) < args.settled / 4
        variant = torch.where(settled, variant % SETTLED_VARIANTS, variant)
    luck = torch.rand(3, args.batch, generator=generator)
    latents, tokens = examples.batch(which, variant, (luck[0] < set_dropout).long())
    no_subject, no_caption = luck[1] < subject_dropout, luck[2] < args.caption_dropout
    tokens[no_subject] = examples.no_subject[which[no_subject]]
    tokens[no_caption] = empty
    return latents, tokens, generator


@torch.no_grad()
def held_out_losses(loss_of, examples: Examples) -> dict[str, float]:
    """Loss on variants that training sees, on variants it never sees, and on captions it never sees."""
    spread = torch.arange(0, examples.known, max(1, examples.known // 128))
    last, unseen = len(examples.styles), torch.arange(examples.known, len(examples.captions)).repeat(7)
    parts = {"seen": (spread, 0), "held_out_variants": (spread, last), "held_out_captions": (unseen, last)}
    losses, unnamed = {}, int(len(set(examples.sets)) == 1)
    for name, (which, variant) in parts.items():
        batch = examples.batch(which, torch.full_like(which, variant), unnamed)
        losses[name] = loss_of(*batch, torch.Generator().manual_seed(1)).item()
    return losses


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


def report(
    step: int,
    recent: list[float],
    pipeline: DiffusionPipeline,
    judged: tuple[Callable, Examples],
    args: argparse.Namespace,
) -> None:
    """Writes the losses of a step; the pipeline as well after the last step."""
    output = Path(args.output)
    losses = {"train": sum(recent) / len(recent), **held_out_losses(*judged)}
    if step == args.steps:
        save_pipeline(pipeline, output / "pipeline")
    with (output / "loss.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step, **losses, "time": time.time()}) + "\n")


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

    recent, saved = [], time.monotonic()
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
        reports = (step + 1) % args.report_every == 0 or step + 1 in (steady, args.steps)
        if reports or time.monotonic() - saved > 60 * args.save_minutes:
            save_checkpoint(output / "checkpoint.pt" if step < steady else cooling, parts, step + 1)
            saved = time.monotonic()
        if reports:
            ema.store(parameters)
            ema.copy_to(parameters)
            with accelerator.autocast():
                report(step + 1, recent, pipeline, (loss_of, examples), args)
            ema.restore(parameters)
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
            recent = []
