"""Requests to a run between two steps."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from reslora.options.images import Options
from reslora.options.shared import TrainOptions
from reslora.options.texts import LlmOptions
from reslora.runtime.signals import StopRequest
from reslora.training import loop, stopping
from reslora.training.loop import after_step
from reslora.training.stopping import Asked, Requests


def requests(folder, minutes: float | None = None, images: int = 1) -> Requests:
    shown = {"validation_prompt": ["red disc"], "num_validation_images": images}
    return requests_of(Options.of(checkpointing_minutes=minutes, checkpointing_steps=5, **shown), folder)


def requests_of(options: TrainOptions, folder) -> Requests:
    return Requests(SimpleNamespace(stop=StopRequest(), folder=folder, status=None, options=options))


def test_files_ask_once_and_go(tmp_path):
    asked = requests(tmp_path)
    assert asked.after_step() == Asked()
    (tmp_path / "sample.now").touch()
    assert asked.after_step() == Asked(samples="")
    (tmp_path / "sample.now").write_text("red disc\nblue box --d 3\n")
    (tmp_path / "save.now").touch()
    asked.stop.signal = 15
    assert asked.after_step() == Asked(stop=True, save=True, samples="red disc\nblue box --d 3")
    assert not list(tmp_path.iterdir())


def test_a_run_that_draws_nothing_says_so(tmp_path, capsys):
    """Only of a run with images, the line names options: the language scripts have no such ones."""
    for asked, text, more in (
        (requests(tmp_path, images=0), "", "give it --validation_prompt and --num_validation_images"),
        (requests_of(LlmOptions(), tmp_path), "red disc", "no language script does"),
    ):
        (tmp_path / "sample.now").write_text(text)
        assert asked.after_step() == Asked() and not list(tmp_path.iterdir())
        assert capsys.readouterr().out == f"sample.now: this run generates no samples; {more}\n"


def test_minutes_count_from_the_last_checkpoint(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    asked = requests(tmp_path, minutes=2)
    found = []
    for now in (219.0, 220.0, 221.0):  # noqa: B007 - the clock
        found.append(asked.after_step().save)
    asked.saved()
    for now in (340.0, 341.0):  # noqa: B007
        found.append(asked.after_step().save)
    assert found == [False, True, True, False, True]


SAVED = ["held", "flush", "save", "saved"]
DRAWN = ["held", "flush", "all", "save"]


@pytest.mark.parametrize(
    ("step", "asked", "meanwhile", "expected", "stops"),
    [
        (1, (), "", [], False),
        (5, (), "", SAVED, False),  # --checkpointing_steps
        (12, (), "", [*SAVED, "all"], False),  # the last one
        (1, ("save",), "", SAVED, False),
        (1, ("draw",), "", ["held", "flush", "samples"], False),
        (1, ("prompts",), "", ["held", "flush", "blue box"], False),
        (3, ("prompts",), "", ["held", "flush", "all", "blue box"], False),  # and those that are due
        (1, ("stop",), "", SAVED, True),
        (3, ("stop",), "", SAVED, True),  # the validation is left to the next start
        (3, (), "", ["held", "flush", "all"], False),
        (3, (), "stop", DRAWN, True),
        (3, (), "over", DRAWN, False),  # what patience ends is saved
        (5, ("draw",), "stop", [*SAVED, "samples"], True),  # and nothing twice
    ],
)
def test_what_is_due_or_asked_for_is_done_once(monkeypatch, step, asked, meanwhile, expected, stops):
    """A non-finite loss, which `flush` detects, is not saved; nothing is saved to a moved folder."""
    done, stop = [], StopRequest()
    learner = SimpleNamespace(step=step, name="lora", over=False, timed=nullcontext)

    def validated(learner, reports, parts):
        done.extend(parts or ["all"])
        stop.signal = 15 if meanwhile == "stop" else None
        learner.over = meanwhile == "over"

    monkeypatch.setattr(loop, "check_held", lambda: done.append("held"))
    monkeypatch.setattr(loop, "save_checkpoint", lambda learner, study: done.append("save"))
    samples = "" if "draw" in asked else "blue box" if "prompts" in asked else None
    reports = SimpleNamespace(flush=lambda: done.append("flush"))
    requests = SimpleNamespace(
        after_step=lambda: Asked("stop" in asked, "save" in asked, samples),
        every=5, saved=lambda: done.append("saved"), status=SimpleNamespace(say=lambda *_: None), stop=stop,
    )  # fmt: skip
    schedule = SimpleNamespace(steps=12, is_due=lambda step: step % 3 == 0)
    sample = lambda learner, reports, prompts: done.append(prompts)  # noqa: E731
    study = SimpleNamespace(schedule=schedule, validate=validated, sample=sample)
    assert (after_step(learner, study, reports, requests), done) == (stops, expected)


def test_a_pause_saves_samples_and_waits_until_the_file_is_removed(monkeypatch, tmp_path, capsys):
    done, asked = [], requests(tmp_path)
    looks = iter([lambda: (tmp_path / "sample.now").write_text("blue box"), (tmp_path / "pause.now").unlink])
    monkeypatch.setattr(stopping.time, "sleep", lambda _: next(looks)())
    monkeypatch.setattr(loop, "check_held", lambda: None)
    monkeypatch.setattr(loop, "save_checkpoint", lambda learner, study: done.append("save"))
    asked.status = SimpleNamespace(say=lambda *words: done.append(words[0]))
    learner = SimpleNamespace(step=1, name="lora", over=False, timed=nullcontext)
    study = SimpleNamespace(
        schedule=SimpleNamespace(steps=12, is_due=lambda step: False), sample=lambda *words: done.append(words[2])
    )
    (tmp_path / "pause.now").touch()
    assert not after_step(learner, study, SimpleNamespace(flush=lambda: None), asked)
    paused = "paused at step 1"
    assert done == ["save", paused, "sampling at step 1", "blue box", paused]
    assert f"paused after step 1; remove {tmp_path / 'pause.now'} to continue" in capsys.readouterr().out
