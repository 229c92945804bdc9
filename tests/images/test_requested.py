"""Samples of prompts in `sample.now`, at the present weights of a run."""

import pytest

from images.runs import assert_same, digests, final_weights, only, printed


@pytest.fixture(scope="module")
def flags(brief_flags) -> list[str]:
    words = [*brief_flags, "--max_train_steps", "2", "--validation_steps", "1", "--checkpointing_steps", "5"]
    return [*words, "--validation_prompt", "blue disc"]


@pytest.mark.exhaustive
def test_requested_prompts_are_sampled_and_change_nothing_else(flags, tmp_path):
    """The first prompt is the run's own, so that its sample is known; the text encoder was freed before training."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    printed(*flags, "--output_dir", whole)
    output.mkdir()
    (output / "sample.now").write_text("blue disc\n# a comment\nbox box --w 48 --n disc\n")
    lines = printed(*flags, "--output_dir", output)
    folder = output / "lora" / "requested" / "step-000001" / "1"
    only(lines, f"requested samples of step 1 in {folder}")
    assert digests(folder, "0-0.png") == digests(output / "lora" / "samples" / "step-000001", "0-0.png")
    assert sorted(path.name for path in folder.iterdir()) == ["0-0.png", "1-0.png", "prompts.json"]
    assert digests(output, "lora/samples/*/*.png") == digests(whole, "lora/samples/*/*.png")
    assert_same(final_weights(output, "lora", 2), final_weights(whole, "lora", 2))


def test_an_invalid_prompt_is_warned_of_and_training_goes_on(flags, tmp_path):
    (tmp_path / "sample.now").write_text("red disc\nblue box --w 30")
    only(printed(*flags, "--output_dir", tmp_path), "warning: no samples: sample.now 'blue box': 30 pixels; ")
    assert not (tmp_path / "lora" / "requested").exists()
