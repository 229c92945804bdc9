"""What varies in an experiment, and the options of its runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .shared import RunOptions, SharedMethodOptions

O = TypeVar("O", bound=RunOptions)  # noqa: E741


@dataclass(frozen=True)
class Grid(Generic[O]):
    """An experiment: the options that all its runs share, and the values of those that vary."""

    base: O
    """Those of the first run; `lora_alpha` is None where it follows from ranks that vary."""
    varied: Mapping[str, list]
    """Two or more values of each option that varies, by the name that all scripts have for it."""

    def values(self, name: str) -> list:
        """Return all values of an option; a list with the only one where it does not vary."""
        return self.varied.get(name) or [self.base[name]]

    @property
    def methods(self) -> list[str]:
        """All methods."""
        return self.base.adapter.method

    @property
    def rates(self) -> list[float]:
        """All learning rates."""
        return self.values("learning_rate")

    def flag(self, name: str) -> str:
        """Return how an option is typed."""
        return self.base.option(name).flag

    def runs(self, *names: str) -> list[O]:
        """Return the options of runs with each combination of the values of `names`, and the first of the others."""
        values = [self.values(name) for name in names]
        return [self.run(**dict(zip(names, own, strict=True))) for own in itertools.product(*values)]

    def run(self, method: str = "", **values: Any) -> O:
        """Return the options of a run with these values, and of one method if it is given."""
        options = self.base.replace(**values, **({"method": [method]} if method else {}))
        return options.replace(lora_alpha=alpha_of(options.adapter))

    def flat(self) -> dict[str, Any]:
        """Return all values by name, as `config.json` records them: lists of those that vary."""
        return {**self.base.flat(), **{self.base.option(name).name: values for name, values in self.varied.items()}}

    def replace(self, **values: Any) -> Grid[O]:
        """Return an experiment in which some shared options have other values."""
        return dataclasses.replace(self, base=self.base.replace(**values))


def first_of(kind: type[O], values: dict[str, Any]) -> tuple[O, dict[str, list]]:
    """Return the options with these values, of those that vary the first, and all of these where there are several."""
    varied: dict[str, list] = {}
    for name, option in kind.table().items():
        if option.varies and isinstance(values[name], list):
            several, values[name] = values[name], values[name][0]
            varied |= {option.attribute: several} if len(several) > 1 else {}
    return kind.of(**values), varied


def alpha_of(adapter: SharedMethodOptions) -> float | None:
    """Return the alpha that is given, or twice the rank; None where a family's rank or a LoRA decides it yet."""
    if adapter.lora_alpha is not None:
        return adapter.lora_alpha
    return 2 * adapter.rank if adapter.rank and not getattr(adapter, "init_lora", None) else None
