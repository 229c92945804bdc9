"""Line charts as static SVG: `line_chart` for the application's page, `chart` for an experiment's report.

`chart` has a line for each series and a dot for each seed. The style sheets of page and report set fonts and colors;
only the lines of a `line_chart` have colors of their own.
"""

import html
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """Size of a chart and its margins for numbers, titles and the legend, in pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


PAGE = Frame(560, 226, 62, 12, 9, 41)
REPORT = Frame(420, 270, 66, 10, 12, 44)
LONGEST = 60
"""Maximum number of characters of a name in a legend."""
MOST_DOTS = 25
"""Maximum number of points of a line in a `line_chart` that are marked with dots."""
COLORS = 8
"""Number of colors in the report's style sheet."""
FARTHEST = 12
"""The y axis ends at most at this many times the median's distance from the minimum; dots beyond are hollow.

If y is a difference, the axis ends at most at this many times the median of the absolute values.
"""


@dataclass(frozen=True)
class Places:
    """Ranges of a chart's axes, and conversion of values to pixels."""

    frame: Frame
    across: Point
    up: Point
    scaled: Callable[[float], float] = float
    """Function applied to x: the logarithm if the axis is logarithmic. The range `across` is in scaled values."""

    def x(self, value: float) -> float:
        """Return the distance from the left edge in pixels."""
        left, right = self.across
        share = (self.scaled(value) - left) / (right - left)
        return self.frame.left + share * (self.frame.width - self.frame.left - self.frame.right)

    def y(self, value: float) -> float:
        """Return the distance from the top edge in pixels; values above the range are placed at its upper end."""
        low, high = self.up
        share = min(1.0, (value - low) / (high - low))
        return self.frame.height - self.frame.bottom - share * (self.frame.height - self.frame.top - self.frame.bottom)


def escape(text: object) -> str:
    """Return text escaped for HTML, including attributes."""
    return html.escape(str(text))


def ticks(low: float, high: float, locator: MaxNLocator) -> list[float]:
    """Return round numbers from `low` to `high`."""
    return [round(value, 12) for value in locator.tick_values(low, high) if low <= value <= high]


# -- on the page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, color and points (x, y)."""

    name: str
    color: str
    points: tuple[Point, ...]
    dash: str = ""
    """Lengths of dashes and gaps as in SVG's `stroke-dasharray`; empty: a solid line."""


def line_chart(title: str, x_title: str, lines: Sequence[Line], mark: float | None = None) -> str:
    """Return a line chart with axes and a legend as HTML; `mark` is the x of an additional vertical line.

    Each point of a line with few points has a tooltip with its values. Without lines the chart is empty.
    """
    x, y = ([point[axis] for line in lines for point in line.points] or [0.0, 1.0] for axis in (0, 1))
    place = Places(PAGE, _padded(min(x), max(x), 0.02), _padded(min(y), max(y), 0.05))
    locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    across, up = (  # a single value is its own tick: round numbers next to it would have too many digits
        own[:1] if min(own) == max(own) else ticks(*ends, locator) for own, ends in ((x, place.across), (y, place.up))
    )
    body = _grid(place, across, up, Axes(title, x_title, "")) + "".join(_of_line(line, place) for line in lines)
    if mark is not None and lines and min(x) <= mark <= max(x):
        body += f'<path class="mark" d="M{place.x(mark):.1f} {PAGE.top}V{PAGE.height - PAGE.bottom}"/>'
    legend = "".join(f"<li>{swatch(line.color, line.dash)} {escape(shortened(line.name))}</li>" for line in lines)
    return _figure(title, PAGE, body, [line.name for line in lines], legend)


def _of_line(line: Line, place: Places) -> str:
    """Return the line, and dots with tooltips if it has few points."""
    dots = "".join(
        _dot(place.x(x), place.y(y), 0, tooltip=f"{line.name}, {x:g}: {y:.4f}")
        for x, y in (line.points if len(line.points) <= MOST_DOTS else ())
    )
    dash = " ".join(f"{2 * float(length):g}" for length in line.dash.split())  # legible in a noisy line, too
    path = f'<path class="line" d="{_path(line.points, place)}"{_dashed(dash)}/>'
    return f'<g style="--own: {line.color}">{path}{dots}</g>'


def _dashed(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def swatch(color: str, dash: str) -> str:
    """Return a short sample of a line for a legend, as SVG."""
    line = f'<path d="M0 6H28" stroke="{color}" stroke-width="3"{_dashed(dash)}/>'
    return f'<svg class="key" viewBox="0 0 28 12" aria-hidden="true">{line}</svg>'


def shortened(text: str) -> str:
    """Return a name shortened for a legend."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


# -- in a report -------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """One line of a chart: its means, with a dot for each seed."""

    label: str
    number: int
    """Index among all series, which determines its color and the shape of its dots."""
    line: list[Point] = field(default_factory=list)
    dots: list[Point] = field(default_factory=list)
    chosen: Point | None = None


@dataclass(frozen=True)
class Axes:
    """Titles and scales of a chart's axes."""

    title: str
    x: str
    y: str
    ticks: Sequence[float] = ()
    """Ticks of a logarithmic x axis; empty for a linear one."""
    name: Callable[[float], str] = "{:.6g}".format
    """Format of the ticks of the x axis."""
    zero: bool = False
    """Whether y is a difference, so that 0 is within its range."""


def chart(series: Sequence[Series], axes: Axes) -> str:
    """Return a line chart with its legend as HTML; empty if no point is finite."""
    points = [point for each in series for point in (*each.line, *each.dots) if all(map(math.isfinite, point))]
    if not points:
        return ""
    x, *others = {x for x, _ in points}
    if not others and x > 0:  # the only x is the only tick
        axes = replace(axes, ticks=[x])
    place = _places(points, axes)
    whole = MaxNLocator(6, integer=place.across[1] - place.across[0] > 1.5)  # integers for training steps
    across = axes.ticks or ticks(*place.across, whole)
    grid = _grid(place, across[:: math.ceil(len(across) / 7)], ticks(*place.up, MaxNLocator(5)), axes)
    legend = "".join(
        f'<li><svg class="c{each.number % COLORS}" viewBox="0 0 24 12" aria-hidden="true">'
        f'<path class="line" d="M0 6H24"/>{_dot(12, 6, each.number)}</svg>{escape(each.label)}</li>'
        for each in series
        if each.line
    )
    body = grid + "".join(_of_series(each, place) for each in series)
    return _figure(axes.title, REPORT, body, [each.label for each in series], legend)


def _figure(title: str, frame: Frame, body: str, names: Sequence[str], legend: str = "") -> str:
    """Return a chart as HTML; `names`: what the chart shows, for screen readers; `legend`: items of a list."""
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}: {escape(", ".join(names) or "nothing yet")}">'
        f"{body}</svg>{legend}</figure>"
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
    """Return a range widened on both sides by the fraction `share` of its length; never an empty range."""
    room = (high - low) * share or abs(low) * share or 1.0
    return low - room, high + room


def _grid(place: Places, across: Sequence[float], up: Sequence[float], axes: Axes) -> str:
    """Return grid lines, the numbers `across` and `up` at the axes, and the titles of both axes."""
    frame = place.frame
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    parts = [
        f'<path class="{"zero" if axes.zero and abs(y) < 1e-12 else "grid"}" d="M{left} {place.y(y):.1f}H{right}"/>'
        f'<text x="{left - 6}" y="{place.y(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>'
        for y in up
    ]
    parts += [
        f'<path class="grid" d="M{place.x(x):.1f} {bottom}v4"/>'
        f'<text x="{place.x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(axes.name(x))}</text>'
        for x in across
    ]
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{frame.height - 6}" text-anchor="middle">{escape(axes.x)}</text>')
    turned = f"translate(11 {(frame.top + bottom) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(axes.y)}</text>')
    return "".join(parts)


def _path(points: Sequence[Point], place: Places) -> str:
    """Return a line through the points as the `d` of an SVG path, with gaps at non-finite values."""
    path, pen = "", "M"
    for x, y in points:
        path += f"{pen}{place.x(x):.1f} {place.y(y):.1f}" if math.isfinite(y) else ""
        pen = "L" if math.isfinite(y) else "M"
    return path


def _of_series(series: Series, place: Places) -> str:
    """Return the line, the dots, and a ring around the chosen point."""
    path = _path(series.line, place)
    line = f'<path class="line" d="{path}"/>' if path else ""
    dots = [_dot(place.x(x), place.y(y), series.number, y > place.up[1]) for x, y in series.dots if math.isfinite(y)]
    ring = ""
    if series.chosen and math.isfinite(series.chosen[1]):
        x, y = series.chosen
        ring = f'<circle class="ring" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="7"/>'
    return f'<g class="c{series.number % COLORS}">{line}{"".join(dots)}{ring}</g>'


def _dot(x: float, y: float, number: int, hollow: bool = False, tooltip: str = "") -> str:
    """Return a marker; its shape distinguishes series whose colors look alike."""
    shapes = (
        "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0",
        "m-3-3h6v6h-6z",
        "m0-4l3.8 6.6h-7.6z",
        "m0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
        "m0 4l3.8-6.6h-7.6z",
    )
    title = f"<title>{escape(tooltip)}</title>" if tooltip else ""
    shape = shapes[number % len(shapes)]
    return f'<path class="{"hollow" if hollow else "dot"}" d="M{x:.1f} {y:.1f}{shape}">{title}</path>'


# -- intervals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a forest plot: a difference with its interval, both in percent."""

    name: str
    number: int
    """Index among all series, which determines its color and the shape of its dot."""
    value: float
    ends: Point | None
    text: str
    """The values as text."""


MINUS = "\N{MINUS SIGN}"
FOREST_ROW = 46
FOREST_TOP = 8
FOREST_LINE, FOREST_CHARACTERS = 17, 48
"""Height of a further line of a row, and characters of a name that fit into a line."""


def forest(title: str, rows: Sequence[Row], axis: str) -> str:
    """Return a forest plot: intervals below each other, with a line at zero and an axis; empty without rows.

    The name and values of a row are above its interval, so that both are legible on a narrow screen. A name that does
    not fit next to the values has lines of its own. A value beyond all intervals and their margin is an arrow at the
    edge.
    """
    if not rows:
        return ""
    inside = [value for row in rows if row.ends for value in row.ends] or [row.value for row in rows]
    low, high = _padded(min(0.0, *inside), max(0.0, *inside), 0.05)
    lines, tops = [_lines_of(row) for row in rows], [FOREST_TOP]
    for each in lines:
        tops.append(tops[-1] + FOREST_ROW + FOREST_LINE * (len(each) - 1))
    bottom = tops[-1]
    frame = replace(REPORT, height=bottom + REPORT.bottom, left=16, right=16, top=FOREST_TOP)  # half a tick label
    place = Places(frame, (low, high), (0, 1))
    parts = [
        f'<path class="{"zero" if abs(x) < 1e-12 else "grid"}" d="M{place.x(x):.1f} {FOREST_TOP}V{bottom + 4}"/>'
        f'<text x="{place.x(x):.1f}" y="{bottom + 18}" text-anchor="middle">{number}%</text>'
        for x in ticks(low, high, MaxNLocator(5))
        for number in [f"{x:+.6g}".replace("-", MINUS) if x else "0"]
    ]
    parts += [_of_row(*each, place) for each in zip(rows, lines, tops, strict=False)]
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(f'<text x="{middle}" y="{frame.height - 6}" text-anchor="middle">{escape(axis)}</text>')
    return _figure(title, frame, "".join(parts), [row.name for row in rows])


def _lines_of(row: Row) -> list[str]:
    """Return the lines of a row's name; the last one is empty unless the values fit next to it."""
    fits = len(row.name) + len(row.text) < FOREST_CHARACTERS
    return [row.name] if fits else [*textwrap.wrap(row.name, FOREST_CHARACTERS), ""]


def _of_row(row: Row, lines: Sequence[str], top: float, place: Places) -> str:
    frame, last = place.frame, top + 16 + FOREST_LINE * (len(lines) - 1)
    y = last + 14
    text = "".join(
        f'<text class="name" x="{frame.left}" y="{top + 16 + FOREST_LINE * number}">{escape(line)}</text>'
        for number, line in enumerate(lines)
        if line
    )
    text += f'<text x="{frame.width - frame.right}" y="{last}" text-anchor="end">{escape(row.text)}</text>'
    low, high = place.across
    if not low <= row.value <= high:
        x, back = (place.x(high), -8) if row.value > high else (place.x(low), 8)
        head = f"M{x + back:.1f} {y - 6}L{x:.1f} {y}L{x + back:.1f} {y + 6}"
        drawn = f'<path class="line" d="{head}M{x:.1f} {y}h{2.5 * back}"/>'
    else:
        bar = f'<path class="bar" d="M{place.x(row.ends[0]):.1f} {y}H{place.x(row.ends[1]):.1f}"/>' if row.ends else ""
        drawn = bar + _dot(place.x(row.value), y, row.number)
    return f'<g class="c{row.number % COLORS}">{text}{drawn}</g>'
