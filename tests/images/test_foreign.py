"""Options of other trainers are refused with their name here; the table of docs/migrate.md agrees."""

import re
from pathlib import Path

import pytest

from images.runs import refused
from reslora.errors import InvalidArgument
from reslora.images import conversion
from reslora.images.settings import parse_args
from reslora.options.foreign import DEFAULT, foreign_names
from reslora.options.images import Options

MIGRATE = Path(__file__).resolve().parents[2] / "docs" / "migrate.md"
OURS = Options.table().keys() | {"config"}
FOREIGN = foreign_names(Options.table())


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--(\w+)", text))


def rows() -> list[list[str]]:
    """Return the cells of the table: kohya's, diffusers', two other trainers', and ours."""
    section = MIGRATE.read_text(encoding="utf-8").partition("\n## Names\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]


def test_the_table_and_the_messages_agree():
    for number, whose in enumerate(("kohya's", "diffusers'")):
        known = {name: here for name, (owner, here) in FOREIGN.items() if owner == whose}
        in_table = {name: row[-1] for row in rows() for name in flags_in(row[number]) - OURS}
        assert known.keys() == in_table.keys()
        for name, here in known.items():
            assert flags_in(here) <= flags_in(in_table[name]) & OURS
            assert flags_in(here) or (here is DEFAULT and DEFAULT in in_table[name])


def test_the_command_line_names_all_of_them(capsys):
    line = refused(capsys, "--network_dim=8", "--rank", "4", "--repeats", "3", "--save_state", "--unknown")
    assert line.endswith(
        "error: --network_dim is kohya's name; here it is --rank. --repeats is diffusers' name; here it is "
        "--train_data_repeats. --save_state is kohya's name; here it is the default, leave it out"
    )
    line = refused(capsys, "--dataset_config", "x.toml")
    assert "--dataset_config is kohya's name; here it is --train_data_dir" in line
    line = refused(capsys, "--instance_prompt", "a sks dog")
    assert "--instance_prompt is diffusers' name; here it is captions in --train_data_dir: .txt files" in line


def test_a_configuration_does_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("network_dim = 8\nrank = 4\nunet_lr = 1e-4")
    told = "--network_dim is kohya's name; here it is --rank. --unet_lr is kohya's name; here it is --learning_rate"
    with pytest.raises(InvalidArgument, match=re.escape(f"--config {file}: {told}") + "$"):
        parse_args(["--config", str(file)])


def test_other_commands_have_names_of_their_own(capsys):
    with pytest.raises(SystemExit):
        conversion.main(["in", "out", "--to", "kohya", "--network_weights", "x"])
    assert "--network_weights: unknown option" in capsys.readouterr().err


def test_none_is_a_flag_here():
    assert not OURS & FOREIGN.keys()
