"""Prompts from files: kohya's lines, JSON, and refusals that name the line."""

import json

import pytest

from images.runs import refused
from reslora.errors import InvalidArgument
from reslora.images.model_checks import check_prompt
from reslora.images.prompts import Prompt, from_file, prompts_of
from reslora.images.settings import parse_args
from reslora.options.images import ValidationOptions

ALL = Prompt("a red disc", "blue box, dim", 64, 96, 7, 20, guidance_scale=3.5, cfg_scale=7.0)


def read(path) -> list[Prompt]:
    prompts, options = from_file([str(path)])
    return prompts_of(ValidationOptions(validation_prompt=prompts, validation_prompt_options=options))


def test_kohyas_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    lines = ["# a comment", "", "  a red disc --n blue box, dim --w 64 --h 96 --d 7 --s 20 --l 7 --g 3.5"]
    file.write_text("\n".join([*lines, "a box --D 3", "--- no option"]), encoding="utf-8-sig")
    assert read(file) == [ALL, Prompt("a box", seed=3), Prompt("--- no option")]


def test_json(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([vars(ALL), {"prompt": "a box", "width": None}]))
    assert read(file) == [ALL, Prompt("a box")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "a --w 6", "line 1: width 6 is not a whole number of 8 to 65536"),
        ("a.txt", "a --s ten", "line 1: --s ten is not a number"),
        ("a.txt", "a\nb --ss euler_a", "line 2: --ss is unknown"),
        ("a.txt", "\n# b\n", "contains no prompt"),
        ("a.json", "[", "is not JSON"),
        ("a.json", "{}", "is not a list"),
        ("a.json", '[{"prompt": "a"}, "b"]', "entry 2: is not an object with a prompt"),
        ("a.json", '[{"prompt": "a", "steps": 3}]', "entry 1: steps is not an option of a prompt"),
        ("a.json", '[{"prompt": "a", "guidance_scale": "7"}]', "entry 1: guidance_scale '7' is not a finite number"),
        ("a.json", f'[{{"prompt": "a", "cfg_scale": 1{"0" * 309}}}]', "0 is not a finite number"),
        ("a.json", '[{"prompt": "a", "seed": true}]', "entry 1: seed True is not a whole number"),
        ("a.json", '[{"prompt": "a", "negative_prompt": 3}]', "entry 1: negative_prompt 3 is not a text"),
        ("b.json", None, "cannot be read"),
        ("a.toml", '[[prompt.subset]]\nprompt = "a"', "not read from TOML; write a .txt file"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(tmp_path, capsys, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert words in refused(capsys, "--validation_prompt", tmp_path / name)


def test_a_file_beside_other_prompts_is_refused():
    """Otherwise its name would be used as a prompt."""
    with pytest.raises(
        InvalidArgument, match=r"^--validation_prompt \S+(txt|JSON|toml): a file together with other prompts"
    ):
        parse_args(["--validation_prompt", *["none.txt", "a red box"]])


def test_a_run_repeats_the_options_by_its_own_flags(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a\nb --w 64")
    flags = parse_args(["--validation_prompt", str(tmp_path / "a.txt")])
    assert prompts_of(flags.validation) == [Prompt("a"), Prompt("b", width=64)]
    names = ("validation_prompt", "validation_prompt_options")
    (tmp_path / "config.json").write_text(json.dumps({name: flags[name] for name in names}))
    again = parse_args(["--config", str(tmp_path / "config.json")])
    assert prompts_of(again.validation) == prompts_of(flags.validation)
    other = parse_args(["--config", str(tmp_path / "config.json"), "--validation_prompt", "c"])
    assert prompts_of(other.validation) == [Prompt("c")]
    words = ["--validation_prompt", "a", "b", "--validation_prompt_options"]
    assert "1 for 2 prompts" in refused(capsys, *words, "{}")
    assert "width 'x' is not a whole" in refused(capsys, *words, "{}", '{"width": "x"}')


@pytest.mark.parametrize(
    ("prompt", "told", "words"),
    [
        (Prompt("a", width=40), "", "40 pixels; height and width must be multiples of 16; give 32"),
        (Prompt("a", num_inference_steps=11), "", "11 steps, and the model has 10"),
        (Prompt("a", "b"), "it is told", "a negative prompt"),
        (Prompt("a", cfg_scale=7), "it is told", "guidance by one"),
    ],
)
def test_what_a_pipeline_cannot_take_is_refused(prompt, told, words):
    with pytest.raises(InvalidArgument, match=words):
        check_prompt(prompt, "--validation_prompt", 10, 16, told)
