"""Pictures of the emoji sets, and the ways to vary them: where the drawing sits, and how it is drawn.

All pictures are float tensors (N, 3, side, side) in [-1, 1] on a white (+1) ground. A change of style comes with a
caption word ("outlined red apple"), so that a plain caption keeps meaning the plain style; the set that a picture is
of is named behind ("red apple, noto style"). Fine-tuning learns Twemoji or OpenMoji, and Fluent is for external
checks: no denoiser or text encoder sees them.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SETS = ("noto", "blob", "firefox", "emojione", "streamline")
STYLES = ("plain", "tinted", "grey", "posterised", "outlined")

SIDE = 64

# A mirrored drawing of one of these would contradict its caption.
SIDED_WORDS = {"left", "right", "clockwise", "anticlockwise", "forward", "backward", "magnifying", "button", "letters"}


def load_pixels(folder: str | Path) -> tuple[torch.Tensor, list[dict]]:
    """Read an imagefolder: pictures (N, 3, side, side) in bytes, and the N rows of its metadata.jsonl."""
    folder = Path(folder)
    if not (folder / "metadata.jsonl").is_file():
        raise SystemExit(f"{folder}: no metadata.jsonl there; make the picture sets with make_data.py first")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), rows


def load_pictures(folder: str | Path) -> tuple[torch.Tensor, list[dict]]:
    """Read an imagefolder: pictures (N, 3, side, side) in [-1, 1], and the N rows of its metadata.jsonl."""
    pictures, rows = load_pixels(folder)
    return pictures / 127.5 - 1, rows


def held_out(row: dict) -> bool:
    """Whether the autoencoder never sees this emoji in any set: one in sixteen."""
    return zlib.crc32(row["file_name"].encode()) % 16 == 0


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
    """Pictures (N, 3, 64, 64), half of those that `mirror` (N) allows flipped, scaled by 0.88 to `largest`, turned by
    up to 8 degrees, and shifted by up to `reach` pixels.

    Given at 128x128 they come out as sharp as if they had been drawn so; at 64x64 they lose a sixth of their gradients.
    """
    n, side = len(pictures), pictures.shape[-1]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, scale = uniform(-8, 8) * math.pi / 180, uniform(0.88, largest)
    flip = 1 - 2 * ((uniform(0, 1) < 0.5) & torch.as_tensor(mirror)).float()
    shift = [uniform(-reach, reach) * 2 / SIDE for _ in range(2)]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack([torch.stack([flip * cos, -flip * sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(matrix, [n, 3, SIDE, SIDE], align_corners=False)
    # Sampling pads with 0, which must mean white. Four neighbours at 128x128 are what one pixel at 64x64 covers.
    mode = "bilinear" if side == 2 * SIDE else "bicubic"
    return (F.grid_sample(pictures - 1, grid, mode=mode, align_corners=False) + 1).clamp(-1, 1)


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


def styled_caption(caption: str, style: str = "plain", of: str | None = None) -> str:
    """The caption that says the style too, and the set; the plain style goes without saying."""
    named = caption if style == "plain" else f"{style} {caption}".strip()
    return named if of is None else f"{named}, {of} style".removeprefix(", ")
