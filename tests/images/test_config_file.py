"""A run's config.json with other options: values that these make meaningless are ignored."""

import json
from unittest.mock import Mock

import pytest

from images.runs import RESUME, only
from reslora.errors import InvalidArgument
from reslora.images.settings import parse_args
from reslora.training.trackers import note_settings

SPLITS = ["--select_split", "0.2", "--test_split", "0.2"]
STEERED = ["--save_best", "--validation_split", "0.3", "--max_train_samples", "9"]


@pytest.fixture
def begun(model, data, tmp_path):
    """Return options that name the configuration written by a run of these flags."""

    def flags(*more: str) -> list[str]:
        images = [] if "--dataset_name" in more else ["--train_data_dir", str(data)]
        own = ["--pretrained_model_name_or_path", str(model), *images, *more]
        values = parse_args([*own, "--output_dir", str(tmp_path)])
        note_settings(values, {"max_train_steps": 4, "validation_steps": 2}, Mock(trackers=[]))
        return ["--config", str(tmp_path / "config.json")]

    return flags


def test_the_best_arm_of_an_experiment_is_trained_once_more(begun, capsys):
    several = ["--method", "lora", "reslora", "--learning_rate", "1e-3", "2e-3", "--seed", "0", "1"]
    config = begun(*several, *SPLITS, "--experiment_minutes", "5")
    flags = parse_args([*config, "--method", "lora", "--learning_rate", "2e-3", "--seed", "1"])
    assert (flags.adapter.method, flags.optimizer.learning_rate, flags.training.seed) == (["lora"], 2e-3, 1)
    assert (
        flags.experiment.select_split is None
        and flags.experiment.test_split is None
        and flags.experiment.experiment_minutes is None
    )
    line = "--select_split, --test_split, --experiment_minutes ignored, because this is not an experiment"
    assert only(capsys.readouterr().out.splitlines(), line)
    again = parse_args([*config, "--seed", "0", "1", "2"])
    experiment = again.base.experiment
    assert (experiment.select_split, experiment.test_split) == (0.2, 0.2) and not capsys.readouterr().out
    with pytest.raises(InvalidArgument, match=r"^--select_split: it has no effect, because this is not an experiment"):
        parse_args([*config, "--learning_rate", "2e-3", "--seed", "1", "--select_split", "0.2"])


def test_a_run_becomes_an_experiment(begun, capsys):
    config = begun(*STEERED)
    flags = parse_args([*config, "--seed", "0", "1"])
    validation = flags.base.validation
    assert (flags.values("seed"), validation.validation_split, validation.save_best) == ([0, 1], 0, False)
    assert validation.validation_noises is None
    assert flags.base.experiment.select_split == 0.1 and flags.base.data.max_train_samples is None
    assert "--max_train_samples, --save_best, --validation_split" in capsys.readouterr().out
    with pytest.raises(InvalidArgument, match=r"^--validation_split: this is an experiment; leave it out"):
        parse_args([*config, "--seed", "0", "1", "--validation_split", "0.3"])


@pytest.mark.parametrize(
    ("before", "given", "rate"),
    [("", "--optimizer prodigy", 1.0), ("--optimizer prodigy --learning_rate 0.5", "--optimizer prodigy", 0.5)],
)
def test_another_optimizer_brings_its_own_rate(begun, before, given, rate):
    assert parse_args([*begun(*before.split()), *given.split()]).optimizer.learning_rate == rate


def test_another_optimizer_is_not_contradicted_by_the_one_before(begun, monkeypatch):
    monkeypatch.setattr("reslora.images.refusals.check_installed", lambda *_: None)
    config = begun("--optimizer", "torch.optim.SGD", "--optimizer_args", "momentum=0.9")
    flags = parse_args([*config, "--use_8bit_adam"])
    assert (flags.optimizer.optimizer, flags.optimizer.optimizer_args) == ("adamw8bit", [])
    flags = parse_args([*begun("--use_8bit_adam"), "--optimizer", "adamw"])
    assert (flags.optimizer.optimizer, flags.optimizer.use_8bit_adam) == ("adamw", False)
    with pytest.raises(InvalidArgument, match=r"^--use_8bit_adam: --optimizer adamw is given"):
        parse_args([*begun(), "--optimizer", "adamw", "--use_8bit_adam"])


def test_shortcuts_of_the_run_before_are_left_out_where_no_method_reads_them(begun, capsys):
    """Given on the command line, they are reported; a resumed run is compared by them."""
    config = begun("--method", "reslora", "--shortcut", "block", "--merge", "weights")
    assert parse_args(config).adapter.shortcut == "block"
    assert parse_args([*config, "--method", "lora"]).adapter.shortcut == "input"
    assert parse_args([*config, "--method", "lora", *RESUME]).adapter.shortcut == "block"
    parse_args([*begun("--method", "lora"), "--shortcut", "block"])
    assert capsys.readouterr().out.splitlines()[-1] == "--shortcut block: it has no effect with --method lora"


def test_tables_are_not_flags_that_are_to_be_removed(tmp_path):
    """kohya's files have all options in tables."""
    (tmp_path / "run.toml").write_text("[model_arguments]\nrank = 4")
    with pytest.raises(
        InvalidArgument, match=r"(model_arguments|datasets|rank) is a table; write all flags at the top"
    ):
        parse_args(["--config", str(tmp_path / "run.toml")])


def test_a_file_names_no_other_file(tmp_path):
    (tmp_path / "run.toml").write_text(f"config = {json.dumps(str(tmp_path / 'other.toml'))}")
    with pytest.raises(InvalidArgument, match="config is not a flag"):
        parse_args(["--config", str(tmp_path / "run.toml")])


def test_an_earlier_version_s_option_that_was_not_given_is_passed_over_in_a_run_s_file(tmp_path):
    """The file has all options; one that had an effect is refused."""
    config = tmp_path / "config.json"
    config.write_text('{"rank": 4, "merged_weights": false, "gone": null, "shortcut_scale": "sum"}')
    assert parse_args(["--config", str(config)]).adapter.rank == 4
    for name, value in (("merged_weights", "true"), ("shortcut_scale", '"mean"')):
        config.write_text(f'{{"rank": 4, "{name}": {value}}}')
        with pytest.raises(InvalidArgument, match=f"{name} is not a flag"):
            parse_args(["--config", str(config)])


def test_a_misspelt_flag_is_refused_with_the_nearest_one(tmp_path):
    (tmp_path / "run.toml").write_text("leraning_rate = 1e-4")
    with pytest.raises(InvalidArgument, match=r"leraning_rate .*; did you mean learning_rate\?; rename or remove it$"):
        parse_args(["--config", str(tmp_path / "run.toml")])
