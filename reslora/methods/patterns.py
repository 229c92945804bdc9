"""Options for ranks, alphas and learning rates of single layers, `NAME=VALUE`; NAME matches layers as in PEFT.

PEFT uses the first entry that matches a layer, and sorts entries when it writes a file. An entry for a complete name
does not depend on this order, so entries are expanded to complete names before an adapter is created.

Functions import PEFT when they are called, so that `--help` appears at once.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from ..checks import is_number, is_whole, number_in_words, whole_in_words
from ..errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

FIELDS = ("rank_pattern", "alpha_pattern")
"""Fields of PEFT's configurations, and the names of the options."""
LEARNING_RATES = "lr_pattern"
HELP = {
    "rank_pattern": "ranks of single layers, such as attn2.to_k=4 or mid_block.*=16; NAME is the end of a layer's name "
    "as a regular expression. Alpha is unchanged, so a lower rank gives a larger scale",
    "alpha_pattern": "alphas of single layers, such as attn2.to_k=8; lora_x2 multiplies these as well",
    LEARNING_RATES: "factors of the learning rates of single layers, such as mid_block.*=0.5 attn2.to_k=2; NAME as "
    "in --rank_pattern. A layer that several match gets the product. Layers of trained text encoders have their "
    "encoder's name in front, as in text_encoder.*=2",
}


def entries(field: str, texts: Iterable[str] | None) -> dict[str, Any]:
    """Return PEFT's `rank_pattern` or `alpha_pattern`, or the factors of `lr_pattern`, from `NAME=VALUE` texts.

    A text may have several entries, with spaces between them. Raises `InvalidArgument` for another format, for a name
    given twice, and for a value that is not a rank (a whole number above 0), or not an alpha or factor (a finite number
    above 0).
    """
    found: dict[str, Any] = {}
    for text in " ".join(texts or ()).split():
        name, _, value = text.rpartition("=")
        argument, fix = f"--{field} {text}", "give NAME=VALUE, such as attn2.to_k=4"
        if not name:
            raise InvalidArgument(argument, "not NAME=VALUE", fix)
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
        if field != "rank_pattern" and is_number(float(text), 0, exclusive=True):
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
            values = values_of_layers(field, given, layers)
            setattr(config, field, {_whole(name): value for name, value in values.items()})
    ranks = getattr(config, "rank_pattern", None) or {}
    for name, module in layers.items() if config.peft_type != "LOKR" else ():
        rank, least = ranks.get(_whole(name), 0), smaller_side(module)
        if rank > least:
            problem = f"the smaller dimension of {name} is {least}"
            raise InvalidArgument(f"--rank_pattern {rank}", problem, f"give a rank of at most {least}")


def values_of_layers(field: str, given: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    """Return complete layer name -> value, for each layer that a pattern of the option --`field` matches.

    A layer that several patterns match gets the product of their factors of the learning rate. Raises `InvalidArgument`
    if a pattern matches none of `layers`, with the most similar names, or if two patterns give a layer different ranks
    or alphas.
    """
    from peft.utils.other import get_pattern_key

    found: dict[str, Any] = {}
    fitted: dict[str, str] = {}
    layers = list(layers)
    for pattern, value in given.items():
        fitting = [name for name in layers if name == pattern or get_pattern_key([pattern], name) != name]
        argument = f"--{field} {pattern}={value}"
        if not fitting:
            fix = f"give the end of an adapted layer's name, or {pattern}.* for all layers inside it"
            problem = f"no adapted layer matches; the most similar are {', '.join(nearest(pattern, layers))}"
            raise InvalidArgument(argument, problem, fix)
        for name in fitting:
            if field == LEARNING_RATES:
                found[name] = found.get(name, 1) * value
            elif found.setdefault(name, value) != value:
                problem = f"{name} also matches {fitted[name]}={found[name]}"
                raise InvalidArgument(argument, problem, "change the patterns so that each layer matches only one")
            fitted.setdefault(name, pattern)
    return found


def nearest(pattern: str, layers: Iterable[str]) -> list[str]:
    """Return the three layer names most similar to a pattern.

    Similarity is the number of characters of the pattern that appear in the name in order; ties prefer shorter names.
    """

    def similarity(name: str) -> tuple[int, int]:
        """Return the sort key of a layer's name: matching characters, and the negative length."""
        blocks = SequenceMatcher(None, pattern, name, autojunk=False).get_matching_blocks()
        return sum(block.size for block in blocks), -len(name)

    return heapq.nlargest(3, layers, key=similarity)


def _whole(name: str) -> str:
    """Return a pattern that matches only this name."""
    return "^" + re.escape(name)
