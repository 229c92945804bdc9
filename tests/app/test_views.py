"""app/views.py: the HTML of a run, whatever its files contain."""

import json

import pytest
from app_runs import run_by_hand

from app import compared, layers, views
from app.layers import linked_layers


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
    plan = {"links": 0, "chains": [{"role": "<b>", "blocks": [{"name": "<i>z", "cut": "<i>"}]}]}
    merge = {"method": "<b>", "blocks": [{"name": "<i>z", "alpha": 1.0, "error": 0.1}], "notes": ["<u>"]}
    shown = compared.images(run, 2) + linked_layers(with_files(run, plan, merge))[0]
    for forbidden in ("<script", "${1}", "{{2}}", "<b>:", "<i>", "<u>"):
        assert forbidden not in shown
    assert "&lt;script&gt;" in shown


def with_files(run, plan: object, merge: object):
    """Write what the merge of a run writes, and return the run."""
    (run.folder / "reslora" / "chains.json").write_text(json.dumps(plan))
    (run.folder / "reslora" / "merge.json").write_text(json.dumps(merge))
    return run


def test_linked_layers_by_hand(run):
    """A row for each layer; an alpha for each neighbor is added up. Damaged files are told."""
    names = [
        f"{part}.attentions.0.transformer_blocks.0.attn1.to_q" for part in ("down_blocks.0", "mid_block", "up_blocks.1")
    ]
    blocks = [
        {"name": name, "cut": why} for name, why in zip(names, ("first of its role", "", "8 follows 4"), strict=True)
    ]
    plan = {"links": 1, "chains": [{"blocks": blocks[:2]}, {"blocks": blocks[2:]}]}
    merged = zip(names, ([0.5, 1.25], 2.0, None), (0.1, 0.3, None), strict=True)
    merge = {
        "method": "weights",
        "blocks": [{"name": name, "alpha": alpha, "error": error} for name, alpha, error in merged],
    }
    told, rows = linked_layers(with_files(run, plan, merge))
    assert rows == [
        ["attn1.to_q", "down 0.0", "none: first of its role", 0.1, 1.75],
        ["attn1.to_q", "mid 0", "down 0.0", 0.3, 2.0],
        ["attn1.to_q", "up 1.0", "none: 8 follows 4", None, None],
    ]
    assert "1 shortcut between 3 layers; merged by weights, error 20.0% on average, 30.0% at most" in told
    assert linked_layers(with_files(run, {}, {}))[1] == [] and "not known yet" in linked_layers(run)[0]
    for wrong in ([5], {"blocks": 5}, {"blocks": [{"name": names[0], "alpha": [None]}]}):
        assert "damaged" in linked_layers(with_files(run, plan, wrong))[0] or wrong == [5]


@pytest.mark.parametrize(
    ("name", "place", "role"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down 1.0", "attn1.to_q"),
        ("mid_block.attentions.0.transformer_blocks.2.attn2.to_out.0", "mid 0/2", "attn2.to_out.0"),
        ("single_transformer_blocks.12.attn.to_q", "single 12", "attn.to_q"),
    ],
)
def test_places_and_roles_of_every_familys_blocks(name, place, role):
    assert (layers.place(name), layers.role_of(name)) == (place, role)


def test_a_summary_by_hand(run):
    """Of two methods with four steps each, five steps are done."""
    log = run.folder / "reslora" / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    shown = views.summary(run, "running")
    assert "4 steps each" in shown and "5 of 8 done" in shown and "width:62.5%" in shown
    assert "rank 2 · learning rate 0.001" in shown and "width:50%" in views.progress("half", 0.5)
