"""Caption transforms: prefix and suffix, dropout, wildcards, shuffled tags, tag dropout.

Order and syntax are those of kohya's `process_caption`. The random choices depend on the seed and on the sample's
position in the run.

Nested wildcards differ from kohya's. In kohya's scripts, a choice ends at the first `}`: `{a|{b|c} d}` becomes `a d}`,
`{b d}` or `c d}`. Here only the innermost choice is made: `{a|{b|c} d}` becomes `{a|b d}` or `{a|c d}`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...options.images import DataOptions

WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
SEPARATOR = ","


@dataclass(frozen=True)
class CaptionTransform:
    """The caption transform of a data source; the default returns the caption unchanged."""

    prefix: str = ""
    suffix: str = ""
    dropout: float = 0.0
    """Probability that a sample is trained with the empty caption."""
    wildcards: bool = False
    shuffle: bool = False
    keep: int = 0
    """Number of tags at the beginning that are neither shuffled nor dropped."""
    tag_dropout: float = 0.0
    """Probability that a tag after the first `keep` tags is dropped."""

    @property
    def rewrites(self) -> bool:
        """Whether the transform can turn one caption into several texts; the empty caption does not count."""
        return self.wildcards or self.shuffle or self.tag_dropout > 0

    @property
    def varies(self) -> bool:
        """Whether the transform is random."""
        return self.rewrites or self.dropout > 0

    def plain(self, caption: str) -> str:
        """Return the caption without randomness: all tags in order, and the first option of every wildcard."""
        return self._resolved(self._with_affixes(self._lines(caption)[0]), None)

    def sampled(self, captions: Sequence[str], draws: torch.Generator) -> str:
        """Return one of an image's captions, chosen and transformed at random; `draws` is the random generator."""
        lines = self._lines(captions[choose(len(captions), draws)])
        caption = self._with_affixes(lines[choose(len(lines), draws)])
        if self.dropout and torch.rand((), generator=draws) < self.dropout:
            return ""
        caption = self._resolved(caption, draws)
        if not self.shuffle and not self.tag_dropout:
            return caption
        tags = [tag.strip() for tag in caption.split(SEPARATOR)]  # empty tags are tags too, as in kohya's scripts
        kept, others = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            others = [others[place] for place in torch.randperm(len(others), generator=draws).tolist()]
        if self.tag_dropout:
            stays = torch.rand(len(others), generator=draws) >= self.tag_dropout
            others = [tag for tag, stay in zip(others, stays.tolist(), strict=True) if stay]
        return f"{SEPARATOR} ".join(kept + others)

    def _lines(self, caption: str) -> list[str]:
        """Return the texts to choose from: with wildcards, the lines of a caption; otherwise, the complete caption.

        The chosen line gets the prefix; kohya's scripts add the prefix only to the first line.
        """
        return ([line for line in caption.splitlines() if line.strip()] if self.wildcards else []) or [caption]

    def _with_affixes(self, caption: str) -> str:
        return " ".join(part for part in (self.prefix, caption, self.suffix) if part)

    def _resolved(self, caption: str, draws: torch.Generator | None) -> str:
        """Replace `{red|blue}` by a random option (the first if `draws` is None), and doubled braces by single ones."""

        def replacement(found: re.Match) -> str:
            """Return the replacement of a match of `WILDCARD`."""
            if found[1] is None:
                return found[0][0]
            options = found[1].split("|")
            return options[0 if draws is None else choose(len(options), draws)]

        return WILDCARD.sub(replacement, caption) if self.wildcards else caption


VERBATIM = CaptionTransform()


def build_caption_transform(options: DataOptions) -> CaptionTransform:
    """Return the caption transform that the options specify."""
    return CaptionTransform(
        options.caption_prefix or "", options.caption_suffix or "", options.caption_dropout, options.enable_wildcard,
        options.shuffle_caption, options.keep_tokens, options.caption_tag_dropout_rate,
    )  # fmt: skip


def choose(count: int, draws: torch.Generator) -> int:
    """Return a random integer from 0 to `count` - 1."""
    return int(torch.randint(count, (), generator=draws))
