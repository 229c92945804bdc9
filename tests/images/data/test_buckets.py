"""The size at which an image is trained: how much of it remains, and that nothing is enlarged."""

from pathlib import Path

import pytest
from pipelines import FAMILIES, image_folder, random_image

from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main, only, printed
from reslora.images.data.buckets import bucket_of, kept, ladder, own_bucket, step_of
from reslora.images.data.size import Size

SHAPES = [2 ** (-1 + 2 * number / 500) for number in range(501)]  # from 1:2 to 2:1


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("resolution", [512, 1024])
def test_every_shape_from_1_to_2_to_2_to_1_keeps_most_of_its_area(resolution, multiple):
    buckets = ladder(resolution, multiple)
    assert (
        min(kept((round(1e6 * shape), 10**6), bucket_of((round(1e6 * shape), 10**6), buckets)) for shape in SHAPES)
        >= 0.957
    )
    assert Size(resolution, resolution) in buckets
    for size in buckets:
        assert size.height % multiple == size.width % multiple == 0
        assert size.height * size.width <= resolution**2 and Size(size.width, size.height) in buckets


def test_what_is_kept_by_hand():
    assert kept((1000, 500), Size(512, 512)) == 0.5  # half of the width is cut off
    assert kept((500, 1000), Size(512, 512)) == 0.5
    assert kept((640, 480), Size(480, 640)) == 1.0
    assert kept((100, 100), Size(300, 400)) == pytest.approx(0.75)


def test_steps_are_what_the_model_allows():
    assert [step_of(512, multiple) for multiple in (8, 16, 32, 64)] == [32, 32, 32, 64]
    assert (step_of(768, 8), step_of(768, 32), step_of(64, 8)) == (48, 32, 8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [  # width and height
        ((512, 512), Size(512, 512)),
        ((4000, 4000), Size(512, 512)),
        ((3000, 2000), Size(416, 608)),
        ((2000, 3000), Size(608, 416)),
        ((300, 500), Size(480, 288)),  # smaller: its own size on the grid
        ((40, 20), Size(16, 40)),  # smaller than the grid's step: on the model's own
        ((40, 6), Size(8, 40)),
        ((6000, 300), Size(288, 896)),  # longer than any bucket: as much as the area allows
    ],
)
def test_an_image_gets_the_bucket_that_keeps_most_of_it(image, expected):
    assert own_bucket(image, 512, 8) == expected


@pytest.mark.parametrize("width", [8, 31, 400, 1400])
def test_nothing_is_scaled_up_or_larger_than_the_square(width):
    for height in (8, 20, 31, *range(33, 1500, 47)):
        size = own_bucket((width, height), 512, 8)
        assert size.height * size.width <= 512**2
        assert size.width <= width and size.height <= height


def test_an_image_with_as_many_pixels_as_the_square_keeps_most_of_its_area():
    """Without enlarging it, not all buckets fit into an image with few more pixels."""
    for more in (1.0, 1.02, 1.05, 1.2):
        for shape in SHAPES[::5]:
            side = 512 * more
            image = (round(side * shape**0.5 + 0.5), round(side / shape**0.5 + 0.5))
            assert kept(image, own_bucket(image, 512, 8)) >= 0.93


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Images of three shapes, two of each."""
    folder = image_folder(tmp_path_factory.mktemp("shapes") / "images", 6)
    for number, size in enumerate([(64, 48), (48, 64), (48, 48)] * 2):
        random_image(number).resize(size).save(folder / f"{number}.png")
    return folder


def flags_for(model: Path, shapes: Path, output: Path, *more: object) -> list[object]:
    return [
        *("--pretrained_model_name_or_path", model, "--train_data_dir", shapes, "--resolution", 48, "--rank", 2),
        *("--use_aspect_ratio_buckets", "--train_batch_size", 2, "--max_train_steps", 6, "--learning_rate", "1e-2"),
        *("--checkpointing_steps", 2, "--num_validation_images", 0, "--num_inference_steps", 1),
        *("--merge_calibration_samples", 6, "--report_to", "none", "--output_dir", output, *more),
    ]


SIDES = ("--resolution", 48, 32)
"""With the three shapes, six buckets."""
GO_ON = ("sdxl", "qwen_image")


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", GO_ON)
def test_a_run_in_buckets_that_goes_on_ends_with_the_same_bytes(family, shapes, tmp_path):
    model = FAMILIES[family](tmp_path / "model")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    only(printed(*flags_for(model, shapes, whole, *SIDES)), "6 buckets")
    killed_after(2, whole, parts)
    assert main(*flags_for(model, shapes, parts, *SIDES, *RESUME)) == 0
    assert_same(final_weights(parts, step=6), final_weights(whole, step=6))
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "32"], "height,width"),
        (["--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "33,32"], "multiples of"),
        (["--aspect_ratio_buckets", "32,32"], "--use_aspect_ratio_buckets"),
    ],
)
def test_buckets_that_cannot_be_are_refused(brief_flags, capsys, tmp_path, words, expected):
    assert main(*brief_flags, *words, "--output_dir", tmp_path / "out") == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
