"""Line charts as SVG, for pages: they take the colour of the text around them, and need no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 44
"""What is left beside the lines, for the numbers, the title and the legend."""
MOST_DOTS = 25


@dataclass(frozen=True)
class Line:
    """A line, its colour, and its points (x, y)."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_title: str, lines: Sequence[Line], mark: float | None = None, log_x: bool = False) -> str:
    """Lines over numbered axes, with a legend; a vertical line stands at `mark`. An empty frame where nothing is given.

    `log_x`: x is laid out by its logarithm. Where there are few points, each says its numbers when it is pointed at.
    """
    points = [point for line in lines for point in line.points]
    low, high = _bounds([y for _, y in points])
    left, right = _bounds([math.log10(x) if log_x else x for x, _ in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = ((math.log10(x) if log_x else x) - left) / (right - left)
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    steps = sorted({x for x, _ in points}) if log_x else ticks(left, right)
    parts = [f'<text class="title" x="{WIDTH / 2}" y="18" text-anchor="middle">{html.escape(title)}</text>']
    if points:
        parts += [_level(place(steps[0] if steps else left, y)[1], y) for y in ticks(low, high)]
        parts += [_step(place(x, low)[0], x) for x in steps]
        if mark is not None and left <= mark <= right:
            x = place(mark, low)[0]
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        dotted = max(len(line.points) for line in lines) <= MOST_DOTS
        parts += [_drawn(line, [place(*point) for point in line.points], dotted) for line in lines]
    parts.append(_legend(lines, x_title))
    name = html.escape(f"{title}: {', '.join(line.name for line in lines) or 'nothing yet'}")
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: about so many, a 1, 2 or 5 with zeros apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest; apart, even where there is but one."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 1e-6 * max(1.0, abs(low), abs(high))
    return (low, high) if high - low > margin else (low - margin, high + margin)


def _level(y: float, value: float) -> str:
    line = f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _step(x: float, value: float) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'


def _drawn(line: Line, places: Sequence[tuple[float, float]], dotted: bool) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2"/>'
    if dotted:
        for (x, y), (step, value) in zip(places, line.points, strict=True):
            told = html.escape(f"{line.name}, {step:g}: {value:.4f}")
            drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}"><title>{told}</title></circle>'
    return drawn


def _legend(lines: Sequence[Line], x_title: str) -> str:
    entries, x = [], float(LEFT)
    for line in lines:
        entries.append(f'<rect x="{x:.0f}" y="{HEIGHT - 17}" width="12" height="12" rx="2" fill="{line.color}"/>')
        entries.append(f'<text x="{x + 17:.0f}" y="{HEIGHT - 7}">{html.escape(line.name)}</text>')
        x += 32 + 7 * len(line.name)
    where = f'x="{WIDTH - RIGHT}" y="{HEIGHT - 7}" text-anchor="end"'
    return f"{''.join(entries)}<text {where}>{html.escape(x_title)}</text>"
