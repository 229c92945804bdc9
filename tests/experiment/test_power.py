"""The detectable difference of a planned experiment, from an earlier one."""

import json
from pathlib import Path

import numpy as np
import pytest

from reslora.experiment.power import power_in_words, spread_of
from reslora.experiment.schedule import ArmSchedule
from reslora.experiment.statistics import detectable, effects_of, level_of, rank_interval
from reslora.images.settings import parse_args

from .examples import experiment


def simulated(seeds: int, units: int, experiments: int, random: np.random.Generator) -> np.ndarray:
    """Return differences with standard deviations of 1 over seeds, 0.5 over units, and 2 of the rest."""
    sizes = {(seeds, 1): 1.0, (1, units): 0.5, (seeds, units): 2.0}
    return sum(each * random.standard_normal((experiments, *shape)) for shape, each in sizes.items())


@pytest.mark.parametrize("planned", [(5, 12), (12, 40)])
def test_four_of_five_experiments_of_another_size_find_the_effect(planned):
    """By an earlier experiment that is large, and therefore knows the spread."""
    random = np.random.default_rng(0)
    (earlier,) = simulated(80, 80, 1, random)
    about, least, most = detectable(effects_of(earlier).squares, (80, 80), 0.01, 0.03, planned)
    new = simulated(*planned, 3000, random)
    ends = [rank_interval(new.mean(axis), 0.03)[0] for axis in (-1, -2)]
    needed = np.minimum.reduce([effects_of(new).interval(0.01)[0], *ends])
    assert (needed + about > 0).mean() == pytest.approx(0.8, abs=0.04) and least < about * 1.1 and most > about * 0.9


def planned(folder: Path, *flags: str) -> str:
    words = ["--method", "lora", "lora_x2", "--learning_rate", "1e-4", "--seed", "0", "1", *flags]
    return power_in_words(ArmSchedule(parse_args(["--output_dir", str(folder), *words])), "base", 12, "image")


def test_the_earlier_experiment_with_the_most_seeds_on_the_same_model_is_read(tmp_path):
    content = experiment(None) | {"settings": {"pretrained_model_name_or_path": "base"}}
    two = [arm for arm in content["arms"] if arm["seed"] < 2]
    others = {"other": {"settings": {"pretrained_model_name_or_path": "another"}}, "two": {"arms": two}}
    for name, changes in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.json").write_text(json.dumps(content | changes))
    line = planned(tmp_path / "new")
    assert line.startswith(
        f"detectable difference: not known, as no experiment on this model in {tmp_path} has 3 seeds"
    )
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "experiment.json").write_text(json.dumps(content))
    line = planned(tmp_path / "new")
    assert (
        line.startswith("detectable difference (80% power, about 12 test images): about ") and " with 2 seeds, " in line
    )
    assert line.endswith(f"by the spread of 3 seeds and 12 images in {tmp_path / 'three'}")
    spread = spread_of(tmp_path / "three", "base", False)
    sizes = [
        detectable(spread.squares, (3, 12), level_of(1), level_of(1), (seeds, 12))[0] for seeds in (2, 3, 5, 8, 12, 20)
    ]
    assert sizes == sorted(sizes, reverse=True) and f"{sizes[3]:.2g}% with 8, " in line
    many = planned(tmp_path / "new", "--method", "lora", "lora_x2", "rslora", "loha")
    assert float(many.split("): about ")[1].split("%")[0]) > float(line.split("): about ")[1].split("%")[0])
    assert spread_of(tmp_path / "three", "base", True) is None
    grouped = json.loads(json.dumps(content))
    for arm in grouped["arms"]:
        if arm["test"]:
            arm["test"]["groups"] = [name for name in "abcdef" for _ in range(2)]
    (tmp_path / "three" / "experiment.json").write_text(json.dumps(grouped))
    assert spread_of(tmp_path / "three", "base", True).size == (3, 6)
