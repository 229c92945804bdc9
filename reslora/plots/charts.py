"""Line charts as static SVG: `line_chart` for the application's page, `chart` for an experiment's report.

Text in both charts has the color of the surrounding text. matplotlib renders `line_chart`. `chart` has a line for each
series and a dot for each seed, with colors from the report's style sheet (`experiment.theme.STYLE`).
"""

import functools
import html
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

Point = tuple[float, float]
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")  # browsers require this prefix
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "reslora"})  # text stays text; deterministic output
WIDTH, HEIGHT, BOX = 560, 220, (0.1, 0.16, 0.88, 0.8)
"""Size of a `line_chart` in pixels, and the place of its axes: left, bottom, width and height as fractions."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart and its margins for numbers, titles and the legend, in pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


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
    svg, (left, right) = _svg(title, x_title, tuple(lines))
    if mark is not None and lines and left <= mark <= right:
        x = WIDTH * (BOX[0] + BOX[2] * (mark - left) / (right - left))
        top, bottom = HEIGHT * (1 - BOX[1] - BOX[3]), HEIGHT * (1 - BOX[1])
        svg = svg.replace("</svg>", f'<path class="mark" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/></svg>')
    legend = "".join(f"<li>{swatch(line.color, line.dash)} {escape(shortened(line.name))}</li>" for line in lines)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}<ul class="legend">{legend}</ul></figure>'
    )


@functools.lru_cache(maxsize=64)
def _svg(title: str, x_title: str, lines: tuple[Line, ...]) -> tuple[str, Point]:
    """Return the chart as SVG without its mark, and the limits of its x axis.

    The result is cached, because a slider moves the mark often.
    """
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes(BOX)
    for number, line in enumerate(lines):
        style: dict[str, Any] = {"linestyle": (0, tuple(map(float, line.dash.split())))} if line.dash else {}
        style |= {"marker": "o", "markersize": 5} if len(line.points) <= MOST_DOTS else {}
        axes.plot(
            *zip(*line.points, strict=True), color=line.color, linewidth=2, clip_on=False, gid=f"line-{number}", **style
        )
    axes.margins(x=0)
    axes.set_xlabel(x_title, loc="right")
    axes.grid(axis="y", color="gray", alpha=0.35)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
        values = {point[place] for line in lines for point in line.points}
        axis.set_major_locator(FixedLocator([*values]) if len(values) == 1 else MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter("{x:g}")
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    for number, line in enumerate(lines):
        uses = root.iterfind(f".//*[@id='line-{number}']//{{{SVG}}}use")
        for use, (x, y) in zip(uses, line.points, strict=False):
            ElementTree.SubElement(use, "title").text = f"{line.name}, {x:g}: {y:.4f}"
    name = f"{title}: {', '.join(line.name for line in lines) or 'nothing yet'}"
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": name}
    return ElementTree.tostring(root, encoding="unicode"), axes.get_xlim()


def swatch(color: str, dash: str) -> str:
    """Return a short sample of a line for a legend, as SVG."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<path d="M0 6H28" stroke="{color}" stroke-width="3"{dashed}/>'
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
    body = _grid(place, axes) + "".join(_of_series(each, place) for each in series)
    legend = "".join(
        f'<li><svg class="c{each.number % COLORS}" viewBox="0 0 24 12" aria-hidden="true">'
        f'<path class="line" d="M0 6H24"/>{_dot(12, 6, each.number)}</svg>{escape(each.label)}</li>'
        for each in series
        if each.line
    )
    return _figure(axes.title, REPORT, body, f'<ul class="legend">{legend}</ul>')


def _figure(title: str, frame: Frame, body: str, legend: str = "") -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(title)}">'
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


def _grid(place: Places, axes: Axes) -> str:
    """Return grid lines, ticks and the titles of both axes."""
    left, right, bottom = REPORT.left, REPORT.width - REPORT.right, REPORT.height - REPORT.bottom
    whole = MaxNLocator(6, integer=place.across[1] - place.across[0] > 1.5)  # integers for training steps
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
    """Return the line, with gaps at non-finite values, the dots, and a ring around the chosen point."""
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
    """Return a dot; its shape distinguishes series if colors do not."""
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
    """Index among all series, which determines its color and the shape of its dot."""
    value: float
    ends: Point | None
    text: str
    """The values as text."""


MINUS = "\N{MINUS SIGN}"
FOREST_ROW = 46
FOREST_TOP = 8


def forest(title: str, rows: Sequence[Row], axis: str) -> str:
    """Return a forest plot: intervals below each other, with a line at zero and an axis; empty without rows.

    The name and values of a row are above its interval, so that both are legible on a narrow screen. A value beyond
    all intervals and their margin is an arrow at the edge.
    """
    if not rows:
        return ""
    inside = [value for row in rows if row.ends for value in row.ends] or [row.value for row in rows]
    low, high = _padded(min(0.0, *inside), max(0.0, *inside), 0.05)
    bottom = FOREST_TOP + FOREST_ROW * len(rows)
    frame = replace(REPORT, height=bottom + REPORT.bottom, left=16, right=16, top=FOREST_TOP)  # half a tick label
    place = Places(frame, (low, high), (0, 1))
    parts = [
        f'<path class="{"zero" if abs(x) < 1e-12 else "grid"}" d="M{place.x(x):.1f} {FOREST_TOP}V{bottom + 4}"/>'
        f'<text x="{place.x(x):.1f}" y="{bottom + 18}" text-anchor="middle">{number}%</text>'
        for x in ticks(low, high, MaxNLocator(5))
        for number in [f"{x:+.6g}".replace("-", MINUS) if x else "0"]
    ]
    parts += [_of_row(row, FOREST_TOP + FOREST_ROW * number, place) for number, row in enumerate(rows)]
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(f'<text x="{middle}" y="{frame.height - 6}" text-anchor="middle">{escape(axis)}</text>')
    return _figure(title, frame, "".join(parts))


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
