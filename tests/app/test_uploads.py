"""app/uploads.py: which uploads are accepted, and that they reach the trainer unchanged."""

from pathlib import Path

import PIL.Image
import pytest
from images.runs import load_images

from app.folders import Folders
from app.image_folders import defaults
from app.runs import RunError
from app.uploads import store


@pytest.fixture
def sent(tmp_path):
    """The folder of the files that a user uploads."""
    (tmp_path / "sent").mkdir()
    return tmp_path / "sent"


def upload(sent, name=""):
    """Return the stored folder and the names of the other files."""
    files = [(path.name, path) for path in sorted(sent.rglob("*")) if path.is_file()]
    return store(Folders(sent.parent / "runs"), name, files)


def image(path: Path, color="red") -> None:
    PIL.Image.new("RGB", (8, 8), color).save(path)


def test_names_and_captions_of_uploads_are_kept_and_no_caption_is_invented(sent):
    for name in ("a cat.png", "red_fox-1.JPG", "c.tif"):
        image(sent / name)
    (sent / "a cat.txt").write_text("a café", encoding="utf-16")
    (sent / "c.caption").write_text("kohya's\r\nsecond line", newline="")
    for other in (".DS_Store", "notes.txt"):
        (sent / other).write_text("other")
    folder, others = upload(sent)
    assert folder.name == "uploads/images-1" and others == [".DS_Store", "notes.txt"]
    stored = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    assert stored == {path.name: path.read_bytes() for path in sent.iterdir() if path.name not in others}
    found = load_images(defaults().replace(train_data_dir=str(folder.path)))
    assert found.captions == [["a café"], ["kohya's\r\nsecond line"]] and "no caption" in found.left_out[0]
    assert upload(sent)[0].name == "uploads/images-2"


def test_a_table_of_captions_is_stored_too(sent):
    image(sent / "a.png")
    (sent / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    folder, _ = upload(sent, "mine")
    assert load_images(defaults().replace(train_data_dir=str(folder.path))).captions == [["red"]]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("b.png", b"not an image", r"b\.png \(not an image\)"),
        ("b.png", None, r"b\.png \(damaged \(.*truncated"),
        ("a.txt", "café".encode("latin-1"), r"a\.txt \(its caption is not UTF-8\)"),
        ("more/a.png", b"", r"a\.png \(several files have this name\)"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_stored(sent, name, content, line):
    PIL.Image.effect_noise((64, 64), 100).save(sent / "a.png")
    (sent / name).parent.mkdir(exist_ok=True)
    (sent / name).write_bytes((sent / "a.png").read_bytes()[:-60] if content is None else content)
    with pytest.raises(RunError, match=line):
        upload(sent, "mine")
    assert list(Folders(sent.parent / "runs").all()) == ["bundled images"]


def test_an_upload_replaces_nothing_and_needs_a_valid_name_and_an_image(sent):
    (sent / "a.txt").write_text("a fox")
    with pytest.raises(RunError, match="None of these files is an image"):
        upload(sent)
    image(sent / "a.png")
    upload(sent, "mine")
    for name in ("mine", "../x", ".hidden"):
        with pytest.raises(RunError, match="folder"):
            upload(sent, name)
