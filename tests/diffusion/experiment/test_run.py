"""Experiments from the command line: arms are plain runs, are trained once, and outlive a kill."""

import json
import shutil
from pathlib import Path

import pytest
from launching import launch
from pipelines import image_folder
from safetensors import safe_open

from diffusion.runs import RESUME, SCRIPT, Watcher, assert_same, final_weights, main, only, printed, refused
from reslora.common.log import read_log
from reslora.files import read_object

ARMS = ("--method", "lora", "reslora", "--learning_rate", "1e-2", "3e-2")
SEEDS = ("--seed", "0", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "images", count=8)


@pytest.fixture(scope="module")
def flags(model, images, tmp_path_factory) -> list[str]:
    """Two steps, each a checkpoint that may be chosen; what is encoded is shared."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--resolution", "32"),
        *("--max_train_steps", "2", "--validation_steps", "1", "--train_batch_size", "2", "--rank", "2"),
        *("--num_validation_images", "0", "--num_inference_steps", "1", "--merge_calibration_samples", "2"),
        *("--report_to", "none", "--select_split", "0.2", "--test_split", "0.2"),
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
    ]


@pytest.fixture(scope="module")
def small(flags, tmp_path_factory) -> Path:
    """Plain LoRA at two rates."""
    output = tmp_path_factory.mktemp("small") / "out"
    assert main(*flags, "--method", "lora", *ARMS[3:], "--output_dir", output) == 0
    return output


@pytest.fixture(scope="module")
def whole(flags, small, tmp_path_factory) -> tuple[Path, list[str]]:
    """The small one, to which a method and a seed were added; and what was printed."""
    output = shutil.copytree(small, tmp_path_factory.mktemp("whole") / "out", copy_function=shutil.copy2)
    return output, printed(*flags, *ARMS, *SEEDS, "--output_dir", output)


def experiment(output: Path) -> dict:
    return json.loads((output / "experiment.json").read_text())


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def arm(output: Path, method: str = "lora", rate: str = "0.01", seed: int = 0) -> Path:
    return output / method / f"lr-{rate}" / f"seed-{seed}"


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_what_an_experiment_leaves(whole):
    output, lines = whole
    found = experiment(output)
    assert [(a["label"], a["learning_rate"], a["seed"], a["status"]) for a in found["arms"]] == [
        (label, rate, seed, "finished") for label in ("lora", "reslora") for rate in (0.01, 0.03) for seed in (0, 1)
    ]
    assert len(found["timesteps"]) == 8 and found["settings"]["seed"] == [0, 1]
    split = found["split"]
    assert split["train"] + split["select"] + split["test"] == 8 and min(split.values()) == 0
    only(lines, "8 arms", f"{split['train']} to train on", f"{split['test']} to compare by")
    for one in found["arms"]:
        choice = found["chosen"][one["label"]]
        assert sorted(one["select_by_step"]) == ["1", "2"] and one["memory_bytes"] > 0 and one["seconds"] > 0
        assert (one["test"] is not None) == (one["learning_rate"] == choice["learning_rate"])
        if one["test"]:
            assert len(one["test"]["losses"]) == split["test"] and len(one["test"]["by_timestep"]) == 8
        folder = output / one["folder"]
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["step-000001", "step-000002"]
        assert (folder / "kohya.safetensors").is_file() and (folder / "unet").is_dir()
    assert [verdict["label"] for verdict in found["verdicts"]] == ["reslora"]
    only(lines, found["verdicts"][0]["sentence"])
    assert lines[-1] == str(output / "report.html") and (output / "report.html").is_file()


def test_the_file_on_top_is_of_the_arm_that_the_select_images_choose(whole):
    output, lines = whole
    found = experiment(output)
    label, choice = min(found["chosen"].items(), key=lambda item: item[1]["loss"])
    arms = [a for a in found["arms"] if a["label"] == label and a["learning_rate"] == choice["learning_rate"]]
    best = min(arms, key=lambda a: a["select_by_step"][str(choice["step"])])
    only(lines, str(output / best["folder"]), f"step {choice['step']}")
    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_seed"], metadata["ss_steps"]) == (str(best["seed"]), str(choice["step"]))


def test_added_methods_and_seeds_train_the_new_arms_alone(small, whole):
    output, lines = whole
    for rate in ("0.01", "0.03"):
        there = files(arm(output, rate=rate))
        assert {name: there[name] for name in files(arm(small, rate=rate))} == files(arm(small, rate=rate))
    assert sum("merging, exporting" in line for line in lines) == 6
    only(lines, "read 2 times")


def test_a_finished_experiment_trains_nothing_and_says_the_same(flags, whole):
    output, lines = whole
    before = {name: time for name, time in files(output).items() if "/" in name}
    again = printed(*flags, *ARMS, *SEEDS, "--output_dir", output)
    assert {name: time for name, time in files(output).items() if "/" in name} == before
    assert again[-2:] == lines[-2:]


# -- arms are plain runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "seed"), [("reslora", 0), ("lora", 1)])
def test_an_arm_is_a_plain_run_on_the_images_to_train_on(flags, whole, images, tmp_path, method, seed):
    """Bit for bit, also where a seed has random crops of its own."""
    output, _ = whole
    held_out = {image for a in experiment(output)["arms"] if a["test"] for image in a["test"]["images"]}
    assert held_out
    plain = [flag for flag in flags if flag not in ("--select_split", "--test_split", "0.2")]
    folder = train_images(output, images, tmp_path / "images")
    plain[plain.index("--train_data_dir") + 1] = str(folder)
    own = ("--method", method, "--learning_rate", "1e-2", "--seed", seed, "--output_dir", tmp_path / "out")
    assert main(*plain, *own) == 0
    mine = arm(output, method, seed=seed)
    assert_same(final_weights(mine.parent, mine.name, 2), final_weights(tmp_path / "out", method, 2))
    one, other = (
        [(row["step"], row["loss"]) for row in read_log(place / "log.jsonl") if row["split"] == "train"]
        for place in (mine, tmp_path / "out" / method)
    )
    assert one == other
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert (mine / name).read_bytes() == (tmp_path / "out" / method / name).read_bytes()
