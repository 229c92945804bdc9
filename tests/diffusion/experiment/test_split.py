"""The three parts of the images: by content alone, near-duplicates together."""

import io
import random
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
from pipelines import image_folder, random_image

from reslora.common.errors import InvalidArgument
from reslora.diffusion.content import content_mark
from reslora.diffusion.data.dataset import FEATURES, ImageDataset
from reslora.diffusion.experiment.split import groups_of, parts_of, perceptual_hash
from reslora.experiment.parts import cut

SHARES = SimpleNamespace(select_split=0.2, test_split=0.3, dataset_name=None, train_data_dir="images")


def picture(number: int) -> PIL.Image.Image:
    """Smooth colours, as a photograph has, 96 x 80."""
    colours = np.random.default_rng(number).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colours).resize((96, 80), PIL.Image.Resampling.BICUBIC)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def dataset(contents: list[bytes]) -> ImageDataset:
    """Images by their content."""
    rows = {"image": [{"path": None, "bytes": content} for content in contents], "captions": [["a"]] * len(contents)}
    return ImageDataset(datasets.Dataset.from_dict(rows, features=FEATURES), [["a"]] * len(contents),
                        marks=[content_mark(content) for content in contents])  # fmt: skip


def parts(contents: list[bytes]) -> dict[bytes, str]:
    """Which part each content is in."""
    found = parts_of({0: dataset(contents)}, SHARES)
    named = {"train": found.train, "select": found.select, "test": found.test}
    return {contents[image]: name for name, part in named.items() for _, image in part}


def test_an_image_that_is_added_or_moved_moves_no_other():
    contents = [encoded(picture(number)) for number in range(40)]
    before = parts(contents[:30])
    assert set(before.values()) == {"train", "select", "test"} and len(before) == 30
    random.Random(0).shuffle(contents)
    after = parts(contents)
    assert len(after) == 40 and {content: after[content] for content in before} == before


def test_parts_have_about_their_shares():
    train, select, test = cut([str(number) for number in range(2000)], 0.2, 0.3)
    assert sorted(train + select + test) == list(range(2000))
    assert abs(len(select) - 400) < 60 and abs(len(test) - 600) < 60


@pytest.mark.parametrize("count", [3, 4, 5])
def test_each_part_has_an_image(count):
    for start in range(30):
        found = cut([f"{start} {number}" for number in range(count)], 0.49, 0.5)
        assert all(found) and sum(map(len, found)) == count


def test_near_duplicates_are_together_and_tested_once():
    """As JPEG, scaled, brighter; and the file itself once more."""
    image = picture(0)
    copies = [encoded(image), encoded(image, "JPEG", quality=60), encoded(image.resize((144, 120))), encoded(image)]
    copies.append(encoded(image.point(lambda value: value * 0.9 + 10)))
    contents = copies + [encoded(picture(number)) for number in range(1, 12)]
    images = dataset(contents)
    found = parts_of({0: images}, SHARES)
    assert found.duplicates == 3  # and the file itself
    named = {"train": found.train, "select": found.select, "test": found.test}
    of_copies = {name: [number for _, number in part if number < 5] for name, part in named.items()}
    (part,) = [name for name, numbers in of_copies.items() if numbers]
    assert len(of_copies[part]) == (5 if part == "train" else 4)  # the file once


def test_duplicates_of_duplicates_are_together():
    hashes = np.zeros((4, 384), bool)
    hashes[1, :12] = hashes[2, :24] = True  # the last is 24 away from the first, and 12 from the one between
    hashes[3, :100] = True
    assert groups_of(["a", "b", "c", "d"], hashes) == [[0, 1, 2], [3]]
    assert groups_of(["a", "b", "c", "a"], hashes) == [[0, 1, 2, 3]]


def test_other_images_are_no_duplicates():
    hashes = np.stack([perceptual_hash(picture(number)) for number in range(60)])
    assert len(groups_of([str(number) for number in range(60)], hashes)) == 60
    noise = np.stack([perceptual_hash(random_image(number).resize((64, 64))) for number in range(20)])
    assert len(groups_of([str(number) for number in range(20)], noise)) == 20


def test_too_few_images_are_refused_in_one_line():
    image = picture(0)
    with pytest.raises(InvalidArgument, match="--train_data_dir images: 2 images but for near-duplicates") as error:
        parts([encoded(image), encoded(image, "JPEG"), encoded(picture(1))])
    assert "\n" not in str(error.value)


def test_an_image_that_cannot_be_opened_is_named(tmp_path):
    image_folder(tmp_path / "images", count=3)
    contents = [encoded(picture(0)), encoded(picture(1)), encoded(picture(2))[:200]]
    with pytest.raises(InvalidArgument, match=r"--train_data_dir images, image 2: .+; repair or remove it"):
        parts(contents)
