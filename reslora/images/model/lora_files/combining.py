"""Sum LoRAs exactly, and approximate a LoRA at a smaller rank."""

from collections.abc import Mapping, Sequence

import torch

from ....errors import InvalidArgument
from ....export import Factors
from ....formatting import pluralize
from ....merging import truncate
from .names import Layer, Parts, shaped


def summed(loras: Sequence[Parts], weights: Sequence[float]) -> Parts:
    """Return the weighted sum of LoRAs, `sum_i w_i s_i B_i A_i`, for every layer that at least one LoRA has.

    The factors are [A_1; A_2; ...] and [w_1 s_1 B_1, w_2 s_2 B_2, ...]. If only one LoRA has a layer, its factors are
    unchanged, and its scale is multiplied by the weight. Raises `ValueError` if LoRAs have different shapes for a
    layer.
    """
    terms: dict[Layer, list[Factors]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for part, layers in lora.items():
            for layer, factors in layers.items():
                terms.setdefault((part, layer), []).append(factors._replace(scale=factors.scale * weight))
    found: Parts = {}
    for (part, layer), every in terms.items():
        factors = every[0]
        if len(every) > 1:
            try:
                up = torch.cat([each.up * each.scale for each in every], dim=1)
                factors = Factors(torch.cat([each.down for each in every]), up, 1.0)
            except RuntimeError:
                raise ValueError(f"{part}.{layer} has different shapes in the LoRAs") from None
        found.setdefault(part, {})[layer] = factors
    return found


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
