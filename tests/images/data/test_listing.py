"""Files that are skipped among images: hidden folders with copies and deleted images, and class images."""

from pathlib import Path

import pytest
from pipelines import image_folder

from images.runs import only, parts
from reslora.images.data.class_images import missing_class_images
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.folders import load_folders
from reslora.images.data.listing import TRASH
from reslora.images.settings import parse_args

HIDDEN = ("hidden image",)


def with_hidden(folder: Path, layout: str = "txt") -> Path:
    """Two images; two more with another caption in hidden folders, and one in the trash."""
    image_folder(folder, 2, layout=layout)
    for place, count in ((".ipynb_checkpoints", 1), (".Trash-1000/files", 1), (TRASH, 1)):
        image_folder(folder / place, count, lambda _: "OLD", layout="txt")
    return folder


def gather(folder: Path, *flags: str, caption: str | None = None) -> list[ImageDataset]:
    return load_folders(
        *parts(parse_args(["--train_data_dir", str(folder), *flags]), "model", "data", "training", "output"),
        caption,
    )


def test_hidden_copies_are_not_trained_on(tmp_path):
    (found,) = gather(with_hidden(tmp_path / "p", "txt"))
    assert found.captions == [["red disc"], ["blue box"]] and not found.left_out
    line = only(found.notes, *HIDDEN)
    assert line.startswith("2 ") and f"{tmp_path}/p/.Trash-1000/files/0.png" in line
    assert not [note for note in found.notes if "not listed" in note]


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (found,) = gather(with_hidden(tmp_path / "p") / ".Trash-1000")
    assert found.captions == [["OLD"]] and not found.notes


def missing_of_three(folder: Path) -> int:
    of_class = ["--class_data_dir", str(folder), "--class_prompt", "a disc", "--num_class_images", "3"]
    return missing_class_images(*parts(parse_args(of_class), "data", "output"))


def test_hidden_class_images_are_none(tmp_path):
    """There, all images have the same caption, whether or not they have a caption file."""
    folder = with_hidden(tmp_path / "p", "none")
    assert missing_of_three(folder) == 1
    (found,) = gather(folder, caption="a disc")
    assert found.captions == [["a disc"]] * 2 and only(found.notes, *HIDDEN).startswith("2 ")


def test_hidden_files_are_no_images(tmp_path):
    """On disks of other systems, macOS writes one next to each file, with an image's name, but it is no image."""
    folder = image_folder(tmp_path / "p", 2, layout="txt")
    for path in list(folder.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert missing_of_three(folder) == 1
    (found,) = gather(folder, "--strict", caption="a disc")
    assert len(found) == 2 and not found.left_out
    assert only(found.notes, *HIDDEN) == f"2 hidden images are not read (for example {folder}/._0.png)"


# -- class images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--class_data_dir", "--output_dir"])
@pytest.mark.parametrize(("named", "other"), [("../p", "{}/p/1_box"), ("../link", "{}/p/1_box")])
def test_folders_are_the_same_however_they_are_written(tmp_path, monkeypatch, flag, named, other):
    """With `..`, as an absolute path, and through links."""
    folder = image_folder(tmp_path / "p" / "2_red disc", 2, layout="none").parent
    image_folder(folder / "1_box", 1, layout="none")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "box").symlink_to(folder / "1_box")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prompt = ["--class_prompt", "a box"] if flag == "--class_data_dir" else []
    found = gather(Path(named.format(tmp_path)), flag, other.format(tmp_path), *prompt)
    assert [images.captions for images in found] == [[["red disc"]] * 2]
