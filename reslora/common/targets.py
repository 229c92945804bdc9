"""Targets that fit what cannot be adapted, as a list of layers: PEFT says neither which they are nor what would do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .adapters import LAYERS
from .errors import InvalidArgument

MOST_NAMED = 8  # layers of a module, where it is told what to give in its place


def check_layers(
    model: nn.Module, targets: Sequence[str] | str, whole: Sequence[str] = (), expressions: bool = False
) -> None:
    """Raises `InvalidArgument` for --target_modules that fit a norm or a module made of layers; it names what would do.

    `targets` as PEFT takes them, ends of names or an expression; `whole` is its `modules_to_save`. `expressions`: the
    flag takes one, too.
    """
    if targets == "all-linear":
        return
    fitted = _fitted(model, targets, whole)
    layers = [name for name, module in fitted.items() if _is_layer(module)]
    wrong = next((name for name in fitted if name not in layers), None)
    if wrong is None:
        return
    problem = f"{wrong} cannot be adapted ({type(fitted[wrong]).__name__})"
    if isinstance(targets, str):
        such = f", such as {layers[0]}" if layers else ""
        raise InvalidArgument(f"--target_modules {targets}", problem, f"let it fit layers alone{such}")
    target = next(target for target in targets if _ends(wrong, target))
    inside = list(dict.fromkeys(f"{target}{rest}" for _, rest in _parts(fitted, target) if rest))
    names = " ".join(inside[:MOST_NAMED]) + (" or the like" if len(inside) > MOST_NAMED else "")
    fix = f"give {names}" if names else "leave it out"
    if alone := next((name for name in layers if _ends(name, target)), None):
        problem += f", and {alone} can"
        by_name = ", and ".join(filter(None, [names, f"{alone} and the like by their whole names"]))
        in_one = f"{shlex.quote(_expression(fitted, targets))} in place of all"
        fix = f"give {in_one if expressions else by_name}"
    raise InvalidArgument(f"--target_modules {target}", problem, fix)


def _fitted(model: nn.Module, targets: Sequence[str] | str, whole: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that PEFT would adapt, by name."""
    asked = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(target_modules=asked, modules_to_save=list(whole) or None)
    return {name: part for name, part in model.named_modules() if name and check_target_module_exists(config, name)}


def _is_layer(module: nn.Module) -> bool:
    """Whether PEFT adapts it; of other types are quantised layers: a matrix of its own, and not made of others."""
    if isinstance(module, (*LAYERS, nn.MultiheadAttention)):
        return True
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return next(module.children(), None) is None and any(tensor.ndim > 1 for tensor in own)


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _parts(fitted: dict[str, nn.Module], target: str) -> Iterator[tuple[str, str]]:
    """What is before and after the target in the name of each layer that it fits, or that is inside of what it fits."""
    for name, module in fitted.items():
        if _ends(name, target):
            inside = [f".{rest}" for rest, part in module.named_modules() if isinstance(part, LAYERS)]
            yield from ((name.removesuffix(target), rest) for rest in ([""] if _is_layer(module) else inside))


def _expression(fitted: dict[str, nn.Module], targets: Sequence[str]) -> str:
    """Fits what the targets fit of layers, and the layers inside of what else they fit, in blocks of any number."""
    parts = []
    for target in targets:
        if all(_is_layer(module) for name, module in fitted.items() if _ends(name, target)):
            parts.append(re.escape(target))
            continue
        for start, rest in _parts(fitted, target):  # whole names: their ends may fit what is no layer
            any_block = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(start))
            parts.append(any_block + re.escape(target + rest))
    return rf"(.*\.)?({'|'.join(dict.fromkeys(parts))})"
