"""The figures of a run: `comparison.png` (the paper's Figure 3) and `loss.png`."""

import bisect
import functools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from ..io import replacing
from ..runtime.log import of_split

Image: TypeAlias = PIL.Image.Image | str | os.PathLike | None
"""A PIL image, a file, or None for an empty cell."""

DPI = 100
SMALL, LARGE = 128, 192
"""Longer side of an image in the comparison in pixels: SMALL for images up to that size, LARGE for larger ones."""
ABOVE = 0.6
"""Size of the images above the grid, relative to the images in the grid."""
GAP, MARGIN = 6, 12
"""Pixels between images, and around the figure."""
TITLE, PROMPT = 16, 20
"""Font sizes in pixels: of column titles and method names, and of prompts."""
_FAMILIES = """
DejaVu Sans, Noto Sans, Arial Unicode MS, Segoe UI,
Noto Sans CJK SC, Noto Sans CJK JP, Noto Sans SC, Noto Sans JP, Noto Sans KR, Source Han Sans SC,
WenQuanYi Micro Hei, WenQuanYi Zen Hei, Droid Sans Fallback, AR PL UMing CN,
PingFang SC, Hiragino Sans, Apple SD Gothic Neo, Microsoft YaHei, Yu Gothic, Malgun Gothic,
Noto Sans Arabic, Noto Sans Hebrew, Noto Sans Devanagari, Noto Sans Bengali, Noto Sans Tamil,
Noto Sans Thai, Noto Emoji, Noto Sans Symbols, Noto Sans Symbols 2, Unifont
"""
FAMILIES = [name.strip() for name in _FAMILIES.split(",")]
"""Font families; matplotlib takes each character from the first installed font that contains the character."""


def comparison(
    path: str | os.PathLike,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[str, Sequence[Image]]]]],
    side: int | None = None,
    above: tuple[str, Sequence[Image]] = ("", ()),
) -> None:
    """Write a grid of images, which has a row for each method of each prompt.

    `columns` holds the titles of the columns, possibly of several lines. `rows` holds each prompt with its methods: for
    each method a name and one image for every column. `above` holds a title and images that are shown above the grid,
    smaller and as many as fit. The first image of the grid is scaled so that its longer side has `side` pixels (None:
    SMALL or LARGE). All other images of the grid are scaled to fit into that size (Lanczos). Long prompts are
    shortened.

    Raises `OSError` for a file that is not an image.
    """
    blocks: Sequence = [block for _, blocks in rows for block in blocks]
    width, height = _tile((image for _, images in blocks for image in images), side)
    left = MARGIN + max((_width(name, TITLE) + 10 for name, _ in blocks if name), default=0)
    room = max(width, *(_width(line, TITLE) for title in columns for line in title.split("\n")))
    heading, line = 36, 22
    small = round(width * ABOVE), round(height * ABOVE)
    lead = heading + small[1] + 2 * MARGIN if above[1] else 0
    top = lead + MARGIN + line * max(title.count("\n") + 1 for title in columns)
    depths = [heading + len(blocks) * (height + GAP) + GAP for _, blocks in rows]
    sheet = _Sheet(left + len(columns) * (room + GAP) - GAP + MARGIN, top + sum(depths))
    starts = [left + column * (room + GAP) + (room - width) // 2 for column in range(len(columns))]
    if lead:
        sheet.text(left, heading / 2 + 2, _shortened(above[0], PROMPT, sheet.width - left - MARGIN), PROMPT)
        sheet.images(range(left, sheet.width - MARGIN - small[0] + 1, small[0] + GAP), heading, above[1], small)
        sheet.line(lead)
    for x, title in zip(starts, columns, strict=True):
        sheet.text(x + width / 2, (lead + top) / 2, title, TITLE, ha="center")
    y = top
    for (prompt, blocks), depth in zip(rows, depths, strict=True):
        sheet.line(y)
        sheet.text(left, y + heading / 2 + 2, _shortened(prompt, PROMPT, sheet.width - left - MARGIN), PROMPT)
        for number, (name, images) in enumerate(blocks):
            row = y + heading + number * (height + GAP)
            sheet.text(left - 10, row + height / 2, name, TITLE, ha="right", color="#444444")
            sheet.images(starts, row, images, (width, height))
        y += depth
    _save(sheet.figure, path, DPI)


def loss_curves(path: str | os.PathLike, logs: Mapping[str, Sequence[dict]], held_out: int | None) -> None:
    """Write plots of each method's training loss and of its loss on held-out images.

    The training loss is a running mean over a tenth of the steps. `logs` holds the rows of each method's log (see
    `log.read_log`). `held_out` is the number of held-out images; without held-out images there is no plot of their
    loss. A third plot shows the last held-out loss by timestep, if a log has it. Non-finite losses leave a gap.
    """
    splits = {"train": "training loss (running mean)"}
    if held_out:
        splits["validation"] = f"loss on {held_out} held-out image{'s' if held_out > 1 else ''}"
    by_timestep = {}
    for method, rows in logs.items():
        for row in of_split(rows, "validation"):
            if row.get("by_timestep"):
                by_timestep[method] = row["by_timestep"]
    count = len(splits) + bool(by_timestep)
    figure = Figure(figsize=(5.5 * count, 4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (split, title) in zip(axes, splits.items(), strict=False):
        for method, rows in logs.items():
            found = of_split(rows, split)
            steps, losses = [row["step"] for row in found], [_number(row.get("loss")) for row in found]
            if split == "train":
                axis.plot(steps, running_mean(losses), label=method, linewidth=1.8)
            else:
                axis.plot(steps, losses, "o-", label=method, linewidth=1.8, markersize=4)
        axis.set(title=title, xlabel="step")
    for method, losses_at in by_timestep.items():
        losses = [_number(loss) for loss in losses_at.values()]
        axes[-1].plot(list(map(float, losses_at)), losses, "o-", label=method, linewidth=1.8)
        axes[-1].set(title="the last one by timestep", xlabel="timestep (1 is pure noise)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if logs:
            axis.legend(frameon=False)
    _save(figure, path, 130)


def running_mean(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Return the running mean of the finite values.

    Each mean is over a window that ends at a value; the length of the window is the fraction `share` of all values.
    """
    window = max(1, round(len(values) * share))
    finite = np.isfinite(values)
    sums, counts = (np.cumsum([0.0, *kept]) for kept in (np.where(finite, values, 0.0), finite))
    starts = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    with np.errstate(invalid="ignore"):  # a window without a finite value has no mean
        return ((sums[1:] - sums[starts]) / (counts[1:] - counts[starts])).tolist()


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


class _Sheet:
    """A figure with elements placed in pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def text(self, x: float, y: float, text: str, size: int, **style: Any) -> None:
        """Add text with a font size in pixels, centered on y; `$` and `_` are not interpreted as math."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, fontproperties=_font(size), va="center", parse_math=False, **style)

    def line(self, y: float) -> None:
        """Add a horizontal line across the figure."""
        ends, height = (MARGIN / self.width, 1 - MARGIN / self.width), 1 - y / self.height
        self.figure.add_artist(Line2D(ends, (height, height), color="#cccccc", linewidth=0.72))

    def images(self, places: Sequence[int], y: int, images: Sequence[Image], size: tuple[int, int]) -> None:
        """Resize images to fit into `size`, and add them with their upper left corners at `places` and y."""
        for x, image in zip(places, images, strict=False):
            if image is not None:
                with _opened(image) as opened:
                    fitted = PIL.ImageOps.pad(opened.convert("RGB"), size, PIL.Image.Resampling.LANCZOS, "white")
                self.figure.figimage(np.asarray(fitted), x, self.height - y - size[1], origin="upper")


def _save(figure: Figure, path: str | os.PathLike, dpi: int) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        # matplotlib renders a character that no installed font has as a box, and would warn about it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def _tile(images: Iterable[Image], side: int | None) -> tuple[int, int]:
    """Return the width and height of images in the grid, in pixels."""
    first = next((image for image in images if image is not None), None)
    if first is None:
        return SMALL, SMALL
    with _opened(first) as image:
        longest = max(image.size)
        side = side or (SMALL if longest <= SMALL else LARGE)
        return tuple(max(1, round(length * side / longest)) for length in image.size)


def _opened(image: Any) -> Any:
    """Return a context manager that yields the image; if `image` is a file, the context manager closes it on exit."""
    return nullcontext(image) if isinstance(image, PIL.Image.Image) else PIL.Image.open(image)


def _shortened(text: str, size: int, room: float) -> str:
    """Return the text on one line, shortened to a width in pixels."""
    text = " ".join(text.split())
    if _width(text, size) <= room:
        return text
    fits = bisect.bisect_right(range(1, len(text)), room, key=lambda length: _width(text[:length] + "…", size))
    return text[:fits].rstrip() + "…"


def _width(text: str, size: int) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return math.ceil(RendererAgg(1, 1, DPI).get_text_width_height_descent(text, _font(size), ismath=False)[0])


@functools.cache
def _font(size: int) -> FontProperties:
    """Return the properties of a font: its size in pixels, and the installed fonts of FAMILIES.

    matplotlib would warn about families that are not installed.
    """
    installed = set(font_manager.get_font_names())
    return FontProperties(family=[name for name in FAMILIES if name in installed], size=size * 72 / DPI)
