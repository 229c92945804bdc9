"""The bundled U-Net's losses on OpenMoji equal those recorded in `held_still.json`, for each shortcut."""

import json
from pathlib import Path

import pytest

from images.runs import losses, main
from reslora.bundled import ASSETS

pytestmark = pytest.mark.exhaustive

HELD = json.loads(Path(__file__).with_name("held_still.json").read_text())


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache of encoded images that all shortcuts share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_the_same_losses_as_ever(shortcut, cache, tmp_path):
    """Without samples and merges, which do not affect losses. LoRA's losses are the same whatever the shortcut."""
    methods = ("lora", "reslora") if shortcut == "input" else ("reslora",)
    flags = ["--shortcut", shortcut, "--pre_num", 4, "--max_train_steps", 4, "--validation_steps", 4]
    flags += ["--train_batch_size", 8, "--seed", 11, "--method", *methods, "--cache_dir", cache]
    flags += ["--max_train_samples", 48, "--num_validation_images", 0, "--num_inference_steps", 1]
    flags += ["--merge_calibration_samples", 1, "--mixed_precision", "no"]
    flags += ["--train_data_dir", ASSETS / "openmoji", "--learning_rate", 2.5e-4]
    assert main(*flags, "--report_to", "none", "--output_dir", tmp_path / "out") == 0
    for method in methods:
        held = HELD["lora" if method == "lora" else shortcut]
        found = losses(tmp_path / "out", method)
        assert [[step, split] for step, split, _ in found] == [row[:2] for row in held]
        assert [loss for *_, loss in found] == pytest.approx([row[2] for row in held], rel=1e-5)
