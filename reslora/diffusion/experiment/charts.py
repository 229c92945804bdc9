"""Curves as SVG that takes its colours from the page: lines of a label's means, a dot a seed."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 12, 44
COLORS = 8
"""How many the page knows: see `look.STYLE`."""
FARTHEST = 12
"""Above the lowest by so many times what half of the values are: what is beyond is drawn hollow at the edge."""

Point = tuple[float, float]


def escape(text: object) -> str:
    """For HTML, in attributes as well."""
    return html.escape(str(text))


@dataclass
class Series:
    """One label of a chart."""

    label: str
    number: int
    """Its place among all labels, which is its colour and the shape of its dots."""
    line: list[Point] = field(default_factory=list)
    dots: list[Point] = field(default_factory=list)
    chosen: Point | None = None


@dataclass(frozen=True)
class Axes:
    """What a chart is of."""

    title: str
    x: str
    y: str
    ticks: Sequence[float] = ()
    """Of a logarithmic x axis; without any it is linear."""
    name: Callable[[float], str] = "{:.6g}".format
    """How a tick of the x axis reads."""
    zero: bool = False
    """Whether y is a difference, and 0 in sight."""


def chart(series: Sequence[Series], axes: Axes) -> str:
    """A figure with its legend; empty without a finite point."""
    points = [point for each in series for point in (*each.line, *each.dots) if all(map(math.isfinite, point))]
    if not points:
        return ""
    place = Places(points, axes)
    body = place.grid() + "".join(drawn(each, place) for each in series)
    legend = "".join(
        f'<li><svg class="c{each.number % COLORS}" viewBox="0 0 24 12" aria-hidden="true">'
        f'<path class="line" d="M0 6H24"/>{mark(12, 6, each.number)}</svg>{escape(each.label)}</li>'
        for each in series
        if each.line
    )
    return (
        f"<figure><figcaption>{escape(axes.title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(axes.title)}">{body}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


class Places:
    """Where values are in a chart."""

    def __init__(self, points: Sequence[Point], axes: Axes) -> None:
        self.axes = axes
        across = [self._scaled(x) for x, _ in points] + [self._scaled(x) for x in axes.ticks]
        self.left, self.right = padded(min(across), max(across), 0.04)
        up = sorted(y for _, y in points) + [0.0] * axes.zero
        low, high = min(up), max(up)
        if not axes.zero:
            high = min(high, low + FARTHEST * (statistics.median(up) - low) or high)
        self.low, self.high = padded(low, high, 0.06)

    def _scaled(self, x: float) -> float:
        return math.log(x) if self.axes.ticks else x

    def x(self, value: float) -> float:
        return LEFT + (self._scaled(value) - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the top; of what is beyond, the edge."""
        share = min(1.0, (value - self.low) / (self.high - self.low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        """Lines, ticks and the names of both axes."""
        bottom = HEIGHT - BOTTOM
        levels = [y for y in MaxNLocator(5).tick_values(self.low, self.high) if self.low <= y <= self.high]
        whole = MaxNLocator(6, integer=self.right - self.left > 1.5)  # steps
        across = self.axes.ticks or [
            x for x in whole.tick_values(self.left, self.right) if self.left <= x <= self.right
        ]
        every = math.ceil(len(across) / 7)
        parts = [
            f'<path class="{"zero" if self.axes.zero and abs(y) < 1e-12 else "grid"}" '
            f'd="M{LEFT} {self.y(y):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>'
            for y in levels
        ]
        parts += [
            f'<path class="grid" d="M{self.x(x):.1f} {bottom}v4"/>'
            f'<text x="{self.x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(self.axes.name(x))}</text>'
            for x in across[::every]
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.axes.x)}</text>')
        turned = f"translate(11 {(TOP + bottom) / 2}) rotate(-90)"
        parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(self.axes.y)}</text>')
        return "".join(parts)


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """A range with some room at its ends, and never empty."""
    room = (high - low) * share or abs(low) * share or 1.0
    return low - room, high + room


def drawn(series: Series, place: Places) -> str:
    """The line, which has gaps where values are not finite, the dots, and a ring around what is chosen."""
    path, pen = "", "M"
    for x, y in series.line:
        path += f"{pen}{place.x(x):.1f} {place.y(y):.1f}" if math.isfinite(y) else ""
        pen = "L" if math.isfinite(y) else "M"
    line = f'<path class="line" d="{path}"/>' if path else ""
    dots = [mark(place.x(x), place.y(y), series.number, y > place.high) for x, y in series.dots if math.isfinite(y)]
    ring = ""
    if series.chosen and math.isfinite(series.chosen[1]):
        x, y = series.chosen
        ring = f'<circle class="ring" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="7"/>'
    return f'<g class="c{series.number % COLORS}">{line}{"".join(dots)}{ring}</g>'


def mark(x: float, y: float, number: int, hollow: bool = False) -> str:
    """A dot: its shape tells labels apart where colours do not."""
    shapes = (
        "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0",
        "m-3-3h6v6h-6z",
        "m0-4l3.8 6.6h-7.6z",
        "m0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
        "m0 4l3.8-6.6h-7.6z",
    )
    return f'<path class="{"hollow" if hollow else "dot"}" d="M{x:.1f} {y:.1f}{shapes[number % len(shapes)]}"/>'


def interval(verdict_interval: tuple[float, float], mean: float, farthest: float) -> str:
    """A bar from one end of an interval to the other with its mean and zero, on a scale to `farthest` both ways."""
    low, at, high = (75 + 70 * value / farthest for value in (verdict_interval[0], mean, verdict_interval[1]))
    return (
        '<svg class="interval" viewBox="0 0 150 16" aria-hidden="true"><path class="zero" d="M75 0V16"/>'
        f'<path class="bar" d="M{low:.1f} 8H{high:.1f}"/><circle class="dot" cx="{at:.1f}" cy="8" r="4"/></svg>'
    )
