"""assets/make/make_example.py, and the example that it has made."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from app_runs import run_by_hand, write_exports
from safetensors.numpy import save_file

from app import compared
from app.bases import BUNDLED, base_of
from app.library import Library
from app.runs import EXAMPLE

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_example_is_small_complete_and_of_no_machine(run, tmp_path):
    write_exports(run)
    for method in run.methods:
        (run.folder / method / "trash").mkdir()
        save_file({"lora_A": np.ones(2, "float32")}, run.folder / method / "pytorch_lora_weights.safetensors")
    elsewhere = {"pretrained_model_name_or_path": "/home/somebody/checkout/assets/pipeline", "cache_dir": "/data/hub"}
    config = run.config | {"train_data_dir": [str(REPOSITORY / "assets" / "pictures"), "/data/cats"]} | elsewhere
    (run.folder / "config.json").write_text(json.dumps(config))
    runpy.run_path(str(REPOSITORY / "assets" / "make" / "make_example.py"))["make_example"](run, tmp_path / "example")
    example = Library(tmp_path).find("example")
    assert example.status == "finished" and example.steps() == run.steps()
    assert example.config["train_data_dir"] == ["assets/pictures", "cats"] and example.config["cache_dir"] == "hub"
    assert base_of(example).model.pretrained_model_name_or_path == str(BUNDLED)
    assert not example.inside("lora", "trash") and example.inside("lora", "pytorch_lora_weights.safetensors")


def test_bundled_example():
    example = Library(EXAMPLE.parent).find(EXAMPLE.name)
    assert example.status == "finished" and {"lora", "reslora"} <= set(example.methods)
    assert "not yet" not in compared.images(example, max(example.steps()))
    assert not [value for value in example.config.values() if str(value).startswith("/")]
    assert base_of(example).model.pretrained_model_name_or_path == str(BUNDLED)
