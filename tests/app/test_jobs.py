"""app/jobs.py: the queue, which entry starts next, and restarts. Tiny programs stand for the trainers."""

import multiprocessing
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import sleep

import gradio as gr
import PIL.Image
import pytest
from app_runs import HOSTILE, write_run
from waiting import LIMIT, ended, wait_until

from app import launcher
from app.jobs import FAILED, RUNNING, WAITING, Entry, Jobs
from app.library import Experiment, Library
from app.run_manager import RunManager
from app.runs import Run, RunError
from app.studio import Studio
from app.tabs.base import Parts
from app.tabs.train import TrainTab
from reslora.images.settings import parse_args

# In place of `accelerate launch`: locks its folder, notes that it was started, waits for its turn to end, and fails.
TRAINER = """
import os, pathlib, sys, time
from reslora.io import this_process
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir") + 1])
(folder / ".lock").write_text(f"{os.getpid()}\\n{this_process()}")
with (folder.parent / "started").open("a") as file:
    print(folder.name, file=file)
while not (folder.parent / f"end-{folder.name}").exists():
    assert folder.parent.exists()
    time.sleep(0.01)
print("the last line")
sys.exit(1)
"""


@pytest.fixture
def lined(tmp_path, monkeypatch):
    """A queue whose trainers are the program."""
    (tmp_path / "data" / "cats").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "python").write_text(f'#!/bin/sh\nshift 4\nexec {sys.executable} {tmp_path / "trainer.py"} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(launcher.sys, "executable", str(tmp_path / "python"))
    yield Jobs(Library(tmp_path / "runs"), tmp_path / "data")
    for name in "abcdefgh":
        (tmp_path / "runs" / f"end-{name}").touch()


def started(lined: Jobs) -> list[str]:
    path = lined.path.with_name("started")
    return path.read_text().split("\n")[:-1] if path.exists() else []


def states(lined: Jobs) -> dict[str, str]:
    return {entry.name: entry.state for entry in lined.entries()}


def let_end(lined: Jobs, name: str) -> None:
    """End its trainer, and wait until the queue has noticed."""
    lined.path.with_name(f"end-{name}").touch()
    wait_until(lambda: lined.advance() or states(lined).get(name) != RUNNING, f"the end of {name}")


def add(lined: Jobs, name: str, **settings) -> Entry:
    return lined.add(Entry(name, settings=settings))


def test_one_after_the_other_and_what_fails_does_not_stop_the_next(lined, tmp_path):
    assert add(lined, "a").state == RUNNING
    assert [add(lined, name).state for name in "bc"] == [WAITING, WAITING]
    assert lined.add(Entry("d", folder="cats")).state == WAITING
    assert [add(lined, name).state for name in "ef"] == [WAITING, WAITING]
    assert lined.would_wait()
    lined.remove("b")
    (tmp_path / "data" / "cats").rmdir()
    for name in "ac":
        let_end(lined, name)
    wait_until(lambda: len(started(lined)) == 3, "the third")
    assert started(lined) == ["a", "c", "e"]
    assert states(lined) == {"a": FAILED, "c": FAILED, "d": FAILED, "e": RUNNING, "f": WAITING}
    lines = {entry.name: entry.line for entry in lined.entries()}
    assert lines["a"] == "the last line" and "no such folder of images" in lines["d"] and not lines["f"]
    with pytest.raises(RunError, match="stop it"):
        lined.remove("e")
    for name in "ef":
        let_end(lined, name)
    assert not Jobs(lined.library).would_wait()
    for name in "acdef":
        lined.remove(name)
    assert lined.entries() == []


def test_what_the_trainer_refuses_is_not_lined_up(lined, tmp_path):
    add(lined, "a")
    before = lined.path.read_bytes()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    wrong = [Entry("b", settings={"rank": "0"}), Entry("b", folder="dogs"), Entry("b", settings={"model": "/etc"})]
    wrong += [Entry(name) for name in HOSTILE] + [Entry("b", "experiment", resume=True), Entry("b", resume=True)]
    wrong += [Entry("b", folder=7)]
    for entry in wrong:
        with pytest.raises(RunError):
            lined.add(entry)
    with pytest.raises(RunError, match="already"):
        lined.add(Entry("a"))
    assert lined.path.read_bytes() == before
    lined.add(Entry("b"))
    with pytest.raises(RunError, match="already in the queue"):
        lined.add(Entry("b"))
    let_end(lined, "a")
    assert states(lined) == {"a": FAILED, "b": RUNNING}


def test_the_form_starts_with_what_stands_in_it(lined):
    with gr.Blocks():
        tab = TrainTab(Parts(lined.library, lined, Studio()))
    told = []
    for name, settings in (("a", {}), ("b", {})):
        *_, label, answer = tab.do_start(name, "", "", *tab.values_of(settings))
        assert label == "Add to queue"
        told.append(answer)
    assert "a starts with the bundled images." in told[0] and "warning" not in told[0]
    shown = tab.look("a", "", "", *tab.values_of({}))
    assert 'class="notice"' in shown[tab.plan] and "a was started. " in shown[tab.plan]
    assert tab.command not in shown  # what was started stands there
    write_run(lined.library.folder / "there")
    shown = tab.look("there", "", "", *tab.values_of({}))
    assert 'class="bad"' in shown[tab.plan] and shown[tab.command] == ""
    assert "b waits in the queue" in told[1]


def test_a_killed_application_leaves_a_queue_that_goes_on_once_each(lined, tmp_path):
    """SIGKILL ends it while one entry trains and two wait; the next one continues the queue."""
    server = multiprocessing.get_context("fork").Process(
        target=lambda: [*map(partial(add, lined), "abc"), sleep(LIMIT)]
    )
    server.start()
    wait_until(lambda: lined.path.exists() and len(lined.entries()) == 3 and started(lined), "three runs", server)
    server.kill()
    assert ended(server) == -signal.SIGKILL
    other = Jobs(Library(tmp_path / "runs"))
    with ThreadPoolExecutor(4) as pool:  # the queue's thread, and people who press Start
        list(pool.map(lambda _: other.advance(), range(20)))
        assert states(lined) == {"a": RUNNING, "b": WAITING, "c": WAITING} and started(lined) == ["a"]
        for name, after in (("a", 2), ("b", 3)):
            lined.path.with_name(f"end-{name}").touch()
            wait_until(
                lambda after=after: list(pool.map(lambda _: other.advance(), "xx")) and len(started(lined)) == after,
                f"what comes after {name}",
            )
    assert started(lined) == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["{", '{"entries": [{"x": 1}]}'])
def test_a_damaged_file_is_one_line_and_stays(lined, content, capsys):
    lined.path.write_text(content)
    for change in (lambda: add(lined, "a"), lined.advance, lambda: lined.remove("a")):
        with pytest.raises(RunError, match=r"queue\.json") as refusal:
            change()
        assert "\n" not in str(refusal.value) and str(lined.path.parent) not in str(refusal.value)
    lined.closed.set()
    lined._look_again()
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert lined.path.read_text() == content and started(lined) == []


def test_resuming_waits_its_turn_and_experiments_too(lined):
    write_run(lined.path.parent / "b", max_train_steps=9)
    add(lined, "a")
    assert lined.add(Entry("b", resume=True)).state == WAITING
    assert lined.add(Entry("c", "experiment", {"learning_rate": "1e-4 2e-4"})).state == WAITING
    with pytest.raises(RunError, match="waits in the queue"):
        RunManager(lined).throw_away("b")
    for name in "ab":
        let_end(lined, name)
    assert states(lined) == {"a": FAILED, "c": RUNNING}
    assert [type(run) for run in lined.all_active()] == [Experiment]
    assert (lined.path.parent / "c" / Experiment.log_name).is_file()
    assert Run("b", lined.path.parent / "b").status == "stopped"


def test_a_configuration_is_saved_for_the_command_line(lined):
    """With the folder of images; settings with default values are left out, so that they follow another model."""
    with gr.Blocks():
        tab = TrainTab(Parts(lined.library, lined, Studio()))
    values = tab.values_of({"seed": [0, 1], "rank": 8, "random_flip": True, "method": ["lora", "lora_x2"]})
    path = Path(tab.do_save("mine", "cats", "assets/pipeline-flow", *values))
    assert path.name == "mine.toml" and "learning_rate" not in path.read_text()
    asked = parse_args(["--config", str(path)])
    assert asked.varied["seed"] == [0, 1] and asked.base.adapter.method == ["lora", "lora_x2"]
    assert asked.base.data.train_data_dir == [str(lined.images.find("cats").path)] and asked.base.adapter.rank == 8
