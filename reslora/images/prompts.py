"""Prompts of samples with their options, from the command line, kohya's prompt files or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidArgument, first_line
from ..options.prompts import as_text, clean

if TYPE_CHECKING:
    from ..options.images import DataOptions, ValidationOptions
    from .model.families.base import Family

UNRELATED = ("a wooden chair in a white room", "a snowy mountain", "a bowl of oranges", "an old man reading a book")
"""Prompts that show how much of the base model's abilities remains after training."""
SUFFIXES = (".txt", ".json")
KOHYA = {  # options of kohya's prompt lines by their letters
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_inference_steps", int),
    "l": ("cfg_scale", float),
    "g": ("guidance_scale", float),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt and its own options, which override those of the run."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    """Seed of the first image; each further image increments it."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    cfg_scale: float | None = None
    """kohya's guidance scale for a negative prompt; 1 disables it.

    This value overrides `guidance_scale`, except for models with embedded guidance.
    """
    reference: int | None = None
    """The index of the sample's reference image; only for edit models."""


def prompts_of(options: ValidationOptions) -> list[Prompt]:
    """Return the prompts of --validation_prompt, each with its own options."""
    own_options = options.validation_prompt_options or ["{}"] * len(options.validation_prompt)
    return [Prompt(text, **json.loads(own)) for text, own in zip(options.validation_prompt, own_options, strict=True)]


def of_lines(text: str, flag: str) -> list[Prompt]:
    """Return the prompts of kohya's lines. `flag` names them in errors."""
    return [Prompt(clean(prompt).strip(), **json.loads(own)) for prompt, own in lines_of(text, flag)]


def from_file(values: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Return the prompts and their options if a prompt file is given instead of prompts; otherwise None."""
    files = [value for value in values if value.lower().endswith((*SUFFIXES, ".toml"))]
    if files and len(values) > 1:
        raise InvalidArgument(
            f"--validation_prompt {files[0]}",
            "a file together with other prompts",
            "give only the file, or only prompts",
        )
    if not files:
        return None
    path = Path(values[0])
    flag = f"--validation_prompt {path}"
    if path.suffix.lower() == ".toml":  # a format of kohya's scripts
        fix = "write a .txt file with one a line, or a .json list"
        raise InvalidArgument(flag, "prompts are not read from TOML", fix)
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = objects_of(text, flag) if path.suffix.lower() == ".json" else lines_of(text, flag)
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({first_line(error)})"
        raise InvalidArgument(flag, problem, "give a file with one prompt per line, a JSON list, or prompts") from None
    if not found:
        raise InvalidArgument(flag, "contains no prompt", "write one prompt per line")
    return [prompt for prompt, _ in found], [options for _, options in found]


def objects_of(text: str, flag: str) -> list[tuple[str, str]]:
    """Return the prompts and options of a JSON list of objects."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(flag, f"is not JSON ({first_line(error)})", "correct it") from None
    if not isinstance(content, list):
        raise InvalidArgument(flag, "is not a list", "write a list of objects, each with a prompt")
    found = []
    for number, entry in enumerate(content, 1):
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str):
            raise InvalidArgument(f"{flag}, entry {number}", "is not an object with a prompt", "correct it")
        own = {name: value for name, value in entry.items() if name != "prompt" and value is not None}
        found.append((prompt, _checked(own, f"{flag}, entry {number}")))
    return found


def lines_of(text: str, flag: str) -> list[tuple[str, str]]:
    """Return the prompts and options of kohya's lines.

    A line is `a cat --n dogs --w 512 --h 768 --d 1 --s 20 --l 7.5`; # begins a comment.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where, own = f"{flag}, line {number}", {}
        prompt, *parts = line.strip().split(" --")
        for part in parts:
            letter, _, value = part.strip().partition(" ")
            if letter.lower() not in KOHYA:
                known = ", ".join(f"--{name}" for name in KOHYA)
                raise InvalidArgument(where, f"--{letter} is unknown", f"remove it; the options are {known}")
            name, read = KOHYA[letter.lower()]
            try:
                own[name] = read(value.strip())
            except ValueError:
                raise InvalidArgument(where, f"--{letter} {value} is not a number", "correct it") from None
        found.append((prompt, _checked(own, where)))
    return found


def _checked(options: dict, where: str) -> str:
    try:
        return as_text(options)
    except ValueError as error:
        raise InvalidArgument(where, first_line(error), "correct it") from None


def resolved(prompt: Prompt, data: DataOptions, validation: ValidationOptions, family: Family) -> Prompt:
    """Return the prompt with all options resolved, and with the guidance scale as the family's pipeline expects it."""
    side = data.resolution[0]
    guidance = prompt.guidance_scale
    if prompt.cfg_scale is not None and not family.takes_guidance:
        guidance = max(0.0, prompt.cfg_scale - (1 - family.unguided))
    return dataclasses.replace(
        prompt, cfg_scale=None, guidance_scale=validation.guidance_scale if guidance is None else guidance,
        width=prompt.width or validation.validation_width or side,
        height=prompt.height or validation.validation_height or side,
        num_inference_steps=prompt.num_inference_steps or validation.num_inference_steps,
    )  # fmt: skip
