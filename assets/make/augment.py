"""Pictures of the emoji sets, and the ways to vary them: where the drawing sits, and how it is drawn.

All pictures are float tensors (N, 3, 64, 64) in [-1, 1] on a white (+1) ground. A change of style comes with a
caption word ("outlined red apple"), so that a plain caption keeps meaning the plain style.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

STYLES = ("plain", "tinted", "grey", "posterised", "outlined")

# A mirrored drawing of one of these would contradict its caption.
SIDED_WORDS = {"left", "right", "clockwise", "anticlockwise", "forward", "backward", "magnifying", "button", "letters"}


def load_pictures(folder: str | Path) -> tuple[torch.Tensor, list[dict]]:
    """Read an imagefolder: pictures (N, 3, 64, 64) in [-1, 1], and the N rows of its metadata.jsonl."""
    folder = Path(folder)
    if not (folder / "metadata.jsonl").is_file():
        raise SystemExit(f"{folder}: no metadata.jsonl there; make the picture sets with make_data.py first")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, rows


def mirrorable(caption: str) -> bool:
    """Whether the caption still holds for the picture's mirror image."""
    return not SIDED_WORDS & set(caption.replace("-", " ").split())


def move(
    pictures: torch.Tensor,
    generator: torch.Generator,
    mirror: torch.Tensor | bool = True,
    largest: float = 1.06,
    reach: float = 3,
) -> torch.Tensor:
    """Flip half the pictures that `mirror` (N) allows, scale by 0.88 to `largest`, turn by up to 8 degrees, and shift
    by up to `reach` pixels."""
    n = len(pictures)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, scale = uniform(-8, 8) * math.pi / 180, uniform(0.88, largest)
    flip = 1 - 2 * ((uniform(0, 1) < 0.5) & torch.as_tensor(mirror)).float()
    shift = [uniform(-reach, reach) * 2 / pictures.shape[-1] for _ in range(2)]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack([torch.stack([flip * cos, -flip * sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    # Sampling pads with 0, which must mean white.
    return (F.grid_sample(pictures - 1, grid, mode="bicubic", align_corners=False) + 1).clamp(-1, 1)


def restyle(pictures: torch.Tensor, style: str, generator: torch.Generator) -> torch.Tensor:
    """Draw the pictures in one of STYLES; white stays white."""
    n = len(pictures)
    if style == "plain":
        return pictures
    if style == "tinted":
        strength = 0.35 + 1.1 * torch.rand(n, 3, 1, 1, generator=generator)
        return (1 - (1 - pictures) * strength).clamp(-1, 1)
    if style == "grey":
        return (pictures * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(pictures)
    if style == "posterised":
        levels = torch.randint(2, 4, (n, 1, 1, 1), generator=generator)
        return ((pictures + 1) / 2 * levels).round() / levels * 2 - 1
    if style == "outlined":
        # An edge is where the neighbourhood's brightest and darkest values differ in some channel.
        spread = F.max_pool2d(pictures, 3, 1, 1) + F.max_pool2d(-pictures, 3, 1, 1)
        edge = ((spread.amax(1, keepdim=True) - 0.35) / 0.35).clamp(0, 1)
        lighter = 1 - (1 - pictures) * (0.6 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator))
        return lighter * (1 - edge) - edge
    raise ValueError(f"unknown style {style!r}; one of {', '.join(STYLES)}")


def styled_caption(caption: str, style: str) -> str:
    """The caption that says the style too; the plain style goes without saying."""
    return caption if style == "plain" else f"{style} {caption}"
