"""Approximate a LoRA at a smaller rank, cast and check its factors, and describe it in a line."""

from collections.abc import Mapping

import torch

from ....errors import InvalidArgument
from ....export import Factors
from ....formatting import pluralize
from ....merging import truncate
from .names import Parts, shaped


def reduced(parts: Mapping[str, Mapping[str, Factors]], rank: int) -> tuple[Parts, dict[str, float]]:
    """Return the best approximation of every layer at `rank` or less, and the relative errors (Frobenius norm).

    Layers of `rank` or less are unchanged, and have no entry among the errors.
    """
    found: Parts = {}
    errors = {}
    for part, layers in parts.items():
        for layer, factors in layers.items():
            if factors.rank > rank:
                down, up = factors.down.flatten(1), factors.up.flatten(1) * factors.scale
                down, up, errors[f"{part}.{layer}"] = truncate(down, up, rank)
                factors = shaped(Factors(down, up, 1.0), factors.down.shape[1:])
            found.setdefault(part, {})[layer] = factors
    return found, errors


def in_words(errors: Mapping[str, float], rank: int) -> str:
    """Return a line with the mean and the highest relative error of the reduction."""
    if not errors:
        return f"--rank {rank}: no layer has more"
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return (
        f"--rank {rank}: {pluralize(len(errors), 'layer')} reduced; the relative error of a layer's update is "
        f"{mean:.3g} on average, and {errors[worst]:.3g} at most ({worst})"
    )


def in_short(parts: Mapping[str, Mapping[str, Factors]]) -> str:
    """Return the number of layers and their ranks as text."""
    ranks = [factors.rank for layers in parts.values() for factors in layers.values()]
    least, most = min(ranks), max(ranks)
    return f"{pluralize(len(ranks), 'layer')}, " + (f"rank {most}" if least == most else f"ranks {least} to {most}")


def check_finite(parts: Mapping[str, Mapping[str, Factors]], argument: str, fix: str) -> None:
    """Raise `InvalidArgument`, naming `argument`, if a layer's factors or scale are not finite."""
    for part, layers in parts.items():
        for layer, (down, up, scale) in layers.items():
            if not all(torch.isfinite(factor).all() for factor in (down, up * scale)):
                raise InvalidArgument(argument, f"{part}.{layer} has values beyond its dtype's largest number", fix)


def cast(parts: Mapping[str, Mapping[str, Factors]], dtype: torch.dtype) -> Parts:
    """Return the factors in another dtype."""
    return {
        part: {layer: Factors(f.down.to(dtype), f.up.to(dtype), f.scale) for layer, f in layers.items()}
        for part, layers in parts.items()
    }
