"""app/generation_request.py: any request becomes one that can be generated."""

from dataclasses import replace

import pytest
from app_runs import write_run

from app import generation_request
from app.generation_request import Request
from app.runs import Run, RunError


def test_requests_are_clamped():
    wild = Request("x\0" + "y" * 50_000, None, 2**70, 10**9, float("inf"), 10**9, -5, 99, float("nan")).clamped()
    assert len(wild.prompt) == generation_request.LONGEST and "\0" not in wild.prompt and wild.negative_prompt == ""
    assert wild == replace(wild, seed=2**32 - 1, steps=150, guidance=4.0, width=1024, height=32, images=8, strength=1.0)
    assert Request(width=101, height="72", steps="x", seed=None, images=None).clamped() == Request(width=96, height=72)
    usual = Request(prompt="red disc", steps=3, seed=5)
    assert usual.clamped() == usual


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("seed", -5, "Seed is -5: give a whole number from 0 to 4294967295."),
        ("width", 70, "Width is 70: give a multiple of 8 from 32 to 1024."),
        ("prompt", "x" * 10_001, "A prompt has 10,001 characters: give at most 10,000."),
    ],
)
def test_what_is_beyond_the_limits_is_refused(name, value, told):
    Request().checked()
    with pytest.raises(RunError, match=f"^{told}"):
        replace(Request(), **{name: value}).checked()


@pytest.mark.parametrize("size", [{}, {"validation_height": 96, "validation_width": 48}])
def test_a_run_is_drawn_as_its_samples_are(tmp_path, size):
    run = Run(
        "run", write_run(tmp_path / "run", **{"resolution": 64} | size, num_inference_steps=3, guidance_scale=2.0)
    )
    height, width = size.get("validation_height", 64), size.get("validation_width", 64)
    assert generation_request.of_samples(run) == Request("red disc", steps=3, guidance=2.0, height=height, width=width)
