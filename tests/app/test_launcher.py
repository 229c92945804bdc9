"""app/launcher.py and app/jobs.py: commands, uploads, and processes."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gradio as gr
import pytest
from app_runs import HOSTILE, run_by_hand, write_run
from waiting import ended, wait_until

from app import experiments, form, launcher, lists, views
from app.folders import BUNDLED
from app.jobs import PAUSE, SAMPLE, SAVE, Entry, Jobs
from app.library import Experiment, Library
from app.run_manager import RunManager
from app.runs import LOG_NAME, Run, RunError
from app.tabs.train import TrainTab
from reslora.bundled import ASSETS
from reslora.images.settings import BUNDLED_IMAGES
from reslora.io import this_process

# In place of a trainer in the folder of the given lock.
LOCKING = """
import os, pathlib, signal, sys, time
from reslora.io import this_process
stops = []
signal.signal(signal.SIGUSR1, lambda *_: stops.append(7))
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()}\\n{this_process()}")
while pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
sys.exit(sum(stops))
"""


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


@pytest.fixture
def trainings(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "data" / "cats").mkdir(parents=True)
    return Jobs(Library(tmp_path / "runs"), tmp_path / "data")


def test_only_flags_that_differ_are_written(trainings):
    settings = {"method": ["lora", "reslora"], "rank": "", "pre_num": 4, "max_train_steps": "8", "learning_rate": ""}
    words, _ = trainings.command("new", settings | {"validation_prompt": "a cat\n\n a dog "})
    assert launcher.in_words(words) == (
        f"accelerate launch train_sd.py --output_dir {trainings.library.folder}/new --method lora reslora "
        "--max_train_steps 8 --validation_prompt 'a cat' 'a dog'"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": []},
        {"method": ["lora", "--push_to_hub"]},
        {"optimizer": "antigravity.X"},  # the trainer takes any class by its path, and imports it
        {"method": ["lora", "antigravity.x"]},  # and any method by its path
        {"model": "/etc"},
        {"model": "assets/pipeline-flow/../pipeline"},
    ],
)
def test_settings_the_trainer_or_the_page_refuses(trainings, settings):
    with pytest.raises(RunError) as refusal:
        trainings.command("new", settings)
    assert "\n" not in str(refusal.value)


def form_of(trainings) -> SimpleNamespace:
    """Return the settings that fill in the form under Train."""
    tab = SimpleNamespace(library=trainings.library, jobs=trainings, all_names=TrainTab.all_names)
    tab.values_of = functools.partial(TrainTab.values_of, tab)
    return tab


def test_a_form_that_begins_with_a_run_has_its_model_or_says_why_not(trainings, tmp_path):
    tab, runs = form_of(trainings), trainings.library.folder
    models = {"u-net": str(ASSETS / "pipeline"), "flow": "/elsewhere/assets/pipeline-flow", "hub": "owner/model"}
    for name, model in (models | {"none": None, "folder": str(tmp_path), "damaged": 5}).items():
        write_run(runs / name, pretrained_model_name_or_path=model)
    write_run(runs / "vae", pretrained_vae_model_name_or_path="owner/vae")
    for name, model in {"u-net": "assets/pipeline", "flow": "assets/pipeline-flow", "hub": "owner/model"}.items():
        assert TrainTab.fill(tab, name)[1] == model
    for name in ("none", next(iter(form.PRESETS))):
        assert TrainTab.fill(tab, name)[1] == "assets/pipeline"
    unnamed = {"folder": "a model in a folder", "damaged": "a model", "vae": "--pretrained_vae"}
    for name, what in unnamed.items():
        with pytest.raises(RunError, match=f"{name} was trained with {what}.*cannot set") as refusal:
            TrainTab.fill(tab, name)
        assert str(tmp_path) not in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_form_that_begins_with_a_run_has_its_images_or_does_not_start(trainings, tmp_path):
    """The page may not name a folder that is not on the list, and must not train on the bundled images instead."""
    tab, runs, cats = form_of(trainings), trainings.library.folder, str(trainings.images.data / "cats")
    uploaded = runs / ".images" / "up"
    uploaded.mkdir(parents=True)
    read = {"listed": cats, "one": [cats], "uploaded": str(uploaded), "bundled": str(BUNDLED_IMAGES), "none": None}
    read |= {"example": "assets/twemoji", "elsewhere": str(tmp_path), "two": [cats, str(uploaded)]}
    for name, folder in read.items():
        write_run(runs / name, train_data_dir=folder)
    write_run(runs / "hub", dataset_name="owner/images")
    filled = {name: TrainTab.fill(tab, name)[2] for name in trainings.library.runs()}
    unlisted = {name: filled.pop(name) for name in ("elsewhere", "two", "hub")}
    uploads, without = {"uploaded": "runs/up"}, dict.fromkeys(("bundled", "example", "none"), BUNDLED)
    assert filled == {"listed": "cats", "one": "cats"} | uploads | without
    for name, folder in unlisted.items():
        assert folder == f"images of {name} (not on the list)"
        with pytest.raises(RunError, match="choose one from the list"):
            trainings.command_of(Entry("new", folder=folder))
    assert TrainTab.fill(tab, next(iter(form.PRESETS)))[2] == gr.update()  # it stays as it is


@pytest.mark.parametrize(
    ("line", "is_why"),
    [
        ("train_sd.py: lora: train loss nan at step 2; start in another --output_dir", True),
        ("train_sd.py: lora stopped after step 7; resume with --resume_from_checkpoint latest", False),
    ],
)
def test_a_run_that_an_error_has_ended_says_so_and_one_that_was_stopped_does_not(run, line, is_why):
    (run.folder / "config.json").write_text(json.dumps(run.config | {"max_train_steps": 20}))
    (run.folder / LOG_NAME).write_text(f"a line before\n{line}\n")
    trainings = Jobs(Library(run.folder.parent))
    said, status = trainings.last_line(run), trainings.status(run)
    experiment, manager = Experiment(run.name, run.folder), RunManager(trainings)
    for shown in (
        views.summary(run, status, said),
        lists.card(manager, run),
        experiments.summary(experiment, status, said),
    ):
        assert status == "stopped" and (f'<p class="bad">{views.escape(line)}</p>' in shown) == is_why
    assert '"bad"' not in views.summary(run, "running", said) + views.summary(run, "finished", said)


@pytest.mark.parametrize("name", [*HOSTILE[:-3], "-x", "a" * 65])
def test_names_of_new_runs_are_plain(trainings, name):
    with pytest.raises(RunError):
        trainings.new_folder(name)


def test_the_name_of_a_run_that_never_began_is_free(trainings):
    folder = trainings.library.folder / "new"
    folder.mkdir()
    (folder / "app.log").write_text("train_sd.py: error: something\n")
    assert trainings.status(trainings.library.find("new")) == "failed"
    assert trainings.new_folder("new") == folder
    write_run(trainings.library.folder / "other")
    with pytest.raises(RunError, match="already"):
        trainings.new_folder("other")
    (trainings.library.folder / "pictures").mkdir()
    (trainings.library.folder / "pictures" / "a.png").touch()
    with pytest.raises(RunError, match="already"):
        trainings.new_folder("pictures")


def test_a_trainer_is_found_by_its_lock_and_stopped(run):
    """A process that has locked the folder reports that it was asked to stop."""
    process = subprocess.Popen([sys.executable, "-c", LOCKING, str(run.folder / ".lock")], env=launcher.environment())
    trainings = Jobs(Library(run.folder.parent))
    wait_until(lambda: run.process, "the lock", process)
    assert trainings.status(run) == "running"
    with pytest.raises(RunError, match="run is training"):
        trainings.start(Entry("second"))
    assert (
        trainings.stop(run) == "run was asked to stop soon; the trained steps are saved."
    )  # it has taken all its steps
    assert trainings.status(run) == "stopping"
    assert "already" in trainings.stop(run)
    (run.folder / ".lock").unlink()
    assert ended(process) == 7  # one signal
    assert trainings.status(run) == "stopped"


def test_who_asks_for_what_cannot_come_is_told_why(run, monkeypatch):
    """No request file remains, which a resumed run would handle."""
    trainings, config = Jobs(Library(run.folder.parent)), run.folder / "config.json"
    assert trainings.ask(SAMPLE) == "Nothing is training."
    monkeypatch.setattr(trainings, "is_active", lambda run: True)
    assert "run is starting" in trainings.ask(SAMPLE)
    monkeypatch.setattr(Run, "process", property(lambda run: os.getpid()))
    assert trainings.ask(SAVE) == "run has finished its training steps."
    config.write_text(json.dumps(run.config | {"max_train_steps": 8, "validation_prompt": []}))
    assert "no prompts" in trainings.ask(SAMPLE, " \n") and not (run.folder / SAMPLE).exists()
    assert trainings.ask(SAMPLE, "red disc\nblue box") == "run: samples are generated after this step."
    assert (run.folder / SAMPLE).read_text() == "red disc\nblue box"
    assert trainings.ask(PAUSE) == "run: training pauses after this step." and (run.folder / PAUSE).exists()
    assert trainings.ask(PAUSE) == "run continues." and not (run.folder / PAUSE).exists()
    assert trainings.ask(PAUSE) == "run: training pauses after this step."
    assert trainings.ask(SAVE) == "run: a checkpoint is saved after this step."
    monkeypatch.setattr(launcher, "launch_words", lambda: [sys.executable, "-c", ""])
    trainings._launch(run, [])
    assert ended(trainings.started["run"]) == 0 and not list(run.folder.glob("*.now"))


def test_what_stops_is_what_trains_whichever_run_is_looked_at(run):
    write_run(run.folder.parent / "looked-at")
    trainings = Jobs(Library(run.folder.parent))
    tab = SimpleNamespace(jobs=trainings)
    assert "Nothing is training." in TrainTab.do_stop(tab, "looked-at")
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    trainings.started["run"] = launcher
    assert trainings.status(run) == "starting"
    trainings.began.add("run")  # its trainer was at work and has left; the launcher goes last
    assert trainings.status(run) == "stopping" and "run is ending." in TrainTab.do_stop(tab, "looked-at")
    trainings.began.clear()
    assert "run is stopped" in TrainTab.do_stop(tab, "looked-at")
    ended(launcher)
    assert trainings.status(run) == "stopped" and trainings.last_line(run) == "stopped before its training began"


@pytest.mark.parametrize(
    "owner",
    [
        "",
        "{pid}\nffffffff-{pid}-{start}",
        "{pid}\n{host}-{pid}-1",
    ],
)
def test_only_trainers_are_stopped(run, owner):
    """Not those of another machine, nor another process that has the id of an ended trainer."""
    host, _, start = this_process().split("-")
    (run.folder / ".lock").write_text(owner.format(host=host, pid=os.getppid(), start=start))
    assert run.process is None
    with pytest.raises(RunError, match="nothing was stopped"):
        Jobs(Library(run.folder.parent)).stop(run)
    (run.folder / ".lock").write_text(f"1\n{this_process()}")
    assert run.process == os.getpid()
