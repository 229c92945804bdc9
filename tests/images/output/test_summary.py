"""The figures of a run, and the file that marks it as finished."""

import errno
from pathlib import Path

import pytest
from PIL import Image

from images.runs import cut, parts
from reslora.images.output import summary
from reslora.images.output.reports import save_images
from reslora.options.images import Options
from reslora.plots.figures import comparison

PROMPTS = ["red disc", "blue box"]


def flags_of(output: Path, prompts: list[str] | None = None) -> Options:
    shown = {"validation_prompt": prompts, "num_validation_images": 1, "max_validation_images": 4}
    return Options.of(output_dir=str(output), method=["lora"], **shown)


def draw(folder: Path, prompts: list[str]) -> None:
    save_images(folder, [Image.new("RGB", (8, 8))] * len(prompts), prompts)


def test_where_loss_png_is_the_weights_are_in_their_place(tmp_path, monkeypatch):
    """`loss.png` marks the run as finished: it must not exist if the disk is full while the weights are copied."""
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(summary.shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            summary.write_figures(*parts(flags_of(tmp_path), "adapter", "validation", "output"), 0)
    assert not (tmp_path / "loss.png").exists()
    summary.write_figures(*parts(flags_of(tmp_path), "adapter", "validation", "output"), 0)
    assert (tmp_path / "loss.png").is_file() and (tmp_path / weights.name).read_bytes() == b"weights"


def test_the_comparison_shows_what_was_drawn_of_todays_prompts_and_can_be_read(tmp_path, monkeypatch):
    samples, drawn, above_it = tmp_path / "lora" / "samples", [], []
    draw(samples / "step-000000", ["green star", "blue box"])
    draw(samples / "step-000001", ["green star", "white cat"])
    draw(samples / "step-000002", ["red disc", "white cat"])
    draw(samples / "step-000004", PROMPTS)
    draw(samples / "step-000006", PROMPTS)
    (samples / "step-000006" / "0-0.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(samples / "step-000006" / "1-0.png")
    cut(samples / "step-000006" / "1-0.png")
    draw(tmp_path / "lora" / "merged", PROMPTS)

    def compare(path: Path, columns: list[str], rows: list, above: tuple) -> None:
        assert [(prompt, name) for prompt, [(name, _)] in rows] == [(f"prompt: {prompt}", "LoRA") for prompt in PROMPTS]
        drawn.append((columns, [[image is not None for image in images] for _, [(_, images)] in rows]))
        above_it.append(above[1])
        comparison(path, columns, rows, above=above)

    monkeypatch.setattr(summary, "comparison", compare)
    flags, learnt = flags_of(tmp_path, PROMPTS), [Image.new("RGB", (9, 9))]
    summary.write_comparison(flags.adapter, flags.validation, flags.output, tmp_path / "comparison.png", learnt)
    columns = ["before\ntraining", "step 2", "step 4", "step 6", "merged into\nthe model"]
    assert drawn == [(columns, [[False, True, True, False, True], [True, False, True, False, True]])]
    assert above_it == [learnt] and (tmp_path / "comparison.png").is_file()


def test_a_comparison_stays_where_nothing_was_drawn_of_todays_prompts(tmp_path):
    draw(tmp_path / "lora" / "merged", PROMPTS)
    (tmp_path / "comparison.png").write_text("of others")
    summary.write_comparison(
        *parts(flags_of(tmp_path, ["a poodle"]), "adapter", "validation", "output"),
        tmp_path / "comparison.png",
    )
    assert (tmp_path / "comparison.png").read_text() == "of others"
