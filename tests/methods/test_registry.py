"""The registry of methods: the content of each row, and that only the rows decide."""

import subprocess
import sys

import pytest
from core_models import assert_one_line
from waiting import LIMIT

from reslora.errors import InvalidArgument
from reslora.methods.registry import METHODS, check_steps, refuse_unable


def test_rows_say_what_each_method_is():
    names = "lora lora_x2 lora_matched reslora adalora rslora dora loha lokr oft"
    assert list(METHODS) == names.split()
    assert [name for name, row in METHODS.items() if row.shortcuts] == ["reslora"]
    plain = ["lora", "lora_x2", "lora_matched", "reslora", "rslora"]
    assert [name for name, row in METHODS.items() if row.trains_lora] == plain
    assert [name for name, row in METHODS.items() if row.reads_shortcut] == ["lora_matched", "reslora"]
    assert [name for name, row in METHODS.items() if row.measured] == ["lora_matched"]
    assert len({row.color for row in METHODS.values()}) == len(METHODS)
    assert [name for name, row in METHODS.items() if not row.plain_lora] == ["dora", "loha", "lokr", "oft"]
    assert [name for name, row in METHODS.items() if not row.of_layers] == ["adalora", "oft"]
    assert [name for name, row in METHODS.items() if not row.dropout] == ["oft"]
    assert [name for name, row in METHODS.items() if not row.deepspeed] == ["adalora"]
    assert [name for name, row in METHODS.items() if not row.quantised] == ["loha", "lokr"]
    assert [name for name, row in METHODS.items() if row.reads_initialization] == ["lora", "lora_x2", "rslora"]
    assert all(name == row.name and row.title and row.help and row.color for name, row in METHODS.items())


def test_what_deepspeed_cannot_train_is_refused():
    refuse_unable(["lora", "reslora", "loha"], "deepspeed")
    with pytest.raises(InvalidArgument) as error:
        refuse_unable(["lora", "adalora"], "deepspeed")
    assert_one_line(error, "--method adalora", "DeepSpeed")


@pytest.mark.parametrize("steps", [None, 0, 3, 100])
def test_enough_steps_are_taken(steps):
    """`check_steps` raises an error for too few."""
    check_steps(["lora", "adalora"], steps, f"--max_train_steps {steps}")


def test_too_few_steps_are_refused_where_a_method_needs_more():
    check_steps(["lora"], 1, "--max_train_steps 1")
    with pytest.raises(InvalidArgument) as error:
        check_steps(["lora", "adalora"], 2, "--max_train_steps 2")
    assert_one_line(error, "--max_train_steps 2", "AdaLoRA needs at least 3")


def test_a_new_baseline_is_a_row(monkeypatch):
    """Options of both trainers offer it, and its row makes the adapter."""
    from reslora.methods.registry import AdapterSettings, adapter_config

    row = METHODS["lora"]
    monkeypatch.setitem(METHODS, "mine", type(row)("mine", "Mine", "made up", "#000000", METHODS["lokr"].config, None))
    config = adapter_config("mine", AdapterSettings(r=2, alpha=4, dropout=0.0, targets=["q_proj"], total_steps=10))
    assert (config.peft_type, config.r, config.alpha) == ("LOKR", 2, 4)
    from reslora.images.settings import build_parser

    assert build_parser().parse_args(["--method", "mine"]).method == ["mine"]


def test_names_of_methods_and_merges_need_no_torch():
    code = (
        "import sys, reslora.methods.registry, reslora.config; sys.exit(bool({'torch', 'peft'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=LIMIT).returncode == 0
