"""app/views.py: the HTML of a run, whatever its files contain."""

import pytest
from app_runs import run_by_hand

from app import compared, views


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_damage_is_told(run):
    log = run.folder / "lora" / "log.jsonl"
    log.write_text(log.read_text().replace("\n", '\n{"step": 2, "lo\n', 1))
    assert len(run.log("lora")) == 7
    image = run.folder / "lora" / "samples" / "step-000004" / "0-0.png"
    content = bytearray(image.read_bytes())
    content[43:53] = bytes(10)
    image.write_bytes(content)
    assert compared.images(run, 4).count('<div class="empty">damaged') == 1


def test_nothing_of_a_run_becomes_markup(run):
    shown = compared.images(run, 2)
    for forbidden in ("<script", "${1}", "{{2}}"):
        assert forbidden not in shown
    assert "&lt;script&gt;" in shown


def test_a_summary_by_hand(run):
    """Of two methods with four steps each, five steps are done."""
    log = run.folder / "reslora" / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    shown = views.summary(run, "running")
    assert "4 steps each" in shown and "5 of 8 done" in shown and "width:62.5%" in shown
    assert "rank 2 · learning rate 0.001" in shown and "width:50%" in views.progress("half", 0.5)
