"""Options for ranks and alphas of single layers, `NAME=VALUE`, where NAME matches layers as in PEFT.

PEFT uses the first entry that matches a layer, and sorts entries when it writes a file. An entry for a complete name
does not depend on this order, so entries are expanded to complete names before an adapter is created.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..checks import is_number, is_whole, number_in_words, whole_in_words
from ..errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

FIELDS = ("rank_pattern", "alpha_pattern")
"""Fields of PEFT's configurations, and the names of the options."""
HELP = {
    "rank_pattern": "ranks of single layers, such as attn2.to_k=4 or mid_block.*=16; NAME is the end of a layer's name "
    "as a regular expression. Alpha stays as it is, so the scale grows where the rank is lower",
    "alpha_pattern": "alphas of single layers, such as attn2.to_k=8; lora_x2 and lora_x4 multiply these as well",
}


def entries(field: str, texts: Iterable[str] | None) -> dict[str, Any]:
    """Return PEFT's `rank_pattern` or `alpha_pattern` from `NAME=VALUE` texts.

    Raises `InvalidArgument` for another format, for a name given twice, and for a value that is not a rank (a whole
    number above 0) or an alpha (a finite number above 0).
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, _, value = text.rpartition("=")
        argument, fix = f"--{field} {text}", "give NAME=VALUE, such as attn2.to_k=4"
        if not name:
            raise InvalidArgument(argument, "no NAME=VALUE", fix)
        try:
            re.compile(name)
        except re.error as error:
            raise InvalidArgument(argument, f"{name} is not a regular expression ({error})", fix) from None
        number = _number(field, value)
        if number is None:
            words = whole_in_words(1) if field == "rank_pattern" else number_in_words(0, exclusive=True)
            raise InvalidArgument(argument, f"{value!r} is not {words}", fix)
        if name in found:
            raise InvalidArgument(argument, f"{name} is given twice", "give it once")
        found[name] = number
    return found


def _number(field: str, text: str) -> float | None:
    with contextlib.suppress(ValueError):
        if is_whole(int(text), 1):
            return int(text)
    with contextlib.suppress(ValueError):
        if field == "alpha_pattern" and is_number(float(text), 0, exclusive=True):
            return float(text)
    return None


def spell_out(model: nn.Module, config: PeftConfig) -> None:
    """Replace the configuration's patterns by entries for complete names, one for each layer that a pattern matches.

    Raises `InvalidArgument` if a pattern matches no adapted layer of `model`, if two patterns with different values
    match the same layer, or if a rank is larger than the layer's smaller dimension (LoKr accepts any rank).
    """
    from .adapters import smaller_side, targeted

    layers = dict(targeted(model, config))
    for field in FIELDS:
        if given := getattr(config, field, None):
            setattr(config, field, _of_whole_names(f"--{field}", given, layers))
    ranks = getattr(config, "rank_pattern", None) or {}
    for name, module in layers.items() if config.peft_type != "LOKR" else ():
        rank, least = ranks.get(_whole(name), 0), smaller_side(module)
        if rank > least:
            problem = f"{name} has {least} features on its smaller side"
            raise InvalidArgument(f"--rank_pattern {rank}", problem, f"give a rank of at most {least}")


def _of_whole_names(flag: str, given: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    from peft.utils.other import get_pattern_key

    found: dict[str, Any] = {}
    fitted: dict[str, str] = {}
    for pattern, value in given.items():
        fitting = [name for name in layers if name == pattern or get_pattern_key([pattern], name) != name]
        if not fitting:
            fix = f"give the end of an adapted layer's name; {pattern}.* is all that begins so"
            raise InvalidArgument(f"{flag} {pattern}={value}", "no adapted layer is called so", fix)
        for name in fitting:
            if found.setdefault(_whole(name), value) != value:
                problem = f"{name} fits {fitted[name]}={found[_whole(name)]} as well"
                raise InvalidArgument(f"{flag} {pattern}={value}", problem, "let each layer fit one of them")
            fitted.setdefault(name, pattern)
    return found


def _whole(name: str) -> str:
    """Return a pattern that matches only this name."""
    return "^" + re.escape(name)
