"""Options of a prompt, as JSON."""

import argparse
import json
import math
from collections.abc import Callable

from ..checks import is_number, is_whole, number_in_words, whole_in_words
from ..errors import first_line

LONGEST_SIDE = 65536  # pixels; far more than a model can generate


def options_text(text: str) -> str:
    """Return a prompt's options as validated JSON; the parser of a command-line option."""
    try:
        return as_text(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {first_line(error)}") from None


def as_text(options: object) -> str:
    """Return a prompt's options as JSON.

    Raises `ValueError` naming the first invalid option.
    """
    if not isinstance(options, dict):
        raise ValueError("not a JSON object with the options of a prompt")
    for name, value in options.items():
        if name not in CHECKS:
            raise ValueError(f"{name} is not an option of a prompt; the options are {', '.join(CHECKS)}")
        fits, words = CHECKS[name]
        if not fits(value):
            raise ValueError(f"{name} {value!r} is not {words}")
    if "negative_prompt" in options:
        options = options | {"negative_prompt": clean(options["negative_prompt"]).strip()}
    return json.dumps(options, ensure_ascii=False)


def clean(text: str) -> str:
    """Return the text without NUL and lone surrogates, which tokenizers reject."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _whole(minimum: int, most: float = math.inf) -> tuple[Callable[[object], bool], str]:
    return lambda value: is_whole(value, minimum, most), whole_in_words(minimum, most)


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_number(value, 0)


_SCALE = (_is_scale, number_in_words(0))
CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "negative_prompt": (lambda value: isinstance(value, str), "a text"),
    "width": _whole(8, LONGEST_SIDE),
    "height": _whole(8, LONGEST_SIDE),
    "seed": _whole(0, 2**63 - 1),
    "num_inference_steps": _whole(1),
    "guidance_scale": _SCALE,
    "cfg_scale": _SCALE,
}
