"""Validate a browser's settings for generating images, and store them in the images' files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from .runs import Run, RunError

SEEDS = 2**32
LIMITS = {
    "seed": (0, SEEDS - 1, 1), "steps": (1, 150, 1), "guidance": (0, 30, None), "strength": (-2, 2, None),
    "width": (32, 1024, 8), "height": (32, 1024, 8), "images": (1, 8, 1),
}  # fmt: skip
"""Minimum and maximum of each setting, and the number of which it must be a multiple; None: fractions are valid."""
LONGEST = 10_000
"""Maximum number of characters of a prompt."""


@dataclass(frozen=True)
class Request:
    """Settings for generating images. They may have any values from a browser; `clamped` makes them valid."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    width: int = 64
    height: int = 64
    images: int = 1
    strength: float = 1.0

    def checked(self) -> Request:
        """Return the request with numbers of the right type.

        Raises `RunError` for a setting that `clamped` would change: a wrong or missing number, or a long prompt.
        """
        for prompt in (self.prompt, self.negative_prompt):
            if len(str(prompt or "")) > LONGEST:
                raise RunError(f"A prompt has {len(str(prompt)):,} characters: give at most {LONGEST:,}.")
        for name in LIMITS:
            checked_number(name, getattr(self, name), name.capitalize())
        return self.clamped()

    def clamped(self) -> Request:
        """Return the nearest valid request."""
        prompt, negative = (str(text or "").replace("\0", "")[:LONGEST] for text in (self.prompt, self.negative_prompt))
        numbers = {}
        for name, (least, greatest, multiple) in LIMITS.items():
            value = bounded(getattr(self, name), least, greatest, getattr(Request, name), multiple is not None)
            numbers[name] = value // multiple * multiple if multiple else float(value)
        return Request(prompt, negative, **numbers)


def of_samples(run: Run) -> Request:
    """Return the settings with which a run generates samples, with the first of its prompts."""
    config = run.config
    height, width = (config.get(f"validation_{side}") or run.first("resolution") for side in ("height", "width"))
    return Request(
        prompt=next(iter(run.prompts), ""), steps=config.get("num_inference_steps"),
        guidance=config.get("guidance_scale"), width=width, height=height,
    ).clamped()  # fmt: skip


def checked_number(name: str, value: object, label: str) -> int | float:
    """Return the value of the setting `name` as a number.

    Raises `RunError` if the value is not a number within the setting's limits; `label`: what the message calls it.
    """
    least, greatest, multiple = LIMITS[name]
    found = bounded(value, whole=False)
    if not least <= found <= greatest or (multiple and found % multiple):
        kind = {None: "a number", 1: "a whole number"}.get(multiple, f"a multiple of {multiple}")
        written = "empty" if value in (None, "") else str(value)[:40]
        raise RunError(f"{label} is {written}: give {kind} from {least} to {greatest}.")
    return int(found) if multiple else found


def bounded(value, low=-math.inf, high=math.inf, otherwise=math.nan, whole: bool = True):
    """Return `value` as a number clamped to [low, high], or `otherwise` if it is not a finite number.

    `whole`: truncate the number to an integer."""
    try:
        value = float(value) if not whole or isinstance(value, float) else int(value)
        if not math.isfinite(value):
            return otherwise
        return min(high, max(low, int(value) if whole else value))
    except (TypeError, ValueError, OverflowError):
        return otherwise


@dataclass(frozen=True)
class Drawn:
    """A generated image with the settings that reproduce it."""

    image: PIL.Image.Image
    request: Request
    run: str
    weights: str
    """The page's names of the run and of the weights."""


def save_image(drawn: Drawn, path: Path) -> Path:
    """Save an image as a PNG with its settings as metadata in the format of A1111, and return the path."""
    info, request = PngInfo(), drawn.request
    info.add_itxt(
        "parameters",
        f"{request.prompt}\nNegative prompt: {request.negative_prompt}\nSteps: {request.steps}, CFG scale: "
        f"{request.guidance}, Seed: {request.seed}, Size: {request.width}x{request.height}, "
        f"Run: {drawn.run}, Weights: {drawn.weights}, LoRA strength: {request.strength}",
    )
    drawn.image.save(path, format="PNG", pnginfo=info)
    return path
