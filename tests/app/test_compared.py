"""app/compared.py: images, curves and numbers of a run."""

import json

import PIL.Image
import pytest
from app_runs import run_by_hand, write_samples

from app import compared


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_columns_and_grid_show_the_chosen_step(run):
    write_samples(run.folder / "reslora" / "merged", 200)
    columns = compared.columns(run, 2)
    assert [column.title for column in columns] == ["Base model", "LoRA", "ResLoRA", "ResLoRA merged"]
    reds = [PIL.Image.open(column.images[0, 0]).getpixel((0, 0))[0] for column in columns]
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
