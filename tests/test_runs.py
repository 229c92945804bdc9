"""app/runs.py, app/views.py and app/training.py on folders made by hand, with everything a browser may send."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from app import training, views
from app.generate import BUNDLED, base_of
from app.make_example import REPOSITORY, make_example
from app.runs import BASE, EXAMPLE, Library, RunError, is_complete_png, is_trainer, read_rows
from app.training import Trainings

HOSTILE = ["..", "../..", "/etc", "/etc/passwd", "a/../..", ".", "", "run\0", "<b>run</b>", "C:\\", None, 7, ["run"]]


def write_run(folder: Path, steps=(0, 2, 4), methods=("lora", "reslora"), **config) -> Path:
    """A run as the trainer leaves it, with pictures of 8x8 pixels whose colour tells method and step."""
    folder.mkdir(parents=True)
    settings = {
        "method": list(methods),
        "max_train_steps": 4,
        "validation_prompt": ["red disc", "<script>alert(1)</script> ${1} {{2}}"],
        "train_batch_size": 2,
        "shortcut": "input",
        "rank": 2,
        "learning_rate": 1e-3,
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    for m, method in enumerate(methods):
        rows = [{"step": s, "split": "train", "loss": 1 / s, "lr": 1e-3, "seconds": s} for s in range(1, 5)]
        rows += [{"step": s, "split": "validation", "loss": 2 / (s + 1), "lr": 1e-3, "seconds": s} for s in steps]
        (folder / method).mkdir()
        (folder / method / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in steps:
            write_samples(folder / method / "samples" / f"step-{step:06d}", 40 * m + 10 * step)
    return folder


def write_samples(folder: Path, value: int) -> None:
    folder.mkdir(parents=True)
    for prompt in range(2):
        PIL.Image.new("RGB", (8, 8), (value, 100 * prompt, 0)).save(folder / f"{prompt}-0.png")


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "runs" / "run")
    return Library(tmp_path / "runs").find("run")


def test_reads_what_the_trainer_wrote(run):
    assert run.methods == ["lora", "reslora"]
    assert run.steps() == [0, 2, 4]
    assert run.prompts[0] == "red disc"
    assert run.progress == (8, 8)
    assert run.status == "stopped"
    assert set(run.samples("lora", 2)) == {(0, 0), (1, 0)}
    for method in run.methods:
        (run.folder / method / "exports.json").write_text("{}")
    assert run.status == "finished"


def test_newest_run_first_and_example_last(tmp_path):
    for age, name in ((300, "old"), (100, "new")):
        folder = write_run(tmp_path / "runs" / name)
        for path in (folder / "config.json", *folder.glob("*/log.jsonl")):
            os.utime(path, (time.time() - age,) * 2)
    write_run(tmp_path / "example")
    library = Library(tmp_path / "runs", (tmp_path / "example", tmp_path / "missing"))
    assert list(library.runs()) == ["new", "old", "example"]
    assert list(Library(tmp_path / "runs" / "old").runs()) == ["old"]
    assert list(Library(tmp_path / "nothing here").runs()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_not_listed_is_refused_without_paths(run, name):
    with pytest.raises(RunError) as refusal:
        Library(run.folder.parent).find(name)
    assert str(run.folder.parent) not in str(refusal.value) and "\n" not in str(refusal.value)


def test_links_that_lead_out_are_not_followed(tmp_path, run):
    secret = write_run(tmp_path / "secret")
    (run.folder.parent / "link").symlink_to(secret)
    assert list(Library(run.folder.parent).runs()) == ["run"]

    picture = run.folder / "lora" / "samples" / "step-000002" / "0-0.png"
    picture.unlink()
    picture.symlink_to(secret / "lora" / "samples" / "step-000002" / "0-0.png")
    assert set(run.samples("lora", 2)) == {(1, 0)}
    for name in ("config.json", "reslora/merge.json", "app.log"):
        (run.folder / name).unlink(missing_ok=True)
        (run.folder / name).symlink_to(secret / "config.json")
    assert run.config == {} and run.read_json("reslora", "merge.json") is None and run.log_tail() == ""
    assert run.inside("..", "..", "secret", "config.json") is None
    assert run.inside("config.json\0") is None


def test_weights_with_links_that_lead_out_are_not_offered(run, tmp_path):
    checkpoint, merged = run.folder / "reslora" / "checkpoint-2", run.folder / "reslora" / "unet"
    for folder, names in ((checkpoint, ("trainer.json", "reslora_model.safetensors")), (merged, ("config.json",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    assert [weights.path for weights in run.weights()] == [None, merged, checkpoint]
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (checkpoint / "reslora_config.json").symlink_to(secret)
    (merged / "more.safetensors").symlink_to(secret)
    assert run.weights() == [BASE]


def test_a_picture_that_is_still_being_written_is_not_shown(run):
    path = run.folder / "lora" / "samples" / "step-000004" / "0-0.png"
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole) - 12, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not is_complete_png(path)
        assert set(run.samples("lora", 4)) == {(1, 0)}
    path.write_bytes(whole)
    assert is_complete_png(path)
    write_samples(run.folder / "lora" / "samples" / ".step-000006.tmp", 0)
    assert run.steps() == [0, 2, 4]


def test_damaged_files_are_as_good_as_none(run):
    log = run.folder / "lora" / "log.jsonl"
    rows = len(run.log("lora"))
    with log.open("a") as file:
        file.write('{"step": 5, "split": "train", "loss": NaN}\n[1]\n7\n\n{"step": 6, "spl')
    assert len(run.log("lora")) == rows
    for text in ("", "{", "[1, 2]", '"text"', "[" * 100000):
        (run.folder / "config.json").write_text(text)
        assert run.config == {}
        assert run.methods == ["lora", "reslora"]  # found by their folders


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
        "reslora: pytorch_lora_weights.safetensors",
        "reslora: unmerged, step 2",
    ]
    assert run.find_weights("base model") is BASE
    for label in HOSTILE:
        with pytest.raises(RunError):
            run.find_weights(label)


def test_norms_of_an_exported_file_are_those_of_the_product(run):
    random = np.random.default_rng(0)
    down, up = random.normal(size=(2, 5)).astype("float32"), random.normal(size=(7, 2)).astype("float32")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for method, scale in (("lora", 1.0), ("reslora", 3.0)):
        tensors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": scale * up}
        save_file(tensors, run.folder / method / "pytorch_lora_weights.safetensors")
    assert run.lora_norms("lora")[name] == pytest.approx(np.linalg.norm(up @ down), rel=1e-5)
    assert f"{2 * np.linalg.norm(up @ down):+.2f}" in views.norm_difference(run)


def test_example_is_small_complete_and_of_no_machine(run, tmp_path):
    for method in run.methods:
        (run.folder / method / "exports.json").write_text("{}")
        (run.folder / method / "trash").mkdir()
        save_file({"lora_A": np.ones(2, "float32")}, run.folder / method / "pytorch_lora_weights.safetensors")
    elsewhere = {"pretrained_model_name_or_path": "/home/somebody/checkout/assets/pipeline", "cache_dir": "/data/hub"}
    config = run.config | {"train_data_dir": str(REPOSITORY / "assets" / "pictures")} | elsewhere
    (run.folder / "config.json").write_text(json.dumps(config))
    make_example(run, tmp_path / "example")
    example = Library(tmp_path / "example").find("example")
    assert example.status == "finished" and example.steps() == run.steps()
    assert example.config["train_data_dir"] == "assets/pictures" and example.config["cache_dir"] == "hub"
    assert base_of(example).name == str(BUNDLED)
    assert not example.inside("lora", "trash") and example.inside("lora", "pytorch_lora_weights.safetensors")


def test_bundled_example():
    example = Library(EXAMPLE).find(EXAMPLE.name)
    assert example.status == "finished" and {"lora", "reslora"} <= set(example.methods)
    assert "not yet" not in views.comparison(example, max(example.steps()))
    assert "no chain plan" not in views.chain_plan(example.read_json("reslora", "chains.json"))
    assert not [value for value in example.config.values() if str(value).startswith("/")]
    assert base_of(example).name == str(BUNDLED)


def test_columns_and_grid_show_the_chosen_step(run):
    write_samples(run.folder / "reslora" / "merged", 200)
    columns = views.columns(run, 2)
    assert [title for title, _, _ in columns] == ["Base model", "LoRA", "ResLoRA", "ResLoRA merged"]
    reds = [PIL.Image.open(pictures[0, 0]).getpixel((0, 0))[0] for _, _, pictures in columns]
    assert reds == [0, 20, 60, 200]
    assert views.comparison(run, 2) != views.comparison(run, 4)
    assert "not yet" in views.comparison(run, 3)
    assert views.grid(run, 2).getpixel((20, 100)) == (0, 0, 0)


def test_a_run_without_prompts_shows_its_losses(tmp_path):
    folder = write_run(tmp_path / "runs" / "quiet", validation_prompt=[])
    for samples in folder.glob("*/samples"):
        shutil.rmtree(samples)
    run = Library(tmp_path / "runs").find("quiet")
    assert run.steps() == [0, 2, 4]
    assert "--validation_prompt" in views.comparison(run, 4)
    assert "0.4000" in views.numbers(run, 4)  # the validation loss at step 4


def test_nothing_of_a_run_becomes_markup(run):
    plan = {"links": 0, "chains": [{"role": "<b>", "blocks": [block("<i>x"), block("<i>y")]}]}
    merge = {"method": "<b>", "blocks": [{"name": "<i>z", "role": "", "alpha": 1.0, "rank": 2, "error": 0.1}]}
    shown = views.comparison(run, 2) + views.chain_plan(plan) + views.merge_report(merge | {"notes": ["<u>"]})
    for forbidden in ("<script", "${1}", "{{2}}", "<b>:", "<i>", "<u>"):
        assert forbidden not in shown
    assert "&lt;script&gt;" in shown


def block(name: str) -> dict:
    return {"name": name, "in_features": 4, "out_features": 4, "rank": 2, "tokens": [1], "cut": "<i>"}


def test_chain_plan_shows_links_and_cuts():
    first, second, third = block("down_blocks.0.attentions.0.x"), block("mid_block.attentions.0.x"), block("other")
    third["cut"] = "8->8 follows 4->4 features"
    plan = {"links": 1, "chains": [{"role": "to_q", "blocks": [first, second]}, {"role": "to_q", "blocks": [third]}]}
    shown = views.chain_plan(plan)
    order = [shown.index(text) for text in (">d0.0<", ">→<", ">m.0<", "✂", ">other<")]
    assert order == sorted(order)
    assert "8-&gt;8 follows" in shown
    assert "no chain plan yet" in views.chain_plan(None)


def test_curves_have_a_marker_at_the_step(run):
    frame = views.curves(run, "train", 2)
    assert set(frame["method"]) == {"LoRA", "ResLoRA", views.MARKER}
    assert set(frame[frame["method"] == views.MARKER]["step"]) == {2}
    assert len(views.curves(run, "nothing", 2)) == 0
    assert views.running_mean([1.0, 3.0, 5.0], share=0.6) == [1.0, 2.0, 4.0]


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainings(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "data" / "cats").mkdir(parents=True)
    return Trainings(Library(tmp_path / "runs"), tmp_path / "data")


def test_only_flags_that_differ_are_written(trainings):
    settings = {"method": ["lora", "reslora"], "rank": "16", "pre_num": 4, "max_train_steps": "8", "learning_rate": ""}
    words = trainings.command("new", settings | {"validation_prompt": "a cat\n\n a dog "})
    assert training.in_words(words) == (
        f"accelerate launch train_sd.py --output_dir {trainings.library.folder}/new --method lora reslora "
        "--max_train_steps 8 --validation_prompt 'a cat' 'a dog'"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": "0"},
        {"max_train_steps": "8; rm -rf /"},
        {"method": ["lora", "--push_to_hub"]},
        {"shortcut": "--config=x"},
        {"validation_prompt": "--push_to_hub"},
        {"model": "/etc"},
        {"model": "../../x"},
        {"model": "../x"},
        {"model": "owner/model"},
    ],
)
def test_settings_the_trainer_or_the_page_refuses(trainings, settings):
    with pytest.raises(RunError) as refusal:
        trainings.command("new", settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [*HOSTILE[:-3], "-x", "a b", "a" * 65, ".hidden"])
def test_names_of_new_runs_are_plain(trainings, name):
    with pytest.raises(RunError):
        trainings.new_folder(name)


def test_a_page_on_a_single_run_starts_no_other(run):
    with pytest.raises(RunError, match="folder of runs"):
        Trainings(Library(run.folder)).new_folder("other")


def test_pictures_come_from_the_data_folder_or_an_upload(trainings, tmp_path):
    assert trainings.folders() == [".", "cats"]
    assert trainings.choose_pictures("new", "cats", None) == trainings.data / "cats"
    assert trainings.choose_pictures("new", None, None) is None
    for folder in ("..", "/etc", "cats/../..", "dogs"):
        with pytest.raises(RunError):
            trainings.choose_pictures("new", folder, None)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "red_fox-1.png")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("a bear")
    uploads = [str(tmp_path / name) for name in ("red_fox-1.png", "b.jpg", "b.txt")]
    folder = training.store_pictures(trainings.choose_pictures("new", None, uploads), uploads, "")
    assert folder.is_relative_to(trainings.library.folder)
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == ["red fox 1", "a bear"]
    assert len(list(folder.iterdir())) == 4
    assert list(trainings.library.runs()) == []
    (tmp_path / "c.png").write_bytes(b"not a picture")
    with pytest.raises(RunError, match=r"c\.png is not a readable picture"):
        training.store_pictures(tmp_path / "elsewhere", [str(tmp_path / "c.png")], "")


def test_the_name_of_a_run_that_never_began_is_free(trainings):
    folder = trainings.library.folder / "new"
    folder.mkdir()
    (folder / "app.log").write_text("train_sd.py: error: something\n")
    assert trainings.status(trainings.library.find("new")) == "failed"
    assert trainings.new_folder("new") == folder
    write_run(trainings.library.folder / "other")
    with pytest.raises(RunError, match="already"):
        trainings.new_folder("other")


def test_a_trainer_is_found_by_its_lock_and_stopped(run):
    """A process that looks like a trainer writes the lock, and says that it was asked to stop."""
    code = (
        "import os, pathlib, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.folder / ".lock"), "train_sd.py"])
    trainings = Trainings(Library(run.folder.parent))
    while not run.process:
        assert process.poll() is None
        time.sleep(0.01)
    assert trainings.status(run) == "running"
    with pytest.raises(RunError, match="run is training"):
        trainings.start("second", [])
    assert "Stopping" in trainings.stop("run")
    trainings.asked.add(process.pid)
    assert "already" in trainings.stop("run") or process.poll() == 7  # a second signal would keep it from saving
    assert process.wait(timeout=60) == 7
    assert trainings.status(run) == "stopped"


def test_a_refused_start_leaves_the_pictures_of_the_run_that_trains_alone(run):
    trainings, stored = Trainings(Library(run.folder.parent)), []
    trainings.is_active = lambda run: True
    with pytest.raises(RunError, match="is training"):
        trainings.start("second", [], lambda: stored.append("pictures"))
    assert not stored


def test_a_growing_log_is_read_from_where_it_was_left(tmp_path):
    path, row = tmp_path / "log.jsonl", '{{"step": {}, "split": "train", "loss": 1.0}}\n'
    for written in range(1, 5):
        with path.open("a") as file:
            file.write(row.format(written) + '{"step": 99')
        assert [found["step"] for found in read_rows(path)] == list(range(1, written + 1))
        path.write_text(path.read_text().removesuffix('{"step": 99'))
    path.write_text(row.format(7))  # another log under the name, shorter
    assert [found["step"] for found in read_rows(path)] == [7]
    path.write_text(row.format(8) * 9)
    assert len(read_rows(path)) == 9


def test_only_trainers_are_stopped():
    assert not is_trainer(os.getppid())
    for pid in (0, 1, -1, 2**30):
        assert not is_trainer(pid)
