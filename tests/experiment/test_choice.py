"""The choice of learning rates and checkpoints on the selection split."""

import math

import pytest

from reslora.experiment.choice import choice, choose


def arm(label: str, rate: float, seed: int, **more) -> dict:
    method = label.split()[0]
    found = {"label": label, "method": method, "learning_rate": rate, "seed": seed, "rank": 4, "status": "finished"}
    return found | {"select_by_step": {"50": 0.4, "100": 0.3}, "test": None} | more


def test_rate_and_step_are_chosen_over_seeds_together():
    losses = {
        1e-4: [{"50": 0.50, "100": 0.40}, {"50": 0.50, "100": 0.42}],
        2e-4: [{"50": 0.30, "100": 0.10}, {"50": 0.36, "100": 0.90}],  # the best loss of all, by luck
        4e-4: [{"50": 0.45, "100": 0.60}, {"50": 0.45, "100": 0.60}],
    }
    expected = {"learning_rate": 2e-4, "step": 50, "loss": pytest.approx(0.33), "at_end": None, "next": None}
    assert choice(losses) == expected


@pytest.mark.parametrize(
    ("losses", "at_end", "following"),
    [
        ((1, 2, 3), "low", 5e-5),
        ((3, 2, 1), "high", 8e-4),
        ((3, 1, 2), None, None),
        ((3, 1, None), None, None),  # it diverged, which is an end of the grid too
        ((2, 2, 3), "low", 5e-5),
    ],
)
def test_a_best_rate_at_an_end_of_the_grid_has_a_next_one(losses, at_end, following):
    found = choice({rate: [{"50": loss}] for rate, loss in zip((1e-4, 2e-4, 4e-4), losses, strict=True)})
    assert (found["at_end"], found["next"]) == (at_end, following)


def test_the_next_rate_continues_by_the_step_at_that_end():
    rates = (1e-4, 2e-4, 3e-4, 9e-4)
    for losses, following in (((1, 2, 3, 4), 5e-5), ((4, 3, 2, 1), 2.7e-3)):
        assert choice({rate: [{"50": loss}] for rate, loss in zip(rates, losses, strict=True)})["next"] == following


@pytest.mark.parametrize(("beside", "loss", "following"), [(0.1, None, 1e-5), (0.1, 1, 1e-7), (2e-4, None, 5e-5)])
def test_a_rate_that_diverged_far_away_says_no_step(beside, loss, following):
    assert choice({1e-4: [{"50": 0.5}], beside: [{"50": loss}]})["next"] == following


def test_a_rate_with_fewer_seeds_says_the_step():
    assert choice({1e-4: [{"50": 0.5}] * 2, 1e-2: [{"50": 0.6}]})["next"] == 1e-6


@pytest.mark.parametrize(("trained", "at_end"), [((0, 1), None), ((1,), None), ((2,), None), ((1, 2), "high")])
def test_an_end_is_one_of_all_rates_beside_one_that_was_tried(trained, at_end):
    """The time limit was reached before the other rates were tried; they say more than a rate beyond the grid."""
    losses = [[{"50": 0.5 - 0.1 * place}] if place in trained else [] for place in range(3)]
    assert choice(dict(zip((1e-4, 2e-4, 4e-4), losses, strict=True)))["at_end"] == at_end


def test_one_rate_has_no_ends_and_nothing_finite_is_no_choice():
    assert choice({1e-4: [{"50": 0.5}]}) | {"loss": 0} == {
        "learning_rate": 1e-4, "step": 50, "loss": 0, "at_end": None, "next": None,
    }  # fmt: skip
    for losses in ({}, {1e-4: []}, {1e-4: [{}]}, {1e-4: [{"50": None}]}, {1e-4: [{"50": math.nan}]}):
        assert choice(losses) is None


def test_what_not_all_seeds_have_is_not_chosen():
    """A rate with fewer seeds, a step that one seed lacks, and a step with a non-finite loss."""
    seeds = [{"50": 0.5, "100": 0.1, "150": 0.2}, {"50": 0.5, "150": None}]
    found = choice({1e-4: seeds, 2e-4: [{"50": 0.1}]})
    assert (found["learning_rate"], found["step"], found["at_end"]) == (1e-4, 50, "low")
    # The end of what is left, but not of what was tried.
    found = choice({1e-4: seeds, 2e-4: seeds, 5e-5: [{"50": 0.1}]})
    assert (found["learning_rate"], found["at_end"], found["next"]) == (1e-4, None, None)


def test_seeds_that_compare_do_not_choose_but_a_rate_at_which_one_fails_is_out():
    arms = [arm("lora", 1e-4, 0), arm("lora", 2e-4, 0, select_by_step={"50": 0.2})]
    compares = arm("lora", 1e-4, 1, select_by_step={"50": 0.1})
    assert choose([*arms, compares], [0])["lora"]["learning_rate"] == 2e-4
    fails = arm("lora", 2e-4, 1, status="failed")
    assert choose([*arms, fails], [0])["lora"]["learning_rate"] == 1e-4


def test_labels_choose_among_arms_that_have_ended():
    arms = [arm("lora", 1e-4, 0), arm("lora", 2e-4, 0, select_by_step={"50": 0.1}, status="running")]
    arms += [arm("reslora", 1e-4, 0), arm("reslora", 2e-4, 0, select_by_step={"50": 0.1}, status="failed")]
    arms += [arm("loha", 1e-4, 0, status="failed"), arm("lokr", 1e-4, 0, status="waiting")]
    found = choose(arms)
    assert list(found) == ["lora", "reslora"]
    assert all(each["learning_rate"] == 1e-4 and each["step"] == 100 for each in found.values())
    assert [each["at_end"] for each in found.values()] == [None, "low"]
    waiting = [arm("oft", 1e-4, 0), arm("oft", 2e-4, 0), arm("oft", 4e-4, 0, status="waiting")]
    waiting[1]["select_by_step"] = {"100": 0.01}
    assert choose(waiting)["oft"] | {"loss": 0} == {
        "learning_rate": 2e-4, "step": 100, "loss": 0, "at_end": None, "next": None,
    }  # fmt: skip
