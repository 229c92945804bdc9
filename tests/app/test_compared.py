"""app/compared.py: images, curves and numbers of one run or of several."""

import json
import shutil
from dataclasses import replace

import PIL.Image
import pytest
from app_runs import run_by_hand, write_run, write_samples

from app import compared
from app.differences import differences
from app.runs import Run


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_columns_and_grid_show_the_chosen_step(run):
    write_samples(run.folder / "reslora" / "merged", 200)
    columns = compared.columns(run, 2)
    assert [column.title for column in columns] == ["Base model", "LoRA", "ResLoRA", "ResLoRA merged"]
    reds = [PIL.Image.open(column.images[0, 0, "red disc"]).getpixel((0, 0))[0] for column in columns]
    assert reds == [0, 20, 60, 200]
    assert compared.images(run, 2) != compared.images(run, 4)
    assert "not at this step" in compared.images(run, 3)
    compared.save_grid(run, 2, run.folder / "grid.png")
    with PIL.Image.open(run.folder / "grid.png") as grid:
        colours = {colour for _, colour in grid.convert("RGB").getcolors(2**20)}
    assert {(red, green, 0) for red in reds for green in (0, 100)} <= colours


def test_two_images_of_the_grid_in_one_size_with_their_difference(run):
    columns, rows = compared.choices(run, 4)
    assert list(columns) == ["Base model", "LoRA", "ResLoRA"] and next(iter(rows)) == "red disc"
    images = compared.two_images(columns["LoRA"], columns["ResLoRA"], rows["red disc"])
    assert [image.size for image in images] == [(512, 512)] * 2
    assert [image.getpixel((0, 0)) for image in images] == [(40, 0, 0), (80, 0, 0)]
    shown, caption = compared.difference(*images)
    assert (
        shown.getpixel((0, 0)) == (255, 0, 0)
        and caption == "Difference: 13.3 of 255 on average, shown 6.4 times as bright"
    )
    assert compared.difference(images[0], images[0])[1].startswith("Difference: 0.0 of 255")
    next(iter(columns["LoRA"].images.values())).write_bytes(b"")
    assert compared.two_images(columns["LoRA"], columns["ResLoRA"], rows["red disc"]) is None


def test_numbers_and_curves_by_hand(run, monkeypatch):
    """The mean of the last 20 training losses and the last validation loss up to the step.

    The curve is a running mean over a tenth.
    """
    rows = [{"step": s, "split": "train", "loss": float(s), "lr": s * 1e-3, "seconds": 2 * s} for s in range(1, 31)]
    rows += [{"step": s, "split": "validation", "loss": s / 8, "lr": s * 1e-3, "seconds": 2 * s} for s in (0, 10, 30)]
    rows.sort(key=lambda row: row["step"])
    for method in run.methods:
        (run.folder / method / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compared.numbers_of(run, "lora", 2) == ((2, 0), (1.5, 0.0, 2e-3, 4))
    assert compared.numbers_of(run, "lora", 25) == ((25, 10), (15.5, 1.25, 25e-3, 50))
    assert compared.numbers_of(run, "lora", 30) == ((30, 30), (20.5, 3.75, 30e-3, 60))
    assert "<td>15.5000</td><td>1.2500</td><td>0.025</td><td>50 s</td>" in compared.numbers(run, 25)
    drawn = {}
    monkeypatch.setattr(compared, "line_chart", lambda title, axis, lines, step: drawn.update({title: lines}) or "")
    compared.curves(run, "train", 2)
    compared.curves(run, "validation", 2)
    train, held_out = (
        list(drawn[title][0].points) for title in (compared.TITLES["train"], compared.TITLES["validation"])
    )
    assert held_out == [(0, 0.0), (10, 1.25), (30, 3.75)]
    assert [step for step, _ in train] == list(range(1, 31))
    assert [loss for _, loss in train] == pytest.approx([1.0, 1.5, *range(2, 30)])


def beside(folder, *others: dict, **config) -> Run:
    """A run, and other runs with other settings to compare with it."""
    config = {"seed": 3, "validation_split": 0.1, "validation_prompt": ["red disc", "box"]} | config
    runs = [Run("first", write_run(folder / "first", methods=("lora",), **config))]
    for number, changes in enumerate(others):
        name = f"other{number}"
        runs.append(Run(name, write_run(folder / name, methods=("lora",), **(config | changes))))
    return replace(runs[0], beside=tuple(runs[1:]))


def test_runs_are_side_by_side_and_images_that_do_not_compare_are_in_rows_of_their_own(tmp_path):
    """Two runs that sample alike share the base model's column; another prompt of the same number has its own row."""
    run = beside(tmp_path, {}, {"validation_prompt": ["red disc", "a large box"], "seed": 4})
    shutil.rmtree(run.beside[0].folder / "lora" / "samples" / "step-000002")
    columns = compared.columns(run, 2)
    assert [column.title for column in columns] == [
        "first: Base model", "other1: Base model", "first: LoRA", "other0: LoRA", "other1: LoRA",
    ]  # fmt: skip
    assert [cell[2] for cell in compared.rows_of(columns)] == ["red disc", "box", "a large box"]
    shown = compared.images(run, 2)
    assert shown.count("<img") == 8 and shown.count(">other prompt<") == 5 and shown.count(">not at this step<") == 2
    assert 'alt="a large box: other1: LoRA" title="a large box: other1: LoRA"' in shown
    assert shown.count('class="small"') == 8


@pytest.mark.parametrize(
    ("changes", "told", "compares"),
    [
        ({}, "All settings that affect images and losses agree", (True, True)),
        ({"seed": 4}, "seed (first: 3, other0: 4)", (False, False)),
        ({"pretrained_model_name_or_path": "<b>"}, "base model (first: none, other0: &quot;&lt;b&gt;", (False, False)),
        ({"validation_split": 0.2}, "images not trained on (first: 0.1, other0: 0.2)", (True, False)),
    ],
)  # fmt: skip
def test_what_keeps_runs_from_being_compared_is_said(tmp_path, changes, told, compares):
    """No loss is marked as the lowest if the held-out images may differ."""
    run = beside(tmp_path, changes)
    log = run.folder / "lora" / "log.jsonl"
    log.write_text(log.read_text().replace("0.4", "0.41"))
    said = differences(run)
    assert told in said and differences(replace(run, beside=())) == ""
    assert ("can be compared" in said, "same images, which were not trained on; one seed" in said) == compares
    assert ("lowest" in compared.numbers(run, 4)) == compares[1]
