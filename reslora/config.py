"""Configuration of ResLoRA: the shortcut, how many earlier blocks it uses, and the head of a chain.

This module does not import torch, so that `--help` appears at once.
"""

import dataclasses

from .checks import is_whole

PLAIN = "none"
"""Name for plain LoRA, without a shortcut (Eq. 1)."""

SHORTCUTS = (PLAIN, "input", "block", "middle")
"""Valid values of `ResLoraConfig.shortcut`; `reslora.shortcuts` has the class of each."""

MERGES = ("none", "input", "weights", "lstsq")
"""Merge methods that can be chosen by name; a block-shortcut has an exact merge in place of all but `none`."""

AUTO = "auto"
"""Name that stands for the most accurate merge method that the available statistics allow."""

HEADS = ("repeat", "none")
"""Valid values of `ResLoraConfig.head`."""


@dataclasses.dataclass(frozen=True)
class ResLoraConfig:
    """Configuration of the shortcuts between LoRA blocks of neighboring layers (Shi et al., 2024, Section 3.2).

    Raises `ValueError` for an invalid value; the message names the field, the value and the valid values.
    """

    shortcut: str = "input"
    """`input` (Eq. 2, ResLoRA_is), `block` (Eq. 3, ResLoRA_bs), `middle` (Eq. 4, ResLoRA_ms), `none` (Eq. 1, LoRA)."""

    pre_num: int = 1
    """Number of earlier blocks whose terms a block adds (m of Eqs. 3-4); -1: all, 0: plain LoRA.

    `input` uses one for any value but 0.
    """

    head: str = "repeat"
    """First block of an `input` chain: `repeat` sets x_{n-1} := x_n (below Eq. 2), `none` adds nothing (Appendix C)."""

    window: int = 100
    """Number of latest training forward passes over which the norms f_n of Eqs. 8-9 are averaged; 0 records none."""

    def __post_init__(self) -> None:
        _check_choice("shortcut", self.shortcut, SHORTCUTS)
        _check_choice("head", self.head, HEADS)
        _check_integer("pre_num", self.pre_num, least=-1, hint="-1 means all previous blocks, 0 none")
        _check_integer("window", self.window, least=0, hint="0 records no norms")

    @property
    def reach(self) -> int | None:
        """Maximum number of earlier blocks whose terms a block adds, from `pre_num` and the shortcut; None: all.

        The m of Eqs. 3 and 4 is this number, or the number of earlier blocks in the chain if that is smaller.
        """
        if not self.wired or self.shortcut == "input":
            return int(self.wired)
        return None if self.pre_num == -1 else self.pre_num

    @property
    def wired(self) -> bool:
        """Whether this configuration has shortcuts; `shortcut="none"` and `pre_num=0` are plain LoRA."""
        return self.shortcut != PLAIN and self.pre_num != 0

    @property
    def carries(self) -> bool:
        """Whether blocks pass activations to later blocks and record norms, as all shortcuts but `block` do."""
        return self.wired and self.shortcut != "block"

    def to_dict(self) -> dict:
        """Return the fields as a JSON-serializable dict; `ResLoraConfig(**fields)` restores the configuration."""
        return dataclasses.asdict(self)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _check_integer(name: str, value: object, least: int, hint: str) -> None:
    if not is_whole(value, least):
        raise ValueError(f"{name}={value!r} must be an integer of at least {least} ({hint})")
