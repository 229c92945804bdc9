"""reslora/plots/figures.py: images and curves at their places, read from the pixels and the data of the curves."""

import math

import numpy as np
import PIL.Image
import pytest

from reslora.plots import figures

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def plain(color, size=(64, 64)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, color)


def drawn(tmp_path, columns, rows, **more) -> np.ndarray:
    """Return the pixels of the comparison, RGB."""
    figures.comparison(tmp_path / "comparison.png", columns, rows, **more)
    return np.asarray(PIL.Image.open(tmp_path / "comparison.png").convert("RGB"))


def box(pixels: np.ndarray, color) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the area of a color, which must fill this rectangle."""
    y, x = np.nonzero((pixels == color).all(axis=-1))
    left, top, width, height = int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1
    assert len(x) == width * height
    return left, top, width, height


def test_steps_go_across_and_methods_down(tmp_path):
    rows = [("one", [("lora", [plain(RED), plain(GREEN)]), ("reslora", [None, plain(BLUE)])])]
    pixels = drawn(tmp_path, ["step 0", "step 4"], rows)
    red, green, blue = (box(pixels, color) for color in (RED, GREEN, BLUE))
    assert red[2:] == green[2:] == blue[2:] == (figures.SMALL, figures.SMALL)
    assert green[:2] == (red[0] + figures.SMALL + figures.GAP, red[1])
    assert blue[:2] == (green[0], green[1] + figures.SMALL + figures.GAP)
    beside = pixels[red[1] : red[1] + red[3], : red[0]]
    below = pixels[blue[1] : blue[1] + blue[3], red[0] : red[0] + red[2]]
    assert (beside != 255).any() and (below == 255).all()  # the method's name; an empty place


def test_images_above_are_smaller_and_as_many_as_there_is_room_for(tmp_path):
    rows = [("one", [("lora", [plain(GREEN), plain(BLUE)])])]
    without = drawn(tmp_path, ["before", "step 4"], rows)
    pixels = drawn(tmp_path, ["before", "step 4"], rows, above=("learnt", [plain(RED, (32, 16)), *[plain(GREEN)] * 9]))
    red, blue = box(pixels, RED), box(pixels, BLUE)
    side = round(figures.ABOVE * figures.SMALL)
    assert red == (blue[0] - figures.SMALL - figures.GAP, red[1], side, side // 2)  # with its shape
    more = len(pixels) - len(without)
    assert np.array_equal(pixels[more + 12 :], without[12:]) and red[1] + red[3] < more < blue[1]
    assert (pixels[: red[1], red[0] : red[0] + red[2]] != 255).any()  # the line over it
    (greens,) = np.nonzero((pixels[red[1] + red[3] // 2] == GREEN).all(axis=-1))
    assert len(greens) == 2 * side and greens.max() < blue[0] + figures.SMALL  # two more, and no part of a fourth
    assert np.array_equal(without, drawn(tmp_path, ["before", "step 4"], rows, above=("learnt", [])))


@pytest.mark.parametrize(("size", "shown"), [((32, 16), (128, 64)), ((512, 512), (192, 192))])
def test_images_keep_their_shape(tmp_path, size, shown):
    assert box(drawn(tmp_path, ["a"], [("p", [("m", [plain(RED, size)])])]), RED)[2:] == shown


def test_files_are_read_and_closed(tmp_path):
    plain(RED).save(tmp_path / "0-0.png")
    assert box(drawn(tmp_path, ["a"], [("p", [("m", [tmp_path / "0-0.png"])])]), RED)
    (tmp_path / "0-0.png").write_bytes(b"no image")
    (tmp_path / "comparison.png").write_bytes(b"what was there")
    with pytest.raises(OSError):
        figures.comparison(tmp_path / "comparison.png", ["a"], [("p", [("m", [tmp_path / "0-0.png"])])])
    assert (tmp_path / "comparison.png").read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0.png", "comparison.png"]


def test_prompts_are_no_formulas(tmp_path):
    def head(prompt):
        return drawn(tmp_path, ["a"], [(prompt, [("m", [plain(RED)])])])

    assert not np.array_equal(head("$x_1$"), head("x_1"))
    assert not np.array_equal(head("$x$"), head(r"$x"))
    head(r"$\frac{")  # would be an error in a formula
    assert np.array_equal(head("a\n\tb"), head("a b"))


def test_what_is_too_long_is_shortened(tmp_path):
    rows = [("word " * 300, [("m", [plain(RED)] * 3)])]
    long, short = drawn(tmp_path, ["a", "b", "c"], rows), drawn(tmp_path, ["a", "b", "c"], [("word", rows[0][1])])
    assert long.shape == short.shape
    assert (long[:, -figures.MARGIN // 2 :] == 255).all()
    text = figures._shortened("word " * 300, 20, 200)
    assert text.endswith("…") and 180 < figures._width(text, 20) <= 200
    assert figures._shortened("word", 20, 200) == "word"


def test_the_same_content_gives_the_same_bytes(tmp_path):
    rows = [("prompt", [("lora", [plain(RED)])])]
    logs = {"lora": [{"step": 1, "split": "train", "loss": 1.0}]}
    for name in ("a", "b"):
        figures.comparison(tmp_path / f"comparison-{name}.png", ["a"], rows)
        figures.loss_curves(tmp_path / f"loss-{name}.png", logs, 3)
    for kind in ("comparison", "loss"):
        assert (tmp_path / f"{kind}-a.png").read_bytes() == (tmp_path / f"{kind}-b.png").read_bytes()
        assert "Software" not in PIL.Image.open(tmp_path / f"{kind}-a.png").info


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(monkeypatch):
    """Return the figures that would be written."""
    found = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, dpi: found.append(figure))
    return found


def test_curves_are_the_losses_of_each_method(saved):
    log = [{"step": step, "split": "train", "loss": float(step % 3)} for step in range(1, 31)]
    log += [{"step": step, "split": "validation", "loss": 10.0 - step} for step in (0, 5)]
    figures.loss_curves("loss.png", {"lora": log, "reslora": log[:10]}, 12)
    train, validation = saved[0].axes
    lines = {line.get_label(): line for line in train.lines}
    assert list(lines) == ["lora", "reslora"]
    assert lines["lora"].get_xdata().tolist() == list(range(1, 31))
    windows = [[row["loss"] for row in log[max(0, i - 2) : i + 1]] for i in range(30)]  # a tenth of 30 steps: 3
    assert lines["lora"].get_ydata().tolist() == pytest.approx([sum(window) / len(window) for window in windows])
    assert validation.lines[0].get_ydata().tolist() == [10.0, 5.0]
    assert "12 held-out images" in validation.get_title()


def test_a_third_plot_has_the_last_held_out_loss_by_timestep(saved):
    rows = [{"step": 0, "split": "validation", "loss": 2.0, "by_timestep": {"0.25": 1.0, "0.75": 3.0}}]
    rows += [{"step": 5, "split": "validation", "loss": 1.5, "by_timestep": {"0.25": 0.5, "0.75": 2.5}}]
    figures.loss_curves("loss.png", {"lora": rows, "reslora": []}, 12)
    *_, last = saved[0].axes
    (line,) = last.lines
    assert line.get_label() == "lora"
    assert [values.tolist() for values in line.get_data()] == [[0.25, 0.75], [0.5, 2.5]]


def test_without_held_out_images_there_is_one_plot(saved):
    for held_out in (None, 0):
        figures.loss_curves("loss.png", {"lora": [{"step": 1, "split": "train", "loss": 1.0}]}, held_out)
        assert len(saved.pop().axes) == 1


def test_losses_that_are_not_finite_leave_a_gap(saved):
    losses = [1.0, math.nan, 3.0, math.inf, "5", None]
    log = [{"step": step, "split": "validation", "loss": loss} for step, loss in enumerate(losses)]
    log += [{"step": 9, "split": "validation"}, {"step": 1, "split": "train", "loss": math.nan}]
    figures.loss_curves("loss.png", {"lora": log}, 1)
    drawn = saved[0].axes[1].lines[0].get_ydata()
    assert [value for value in drawn if not math.isnan(value)] == [1.0, 3.0] and len(drawn) == 7


def test_running_mean():
    assert figures.running_mean([1.0, 3.0, 5.0], share=0.6) == [1.0, 2.0, 4.0]
    assert figures.running_mean([]) == []
    means = figures.running_mean([math.nan, 2.0, math.inf, 4.0], share=0.5)
    assert math.isnan(means[0]) and means[1:] == [2.0, 2.0, 4.0]


def test_empty_logs(tmp_path):
    for logs in ({}, {"lora": []}):
        figures.loss_curves(tmp_path / "loss.png", logs, 2)
        assert PIL.Image.open(tmp_path / "loss.png").size[0] > 1000
