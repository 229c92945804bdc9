"""Line charts as SVG, without a script: `line_chart` for the application's page, `chart` for an experiment's report.

Both take the colour of the text around them. Lines of the first have colours of their own; those of the second, with a
dot for each seed, take theirs from the page (`experiment.look.STYLE`).
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The size of a chart, and what is left beside its lines for numbers, titles and the legend."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


PAGE = Frame(560, 260, 52, 12, 30, 44)
REPORT = Frame(420, 270, 66, 10, 12, 44)
LEGEND = 18
"""Pixels from one row of a legend to the next."""
LONGEST = 60
"""Letters of a name in a legend."""
MOST_DOTS = 25
COLORS = 8
"""How many the report's style knows."""
FARTHEST = 12
"""Above the lowest by so many times what half of the values are: what is beyond is drawn hollow at the edge."""


@dataclass(frozen=True)
class Places:
    """Where values are in a chart, of which both ranges are to be seen."""

    frame: Frame
    across: Point
    up: Point
    scaled: Callable[[float], float] = float
    """Of x: its logarithm, where the axis is logarithmic; `across` is of these."""

    def x(self, value: float) -> float:
        """From the left."""
        left, right = self.across
        share = (self.scaled(value) - left) / (right - left)
        return self.frame.left + share * (self.frame.width - self.frame.left - self.frame.right)

    def y(self, value: float) -> float:
        """From the top; of what is beyond, the edge."""
        low, high = self.up
        share = min(1.0, (value - low) / (high - low))
        return self.frame.height - self.frame.bottom - share * (self.frame.height - self.frame.top - self.frame.bottom)


def escape(text: object) -> str:
    """For HTML, in attributes as well."""
    return html.escape(str(text))


def ticks(low: float, high: float, locator: MaxNLocator) -> list[float]:
    """Round numbers from `low` to `high`."""
    return [round(value, 12) for value in locator.tick_values(low, high) if low <= value <= high]


# -- on the page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line, its colour, and its points (x, y)."""

    name: str
    color: str
    points: Sequence[Point]
    dash: str = ""
    """Lengths of dashes and gaps, as SVG takes them; a whole line without."""


def line_chart(title: str, x_title: str, lines: Sequence[Line], mark: float | None = None) -> str:
    """Lines over numbered axes, with a legend; a vertical line stands at `mark`. An empty frame where nothing is given.

    Where there are few points, each says its numbers when it is pointed at.
    """
    points, round_numbers = [point for line in lines for point in line.points], MaxNLocator(5, steps=[1, 2, 5, 10])
    ys, xs = [y for _, y in points], [x for x, _ in points]
    up, across = _bounds(ys), _bounds(xs)
    place, bottom = Places(PAGE, across, up), PAGE.height - PAGE.bottom
    parts = [f'<text class="title" x="{PAGE.width / 2}" y="18" text-anchor="middle">{escape(title)}</text>']
    if points:
        parts += [_level(place.y(y), y) for y in _numbers(ys, up, round_numbers)]
        parts += [
            f'<text x="{place.x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>'
            for x in _numbers(xs, across, round_numbers)
        ]
        if mark is not None and across[0] <= mark <= across[1]:
            x = place.x(mark)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{PAGE.top}" y2="{bottom}"/>')
        dotted = max(len(line.points) for line in lines) <= MOST_DOTS
        parts += [_drawn(line, place, dotted) for line in lines]
    legend, rows = _legend(lines, x_title)
    parts.append(legend)
    name = escape(f"{title}: {', '.join(line.name for line in lines) or 'nothing yet'}")
    box = f"0 0 {PAGE.width} {PAGE.height + (rows - 1) * LEGEND}"
    return f'<svg class="chart" viewBox="{box}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _bounds(values: Sequence[float]) -> Point:
    """The least and the greatest; apart, even where there is but one."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 1e-6 * max(1.0, abs(low), abs(high))
    return (low, high) if high - low > margin else (low - margin, high + margin)


def _numbers(values: Sequence[float], bounds: Point, locator: MaxNLocator) -> list[float]:
    """What is written along an axis: round numbers, or the one value that there is."""
    if len({f"{value:.6g}" for value in values}) > 1:
        return ticks(*bounds, locator)
    return [values[0] if values[0] == int(values[0]) else float(f"{values[0]:.4g}")]


def _level(y: float, value: float) -> str:
    line = f'<line class="level" x1="{PAGE.left}" x2="{PAGE.width - PAGE.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{PAGE.left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _drawn(line: Line, place: Places, dotted: bool) -> str:
    path = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in line.points)
    drawn = f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2"{_dashed(line)}/>'
    for x, y in line.points if dotted else ():
        told = escape(f"{line.name}, {x:g}: {y:.4f}")
        at = f'cx="{place.x(x):.1f}" cy="{place.y(y):.1f}"'
        drawn += f'<circle {at} r="3" fill="{line.color}"><title>{told}</title></circle>'
    return drawn


def _dashed(line: Line) -> str:
    return f' stroke-dasharray="{line.dash}"' if line.dash else ""


def _legend(lines: Sequence[Line], x_title: str) -> tuple[str, int]:
    """Names below the chart, and how many rows they take."""
    entries, x, row = [], float(PAGE.left), 0
    end = PAGE.width - PAGE.right - 7 * len(x_title)
    wide = 28 if any(line.dash for line in lines) else 12  # room for a few dashes
    for line in lines:
        name = line.name if len(line.name) <= LONGEST else f"{line.name[: LONGEST - 1]}…"
        needed = wide + 20 + 7 * len(name)
        if x > PAGE.left and x + needed > end:
            x, row = float(PAGE.left), row + 1
        y = PAGE.height - 17 + row * LEGEND
        shape = f'<rect x="{x:.0f}" y="{y}" width="12" height="12" rx="2" fill="{line.color}"/>'
        if wide > 12:
            stroke = f'stroke="{line.color}" stroke-width="3"{_dashed(line)}'
            shape = f'<line x1="{x:.0f}" x2="{x + wide:.0f}" y1="{y + 6}" y2="{y + 6}" {stroke}/>'
        entries.append(f'{shape}<text x="{x + wide + 5:.0f}" y="{y + 10}">{escape(name)}</text>')
        x += needed
    where = f'x="{PAGE.width - PAGE.right}" y="{PAGE.height - 7}" text-anchor="end"'
    return f"{''.join(entries)}<text {where}>{escape(x_title)}</text>", row + 1


# -- in a report -------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """One label of a chart: a line of its means, a dot a seed."""

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
    x, *others = {x for x, _ in points}
    if not others and x > 0:  # round numbers about the one step there is would be no steps
        axes = replace(axes, ticks=[x])
    place = _places(points, axes)
    body = _grid(place, axes) + "".join(_of_series(each, place) for each in series)
    legend = "".join(
        f'<li><svg class="c{each.number % COLORS}" viewBox="0 0 24 12" aria-hidden="true">'
        f'<path class="line" d="M0 6H24"/>{_dot(12, 6, each.number)}</svg>{escape(each.label)}</li>'
        for each in series
        if each.line
    )
    box = f"0 0 {REPORT.width} {REPORT.height}"
    return (
        f"<figure><figcaption>{escape(axes.title)}</figcaption>"
        f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(axes.title)}">{body}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _places(points: Sequence[Point], axes: Axes) -> Places:
    scaled = math.log if axes.ticks else float
    across = [scaled(x) for x in (*(x for x, _ in points), *axes.ticks)]
    up = sorted(y for _, y in points) + [0.0] * axes.zero
    low, high = min(up), max(up)
    if axes.zero:
        high = min(high, FARTHEST * statistics.median(map(abs, up)) or high)
    else:
        high = min(high, low + FARTHEST * (statistics.median(up) - low) or high)
    return Places(REPORT, _padded(min(across), max(across), 0.04), _padded(low, high, 0.06), scaled)


def _padded(low: float, high: float, share: float) -> Point:
    """A range with some room at its ends, and never empty."""
    room = (high - low) * share or abs(low) * share or 1.0
    return low - room, high + room


def _grid(place: Places, axes: Axes) -> str:
    """Lines, ticks and the names of both axes."""
    left, right, bottom = REPORT.left, REPORT.width - REPORT.right, REPORT.height - REPORT.bottom
    whole = MaxNLocator(6, integer=place.across[1] - place.across[0] > 1.5)  # steps
    across = axes.ticks or ticks(*place.across, whole)
    parts = [
        f'<path class="{"zero" if axes.zero and abs(y) < 1e-12 else "grid"}" d="M{left} {place.y(y):.1f}H{right}"/>'
        f'<text x="{left - 6}" y="{place.y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>'
        for y in ticks(*place.up, MaxNLocator(5))
    ]
    parts += [
        f'<path class="grid" d="M{place.x(x):.1f} {bottom}v4"/>'
        f'<text x="{place.x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(axes.name(x))}</text>'
        for x in across[:: math.ceil(len(across) / 7)]
    ]
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{REPORT.height - 6}" text-anchor="middle">{escape(axes.x)}</text>')
    turned = f"translate(11 {(REPORT.top + bottom) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(axes.y)}</text>')
    return "".join(parts)


def _of_series(series: Series, place: Places) -> str:
    """The line, which has gaps where values are not finite, the dots, and a ring around what is chosen."""
    path, pen = "", "M"
    for x, y in series.line:
        path += f"{pen}{place.x(x):.1f} {place.y(y):.1f}" if math.isfinite(y) else ""
        pen = "L" if math.isfinite(y) else "M"
    line = f'<path class="line" d="{path}"/>' if path else ""
    dots = [_dot(place.x(x), place.y(y), series.number, y > place.up[1]) for x, y in series.dots if math.isfinite(y)]
    ring = ""
    if series.chosen and math.isfinite(series.chosen[1]):
        x, y = series.chosen
        ring = f'<circle class="ring" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="7"/>'
    return f'<g class="c{series.number % COLORS}">{line}{"".join(dots)}{ring}</g>'


def _dot(x: float, y: float, number: int, hollow: bool = False) -> str:
    """Its shape tells labels apart where colours do not."""
    shapes = (
        "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0",
        "m-3-3h6v6h-6z",
        "m0-4l3.8 6.6h-7.6z",
        "m0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
        "m0 4l3.8-6.6h-7.6z",
    )
    return f'<path class="{"hollow" if hollow else "dot"}" d="M{x:.1f} {y:.1f}{shapes[number % len(shapes)]}"/>'


# -- intervals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a forest plot: a difference with its interval, both in percent."""

    name: str
    number: int
    """Its place among all labels, which is its color and the shape of its dot."""
    value: float
    ends: Point | None
    text: str
    """The numbers, as they are read."""


MINUS = "\N{MINUS SIGN}"
FOREST_ROW = 46
FOREST_TOP = 8


def forest(title: str, rows: Sequence[Row], axis: str) -> str:
    """Return a figure of intervals below each other, with zero and a numbered axis; empty without rows.

    A name and its numbers are above its interval, so that both are legible on a narrow screen. A value that is far
    beyond all intervals is an arrow at the edge.
    """
    if not rows:
        return ""
    inside = [value for row in rows if row.ends for value in row.ends] or [row.value for row in rows]
    low, high = _padded(min(0.0, *inside), max(0.0, *inside), 0.05)
    bottom = FOREST_TOP + FOREST_ROW * len(rows)
    frame = replace(REPORT, height=bottom + REPORT.bottom, left=10, top=FOREST_TOP)
    place = Places(frame, (low, high), (0, 1))
    parts = [
        f'<path class="{"zero" if abs(x) < 1e-12 else "grid"}" d="M{place.x(x):.1f} {FOREST_TOP}V{bottom + 4}"/>'
        f'<text x="{place.x(x):.1f}" y="{bottom + 18}" text-anchor="middle">{number}%</text>'
        for x in ticks(low, high, MaxNLocator(5))
        for number in [f"{x:+.6g}".replace("-", MINUS) if x else "0"]
    ]
    for number, row in enumerate(rows):
        parts.append(_of_row(row, FOREST_TOP + FOREST_ROW * number, place))
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(f'<text x="{middle}" y="{frame.height - 6}" text-anchor="middle">{escape(axis)}</text>')
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _of_row(row: Row, top: float, place: Places) -> str:
    frame, y = place.frame, top + 30
    text = f'<text class="name" x="{frame.left}" y="{top + 16}">{escape(row.name)}</text>'
    text += f'<text x="{frame.width - frame.right}" y="{top + 16}" text-anchor="end">{escape(row.text)}</text>'
    low, high = place.across
    if not low <= row.value <= high:
        x, back = (place.x(high), -8) if row.value > high else (place.x(low), 8)
        head = f"M{x + back:.1f} {y - 6}L{x:.1f} {y}L{x + back:.1f} {y + 6}"
        drawn = f'<path class="line" d="{head}M{x:.1f} {y}h{2.5 * back}"/>'
    else:
        bar = f'<path class="bar" d="M{place.x(row.ends[0]):.1f} {y}H{place.x(row.ends[1]):.1f}"/>' if row.ends else ""
        drawn = bar + _dot(place.x(row.value), y, row.number)
    return f'<g class="c{row.number % COLORS}">{text}{drawn}</g>'
