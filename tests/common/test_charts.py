"""reslora/common/charts.py: lines in SVG."""

import re
from xml.etree import ElementTree

import pytest
from matplotlib.ticker import MaxNLocator

from reslora.common.charts import HEIGHT, SVG, WIDTH, Line, interval, line_chart, ticks


def lines_of(chart: str) -> list[list[tuple[float, float]]]:
    """The corners of each line, in the chart's pixels."""
    groups = ElementTree.fromstring(chart).iterfind(f".//{{{SVG}}}g")
    paths = [group.find(f"{{{SVG}}}path").get("d") for group in groups if group.get("id", "").startswith("line-")]
    numbers = [list(map(float, re.findall(r"-?[\d.]+(?:e[+-]?\d+)?", path))) for path in paths]
    return [list(zip(found[::2], found[1::2], strict=True)) for found in numbers]


def test_points_are_where_their_numbers_say():
    chart = line_chart("Loss <&>", "step", [Line("a", "#111111", ((0, 1.0), (5, 2.0), (10, 3.0)))], mark=5)
    (((left, low), middle, (right, high)),) = lines_of(chart)
    assert 0 < left < right < WIDTH and 0 < high < low < HEIGHT
    assert middle == pytest.approx(((left + right) / 2, (low + high) / 2), abs=0.01)
    (mark,) = re.findall(r'class="mark" d="M([\d.]+) ', chart)
    assert float(mark) == pytest.approx(middle[0], abs=0.1) and "<title>a, 5: 2.0000</title>" in chart


@pytest.mark.parametrize(
    "points", [((3, 0.5),), ((1, 7.0), (2, 7.0)), ((0, 1e30), (1, -1e30)), ((0, 0.3), (1, 0.3 + 1e-16))]
)
def test_hardly_any_points_are_shown_too(points):
    chart = line_chart("Loss", "step", [Line("a", "#111111", points)])
    ElementTree.fromstring(chart)
    dots = re.findall(r'<use xlink:href="#[^"]*" x="([^"]*)" y="([^"]*)"', chart)
    assert len(dots) == len(points)
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in dots)


@pytest.mark.parametrize(
    ("point", "numbers"), [((123456, 0.5), {"0.5", "123456"}), ((0, 0.1234567), {"0.123457", "0"})]
)
def test_one_point_has_its_own_numbers_at_the_axes(point, numbers):
    """Round numbers about it would have more digits than there is room for."""
    chart = line_chart("Loss", "step", [Line("a", "#111111", (point,))])
    assert set(re.findall(r">([-\d.e+]+)</text>", chart)) == numbers


def test_without_points_there_is_an_empty_frame():
    assert lines_of(line_chart("Loss", "step", [])) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 200, [0, 50, 100, 150, 200]),
        (0.27, 0.51, [0.3, 0.35, 0.4, 0.45, 0.5]),
        (0.1, 0.2, [0.1, 0.12, 0.14, 0.16, 0.18, 0.2]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high, MaxNLocator(5, steps=[1, 2, 5, 10])) == expected


def test_an_interval_is_drawn_about_its_mean_and_to_scale():
    """Zero is in the middle, at 75, and the farthest end of all intervals 70 from it."""
    drawn = interval((-2.0, -1.0), -1.5, 4.0)
    assert 'd="M75 0V16"' in drawn and 'd="M40.0 8H57.5"' in drawn and 'cx="48.8"' in drawn
