"""ResLoraConfig: defaults, validation, immutability, JSON."""

import dataclasses
import json

import pytest
from core_models import assert_one_line

from reslora import ResLoraConfig


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(ResLoraConfig()) == {
        "shortcut": "input",
        "pre_num": 1,
        "head": "repeat",
        "window": 100,
    }


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("pre_num", [-1, 4])
def test_every_shortcut_takes_every_pre_num(shortcut, pre_num):
    config = ResLoraConfig(shortcut=shortcut, pre_num=pre_num)
    assert (config.shortcut, config.pre_num) == (shortcut, pre_num)


@pytest.mark.parametrize(
    "field, value",
    [
        ("shortcut", "inputs"),
        ("shortcut", ""),
        ("shortcut", None),
        ("shortcut", 1),
        ("pre_num", -2),
        ("pre_num", 1.5),
        ("pre_num", 1.0),
        ("pre_num", "4"),
        ("pre_num", None),
        ("pre_num", True),
        ("head", "double"),
        ("head", None),
        ("window", -1),
        ("window", 2.0),
        ("window", "100"),
        ("window", True),
    ],
)
def test_a_bad_value_is_named_with_its_field(field, value):
    with pytest.raises((ValueError, RuntimeError)) as error:
        ResLoraConfig(**{field: value})
    assert_one_line(error, field, str(value))


def test_an_unknown_shortcut_is_answered_with_the_known_ones():
    with pytest.raises((ValueError, RuntimeError)) as error:
        ResLoraConfig(shortcut="residual")
    assert_one_line(error, "residual", "none", "input", "block", "middle")


def test_the_config_is_frozen():
    config = ResLoraConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.shortcut = config.shortcut


def test_equal_configs_are_equal_and_hash_alike():
    assert ResLoraConfig("block", 4) == ResLoraConfig(shortcut="block", pre_num=4)
    assert hash(ResLoraConfig("block", 4)) == hash(ResLoraConfig(shortcut="block", pre_num=4))


def test_a_config_survives_json():
    config = ResLoraConfig(shortcut="middle", pre_num=-1, head="none", window=7)
    assert ResLoraConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "shortcut, pre_num, reach",
    [
        *[("input", 1, 1), ("input", 4, 1), ("input", -1, 1)],
        *[("block", 4, 4), ("middle", -1, None), ("middle", 0, 0), ("none", 3, 0)],
    ],
)
def test_reach_is_what_the_equation_takes(shortcut, pre_num, reach):
    config = ResLoraConfig(shortcut, pre_num)
    assert config.reach == reach and config.wired == (reach != 0)
