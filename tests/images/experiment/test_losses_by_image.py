"""The losses by test image in an experiment's report: formula, order and thumbnails."""

import re
from functools import partial

import numpy as np
import pytest
from experiment import examples
from PIL import Image

from reslora.images.experiment.losses_by_image import FOLDER, SHOWN, SIDE, by_image, differences, write_thumbnails


@pytest.fixture(scope="module")
def experiment() -> dict:
    return examples.experiment(None)


def test_differences_are_means_over_seeds_by_hand_and_sorted(experiment):
    assert min(experiment["verdicts"], key=lambda verdict: verdict["relative"])["label"] == "reslora block(4)"
    losses = {
        label: np.mean(
            [
                arm["test"]["losses"]
                for arm in experiment["arms"]
                if arm["label"] == label and arm["learning_rate"] == experiment["chosen"][label]["learning_rate"]
            ],
            axis=0,
        )
        for label in ("lora", "reslora block(4)")
    }
    expected = dict(enumerate(100 * (losses["reslora block(4)"] - losses["lora"]) / losses["lora"]))
    found = differences(experiment)
    assert [percent for _, percent in found] == pytest.approx(sorted(expected.values()))
    assert {int(name, 16): percent for name, percent in found} == pytest.approx(expected)


def test_each_image_stands_with_its_picture_and_a_missing_one_with_its_name(experiment, tmp_path):
    names = [name for name, _ in differences(experiment)]

    def opened(name: str) -> Image.Image:
        if name == names[0]:
            raise OSError("gone since it was encoded")
        return Image.new("RGB", (3 * SIDE, SIDE))

    write_thumbnails(tmp_path, ((name, partial(opened, name)) for name in names))
    assert Image.open(tmp_path / FOLDER / f"{names[1]}.png").size == (SIDE, round(SIDE / 3))
    found = by_image(experiment, tmp_path)
    assert len(names) == 2 * SHOWN and "<details>" not in found  # all are shown
    assert found.count("<img") == len(names) - 1 and names[0] in found
    assert re.findall(r"test image (\w+):", found) == names[1:]
    more = {**experiment, "arms": [doubled(arm) for arm in experiment["arms"]]}
    found = by_image(more, tmp_path)
    assert f"<summary>All {2 * len(names)} test images</summary>" in found
    assert len(re.findall("<figure>", found)) == 2 * SHOWN + 2 * len(names)
    assert by_image({**experiment, "verdicts": []}, tmp_path) == ""


def doubled(arm: dict) -> dict:
    """Return the arm with twice as many test images."""
    if not (test := arm["test"]):
        return arm
    names = [*test["images"], *(f"{name}x" for name in test["images"])]
    return {**arm, "test": {**test, "images": names, "losses": 2 * test["losses"]}}
