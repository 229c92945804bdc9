"""The grid of an experiment: the options that vary, and the options of its runs."""

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
    """An experiment: the options that all its runs share, and the values of the options that vary."""

    base: O
    """Options of a run with the first value of each option that varies."""
    varied: Mapping[str, list]
    """Two or more values of each option that varies, by the name common to all scripts."""

    def values(self, name: str) -> list:
        """Return all values of an option; a single value if the option does not vary."""
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
        """Return an option's name on the command line."""
        return self.base.option(name).flag

    def runs(self, *names: str) -> list[O]:
        """Return the options of runs with every combination of the values of `names`.

        Other options have their first value.
        """
        values = [self.values(name) for name in names]
        return [self.run(**dict(zip(names, own, strict=True))) for own in itertools.product(*values)]

    def variants(self) -> list[O]:
        """Return the options of a run for each combination of the varied values, without learning rates and seeds."""
        return self.runs(*(name for name in self.varied if name not in ("learning_rate", "seed")))

    def run(self, method: str = "", **values: Any) -> O:
        """Return the options of a run with these values, and with `method` as its only method if it is given.

        --average_checkpoints does not apply to single runs: it adds compared methods to the experiment.
        """
        own = {"average_checkpoints": None, **values, **({"method": [method]} if method else {})}
        options = self.base.replace(**own)
        return options.replace(lora_alpha=alpha_of(options.adapter))

    def flat(self) -> dict[str, Any]:
        """Return all values by name as `config.json` stores them: lists for options that vary."""
        return {**self.base.flat(), **{self.base.option(name).name: values for name, values in self.varied.items()}}

    def replace(self, **values: Any) -> Grid[O]:
        """Return an experiment with other values of shared options."""
        return dataclasses.replace(self, base=self.base.replace(**values))


def first_of(kind: type[O], values: dict[str, Any]) -> tuple[O, dict[str, list]]:
    """Return the options of the first run, and all values of the options that have several values.

    An alpha that is not given follows from the rank, unless the rank varies.
    """
    varied: dict[str, list] = {}
    for name, option in kind.table().items():
        if (several := option.several(values[name])) is not None:
            values[name] = several[0]
            varied |= {option.attribute: several} if len(several) > 1 else {}
    options = kind.of(**values)
    return (options if "rank" in varied else options.replace(lora_alpha=alpha_of(options.adapter))), varied


def alpha_of(adapter: SharedMethodOptions) -> float | None:
    """Return the given alpha, or twice the rank; None if the rank depends on the model's family or on a LoRA file."""
    if adapter.lora_alpha is not None:
        return adapter.lora_alpha
    return 2 * adapter.rank if adapter.rank and not getattr(adapter, "init_lora", None) else None
