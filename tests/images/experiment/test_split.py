"""The three parts of the images: assigned by content, with near-duplicates in the same part."""

import dataclasses
import io
import random
import re
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from pipelines import random_image

from images.runs import parts
from reslora.content_hash import content_mark
from reslora.errors import InvalidArgument
from reslora.experiment.hashed_split import cut, too_few
from reslora.images.data.dataset import FEATURES, ImageDataset, sample, usable
from reslora.images.experiment import split
from reslora.images.experiment.split import BITS, features_of, groups_of, parts_of
from reslora.options.images import Options

SHARES = Options.of(select_split=0.2, test_split=0.3, max_validation_images=64, train_data_dir="images")


def picture(number: int) -> PIL.Image.Image:
    """Return smooth colors, as in a photograph, 96 x 80."""
    colours = np.random.default_rng(number).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colours).resize((96, 80), PIL.Image.Resampling.BICUBIC)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def dataset(contents: list[bytes]) -> ImageDataset:
    """Return a dataset of images by their content."""
    rows = {"image": [{"path": None, "bytes": content} for content in contents], "captions": [["a"]] * len(contents)}
    return ImageDataset(datasets.Dataset.from_dict(rows, features=FEATURES), [["a"]] * len(contents),
                        marks=[content_mark(content) for content in contents])  # fmt: skip


def parts_by_content(contents: list[bytes]) -> dict[bytes, str]:
    """Return the part of each content."""
    found = parts_of({0: dataset(contents)}, SHARES.data, SHARES.validation, SHARES.experiment)
    named = {"train": found.train, "select": found.select, "test": found.test}
    return {contents[image]: name for name, part in named.items() for _, image in part}


def test_an_image_that_is_added_or_moved_moves_no_other():
    contents = [encoded(picture(number)) for number in range(40)]
    before = parts_by_content(contents[:30])
    assert set(before.values()) == {"train", "select", "test"} and len(before) == 30
    random.Random(0).shuffle(contents)
    after = parts_by_content(contents)
    assert len(after) == 40 and {content: after[content] for content in before} == before


def test_parts_have_about_their_shares():
    train, select, test = cut([str(number) for number in range(2000)], 0.2, 0.3)
    assert sorted(train + select + test) == list(range(2000))
    assert abs(len(select) - 400) < 60 and abs(len(test) - 600) < 60


def test_each_part_has_an_image():
    for start in range(30):
        found = cut([f"{start} {number}" for number in range(3)], 0.49, 0.5)
        assert all(found) and sum(map(len, found)) == 3


def test_too_few_to_compare_by_are_said_with_the_share_that_takes_enough():
    """The hash decides how many images a fraction gives, which the advice takes into account."""
    contents = [encoded(picture(number)) for number in range(40)]
    for tested, fix in ((1, "1 image compares: .*, or with"), (5, "5 images compare: .*, or with")):
        enough = parts_of({0: dataset(contents)}, SHARES.data, SHARES.validation, SHARES.experiment).enough
        (line,) = too_few(tested, "image", enough)
        assert re.search(f"^only {fix} --test_split {enough:g}$", line)
    found = parts_of(
        {0: dataset(contents)},
        *parts(SHARES.replace(test_split=enough), "data", "validation", "experiment"),
    )
    assert 10 <= len(found.test) <= 11 and too_few(6, "image", enough) == []
    few = parts_of({0: dataset(contents[:10])}, SHARES.data, SHARES.validation, SHARES.experiment)
    assert too_few(2, "image", few.enough)[0].endswith("begin anew with more images")


def test_near_duplicates_are_together_and_tested_once():
    """As JPEG, scaled, brighter; and the same file again."""
    image = picture(0)
    copies = [encoded(image), encoded(image, "JPEG", quality=60), encoded(image.resize((144, 120))), encoded(image)]
    copies.append(encoded(image.point(lambda value: value * 0.9 + 10)))
    contents = copies + [encoded(picture(number)) for number in range(1, 12)]
    images = dataset(contents)
    found = parts_of({0: images}, SHARES.data, SHARES.validation, SHARES.experiment)
    assert found.duplicates == 3  # and the file itself
    named = {"train": found.train, "select": found.select, "test": found.test}
    of_copies = {name: [number for _, number in part if number < 5] for name, part in named.items()}
    (part,) = [name for name, numbers in of_copies.items() if numbers]
    assert len(of_copies[part]) == (5 if part == "train" else 1)


def test_duplicates_of_duplicates_are_together(monkeypatch):
    """However many images are compared at a time."""
    monkeypatch.setattr(split, "AT_ONCE", 2)
    looks = np.zeros((4, BITS + 192), np.float32)
    looks[1, :12] = looks[2, :24] = 1  # the last is 24 away from the first, and 12 from the one between
    looks[3, :100] = 1
    assert groups_of(["a", "b", "c", "d"], looks) == [[0, 1, 2], [3]]
    assert groups_of(["a", "b", "c", "a"], looks) == [[0, 1, 2, 3]]


def groups(images: list[PIL.Image.Image]) -> list[list[int]]:
    """Return groups of images that all have different content."""
    return groups_of([str(number) for number in range(len(images))], np.stack(list(map(features_of, images))))


def icon(number: int) -> PIL.Image.Image:
    """Return a small shape on a white ground: one of three, in one of eight colors."""
    image, colour = PIL.Image.new("RGB", (256, 256), "white"), tuple(255 * (number // 3 >> k & 1) for k in range(3))
    pen, box = PIL.ImageDraw.Draw(image), (98, 98, 158, 158)
    if number % 3 == 0:
        pen.ellipse(box, fill=colour)
    elif number % 3 == 1:
        pen.line([(98, 128), (158, 128)], fill=colour, width=12)
    else:
        pen.polygon([(128, 98), (158, 158), (98, 158)], fill=colour)
    return image


def test_other_images_are_no_duplicates():
    assert len(groups([picture(number) for number in range(60)])) == 60
    assert len(groups([random_image(number).resize((64, 64)) for number in range(20)])) == 20


@pytest.mark.parametrize("drawn", [picture, icon])
def test_copies_are_found_whatever_is_drawn(drawn):
    """As JPEG, scaled, darker, with less contrast, and cropped by a hundredth at each side."""
    image = drawn(0)
    width, height = image.size
    copies = [
        PIL.Image.open(io.BytesIO(encoded(image, "JPEG", quality=60))).convert("RGB"),
        image.resize((width * 3 // 2, height * 3 // 2)),
        image.resize((width // 2, height // 2)),
        image.point(lambda value: value * 0.9 + 10),
        image.point(lambda value: value - 10),
        image.crop((width // 100, height // 100, width - width // 100, height - height // 100)),
    ]
    assert [len(groups([image, copy])) for copy in copies] == [1] * len(copies)


def test_one_of_several_that_look_alike_chooses_or_compares():
    """The one with the lowest hash; none of them if others are trained on."""
    contents = [
        encoded(picture(number), "JPEG", quality=quality) for number in range(30) for quality in (60, 70, 80, 90)
    ]
    found = parts_of({0: dataset(contents)}, SHARES.data, SHARES.validation, SHARES.experiment)
    marks = list(map(content_mark, contents))
    for part in (found.select, found.test):
        assert part and len({image // 4 for _, image in part}) == len(part)
        assert all(marks[image] == min(marks[image // 4 * 4 : image // 4 * 4 + 4]) for _, image in part)
    assert len(found.train) == 4 * (30 - len(found.select) - len(found.test)) and found.duplicates == 90


def test_too_few_images_are_refused_in_one_line():
    image = picture(0)
    with pytest.raises(InvalidArgument, match="images: only 2 images without near-duplicates") as error:
        parts_by_content([encoded(image), encoded(picture(1)), encoded(image, "JPEG")])
    assert "\n" not in str(error.value) and "(image 0 and image 2 look alike)" in str(error.value)


def in_groups(names: list[str], near_duplicate: bool = False) -> tuple[ImageDataset, split.Parts]:
    """Return images with these groups, and their parts. The last image may resemble the first one."""
    contents = [encoded(picture(number)) for number in range(len(names))]
    if near_duplicate:
        contents[-1] = encoded(picture(0), "JPEG")
    images = dataclasses.replace(dataset(contents), groups=names)
    return images, parts_of({0: images}, SHARES.data, SHARES.validation, SHARES.experiment)


def test_images_of_a_group_are_in_one_part_and_all_of_them_are_tested():
    names = [f"day {number // 4}" for number in range(48)]
    images, found = in_groups(names)
    parts = [{names[number] for _, number in part} for part in (found.train, found.select, found.test)]
    assert all(parts) and len(set.union(*parts)) == sum(map(len, parts)) == 12
    assert found.groups == tuple(names[number] for _, number in found.test) and len(found.test) == 4 * len(parts[2])
    assert f"{len(found.test)} in the test split in {len(parts[2])} groups" in str(found)
    without = dataclasses.replace(found, groups=())
    assert split.content_of(found, {0: images}) != split.content_of(without, {0: images})


def test_groups_that_share_a_near_duplicate_are_one_group():
    names = [f"day {number // 4}" for number in range(48)]
    _, found = in_groups(names, near_duplicate=True)
    (part,) = (part for part in (found.train, found.select, found.test) if (0, 0) in part or (0, 47) in part)
    assert {names[number] for _, number in part} >= {"day 0", "day 11"}


def test_a_folder_is_a_group(tmp_path):
    for number in range(12):
        folder = tmp_path / f"session {number // 2}"
        folder.mkdir(exist_ok=True)
        picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture")
    options = SHARES.replace(train_data_dir=str(tmp_path), test_groups="folder")
    images = usable(options.model, options.data, options.training, options.output)
    (images,) = sample([images], options.data, options.training)
    found = parts_of({0: images}, *parts(options, "data", "validation", "experiment"))
    assert all(name.startswith(str(tmp_path / "session")) for name in found.groups) and len(found.test) % 2 == 0
    order = split.order_of({0: images}, [(0, number) for number in range(12)])
    assert [Path(images.name(number)).stem for number in order] == [str(number) for number in range(12)]


def test_groups_that_cannot_be_used_are_refused_in_one_line():
    with pytest.raises(InvalidArgument, match="only 2 groups of images, and training") as error:
        in_groups(["a", "b"] * 6)
    assert "\n" not in str(error.value)
    images = dataset([encoded(picture(number)) for number in range(6)])
    grouped = dataclasses.replace(dataset([encoded(picture(number)) for number in range(6, 12)]), groups=["a"] * 6)
    with pytest.raises(InvalidArgument, match="only some folders of images have a column group"):
        parts_of({0: images, 1: grouped}, SHARES.data, SHARES.validation, SHARES.experiment)
    with pytest.raises(InvalidArgument, match="--test_groups folder: the images are not files"):
        parts_of({0: images}, *parts(SHARES.replace(test_groups="folder"), "data", "validation", "experiment"))
