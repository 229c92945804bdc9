"""--vary: which options it accepts, and labels, folders and values of the arms."""

import json

import pytest
from images.runs import refused

from reslora.experiment.arms import Arm, labels_of, options_of, place_of, reference_of
from reslora.experiment.schedule import ArmSchedule
from reslora.images.settings import parse_args
from reslora.options.grid import Grid
from reslora.options.texts import LlmOptions
from reslora.texts.arguments import read


def test_every_combination_is_a_label_with_a_folder_of_its_own():
    words = ["--vary", "optimizer=adamw,adafactor", "--vary", "lora_dropout=0,0.1", "lr=1e-4,2e-4"]
    grid = parse_args(["--method", "lora", "reslora", *words])
    found = {label.name: label for label in labels_of(grid)}
    assert len(found) == 8 and len({(label.method, label.place) for label in found.values()}) == 8
    label = found["reslora lora_dropout=0.1 optimizer=adafactor"]
    assert place_of(label, Arm(label.name, 1e-4, 0)) == "lora_dropout-0.1/optimizer-adafactor/lr-0.0001/seed-0"
    own = options_of(grid, label, 1e-4, 0)
    assert (own["method"], own["optimizer"], own["lora_dropout"]) == (["reslora"], "adafactor", 0.1)
    assert grid.rates == [1e-4, 2e-4] and grid.flat()["optimizer"] == ["adamw", "adafactor"]


def test_a_config_may_hold_several_values_and_a_method_without_an_option_has_one_label(tmp_path):
    (tmp_path / "own.toml").write_text('method = ["lora", "reslora"]\nhead = ["none", "repeat"]\n')
    (tmp_path / "config.json").write_text(json.dumps({"method": ["lora"], "snr_gamma": [0, 5]}))
    grid = parse_args(["--config", str(tmp_path / "own.toml")])
    assert [label.name for label in labels_of(grid)] == ["lora", "reslora head=none", "reslora head=repeat"]
    grid = parse_args(["--config", str(tmp_path / "config.json")])
    assert [label.name for label in labels_of(grid)] == ["lora snr_gamma=0", "lora snr_gamma=5"]
    one = parse_args(["--config", str(tmp_path / "config.json"), "--snr_gamma", "1"])
    assert not isinstance(one, Grid) and one["snr_gamma"] == 1


def test_switches_and_lists_vary(tmp_path):
    """Folders of long lists and of regular expressions are short, and stay the same."""
    long = "+".join(f"down_blocks.{number}.attn" for number in range(9))
    words = ["random_flip=true,no", f"target_modules=to_q,to_q+to_k,{long},.*attn1"]
    grid = parse_args(["--method", "lora", "--vary", *words, "--seed", "0", "1"])
    found = labels_of(grid)
    places = list(dict.fromkeys(label.place.split("/")[0] for label in found))
    assert places[:2] == ["target_modules-to_q", "target_modules-to_q+to_k"] and len(found) == 8
    assert places[2] == f"target_modules-{long[:40]}-c02466" and places[3].startswith("target_modules-._attn1-")
    assert found[3].name == "lora target_modules=to_q+to_k random_flip=false"
    own = options_of(grid, found[3], 1e-4, 0)
    assert own["target_modules"] == ["to_q", "to_k"] and own["random_flip"] is False
    (tmp_path / "config.json").write_text(json.dumps(grid.flat() | {"output_dir": str(tmp_path)}))
    assert parse_args(["--config", str(tmp_path / "config.json")]).varied == grid.varied
    (tmp_path / "own.toml").write_text('target_modules = [["to_q"], ["to_q", "to_k"]]\nrandom_flip = [true, false]\n')
    grid = parse_args(["--config", str(tmp_path / "own.toml"), "--method", "lora"])
    assert grid.varied == {"target_modules": [["to_q"], ["to_q", "to_k"]], "random_flip": [True, False]}
    one = parse_args(["--target_modules", "to_q", "to_k", "--random_flip"])
    assert not isinstance(one, Grid) and one["target_modules"] == ["to_q", "to_k"]


def test_an_optimizer_with_a_rate_of_its_own_is_trained_at_it():
    schedule = ArmSchedule(parse_args(["--method", "lora", "--vary", "optimizer=prodigy,adamw"]))
    assert schedule.grids == {"lora optimizer=prodigy": [1.0], "lora optimizer=adamw": [5e-4]}


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        ("--method lora reslora", "lora"),
        ("--method dora --vary snr_gamma=0,5", "dora snr_gamma=0"),
        ("--method dora loha", "lora"),  # with which nothing is compared
        ("--method dora loha --reference loha", "loha"),
        ("--method lora --vary snr_gamma=0,5 --reference", "lora snr_gamma=5"),
    ],
)
def test_the_reference_is_lora_or_the_first_value_or_the_given_one(words, reference):
    given = [*words.split(), *[reference] * words.endswith("--reference"), "--seed", "0", "1"]
    grid = parse_args(given)
    assert reference_of(grid, labels_of(grid)) == reference


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("optimzer=adamw,lion", "optimzer is not an option; did you mean optimizer?"),
        ("train_data_dir=a,b", "train_data_dir cannot vary: losses with other held-out images are not comparable"),
        ("lora_dropout=0,2", "'2' is not a finite number of at least 0 and below 1"),
        ("lora_dropout=0", "needs two or more values"),
        ("seed=1,2", "--seed is given twice"),
        ("target_modules=to_q,to_k+", "an item is empty"),
        ("lr_scheduler=cosine,cosin", "'cosin' is not a choice"),
    ],
)  # fmt: skip
def test_what_cannot_vary_is_named(capsys, word, why):
    line = refused(capsys, "--vary", word, "--seed", "0", "1")
    assert f"--vary {word}" in line and why in line


def test_other_refusals(capsys):
    assert "--lora_dropout 0 0: one value is given twice" in refused(capsys, "--vary", "lora_dropout=0,0.0")
    assert "--head none repeat: no method of --method lora" in refused(
        capsys, "--vary", "head=none,repeat", "--method", "lora"
    )
    assert "did you mean reslora?" in refused(capsys, "--reference", "relora", "--seed", "0", "1")
    line = refused(capsys, "--vary", "optimizer=adamw,prodigy", "--lr", "1e-4", "2e-4", "--extend_rates")
    assert "--extend_rates: with --vary optimizer" in line
    line = refused(capsys, "--vary", "train_batch_size=1,2", "--shuffle_caption")
    assert "--vary train_batch_size: random captions are encoded beforehand for one batch size" in line


def test_the_language_scripts_vary_their_own_options():
    grid = read(LlmOptions, "train_llm.py", ["--method", "lora", "--vary", "optim=adamw_torch,adafactor"])
    found = labels_of(grid)
    assert [label.name for label in found] == ["lora optim=adamw", "lora optim=adafactor"]
    assert options_of(grid, found[1], 1e-3, 0).optimizer.optimizer == "adafactor"
