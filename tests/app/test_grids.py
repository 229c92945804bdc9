"""app/grids.py on a tiny Stable Diffusion: every cell equals, pixel for pixel, the image generated alone."""

from dataclasses import replace

import numpy as np
import pytest
from app_runs import own_runs, pixels

from app.generation_request import Request
from app.grids import MOST, axis, grid, table
from app.library import Library
from app.runs import RunError
from app.studio import Studio
from reslora.methods.registry import METHODS

REQUEST = Request(prompt="red disc", steps=2, seed=5, width=32, height=32, guidance=3.0)
START = "LoRA: merged weights"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Library(own_runs(tmp_path_factory)).find("tiny")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def grid_of(run, x, y, start=START):
    return grid(run, run.find_weights(start), REQUEST, axis("X", *x), axis("Y", *y))


# -- cells -------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("x", "y", "single"),
    [
        (("strength", "0.5, 1"), ("seed", "7 8"), lambda x, y: (START, {"strength": x, "seed": y})),
        (("method", "LoRA, ResLoRA"), ("prompt", "red disc\n\nblue box "),
            lambda x, y: (f"{METHODS[x].title}: merged weights", {"prompt": y})),
        (("checkpoint", "2 4"), ("method", "LoRA, ResLoRA"),
            lambda x, y: (f"{METHODS[y].title}: unmerged, step {x}", {})),
        (("method", "LoRA, base"), ("none", ""), lambda x, y: (START if x == "lora" else "base model", {})),
    ],
    ids=["strength-seed", "method-prompt", "checkpoint-method", "one-axis"],
)  # fmt: skip
def test_cells_are_single_drawings(studio, run, x, y, single):
    """With different weights and settings."""
    made = grid_of(run, x, y)
    drawn = pixels(studio.draw(run, [*made.cells.values()]))
    assert len(drawn) == len(made.cells) == len(made.x.values) * len(made.y.values)
    for (row, column), image in zip(made.cells, drawn, strict=True):
        label, changes = single(made.x.values[column], made.y.values[row])
        alone = pixels(studio.generate(run, [run.find_weights(label)], replace(REQUEST, **changes)))
        assert np.array_equal(image, *alone)
    assert all(not np.array_equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("colour", "1", "X: no setting has this name; choose one of checkpoint, "),
        ("strength", "0 half", r"X \(strength\) is half: give a number from -2 to 2"),
        ("seed", " ".join(map(str, range(65))), f"X .seed.: 65 values are more than the {MOST}"),
    ],
)
def test_an_axis_that_says_nothing_is_refused_in_a_line(name, text, said):
    with pytest.raises(RunError, match=f"^{said}"):
        axis("X", name, text)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (("seed", "1 2 3 4 5 6 7 8 9"), ("steps", "1 2 3 4 5 6 7 8"), "9 x 8 values are 72 cells: at most 64"),
        (("checkpoint", "3"), ("seed", "1"), "LoRA has no checkpoint at step 3; it has checkpoints at 2, 4"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused_before_anything_is(run, x, y, said):
    with pytest.raises(RunError, match=f"^{said}"):
        grid_of(run, x, y)


# -- what is seen of it ------------------------------------------------------------------------------------------------


def test_the_page_has_a_place_for_each_cell_and_prompts_are_no_markup(run):
    made = grid_of(run, ("prompt", "<b>red</b> ${1}\nblue box"), ("seed", "1 2"))
    shown = table(made, {(1, 0): 'a"b'})
    assert shown.count("not yet") == 3 and shown.count("<img") == 1
    assert "<b>" not in shown and "${" not in shown and 'src="a&quot;b"' in shown
    assert 'data-row="1" data-column="0"' in shown and "seed 2 · &lt;b&gt;red" in shown
    assert made.heading == "2 steps · guidance 3 · strength 1 · LoRA: merged weights"
