"""Masks from alpha channels and files, cropped and mirrored like their images, in the loss."""

import json
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import image_folder, random_image

from images.runs import FAMILY, losses, main, only, parts, printed, read_by, refused
from reslora.images.data.encoding import Variants
from reslora.images.data.folders import load_folders
from reslora.images.data.images import crop_mask, open_masked
from reslora.images.data.samples import TrainingData, training_loader
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.model.objective import FlowObjective
from reslora.images.settings import parse_args

MODEL = ("--pretrained_model_name_or_path", "someone/model", "--resolution", "16", "--masked_loss")


def png(mode: str, colour, **save) -> bytes:
    file = BytesIO()
    PIL.Image.new(mode, (8, 4), colour).save(file, "PNG", **save)
    return file.getvalue()


def opened(image: bytes, mask: bytes = b"") -> tuple:
    """Return the color of an image's pixels, and their mask."""
    return tuple(found.getpixel((3, 2)) for found in open_masked(image, mask))


def test_the_alpha_channel_counts_and_leaves_the_colours_below_as_they_are():
    assert opened(png("RGBA", (255, 0, 0, 0))) == ((255, 0, 0), 0)
    assert opened(png("RGBA", (1, 2, 3, 100))) == ((1, 2, 3), 100)
    assert opened(png("LA", (7, 100))) == ((7, 7, 7), 100)
    assert opened(png("L", 100, transparency=100)) == ((100, 100, 100), 0)
    assert opened(png("RGB", (1, 2, 3))) == ((1, 2, 3), 255)


def test_a_mask_counts_before_the_alpha_channel_which_is_transparency_then():
    assert opened(png("RGBA", (255, 0, 0, 0)), png("L", 100)) == ((255, 255, 255), 100)
    assert opened(png("RGB", (1, 2, 3)), png("1", 0)) == ((1, 2, 3), 0)
    assert opened(png("RGB", (1, 2, 3)), png("RGB", "white")) == ((1, 2, 3), 255)


def test_what_is_black_counts_nothing_up_to_its_edge_whatever_the_scale():
    """Lanczos resampling would overshoot at the edge."""
    side = 8
    mask = PIL.Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 16, 0).astype(np.uint8))
    found = crop_mask(mask, (0.5, 0.5), False, Size(side, side))
    assert found.shape == (1, side, side)
    assert (found[..., : side // 2] == 0).all() and (found[..., side // 2 :] == 1).all()
    assert crop_mask(mask, (0.5, 0.5), True, Size(side, side)).equal(found.flip(2))


# -- folders and datasets --------------------------------------------------------------------------------------------


def add_masks(folder: Path, masks: dict[int, PIL.Image.Image]) -> Path:
    """Write masks, and their names into metadata.jsonl."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, mask in masks.items():
        mask.save(folder / f"mask-{number}.png")
        rows[number]["mask"] = f"mask-{number}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def red_of(number: int) -> PIL.Image.Image:
    """Return a mask that is the red channel of its image."""
    return random_image(number).getchannel("R")


def found_in(folder: Path, *flags: object) -> list:
    return load_folders(
        *parts(
            parse_args([*MODEL, "--train_data_dir", str(folder), *map(str, flags)]),
            "model",
            "data",
            "training",
            "output",
        ),
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images: with a mask, with an alpha channel, and with neither."""
    folder = add_masks(image_folder(tmp_path / "images", 3), {0: red_of(0)})
    image = random_image(1)
    image.putalpha(red_of(1))
    image.save(folder / "1.png")
    return folder


def check(images) -> None:
    """Check image and mask of each image."""
    for number, mask in enumerate([red_of(0), red_of(1), PIL.Image.new("L", random_image(2).size, 255)]):
        image, found = images.open_masked(number)
        assert image.tobytes() == random_image(number).tobytes() and found.tobytes() == mask.tobytes()


@pytest.mark.parametrize("layout", ["jsonl", "csv", "json", "parquet"])
def test_every_layout_with_columns_may_have_one_of_masks(layout, folder):
    rows, flags = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()], []
    if layout != "jsonl":
        (folder / "metadata.jsonl").unlink()
    if layout == "csv":
        lines = [",".join(row.get(name, "") for name in ("file_name", "text", "mask")) for row in rows]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text,mask", *lines]))
    if layout == "json":
        (folder / "table.json").write_text(json.dumps(rows))
        flags = ["--image_column", "file_name"]
    if layout == "parquet":
        files = {name: [row.get(name) and str(folder / row[name]) for row in rows] for name in ("file_name", "mask")}
        table = {"image": files["file_name"], "mask": files["mask"], "text": [row["text"] for row in rows]}
        image = datasets.Image()
        made = datasets.Dataset.from_dict(table).cast_column("image", image).cast_column("mask", image)
        made.to_parquet(folder / "0.parquet")
    (images,) = found_in(folder, *flags)
    check(images)
    assert images.masked == [True, True, False] and not images.notes


def test_a_mask_of_another_size_or_none_at_all_is_left_out_or_refused(folder, capsys):
    PIL.Image.new("L", (5, 4)).save(folder / "mask-0.png")
    (images,) = found_in(folder)
    assert len(images) == 2 and "its mask is 5 x 4, the image is 32 x 32" in images.left_out[0]
    (folder / "mask-0.png").unlink()
    assert "its mask: no such file" in found_in(folder)[0].left_out[0]
    assert "its mask: no such file" in refused(capsys, *MODEL, "--train_data_dir", folder, "--strict")


def test_a_mask_that_is_not_in_the_folder_is_refused(folder, capsys):
    rows = [{"file_name": "0.png", "text": "a", "mask": "../mask.png"}]
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
    line = refused(capsys, *MODEL, "--train_data_dir", folder)
    assert "metadata.jsonl line 1" in line and ("mask" in line or "outside" in line)


# -- with their images -----------------------------------------------------------------------------------------------


def test_masks_are_cropped_scaled_and_mirrored_as_their_images(tmp_path):
    """The mask is the image's red channel, so both can be compared."""
    folder = add_masks(image_folder(tmp_path / "images", 3), {number: red_of(number) for number in range(3)})
    words = ["--train_data_dir", str(folder), "--random_flip", "--image_interpolation_mode", "box", "--seed", "4"]
    flags = parse_args([*MODEL, *words, "--no-cache_text_embeddings", "--train_batch_size", "1"])
    (images,) = load_folders(flags.model, flags.data, flags.training, flags.output)
    size = Size(16, 24)
    variants = Variants(images, [size] * 3, flags.data, flags.training, FAMILY)
    for pixels, masks in ((variants[number][name] for name in ("pixels", "mask")) for number in range(3)):
        assert len(pixels) == len(masks) > 1 and len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
        torch.testing.assert_close(masks, (pixels[:, :1] + 1) / 2)
    source = Source(images, None, (0, 1, 2), (), (size,) * 3)
    objective = FlowObjective(FlowMatchEulerDiscreteScheduler())
    training_data = TrainingData((source,), {}, objective, {size: (4, 8, 12)}, FAMILY, **read_by(flags))
    for batch in training_loader(training_data, range(6), 1, 0, pin=False):
        assert batch.mask.shape == (1, 1, 16, 24)
        torch.testing.assert_close(batch.mask, (batch.pixels[:, :1] + 1) / 2)


@pytest.mark.exhaustive
def test_an_image_of_which_nothing_counts_is_left_out_or_refused(brief_flags, folder, capsys, tmp_path):
    PIL.Image.new("L", random_image(0).size).save(folder / "mask-0.png")
    flags = [*brief_flags, "--train_data_dir", folder, "--masked_loss", "--num_validation_images", 0, "--cache_latents"]
    lines = printed(*flags, "--output_dir", tmp_path / "out")
    only(lines, "left out", "0.png: its mask is black or transparent everywhere")
    only(lines, f"{folder}: 2 images, each once an epoch, weight 1; 1 of 2 is masked")
    line = refused(capsys, *flags, "--strict", "--output_dir", tmp_path / "strict", quiet=False)
    assert "--strict" in line and "0.png: its mask is black" in line


@pytest.mark.exhaustive
def test_kept_masks_train_what_fresh_ones_do(brief_flags, folder, tmp_path):
    """Cached at the size of the latents, or scaled to it in the step."""
    add = ["--train_data_dir", folder, "--center_crop", "--masked_loss"]
    add += ["--loss_type", "huber", "--max_train_steps", 2, "--validation_split", 0.3, "--num_validation_images", 0]
    lines = printed(*brief_flags, *add, "--output_dir", tmp_path / "kept")
    only(lines, f"{folder}: 2 images, each once an epoch, weight 1; 1 more held out; 2 of 3 are masked")
    assert main(*brief_flags, *add, "--no-cache_latents", "--output_dir", tmp_path / "fresh") == 0
    kept, fresh = ([row[2] for row in losses(tmp_path / name, "lora")] for name in ("kept", "fresh"))
    assert kept == pytest.approx(fresh, rel=1e-4) and len(kept) > 2
