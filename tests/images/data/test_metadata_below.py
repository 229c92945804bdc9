"""A folder with metadata in subfolders, which the datasets library reads: no image is lost."""

from pathlib import Path

import pytest
from pipelines import image_folder

from images.runs import load_images, parts, refused
from reslora.images.data.folders import load_folders
from reslora.images.settings import parse_args


def nested(folder: Path, layout: str, inner: str) -> Path:
    """Write two images into a folder with captions in `layout`, and two into a subfolder with captions in `inner`."""
    image_folder(folder, 2, layout=layout)
    image_folder(folder / "below", 2, layout=inner)
    return folder


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize("inner", ["jsonl", "csv"])
def test_captions_beside_images_are_not_lost_to_metadata_below(tmp_path, capsys, flag, inner):
    """`datasets` reads the metadata in subfolders, and takes only the images that it lists."""
    folder, cache = nested(tmp_path / "p", "txt", inner), ("--cache_dir", str(tmp_path / "cache"))
    line = refused(capsys, flag, folder, *cache)
    assert "2 images with caption files" in line and f"{folder}/0.png" in line and "one by one" in line
    (folder / "above").mkdir()
    for path in [*folder.glob("?.*")]:
        path.rename(folder / "above" / path.name)
    assert "one by one" in refused(capsys, "--train_data_dir", folder, *cache)
    both = ["--train_data_dir", str(folder / "above"), str(folder / "below")]
    assert [
        images.captions for images in load_folders(*parts(parse_args(both), "model", "data", "training", "output"))
    ] == [[["red disc"], ["blue box"]]] * 2


def test_images_that_metadata_below_does_not_list_are_counted(tmp_path):
    folder = nested(tmp_path / "p", "none", "jsonl")
    flags = ["--train_data_dir", str(folder), "--cache_dir", str(tmp_path / "cache")]
    found = load_images(parse_args(flags))
    assert len(found) == 2 and found.notes[0].startswith("2 images not read")


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    folder = nested(tmp_path / "photos [2024]", "none", "jsonl")
    found = load_images(parse_args(["--train_data_dir", str(folder), "--cache_dir", str(tmp_path / "cache")]))
    assert len(found) == 2


def test_metadata_of_two_kinds_below_is_refused_with_what_helps(tmp_path, capsys):
    folder = nested(tmp_path / "p" / "one", "jsonl", "csv").parent
    line = refused(capsys, "--train_data_dir", folder, "--cache_dir", tmp_path / "cache", quiet=False)
    assert str(folder) in line and "one by one" in line


def test_a_part_of_a_folder_is_read_without_a_word_of_the_rest(tmp_path):
    folder = nested(tmp_path / "p", "txt", "jsonl")
    part = ["--dataset_name", str(folder), "--train_data_dir", "below", "--cache_dir", str(tmp_path / "cache")]
    assert (
        len(found := load_images(parse_args(part))),
        found.notes,
    ) == (2, ())
