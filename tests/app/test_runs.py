"""app/runs.py on folders made by hand, with any names that a browser may send."""

import os
import shutil
import sys
import time

import pytest
from app_runs import HOSTILE, run_by_hand, write_exports, write_run

from app import compared
from app.library import Library
from app.runs import BASE, RunError


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_reads_what_the_trainer_wrote(run):
    assert run.methods == ["lora", "reslora"]
    assert run.steps() == [0, 2, 4]
    assert run.prompts[0] == "red disc"
    assert run.progress == (8, 8)
    assert run.status == "stopped"
    assert set(run.samples("lora", 2)) == {(0, 0), (1, 0)}
    write_exports(run)
    assert run.status == "finished"


def test_an_experiment_is_no_run_and_a_language_model_is_not_listed(tmp_path):
    (write_run(tmp_path / "experiment") / "experiment.json").write_text("{}")
    write_run(tmp_path / "run")
    write_run(tmp_path / "of a language model", model_name_or_path="assets/tiny")
    assert [run.name for run in Library(tmp_path).everything()] == ["run", "experiment"]
    assert list(Library(tmp_path).runs()) == ["run"]


def test_newest_run_first_and_example_last(tmp_path):
    for age, name in ((300, "old"), (100, "new")):
        folder = write_run(tmp_path / "runs" / name)
        for path in (folder / "config.json", *folder.glob("*/log.jsonl")):
            os.utime(path, (time.time() - age,) * 2)
    write_run(tmp_path / "example")
    library = Library(tmp_path / "runs", (tmp_path / "example", tmp_path / "missing"))
    assert list(library.runs()) == ["new", "old", "example"]
    write_run(tmp_path / "runs" / "example", learning_rate=[1e-4, 2e-4])  # an experiment; names are unique
    assert list(library.runs()) == ["new", "old"] and list(library.experiments()) == ["example"]
    assert list(Library(tmp_path / "nothing here").runs()) == []


@pytest.mark.parametrize("name", HOSTILE[:3])
def test_a_name_that_is_not_listed_is_refused_without_paths(run, name):
    with pytest.raises(RunError) as refusal:
        Library(run.folder.parent).find(name)
    assert str(run.folder.parent) not in str(refusal.value) and "\n" not in str(refusal.value)


def test_links_that_lead_out_are_not_followed(tmp_path, run):
    secret = write_run(tmp_path / "secret")
    (run.folder.parent / "link").symlink_to(secret)
    assert list(Library(run.folder.parent).runs()) == ["run"]

    image = run.folder / "lora" / "samples" / "step-000002" / "0-0.png"
    image.unlink()
    image.symlink_to(secret / "lora" / "samples" / "step-000002" / "0-0.png")
    assert set(run.samples("lora", 2)) == {(1, 0)}
    for name in ("config.json", "reslora/merge.json", "app.log"):
        (run.folder / name).unlink(missing_ok=True)
        (run.folder / name).symlink_to(secret / "config.json")
    assert run.config == {} and run.read_json("reslora", "merge.json") == {} and run.log_tail() == ""
    assert run.inside("..", "..", "secret", "config.json") is None
    assert run.inside("config.json\0") is None


def test_damaged_files_are_as_good_as_none(run):
    log = run.folder / "lora" / "log.jsonl"
    rows = len(run.log("lora"))
    with log.open("a") as file:
        file.write('{"step": 5, "split": "train", "loss": NaN}\n[1]\n7\n{"step": 6, "spl')
    assert len(run.log("lora")) == rows
    for text in ("", "{", "[1, 2]", '"text"', "[" * 100000):
        (run.folder / "config.json").write_text(text)
        assert run.config == {}
        assert run.methods == ["lora", "reslora"]  # found by their folders


def test_a_method_that_a_user_brought_is_shown_by_its_title(run):
    """Its module is not imported, and a file whose name has a dot is not taken for a method."""
    shutil.copytree(run.folder / "lora", run.folder / "theirs.shared_a")
    (run.folder / "notes.txt").write_text("")
    assert run.methods == ["lora", "reslora", "theirs.shared_a"]
    assert compared.curves(run, "train", None).count("shared a (theirs)") >= 1
    assert "theirs" not in sys.modules


def test_weights_of_a_run(run):
    folder = run.folder / "reslora"
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer.json").write_text("{}")
    assert [weights.label for weights in run.weights()] == ["base model"]  # that checkpoint isn't complete
    (folder / "checkpoint-2" / "reslora_model.safetensors").write_bytes(b"")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (folder / "calibration.safetensors").write_bytes(b"")
    assert [weights.label for weights in run.weights()] == [
        "base model",
        "ResLoRA: pytorch_lora_weights.safetensors",
        "ResLoRA: unmerged, step 2",
    ]
    assert run.find_weights("base model") is BASE
    for label in HOSTILE:
        with pytest.raises(RunError):
            run.find_weights(label)
