"""app/shelf.py and what is seen of it: notes, a trash that gives back, and cards of whatever there is."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from app_runs import HOSTILE, write_language_run, write_run
from waiting import join, start_thread, wait_until

from app import lists
from app.jobs import Entry, Jobs
from app.library import Library
from app.runs import EXPERIMENT_LOG, IN_PLACE, LONGEST_NOTES, NO_CONFIG, RunError
from app.shelf import Shelf
from app.tabs.runs import RunsTab


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    """Two runs, an experiment that never began, and a run elsewhere."""
    for name in ("runs/one", "runs/two", "elsewhere"):
        write_run(tmp_path / name)
    (tmp_path / "runs" / "which").mkdir()
    (tmp_path / "runs" / "which" / EXPERIMENT_LOG).touch()
    return Shelf(Jobs(Library(tmp_path / "runs", (tmp_path / "elsewhere",))))


def refused(function, *inputs) -> str:
    with pytest.raises(RunError) as refusal:
        function(*inputs)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_notes_are_written_by_who_has_seen_the_last_ones(shelf):
    run = shelf.library.find("one")
    assert shelf.write_notes("one", "", " two lines\r\nof <b>notes</b> ") == run.notes == "two lines\nof <b>notes</b>"
    assert "changed meanwhile" in refused(shelf.write_notes, "one", "", "mine")
    for text in ("x" * (LONGEST_NOTES + 1), "\ud800", None, 7, ["x"]):
        refused(shelf.write_notes, "one", run.notes, text)
    for name in (*HOSTILE, "elsewhere"):
        refused(shelf.write_notes, name, "", "x")
    assert [path.name for path in run.folder.parent.parent.rglob("notes.txt")] == ["notes.txt"]
    shelf.write_notes("one", run.notes, "")
    assert not (run.folder / "notes.txt").exists()
    (run.folder / "notes.txt").write_text("x" * (LONGEST_NOTES + 9))  # by hand
    assert "too long" in refused(shelf.write_notes, "one", run.notes, "short")


def test_notes_that_lead_elsewhere_are_neither_read_nor_written(shelf, tmp_path):
    (tmp_path / "secret").write_text("secret")
    run = shelf.library.find("one")
    (run.folder / "notes.txt").symlink_to(tmp_path / "secret")
    assert run.notes == ""
    shelf.write_notes("one", "", "mine")
    assert run.notes == "mine" and (tmp_path / "secret").read_text() == "secret"


def test_what_is_thrown_away_comes_back_as_it_was(shelf, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "runs" / "one").rglob("*") if path.is_file()}
    for name in ("one", "which"):
        assert "trash" in shelf.throw_away(name)
    assert [run.name for run in shelf.library.everything()] == ["two", "elsewhere"]
    (which, one), names = shelf.trashed(), [folder.name for folder in shelf.trashed().values()]
    assert names == ["which", "one"]
    write_run(tmp_path / "runs" / "one")
    assert "again" in refused(shelf.restore, one)
    shelf.throw_away("one")
    shelf.restore(one)
    assert {path: path.read_bytes() for path in before} == before
    for place in (*HOSTILE, one, f"../.trash/{which}"):
        refused(shelf.restore, place)
    shelf.restore(which)
    assert {run.name for run in shelf.library.everything()} == {"one", "two", "which", "elsewhere"}


def test_what_trains_waits_or_is_elsewhere_is_not_thrown_away(shelf, tmp_path):
    for name in (*HOSTILE, "elsewhere"):
        refused(shelf.throw_away, name)
    with shelf.jobs.changing() as entries:
        entries.append(Entry("one", resume=True))
    assert "waits in the queue" in refused(shelf.throw_away, "one")
    shelf.jobs.is_active = lambda run: run.name == "two"
    assert "two is training" in refused(shelf.throw_away, "two")
    assert shelf.trashed() == {} and (tmp_path / "runs" / "two" / "config.json").is_file()


def test_nothing_is_restored_in_the_place_of_what_waits(shelf):
    """Which would go on with it, or fail, when its turn comes."""
    for name in ("one", "which"):
        shelf.throw_away(name)
    which, one = shelf.trashed()
    with shelf.jobs.changing() as entries:
        entries += [Entry("one"), Entry("which", "experiment", state="failed")]
    assert "Another one is in the queue" in refused(shelf.restore, one)
    assert list(shelf.trashed()) == [which, one] and shelf.restore(which) == "which is back."
    shelf.jobs.remove("one")
    assert shelf.restore(one) == "one is back."


def test_notes_and_a_deletion_come_one_after_the_other(shelf, monkeypatch):
    """What is thrown away while notes are written leaves no folder with nothing but notes in its place."""
    threads, find, names = [], shelf.find, []

    def delete(name: str) -> None:
        shelf.throw_away(name)
        names.extend(folder.name for folder in shelf.trashed().values())

    def meanwhile(name: str):
        run = find(name)
        monkeypatch.setattr(shelf, "find", find)
        threads.append(start_thread(delete, name))
        wait_until(lambda: shelf.jobs.lock.locked() or names, "the deletion to wait", threads[0], pause=0)
        if not IN_PLACE.locked():  # nothing keeps it waiting
            join(threads[0])
        return run

    monkeypatch.setattr(shelf, "find", meanwhile)
    shelf.write_notes("one", "", "good")
    join(*threads)
    assert names == ["one"] and not (shelf.library.folder / "one").exists()
    (place,) = shelf.trashed()
    shelf.restore(place)
    assert shelf.library.find("one").notes == "good"


def test_a_trash_that_leads_elsewhere_is_none(shelf, tmp_path):
    (tmp_path / "other" / "place" / "run").mkdir(parents=True)
    (tmp_path / "runs" / ".trash").symlink_to(tmp_path / "other")
    assert shelf.trashed() == {}
    refused(shelf.restore, "place")
    refused(shelf.throw_away, "one")


def test_of_two_who_throw_one_run_away_one_does(shelf):
    def attempt(_: int) -> bool:
        try:
            return bool(shelf.throw_away("one"))
        except RunError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
    assert len(shelf.trashed()) == 1


def test_cards_show_the_newest_sample_and_escape_all_else(shelf, tmp_path):
    attack = "<script>${x} {{y}}"
    write_run(tmp_path / "runs" / attack)
    (tmp_path / "runs" / attack / "notes.txt").write_text(f"</textarea>{attack}")
    (tmp_path / "runs" / "two" / "reslora" / "samples" / "step-000004" / "0-0.png").write_bytes(b"damaged")
    shelf.throw_away("one")
    shown = lists.runs(shelf, "")
    for text in ("<script>", "${", "{{", "</textarea>&lt;", str(tmp_path)):
        assert text not in shown, text
    assert shown.count('class="run"') == 4 and shown.count("<img ") == 3 and shown.count("no samples") == 1
    assert shown.count('data-do="trash"') == 3 and "Restore one" in shown and "LoRA, ResLoRA · 8 of 8 steps" in shown
    assert lists.runs(shelf, "TEXTAREA").count('class="run"') == 1 and "No run has this" in lists.runs(shelf, "zzz")
    # What a card shows is what the folder has now.
    assert "no notes" in lists.runs(shelf, "two")
    shelf.write_notes("two", "", "good")
    assert "good</textarea>" in lists.runs(shelf, "two")


def test_the_card_of_a_run_whose_config_is_damaged_says_so(shelf):
    assert NO_CONFIG not in lists.runs(shelf, "one")
    (shelf.library.folder / "one" / "config.json").write_text("{")
    assert "failed</b>" in lists.runs(shelf, "one") and NO_CONFIG in lists.runs(shelf, "one")


def test_the_card_of_a_language_run_says_what_it_is_and_opens_nothing(shelf):
    write_language_run(shelf.library.folder / "glue")
    shown = lists.runs(shelf, "glue")
    assert "ResLoRA · a language model, by train_glue.py" in shown
    assert "Open glue" not in shown and "Move glue to the trash" in shown
    assert "glue was trained by train_glue.py" in refused(RunsTab.opened, shelf, "glue")
    assert "in the trash" in shelf.throw_away("glue")


def test_the_queue_as_it_is_seen(shelf):
    assert "Nothing is lined up" in lists.queue(shelf.jobs)
    states = ("finished", "running", "waiting", "waiting", "failed")
    with shelf.jobs.changing() as entries:
        entries += [Entry(f"{state}-{n}<", state=state, line="<b>why</b>") for n, state in enumerate(states)]
    shelf.jobs.is_active = lambda run: run.name.startswith("running")
    shown = lists.queue(shelf.jobs)
    assert "<b>why" not in shown and "-0<" not in shown
    order = [shown.index(f'data-name="{name}') for name in ("running", "waiting-2", "waiting-3", "failed", "finished")]
    assert order == sorted(order)
    disabled = [part.split('"')[0] for part in shown.split('aria-label="') if " disabled>" in part]
    assert disabled == ["Move waiting-2&lt; up", "Move waiting-3&lt; down"]
    shelf.jobs.path.write_text(json.dumps({"version": 9}))
    assert "mend or remove queue.json" in lists.queue(shelf.jobs)
