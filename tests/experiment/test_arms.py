"""The arms of an experiment, their order, and extended rates: functions without disk or model."""

import importlib.util
import math

import pytest
from images.runs import refused

from reslora.experiment.arms import (
    LEAST_RATIO,
    MOST_EXTENSIONS,
    NEAR,
    Arm,
    choosing_of,
    coarse_to_fine,
    continued,
    grown,
    in_order,
    labels_of,
    nearest,
    options_of,
    place_of,
    with_next,
)
from reslora.images.settings import parse_args
from reslora.options.grid import Grid
from reslora.options.images import Options

RATES = [1e-4, 2e-4, 4e-4, 8e-4, 16e-4]
SEVERAL = ("--learning_rate", "1e-4", "2e-4")


def parabola(best: dict[str, int]):
    """Return losses that are lowest at this position of the grid, and a little higher for later seeds."""
    return lambda arm: (RATES.index(arm.rate) - best[arm.label] - 0.1) ** 2 + 0.01 * arm.seed


def all_arms(grids: dict, seeds: list[int]) -> set[Arm]:
    return {Arm(label, rate, seed) for label, rates in grids.items() for rate in rates for seed in seeds}


def trained_in_order(grids: dict, seeds: list[int], loss) -> list[Arm]:
    """Return the arms in their order of training."""
    losses: dict[Arm, float] = {}
    while todo := [arm for arm in in_order(grids, seeds, losses) if arm not in losses]:
        losses[todo[0]] = loss(todo[0])
    return list(losses)


# -- from flags --------------------------------------------------------------------------------------------------------


def test_one_value_is_no_list_and_no_experiment():
    flags = parse_args(["--learning_rate", "1e-4", "--seed", "3", "--rank", "4", "--shortcut", "block"])
    names = ("learning_rate", "seed", "rank", "shortcut", "lora_alpha")
    assert [flags[name] for name in names] == [1e-4, 3, 4, "block", 8]
    assert (
        isinstance(flags, Options)
        and flags.experiment.select_split is None
        and flags.validation.validation_split == 0.1
    )


def test_labels_are_methods_with_what_is_given_several_times():
    flags = parse_args(["--method", "lora", "reslora", *SEVERAL, "--rank", "4", "8", "--shortcut", "input", "block"])
    found = {label.name: label for label in labels_of(flags)}
    assert list(found) == [
        *("lora rank 4", "lora rank 8", "reslora input rank 4", "reslora input rank 8"),
        *("reslora block(4) rank 4", "reslora block(4) rank 8"),
    ]
    label = found["reslora block(4) rank 8"]
    assert place_of(label, Arm(label.name, 1e-4, 2)) == "block/rank-8/lr-0.0001/seed-2"
    own = options_of(flags, label, 1e-4, 2)
    adapter = own.adapter
    assert (adapter.method, adapter.rank, adapter.lora_alpha, adapter.shortcut) == (["reslora"], 8, 16, "block")
    assert (own["learning_rate"], own["seed"]) == (1e-4, 2)
    assert [label.name for label in labels_of(parse_args([*SEVERAL]))] == ["lora", "reslora"]


def test_all_shortcuts_and_all_controls_are_one_experiment():
    words = "--method lora lora_x2 lora_matched loha lokr reslora"
    flags = parse_args([*words.split(), "--shortcut", "input", "block", "middle", "--pre_num", "4", *SEVERAL])
    found = {label.name: label for label in labels_of(flags)}
    assert list(found) == [
        *("lora", "lora_x2", "lora_matched input", "lora_matched block(4)", "lora_matched middle(4)"),
        *("loha", "lokr", "reslora input", "reslora block(4)", "reslora middle(4)"),
    ]
    own = {name: options_of(flags, label, 1e-4, 0).adapter for name, label in found.items()}
    assert (own["lora_matched middle(4)"].shortcut, own["loha"].shortcut) == ("middle", "none")
    assert {each.pre_num for each in own.values()} == {4}
    matched = parse_args(["--method", "lora", "lora_matched", "--shortcut", "input", "block"])
    assert [label.name for label in labels_of(matched)] == ["lora", "lora_matched input", "lora_matched block(4)"]


def test_several_numbers_of_blocks_are_arms_of_the_shortcuts_that_take_several():
    words = ["--method", "lora", "reslora", "--shortcut", "input", "middle", "--pre_num", "1", "4", "--seed", "0", "1"]
    flags = parse_args(words)
    found = {label.name: label for label in labels_of(flags)}
    assert list(found) == ["lora", "reslora input", "reslora middle(1)", "reslora middle(4)"]
    own = options_of(flags, found["reslora middle(1)"], 1e-4, 0)
    assert (own.adapter.shortcut, own.adapter.pre_num) == ("middle", 1)
    arm = Arm("reslora middle(1)", 1e-4, 1)
    assert place_of(found[arm.label], arm) == "middle/pre_num-1/lr-0.0001/seed-1"
    assert isinstance(parse_args(["--shortcut", "block", "--pre_num", "1", "4"]), Grid)


@pytest.mark.parametrize(
    "flags",
    [
        ("--learning_rate", "1e-4", "0.0001"),
        ("--seed", "1", "2", "1"),
        ("--push_to_hub", *SEVERAL),
        ("--max_train_samples", "4", *SEVERAL),
        ("--validation_split", "0.2", *SEVERAL),
        ("--resume_from_checkpoint", "checkpoint-2", *SEVERAL),
        ("--shortcut", "input", "block", "--method", "lora"),
        ("--pre_num", "1", "4", "--method", "reslora", "--shortcut", "input"),
        ("--extend_rates", "--seed", "0", "1"),
        ("--extend_rates",),
        ("--learning_rate", "1.001e-4", "1e-4", "--extend_rates"),
        ("--learning_rate", "5e-5", "1.04e-4", "1.05e-4", "--extend_rates"),
        ("--experiment_minutes", "5"),
        ("--arms_at_once", "2"),
        ("--executor", "ray"),
        ("--gpus_per_run", "0.5", *SEVERAL),
        ("--test_split", "0.2"),
        ("--select_split", "0.5", "--test_split", "0.5", *SEVERAL),
        ("--lr_scheduler", "polynomial", "--learning_rate", "1e-4", "1e-8"),
        ("--average_checkpoints", "last:5", "--max_train_steps", "20", "--validation_steps", "5", *SEVERAL),
        ("--save_best", "--average_checkpoints", "last:2", *SEVERAL),
        ("--reference", "lora last:3", "--average_checkpoints", "last:2", *SEVERAL),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(capsys, flags):
    assert flags[0] in refused(capsys, *flags)


def test_ray_is_an_extra_and_a_run_has_one_gpu(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    several = ("--executor", "ray", *SEVERAL)
    assert "--executor ray: ray is not installed; pip install ray" in refused(capsys, *several)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "ray" else found(name))
    assert "--gpus_per_run 2: a run trains on one GPU" in refused(capsys, *several, "--gpus_per_run", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--executor ray: each run is trained by all processes" in refused(capsys, *several)


# -- in which order ----------------------------------------------------------------------------------------------------


def test_rates_go_from_coarse_to_fine():
    assert coarse_to_fine([5, 1, 3]) == [3, 1, 5]
    assert coarse_to_fine(range(7)) == [3, 1, 5, 0, 2, 4, 6]
    assert nearest(dict(zip(RATES, [9, 5, 1, 2, 3], strict=True))) == [RATES[i] for i in (2, 3, 1, 4, 0)]


def test_the_first_seed_comes_first_and_no_label_is_ahead_by_more_than_one():
    grids, seeds = {"lora": RATES, "reslora": RATES, "loha": RATES}, [7, 1, 2]
    order = trained_in_order(grids, seeds, parabola({"lora": 2, "reslora": 4, "loha": 0}))
    assert set(order) == all_arms(grids, seeds) and len(order) == len(set(order))
    assert {arm.seed for arm in order[:15]} == {7}
    for end in range(len(order)):
        trials = [sum(arm.label == label for arm in order[:end]) for label in grids]
        assert max(trials) - min(trials) <= 1


def test_further_seeds_go_to_the_rates_near_each_optimum_first():
    grids, seeds = {"lora": RATES, "reslora": RATES}, [0, 1, 2]
    order = trained_in_order(grids, seeds, parabola({"lora": 2, "reslora": 4}))
    second = order[10 : 10 + 2 * NEAR]
    assert [arm.rate for arm in second if arm.label == "lora"] == [RATES[i] for i in (2, 3, 1)]
    assert [arm.rate for arm in second if arm.label == "reslora"] == [RATES[i] for i in (4, 3, 2)]
    assert {arm.seed for arm in second} == {1}
    assert {arm.seed for arm in order[10 + 2 * NEAR : 10 + 4 * NEAR]} == {2}


def test_a_diverged_arm_is_no_optimum():
    losses = dict(zip(RATES, [3, 2, 1, math.inf, math.inf], strict=True))
    assert nearest(losses)[0] == RATES[2]


# -- more rates --------------------------------------------------------------------------------------------------------


def losses_at(grids: dict, best: dict[str, float], seeds: list[int]) -> dict[Arm, float]:
    return {arm: abs(math.log(arm.rate / best[arm.label])) for arm in all_arms(grids, seeds)}


def test_rates_grow_for_all_until_every_optimum_is_inside():
    grids, best, seeds = {"lora": RATES, "reslora": RATES}, {"lora": 2e-4, "reslora": 35e-4}, [0, 1]
    grids = grown(grids, seeds, losses_at(grids, best, seeds))
    assert grids == {"lora": [5e-5, *RATES], "reslora": [*RATES, 32e-4]}
    grids = grown(grids, seeds, losses_at(grids, best, seeds))
    assert grids["reslora"][-1] == 64e-4 and len(grids["lora"]) == len(grids["reslora"])
    assert grown(grids, seeds, losses_at(grids, best, seeds)) == grids


def test_the_rates_that_were_added_are_found_again():
    assert continued([1e-4, 2e-4], [1e-4, 2e-4]) == [1e-4, 2e-4]
    assert continued([1e-4, 2e-4], [4e-4, 2e-4, 1e-4, 5e-5, 7e-4]) == [5e-5, 1e-4, 2e-4, 4e-4]
    assert continued([1e-4], [2e-4]) == [1e-4]


@pytest.mark.parametrize("up", [True, False])
def test_rates_that_are_as_near_as_they_may_be_can_be_extended(up):
    rates = [1e-4, LEAST_RATIO * 1e-4]
    for _ in range(MOST_EXTENSIONS):
        rates = with_next(rates, rates[-1 if up else 0])
    assert rates == sorted(set(rates))


def test_a_best_rate_is_of_the_seeds_that_all_rates_have():
    """With the first seed, the best rate is inside the grid; with both seeds, it is at the end."""
    grids, losses = {"lora": [1, 2, 4]}, {Arm("lora", rate, 0): loss for rate, loss in ((1, 3.0), (2, 1.0), (4, 2.0))}
    assert grown(grids, [0, 1], losses) == {"lora": [1, 2, 4]}
    losses |= {Arm("lora", 4, 1): 0.0}
    assert grown(grids, [0, 1], losses) == {"lora": [1, 2, 4]}
    losses |= {Arm("lora", rate, 1): 5.0 for rate in (1, 2)}
    assert grown(grids, [0, 1], losses) == {"lora": [1, 2, 4, 8]}


def test_every_fourth_seed_chooses_where_there_are_rates_to_choose():
    assert choosing_of([0, 1, 2], 1) == [0, 1, 2] and choosing_of([5, 0, 1], 3) == [5]
    assert choosing_of(range(9), 2) == [0, 4, 8]
