"""The ResLoRA configuration: which shortcut, how far it reaches, and how the first block of a chain behaves."""

from __future__ import annotations

import dataclasses

from .common.checks import is_whole
from .shortcuts import NAMES as SHORTCUTS
from .shortcuts import PLAIN, shortcut_class

HEADS = ("repeat", "none")
"""What the first block of a chain, its head, may take for the input of the block that is not there."""


@dataclasses.dataclass(frozen=True)
class ResLoraConfig:
    """How the LoRA blocks of neighbouring layers are wired (Shi et al., 2024, Section 3.2).

    Raises `ValueError` for a value that means nothing, naming the field, the value and what would fit.
    """

    shortcut: str = "input"
    """`input` (Eq. 2, ResLoRA_is), `block` (Eq. 3, ResLoRA_bs), `middle` (Eq. 4, ResLoRA_ms), `none` (Eq. 1, LoRA)."""

    pre_num: int = 1
    """How many blocks before the current one take part; -1 means all of them, 0 wires nothing. `input` uses one."""

    head: str = "repeat"
    """First block of an `input` chain: `repeat` takes x_{n-1} := x_n (text under Eq. 2), `none` adds nothing
    (Appendix C)."""

    window: int = 100
    """How many of the latest training forwards the norms f_n of Eqs. 8-9 are averaged over; 0 records none."""

    def __post_init__(self) -> None:
        _check_choice("shortcut", self.shortcut, SHORTCUTS)
        _check_choice("head", self.head, HEADS)
        _check_integer("pre_num", self.pre_num, least=-1, hint="-1 means all previous blocks, 0 none")
        _check_integer("window", self.window, least=0, hint="0 records no norms")

    @property
    def reach(self) -> int | None:
        """At most how many blocks before the current one take part: `pre_num` as the shortcut takes it; None: all.

        The m of Eqs. 3 and 4 is this, or what there is in the chain. Called `reach` wherever it is meant.
        """
        return shortcut_class(self.shortcut).reach(self.pre_num) if self.wired else 0

    @property
    def wired(self) -> bool:
        """Whether anything is wired at all: `shortcut="none"` and `pre_num=0` are plain LoRA."""
        return self.shortcut != PLAIN and self.pre_num != 0

    def to_dict(self) -> dict:
        """Return the fields as a dict that `json.dumps` takes and `ResLoraConfig(**fields)` reads back."""
        return dataclasses.asdict(self)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _check_integer(name: str, value: object, least: int, hint: str) -> None:
    if not is_whole(value, least):
        raise ValueError(f"{name}={value!r} must be an integer of at least {least} ({hint})")
