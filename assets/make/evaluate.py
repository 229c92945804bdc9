"""Judge the pipeline: contact sheets for a reader to name, and the share of pictures drawn in the target style.

    python assets/make/evaluate.py sheets                        # named.png and random.png, answers apart from them
    python assets/make/evaluate.py style                         # share of the pipeline's samples called OpenMoji
    python assets/make/evaluate.py style --pictures some/folder  # the same for pictures drawn elsewhere
    python assets/make/evaluate.py curve                         # training_curve.png from the two trainings' loss.jsonl

The reader names each picture without seeing the prompts; answers.txt holds them, row by row. The style is told by a
small classifier trained here on the real sets, whose own accuracy on emoji it never saw is printed first.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import SETS, load_pictures, move
from captions import VALIDATION_PROMPTS, is_known
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sheets", "style", "curve"])
    parser.add_argument("--pipeline", default="assets/pipeline")
    parser.add_argument("--pictures", help="folder of PNG pictures to judge in place of the pipeline's samples")
    base_sets = [f"assets/build/{name}" for name in SETS]
    parser.add_argument("--base_style", default=base_sets, nargs="+", help="imagefolders of the styles of the base")
    parser.add_argument("--target_style", default="assets/build/openmoji", help="imagefolder of the style to learn")
    parser.add_argument("--runs", default=["assets/build/vae", "assets/build/base"], nargs="+", help="for curve")
    parser.add_argument("--output", default="assets/build/sheets", help="folder for the sheets or the curve")
    parser.add_argument("--random", type=int, default=40, help="captions drawn at random from the known ones")
    parser.add_argument("--samples", type=int, default=4, help="samples of each validation prompt")
    parser.add_argument("--inference_steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def draw(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int = 0, steps: int = 25, guidance: float = 4.0
) -> list[Image.Image]:
    """One picture of 64x64 for each prompt; picture i comes from seed + i."""
    setting = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 64, "width": 64}
    pictures = []
    for first in range(0, len(prompts), 20):
        part = list(prompts[first : first + 20])
        generator = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        pictures += pipeline(part, generator=generator, **setting).images
    return pictures


def contact_sheet(pictures: list[Image.Image], columns: int = 8, zoom: int = 2) -> Image.Image:
    """The pictures in rows of `columns`, without their captions."""
    side = pictures[0].width * zoom
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((side, side), Image.NEAREST), (i % columns * side, i // columns * side))
    return sheet


def write_sheets(pipeline: DiffusionPipeline, args: argparse.Namespace) -> None:
    """Sheets of the validation prompts and of known captions drawn at random, both in random order."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(args.seed)
    known = [row["text"] for row in load_pictures(args.base_style[0])[1] if is_known(row)]
    sets = {
        "named": [str(prompt) for prompt in random.permutation(VALIDATION_PROMPTS)],
        "random": [str(prompt) for prompt in random.choice(known, args.random, replace=False)],
    }
    answers = []
    for name, prompts in sets.items():
        contact_sheet(draw(pipeline, prompts, args.seed, args.inference_steps, args.guidance)).save(
            output / f"{name}.png"
        )
        answers += [f"{name}: {', '.join(prompts[i : i + 8])}" for i in range(0, len(prompts), 8)]
    (output / "answers.txt").write_text("\n".join(answers) + "\n", encoding="utf-8")
    print(f"{len(known)} known captions; sheets and answers in {output}")


def new_classifier() -> nn.Sequential:
    """Pictures (N, 3, 64, 64) to one logit each; above 0 means the target style."""
    layers, width = [], 3
    for wider in (16, 32, 64):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, 1))


def load_style(folders: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures of a style, and whether each is of one of the fifth of all emoji that the classifier never sees."""
    pictures, rows = zip(*map(load_pictures, folders), strict=True)
    held_out = [zlib.crc32(row["file_name"].encode()) % 5 == 0 for part in rows for row in part]
    return torch.cat(pictures), torch.tensor(held_out)


def train_classifier(args: argparse.Namespace, steps: int = 800, batch: int = 64) -> tuple[nn.Sequential, float]:
    """The classifier, and its accuracy on emoji that it was not trained on: the mean of the base's styles and the
    target's."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    styles = [load_style(folders) for folders in (args.base_style, [args.target_style])]
    trained = [pictures[~held_out] for pictures, held_out in styles]
    classifier = new_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    label = torch.arange(2).repeat_interleave(batch // 2).float()
    for _ in tqdm(range(steps), desc="style classifier"):
        chosen = [part[torch.randint(len(part), (batch // 2,), generator=generator)] for part in trained]
        pictures = move(torch.cat(chosen), generator)
        # Samples are a little blurred and off-colour next to the real pictures; that must not decide.
        for part, sigma in enumerate((0.1, 0.3, 0.5, 0.7)):
            pictures[part::4] = gaussian_blur(pictures[part::4], 5, sigma)
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)
        loss = F.binary_cross_entropy_with_logits(classifier(pictures)[:, 0], label)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    classifier.eval()
    right = [share_of_target(classifier, pictures[held_out]) for pictures, held_out in styles]
    return classifier, (1 - right[0] + right[1]) / 2


@torch.no_grad()
def share_of_target(classifier: nn.Sequential, pictures: torch.Tensor) -> float:
    """Share of the pictures (N, 3, 64, 64) in [-1, 1] called the target style."""
    return (classifier(pictures)[:, 0] > 0).float().mean().item()


def plot_curve(runs: list[str], output: Path) -> None:
    """training_curve.png: an autoencoder's error, or a base's loss on seen and on held-out examples, for each run."""
    import matplotlib.pyplot as plt

    for run in runs:
        if not (Path(run) / "loss.jsonl").is_file():
            raise SystemExit(f"{run}: no loss.jsonl there")
    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), layout="constrained", squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        lines = [json.loads(line) for line in (Path(run) / "loss.jsonl").open(encoding="utf-8")]
        names = ["l1"] if "l1" in lines[0] else [name for name in lines[0] if name not in ("step", "time")]
        for name in names:
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name.replace("_", " "))
        if names == ["l1"]:
            axis.set(title="Autoencoder", ylabel="L1 of a varied batch, pixels in [-1, 1]")
        else:
            axis.set(title="Text encoder and denoiser", ylabel="squared error")
            axis.legend()
        axis.set(xlabel="step", yscale="log")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "training_curve.png", dpi=80)


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    stack = np.stack([np.asarray(picture.convert("RGB").resize((64, 64))) for picture in pictures])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    args = parse_args()
    if args.what == "curve":
        plot_curve(args.runs, Path(args.output))
        return
    pictures = sorted(Path(args.pictures).glob("*.png")) if args.pictures else []
    if args.pictures and not pictures:
        raise SystemExit(f"{args.pictures}: no PNG pictures there")
    pipeline = None
    if not pictures:
        if not (Path(args.pipeline) / "model_index.json").is_file():
            raise SystemExit(f"{args.pipeline}: no diffusers pipeline there")
        pipeline = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
    if args.what == "sheets":
        write_sheets(pipeline, args)
        return
    classifier, accuracy = train_classifier(args)
    print(f"style classifier: {accuracy:.1%} right on held-out emoji")
    if pictures:
        samples = [Image.open(path) for path in pictures]
    else:
        samples = draw(pipeline, VALIDATION_PROMPTS * args.samples, args.seed, args.inference_steps, args.guidance)
    print(f"{share_of_target(classifier, as_tensor(samples)):.1%} of {len(samples)} samples called the target style")


if __name__ == "__main__":
    main()
