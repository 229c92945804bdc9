"""The rules of racing, by hand."""

import math

import pytest

from reslora.experiment.racing import near_best, remaining, stopped_at

RATES = [1, 2, 3, 4, 5]
INF = math.inf


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ({}, [3, 1, 2, 4, 5]),
        ({3: 1.0}, [2, 1, 4, 5]),  # the lower neighbor first
        ({3: 1.0, 2: 1.1}, [4, 5]),  # nothing is better below
        ({3: 1.0, 2: INF}, [4, 5]),
        ({3: 1.0, 2: 0.9}, [1]),  # it is better below, so nothing above is tried
        ({3: 1.0, 2: 1.1, 4: 0.9}, [5]),
        ({3: 1.0, 2: 1.1, 4: 1.2}, []),
        ({3: 1.0, 2: 0.9, 1: 0.8}, []),
        ({3: INF}, [2, 1]),  # what diverges does so at higher rates as well
        ({3: INF, 2: INF, 1: INF}, []),
        ({3: 1.0, 5: 0.9}, [4]),  # of an experiment that has been given more rates
    ],
)
def test_the_race_climbs_from_the_middle_to_the_best_rate(losses, left):
    assert remaining(RATES, losses, start=3) == left


def test_the_race_finds_a_single_minimum_wherever_it_is():
    for best in RATES:
        losses: dict[float, float] = {}
        while left := remaining(RATES, losses, start=3):
            losses[left[0]] = abs(left[0] - best)
        assert min(losses, key=losses.get) == best and {best - 1, best + 1} & set(RATES) <= set(losses)


BEST = {10: 1.0, 20: 0.9, 30: 0.8, 40: 0.7}


@pytest.mark.parametrize(
    ("curve", "higher", "step"),
    [
        ({10: 1.0, 20: 0.9}, True, None),
        ({10: 1.0, 20: 0.903}, True, 20),  # 0.3% worse
        ({10: 1.003, 20: 0.5}, True, 10),  # the first one decides: what is measured later is not known
        ({10: 1.003, 20: 0.5}, False, None),  # a lower rate is compared from half of the steps on
        ({10: 1.5, 20: 0.908}, False, None),  # 0.9% worse
        ({10: 1.5, 20: 0.909}, False, 20),  # 1%
        ({10: 0.69, 20: 5.0}, True, None),  # its first step is the best of all so far, and may be chosen
        ({40: 5.0}, True, None),  # the run has ended anyway
        ({15: 5.0}, True, None),  # nothing was measured at this step
    ],
)
def test_a_run_is_stopped_where_it_is_clearly_worse(curve, higher, step):
    assert stopped_at(curve, BEST, higher) == step


def test_other_seeds_train_the_rates_that_are_about_as_good():
    assert near_best({1: 1.02, 2: 1.0, 3: 1.01, 4: INF}) == [2, 3]
    assert near_best({1: INF}) == [] == near_best({})
