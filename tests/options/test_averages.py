"""Averages of checkpoints: their notation, and their weights by hand."""

import argparse

import pytest

from reslora.options.averages import averages, averages_of


def test_weights_are_those_of_the_formulas():
    ema, last = averages_of("ema:0.5, last:2")
    assert ema.weights(3) == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=1e-15)
    assert last.weights(4) == [0, 0, 0.5, 0.5] and last.weights(1) == [1.0]
    assert (ema.least, last.least) == (2, 2)


def test_ema_is_a_moving_average_with_adams_correction():
    (ema,), values = averages_of("ema:0.9"), [3.0, -1.0, 4.0, 1.5]
    moving = 0.0
    for value in values:
        moving = 0.9 * moving + 0.1 * value
    mean = sum(weight * value for weight, value in zip(ema.weights(4), values, strict=True))
    assert mean == pytest.approx(moving / (1 - 0.9**4), rel=1e-14)


def test_notation():
    assert averages("ema:.990,last:5,last:5") == "ema:0.99,last:5"


@pytest.mark.parametrize("text", ["ema", "last:1"])
def test_other_texts_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        averages(text)
