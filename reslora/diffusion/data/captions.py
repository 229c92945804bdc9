"""Captions as they are trained with: a trigger word before them, tags in another order or left out, wildcards, none.

In the order and with the words of kohya's `process_caption`: prefix and suffix, dropout, wildcards, shuffled tags,
tags left out. All of it is a function of the seed and a sample's position in the run.

Nested wildcards differ. Kohya's choice ends at the first `}`: `{a|{b|c} d}` becomes `a d}`, `{b d}` or `c d}`. Here
only the innermost choice is made: it becomes `{a|b d}` or `{a|c d}`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...options.images import DataOptions

WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
SEPARATOR = ","


@dataclass(frozen=True)
class Recipe:
    """What becomes of a caption; as it is by default, the caption itself."""

    prefix: str = ""
    suffix: str = ""
    dropout: float = 0.0
    """Share of the samples that are trained with the empty caption."""
    wildcards: bool = False
    shuffle: bool = False
    keep: int = 0
    """How many tags stay at the beginning, in their order."""
    tag_dropout: float = 0.0
    """Share of the other tags that are left out."""

    @property
    def rewrites(self) -> bool:
        """Whether a caption may become another one at every sample, but for the empty one."""
        return self.wildcards or self.shuffle or self.tag_dropout > 0

    @property
    def varies(self) -> bool:
        """Whether chance has a part in it."""
        return self.rewrites or self.dropout > 0

    def plain(self, caption: str) -> str:
        """The caption without chance: whole, its tags in order, of every wildcard the first choice."""
        return self._resolved(self._with_affixes(self._lines(caption)[0]), None)

    def drawn(self, captions: Sequence[str], draws: torch.Generator) -> str:
        """What a training sample of an image with these captions is told."""
        lines = self._lines(captions[choose(len(captions), draws)])
        caption = self._with_affixes(lines[choose(len(lines), draws)])
        if self.dropout and torch.rand((), generator=draws) < self.dropout:
            return ""
        caption = self._resolved(caption, draws)
        if not self.shuffle and not self.tag_dropout:
            return caption
        tags = [tag.strip() for tag in caption.split(SEPARATOR)]  # empty ones too, as kohya's scripts
        kept, others = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            others = [others[place] for place in torch.randperm(len(others), generator=draws).tolist()]
        if self.tag_dropout:
            stays = torch.rand(len(others), generator=draws) >= self.tag_dropout
            others = [tag for tag, stay in zip(others, stays.tolist(), strict=True) if stay]
        return f"{SEPARATOR} ".join(kept + others)

    def _lines(self, caption: str) -> list[str]:
        """With wildcards, a caption is one of its lines; kohya's scripts give the prefix to the first of them alone."""
        return ([line for line in caption.splitlines() if line.strip()] if self.wildcards else []) or [caption]

    def _with_affixes(self, caption: str) -> str:
        return " ".join(part for part in (self.prefix, caption, self.suffix) if part)

    def _resolved(self, caption: str, draws: torch.Generator | None) -> str:
        """Of `{red|blue}` one, the first without `draws`; doubled braces are single ones."""

        def one(found: re.Match) -> str:
            if found[1] is None:
                return found[0][0]
            options = found[1].split("|")
            return options[0 if draws is None else choose(len(options), draws)]

        return WILDCARD.sub(one, caption) if self.wildcards else caption


VERBATIM = Recipe()


def recipe_of(options: DataOptions) -> Recipe:
    """What the options make of captions."""
    return Recipe(
        options.caption_prefix or "", options.caption_suffix or "", options.caption_dropout, options.enable_wildcard,
        options.shuffle_caption, options.keep_tokens, options.caption_tag_dropout_rate,
    )  # fmt: skip


def choose(count: int, draws: torch.Generator) -> int:
    """One of the numbers below `count`."""
    return int(torch.randint(count, (), generator=draws))
