"""A folder with metadata in subfolders, which the datasets library reads: no image is lost."""

from pathlib import Path

from pipelines import image_folder

from images.runs import load_images, parts, refused
from reslora.images.data.folders import load_folders
from reslora.images.settings import parse_args


def nested(folder: Path, layout: str, inner: str) -> Path:
    """Write two images into a folder with captions in `layout`, and two into a subfolder with captions in `inner`."""
    image_folder(folder, 2, layout=layout)
    image_folder(folder / "below", 2, layout=inner)
    return folder


def test_captions_beside_images_are_not_lost_to_metadata_below(tmp_path, capsys):
    """`datasets` reads the metadata in subfolders, and takes only the images that it lists."""
    folder, cache = nested(tmp_path / "p", "txt", "jsonl"), ("--cache_dir", str(tmp_path / "cache"))
    line = refused(capsys, "--train_data_dir", folder, *cache)
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
