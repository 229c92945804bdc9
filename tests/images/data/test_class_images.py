"""Class images: generated if missing, used as often as training images, weighted, and part of the run's identity."""

from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator
from pipelines import FAMILIES

from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main, parts, printed, refused
from reslora.errors import InvalidArgument
from reslora.images.data.class_images import balanced, generate_missing, missing_class_images
from reslora.images.data.plan import Plan
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.model import quantising
from reslora.images.run import resolve_context
from reslora.images.settings import parse_args
from reslora.runtime.signals import StopRequest


def flags_for(folder: Path, model: Path, data: Path, output: str, *more: object) -> list[object]:
    return [
        *("--pretrained_model_name_or_path", model, "--train_data_dir", data, "--resolution", 32, "--rank", 2),
        *("--class_data_dir", folder / "class", "--class_prompt", "a disc", "--num_class_images", 3),
        *("--train_batch_size", 2, "--max_train_steps", 4, "--checkpointing_steps", 2, "--learning_rate", "1e-2"),
        *("--num_validation_images", 0, "--num_inference_steps", 1, "--merge_calibration_samples", 2),
        *("--method", "lora", "--report_to", "none", "--output_dir", folder / output, *more),
    ]


# Krea 2's pipeline is asked as the others are.
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["stable_diffusion", "flux2"])
def test_what_is_missing_is_drawn_and_the_same_again(family, data, tmp_path, capsys):
    """A removed image is generated again identically; an image that the user has added counts and stays."""
    model = FAMILIES[family](tmp_path / "model")
    flags = flags_for(tmp_path, model, data, "out", "--max_train_steps", 1)
    assert "generating 3 class images" in "".join(printed(*flags))
    drawn = pictures(tmp_path / "class")
    assert len(drawn) == 3 and not np.array_equal(drawn[0], drawn[1])
    (tmp_path / "class" / "class-00001.png").unlink()
    generate_missing(resolve_context(parse_args([*map(str, flags)]), Accelerator(cpu=True), StopRequest()))
    assert "generating 1 class image in" in capsys.readouterr().out
    for before, after in zip(drawn, pictures(tmp_path / "class"), strict=True):
        assert np.abs(before - after).max() <= 2  # of 255: another batch rounds otherwise


@pytest.mark.exhaustive
def test_qwen_images_class_images_are_guided(data, tmp_path):
    """Its pipeline applies no guidance without a negative prompt, and has another name for the scale."""
    model, drawn = FAMILIES["qwen_image"](tmp_path / "model"), []
    for scale in (1, 9):
        flags = parse_args([*map(str, flags_for(tmp_path / str(scale), model, data, "out", "--guidance_scale", scale))])
        generate_missing(resolve_context(flags, Accelerator(cpu=True), StopRequest()))
        drawn += [pictures(tmp_path / str(scale) / "class")]
    assert all(np.abs(one - other).max() > 2 for one, other in zip(*drawn, strict=True))


@pytest.mark.exhaustive
def test_blocks_that_are_swapped_draw_the_same(data, tmp_path, monkeypatch):
    model, drawn, copied = FAMILIES["z_image"](tmp_path / "model"), [], []
    monkeypatch.setattr(quantising, "on_device", lambda codes, device: copied.append(device) or codes.clone())
    for blocks in (0, 2):
        flags = flags_for(tmp_path / str(blocks), model, data, "out", "--blocks_to_swap", blocks)
        assert not copied
        generate_missing(resolve_context(parse_args([*map(str, flags)]), Accelerator(cpu=True), StopRequest()))
        drawn += [pictures(tmp_path / str(blocks) / "class")]
    assert copied and np.array_equal(*drawn)


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(PIL.Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.mark.exhaustive
def test_a_run_with_class_images_goes_on_as_if_it_had_not_stopped(model, data, tmp_path):
    whole, parts = (flags_for(tmp_path, model, data, name) for name in ("whole", "parts"))
    assert main(*whole) == 0
    killed_after(2, tmp_path / "whole", tmp_path / "parts", "lora")
    assert main(*parts, *RESUME) == 0
    assert_same(*(final_weights(tmp_path / name, "lora") for name in ("whole", "parts")))
    assert losses(tmp_path / "parts", "lora") == losses(tmp_path / "whole", "lora")


def test_what_is_to_be_learnt_is_no_class_image(tmp_path):
    """No class image is generated there either; a folder of class images inside the training folder is not read."""
    learnt = tmp_path / "class" / "."
    learnt.mkdir(parents=True, exist_ok=True)
    flags = ["--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a disc", "--train_data_dir"]
    with pytest.raises(InvalidArgument, match=r"^--class_data_dir \S+/class: contains the training images of"):
        missing_class_images(*parts(parse_args([*flags, str(learnt)]), "data", "output"))
    assert missing_class_images(*parts(parse_args([*flags, str(tmp_path)]), "data", "output")) == 100


def test_none_are_drawn_where_they_cannot_be_kept(tmp_path):
    """The model is not even loaded."""
    (tmp_path / "class").write_text("")
    flags = parse_args(["--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a disc"])
    with pytest.raises(InvalidArgument, match=r"^--class_data_dir \S+/class: .* is not a writable folder"):
        missing_class_images(flags.data, flags.output)


def test_one_of_the_flags_alone_is_refused(brief_flags, capsys, tmp_path):
    given = {"--class_prompt": "a disc", "--class_data_dir": str(tmp_path / "class")}
    del given["--class_prompt"]
    line = refused(capsys, *brief_flags, *next(iter(given.items())), "--output_dir", tmp_path / "out")
    assert "--class_prompt" in line and not (tmp_path / "class").exists()


@pytest.mark.parametrize(
    ("images", "times"),
    [((5, 100), (100, 100)), ((100, 5), (100, 100)), ((10, 19), (20, 19))],
)
def test_an_epoch_meets_about_as_many_of_either_and_each_at_least_once(images, times):
    made = [Source(None, None, tuple(range(n)), (), (Size(8, 8),) * n) for n in images]
    plan = Plan(balanced(*([source] for source in made), per_forward=1), 1, seed=0)
    uses_per_epoch = [plan.forward(number)[0] for number in range(plan.forwards_per_epoch)]
    assert tuple(sum(draw.source == source for draw in uses_per_epoch) for source in (0, 1)) == times and len(
        uses_per_epoch
    ) == sum(times)
    assert len({(draw.source, draw.image) for draw in uses_per_epoch}) == sum(images)


@pytest.mark.parametrize("shapes", [([8] * 8, [8, 16, 24, 32, 40]), ([8, 16, 24], [32] * 48)])
def test_images_are_balanced_with_what_fills_up_small_buckets(shapes):
    """A batch has 16 samples, also of a bucket with one image. `shapes`: widths of images, and of class images."""
    made = []
    for widths in shapes:
        sizes = tuple(Size(8, width) for width in widths)
        made.append(Source(None, None, tuple(range(len(widths))), (), sizes))
    plan = Plan(balanced(*([source] for source in made), per_forward=16), 16, seed=0)
    epochs = 60  # what a forward is filled up with is drawn
    uses_per_epoch = Counter(draw.source for n in range(epochs * plan.forwards_per_epoch) for draw in plan.forward(n))
    assert abs(uses_per_epoch[0] / uses_per_epoch[1] - 1) < 0.1


def test_what_can_be_refused_is_refused_before_any_is_drawn(model, data, tmp_path, capsys):
    line = refused(capsys, *flags_for(tmp_path, model, data, "out", "--resolution", 33), quiet=False)
    assert "--resolution 33" in line and not (tmp_path / "class").exists()
