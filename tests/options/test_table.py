"""The table of options, and what is derived from it."""

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest
from waiting import LIMIT

from reslora.images.settings import build_parser, parsed_values, resolve, with_family
from reslora.methods.registry import METHODS, Method
from reslora.options.grid import Grid
from reslora.options.images import Options
from reslora.options.option import Resume
from reslora.options.texts import GlueOptions, LlmOptions

TABLE = Options.table()


def test_each_option_says_what_can_be_derived_from_it():
    for option in TABLE.values():
        assert option.help and not option.help.endswith(".") and option.resume in get_args(Resume), option.name
        assert option.yields_to in ("", *TABLE) and option.implies in ("", *METHODS), option.name
        known = hasattr(Method, option.read_by) or option.read_by in Method.__dataclass_fields__
        assert known or not option.read_by, option.name
        assert not option.essential or len(option.essential) < 80, option.name


def test_options_of_a_run_do_not_change_and_are_replaced_by_name():
    options = Options.of(rank=4, resolution=32, seed=1)
    assert (options.adapter.rank, options.data.resolution, options.training.seed) == (4, [32], 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.adapter.rank = 8
    changed = options.replace(rank=8, train_data_dir=["a", "b"])
    assert (changed["rank"], changed["train_data_dir"], options["rank"]) == (8, ["a", "b"], 4)
    assert changed.model is options.model  # what is shared is not copied
    with pytest.raises(KeyError):
        options.replace(rang=4)


def test_files_have_flat_names_and_no_list_around_one_value():
    flat = Options.of(resolution=[64], train_data_dir=["images"]).flat()
    assert list(flat) == list(TABLE) and (flat["resolution"], flat["train_data_dir"]) == (64, "images")
    assert Options.of().flat()["resolution"] is None
    assert Options.of(**flat) == Options.of(resolution=[64], train_data_dir=["images"])


def test_what_is_not_given_is_no_value():
    assert parsed_values(build_parser(), []) == {}
    words = ["--lr", "1e-4", "--steps", "5", "--no-plan", "--num_class_images", "100", "--output", "out"]
    assert parsed_values(build_parser(), words) == {
        "learning_rate": [1e-4], "max_train_steps": 5, "plan": False, "num_class_images": 100, "output_dir": "out",
    }  # fmt: skip


def test_short_names_are_for_files_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("lr = 1e-4\nsteps = 5\nmodel = 'owner/model'\ndata = 'images'\noutput = 'out'")
    given = parsed_values(build_parser(), ["--config", str(file), "--steps", "6"])
    assert given == {
        "learning_rate": [1e-4], "max_train_steps": 6, "pretrained_model_name_or_path": "owner/model",
        "train_data_dir": ["images"], "output_dir": "out",
    }  # fmt: skip


def test_several_values_of_what_varies_are_an_experiment_that_yields_runs():
    grid = resolve({"learning_rate": [1e-4, 2e-4], "rank": [2, 4], "seed": [0]})
    assert isinstance(grid, Grid) and dict(grid.varied) == {"learning_rate": [1e-4, 2e-4], "rank": [2, 4]}
    runs = [(run["learning_rate"], run["rank"], run["lora_alpha"]) for run in grid.runs("rank", "learning_rate")]
    assert runs == [(1e-4, 2, 4), (2e-4, 2, 4), (1e-4, 4, 8), (2e-4, 4, 8)]
    assert grid.flat()["rank"] == [2, 4] and grid.flat()["seed"] == 0 and grid.flat()["lora_alpha"] is None
    assert isinstance(resolve({"learning_rate": [1e-4]}), Options)


def test_a_family_fills_in_what_is_still_open():
    options = resolve({"pretrained_model_name_or_path": "owner/model", "train_data_dir": ["images"]})
    assert options.validation.guidance_scale is None and options.data.resolution == []
    defaults = {"guidance_scale": 7.5, "resolution": 512, "num_inference_steps": 30, "target_modules": ["to_q"]}
    filled = with_family(options.replace(num_inference_steps=4), defaults)
    assert (filled.validation.guidance_scale, filled.data.resolution) == (7.5, [512])
    assert filled.validation.num_inference_steps == 4 and filled.adapter.target_modules == ["to_q"]


def test_help_is_one_screen_and_says_how_to_see_the_rest():
    parser = build_parser("What it does.\n\n    train_sd.py\n")
    short, all_of_it = parser.page(""), parser.page(None)
    essential = [option for option in TABLE.values() if option.essential]
    assert 15 <= len(essential) <= 22 and len(short.splitlines()) <= 45
    assert max(map(len, short.splitlines())) <= 120 and "--help-all" in short and "--help GROUP" in short
    for option in TABLE.values():
        assert f"  {option.flag}" in all_of_it
        assert bool(option.essential) == (f"--{option.short or option.name} " in short) or not option.essential
    assert "--lr RATE" in short and "(default: 16)" in short
    assert "--adam_beta1" in parser.page("optimizer") and "--seed" not in parser.page("optimizer")


@pytest.mark.parametrize("kind", [Options, LlmOptions, GlueOptions])
def test_help_gives_the_default_of_each_number(kind):
    numbers = [option for option in kind.table().values() if isinstance(option.default, int | float)]
    assert [option.name for option in numbers if option.or_else] == []  # words in place of the number


def test_help_answers_on_the_command_line(capsys):
    for words, expected in (
        (["--help"], "--model"),
        (["--help-all"], "--keep_tokens"),
        (["--help", "data"], "--strict"),
    ):
        with pytest.raises(SystemExit) as status:
            build_parser().parse_args(words)
        assert status.value.code == 0 and expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        build_parser().parse_args(["--help", "everything"])
    assert status.value.code == 2 and "--help everything: no such group" in capsys.readouterr().err


def test_the_table_takes_no_heavy_library():
    code = "import sys, reslora.options.images; print({'torch', 'transformers', 'diffusers', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.strip() == "set()", done.stderr
