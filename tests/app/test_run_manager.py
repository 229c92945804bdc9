"""app/run_manager.py and its page: notes, trash and restoring, and cards of any runs."""

import json

import pytest
from app_runs import HOSTILE, write_run

from app import lists
from app.jobs import Entry, Jobs
from app.library import Library
from app.run_manager import RunManager
from app.runs import EXPERIMENT_LOG, LONGEST_NOTES, RunError


@pytest.fixture
def manager(tmp_path) -> RunManager:
    """Two runs, an experiment that has not begun, and a run in another folder."""
    for name in ("runs/one", "runs/two", "elsewhere"):
        write_run(tmp_path / name)
    (tmp_path / "runs" / "which").mkdir()
    (tmp_path / "runs" / "which" / EXPERIMENT_LOG).touch()
    return RunManager(Jobs(Library(tmp_path / "runs", (tmp_path / "elsewhere",))))


def refused(function, *inputs) -> str:
    with pytest.raises(RunError) as refusal:
        function(*inputs)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_notes_are_written_by_who_has_seen_the_last_ones(manager):
    run = manager.library.find("one")
    assert manager.write_notes("one", "", " two lines\r\nof <b>notes</b> ") == run.notes == "two lines\nof <b>notes</b>"
    assert "changed in the meantime" in refused(manager.write_notes, "one", "", "mine")
    for text in ("x" * (LONGEST_NOTES + 1), "\ud800", None, 7, ["x"]):
        refused(manager.write_notes, "one", run.notes, text)
    for name in (*HOSTILE, "elsewhere"):
        refused(manager.write_notes, name, "", "x")
    assert [path.name for path in run.folder.parent.parent.rglob("notes.txt")] == ["notes.txt"]
    manager.write_notes("one", run.notes, "")
    assert not (run.folder / "notes.txt").exists()
    (run.folder / "notes.txt").write_text("x" * (LONGEST_NOTES + 9))  # by hand
    assert "too long" in refused(manager.write_notes, "one", run.notes, "short")


def test_what_is_thrown_away_comes_back_as_it_was(manager, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "runs" / "one").rglob("*") if path.is_file()}
    for name in ("one", "which"):
        assert "trash" in manager.throw_away(name)
    assert [run.name for run in manager.library.everything()] == ["two", "elsewhere"]
    (which, one), names = manager.trashed(), [folder.name for folder in manager.trashed().values()]
    assert names == ["which", "one"]
    write_run(tmp_path / "runs" / "one")
    assert "Another run named one exists" in refused(manager.restore, one)
    manager.throw_away("one")
    manager.restore(one)
    assert {path: path.read_bytes() for path in before} == before
    for place in (*HOSTILE, one, f"../.trash/{which}"):
        refused(manager.restore, place)
    manager.restore(which)
    assert {run.name for run in manager.library.everything()} == {"one", "two", "which", "elsewhere"}


def test_what_trains_waits_or_is_elsewhere_is_not_thrown_away(manager, tmp_path):
    for name in (*HOSTILE, "elsewhere"):
        refused(manager.throw_away, name)
    with manager.jobs.changing() as entries:
        entries.append(Entry("one", resume=True))
    assert "waits in the queue" in refused(manager.throw_away, "one")
    manager.jobs.is_active = lambda run: run.name == "two"
    assert "two is training" in refused(manager.throw_away, "two")
    assert manager.trashed() == {} and (tmp_path / "runs" / "two" / "config.json").is_file()


def test_a_run_is_renamed_unless_the_name_is_taken(manager, tmp_path):
    manager.write_notes("one", "", "good")
    assert "one is now 1st" in manager.rename("one", "1st") and manager.find("1st").notes == "good"
    assert "already exists" in refused(manager.rename, "1st", "two")
    for name in (*HOSTILE, None):
        refused(manager.rename, "1st", name)
        refused(manager.rename, name, "new")
    assert sorted(run.name for run in manager.library.everything()) == ["1st", "elsewhere", "two", "which"]


def test_a_resumed_run_in_the_queue_keeps_its_values_when_it_is_deleted(manager):
    entry = Entry("one", "run", lists.shown_settings(manager.find("one")), resume=True, state="failed", line="why")
    with manager.jobs.changing() as entries:
        entries.append(entry)
    before = lists.queue(manager.jobs)
    assert "learning rate" in before
    for name in ("two", "one"):
        manager.throw_away(name)
        assert lists.queue(manager.jobs) == before


def test_cards_show_the_newest_samples_and_escape_all_else(manager, tmp_path):
    attack = "<script>${x} {{y}}"
    write_run(tmp_path / "runs" / attack)
    (tmp_path / "runs" / attack / "notes.txt").write_text(f"</textarea>{attack}")
    (tmp_path / "runs" / "two" / "reslora" / "samples" / "step-000004" / "0-0.png").write_bytes(b"damaged")
    manager.throw_away("one")
    shown = lists.runs(manager, "")
    for text in ("<script>", "${", "{{", "</textarea>&lt;", str(tmp_path)):
        assert text not in shown, text
    assert shown.count('class="run"') == 4 and shown.count("<img ") == 11 and shown.count("no samples") == 1
    assert shown.count('data-do="trash"') == 3 and "Restore one" in shown and "<p>LoRA: 4 of 4 steps, loss " in shown
    assert lists.runs(manager, "TEXTAREA").count(
        'class="run"'
    ) == 1 and "No name and no notes of a run contain this" in lists.runs(manager, "zzz")
    # What a card shows is what the folder has now.
    assert "no notes" in lists.runs(manager, "two")
    manager.write_notes("two", "", "good")
    assert "good</textarea>" in lists.runs(manager, "two")


def test_the_queue_as_it_is_seen(manager):
    assert "The queue is empty" in lists.queue(manager.jobs)
    states = ("failed", "running", "waiting", "waiting")
    with manager.jobs.changing() as entries:
        entries += [Entry(f"{state}-{n}<", state=state, line="<b>why</b>") for n, state in enumerate(states)]
    manager.jobs.is_active = lambda run: run.name.startswith("running")
    shown = lists.queue(manager.jobs)
    assert "<b>why" not in shown and "-0<" not in shown
    order = [shown.index(f'data-name="{name}') for name in ("running", "waiting-2", "waiting-3", "failed")]
    assert order == sorted(order)
    manager.jobs.path.write_text(json.dumps({"version": 9}))
    assert "repair or remove queue.json" in lists.queue(manager.jobs)
