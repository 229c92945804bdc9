"""reslora/plots/charts.py: charts as SVG."""

import re
from xml.etree import ElementTree

import pytest
from matplotlib.ticker import MaxNLocator

from reslora.plots.charts import PAGE, REPORT, Axes, Line, Row, Series, chart, forest, line_chart, ticks


def lines_of(chart: str) -> list[list[tuple[float, float]]]:
    """Return the points of each line, in pixels."""
    paths = [path.get("d") for path in ElementTree.fromstring(chart).iterfind(".//path[@class='line']")]
    numbers = [list(map(float, re.findall(r"-?[\d.]+", path))) for path in paths]
    return [list(zip(found[::2], found[1::2], strict=True)) for found in numbers]


def test_points_are_where_their_numbers_say():
    chart = line_chart("Loss <&>", "step", [Line("a", "#111111", ((0, 1.0), (5, 2.0), (10, 3.0)))], mark=5)
    (((left, low), middle, (right, high)),) = lines_of(chart)
    assert 0 < left < right < PAGE.width and 0 < high < low < PAGE.height
    assert middle == pytest.approx(((left + right) / 2, (low + high) / 2), abs=0.1)
    (mark,) = re.findall(r'class="mark" d="M([\d.]+) ', chart)
    assert float(mark) == pytest.approx(middle[0], abs=0.1) and "<title>a, 5: 2.0000</title>" in chart


@pytest.mark.parametrize("points", [((3, 0.5),), ((0, 0.3), (1, 0.3 + 1e-16))])
def test_hardly_any_points_are_shown_too(points):
    chart = line_chart("Loss", "step", [Line("a", "#111111", points)])
    ElementTree.fromstring(chart)
    dots = re.findall(r'class="dot" d="M([^ ]*) ([^m]*)m', chart)
    assert len(dots) == len(points)
    assert all(0 <= float(x) <= PAGE.width and 0 <= float(y) <= PAGE.height for x, y in dots)


@pytest.mark.parametrize(
    ("point", "numbers"), [((123456, 0.5), {"0.5", "123456"}), ((0, 0.1234567), {"0.123457", "0"})]
)
def test_one_point_has_its_own_numbers_at_the_axes(point, numbers):
    """Round numbers around it would have too many digits."""
    chart = line_chart("Loss", "step", [Line("a", "#111111", (point,))])
    assert set(re.findall(r">([-\d.e+]+)</text>", chart)) == numbers


def test_without_points_there_is_an_empty_frame():
    chart = line_chart("Loss", "step", [])
    assert lines_of(chart) == [] and 'aria-label="Loss: nothing yet"' in chart


def test_lines_have_their_own_colors_and_dashes_and_only_few_points_have_dots():
    lines = [Line("a", "#111111", tuple((x, 1.0 * x) for x in range(99)), "7 4"), Line("b", "#222222", ((0, 1.0),))]
    chart = line_chart("Loss", "step", lines)
    assert 'style="--own: #111111"' in chart and 'style="--own: #222222"' in chart
    assert chart.count('stroke-dasharray="14 8"') == 1 and chart.count('class="dot"') == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 200, [0, 50, 100, 150, 200]),
        (0.1, 0.2, [0.1, 0.12, 0.14, 0.16, 0.18, 0.2]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high, MaxNLocator(5, steps=[1, 2, 5, 10])) == expected


def test_intervals_are_drawn_to_the_scale_of_the_axis():
    """Twice as far from zero is twice as far in pixels; a value far beyond all intervals is an arrow at the edge."""
    rows = [
        Row("a <b>", 0, -1.5, (-2.0, -1.0), "text"),
        Row("c", 1, 0.5, (0.0, 1.0), ""),
        Row("base", 2, 30.0, None, ""),
    ]
    drawn = forest("Losses", rows, "percent")
    ElementTree.fromstring(drawn)
    zero = float(re.search(r'class="zero" d="M([\d.]+) ', drawn)[1])
    (a_low, a_high), (c_low, c_high) = (
        map(float, ends) for ends in re.findall(r'class="bar" d="M([\d.]+) \d+H([\d.]+)"', drawn)
    )
    assert c_low == zero and zero - a_low == pytest.approx(2 * (zero - a_high), abs=0.2)
    assert zero - a_high == pytest.approx(c_high - zero, abs=0.2)
    (arrow,) = (float(x) for x in re.findall(r'class="line" d="M[\d.]+ [\d.]+L([\d.]+) ', drawn))
    assert c_high < arrow == REPORT.width - 16 and "a &lt;b&gt;" in drawn
    assert re.search(r">\u2212[\d.]+%<", drawn) and ">0%<" in drawn
    assert forest("Losses", [], "percent") == ""


def test_a_difference_far_above_the_others_does_not_flatten_them():
    """Such as the base model's difference: it is hollow, at the edge."""
    near = Series("a", 0, [(0, -1.0), (1, 1.0)], [(0, -1.0), (1, 1.0)])
    far = Series("base", 1, [(0, 500.0), (1, 1.5)], [(0, 500.0), (1, 1.5)])
    drawn = chart([near, far], Axes("Difference", "t", "percent", zero=True))
    assert drawn.count('class="hollow"') == 1 and ">500<" not in drawn and ">400<" not in drawn
