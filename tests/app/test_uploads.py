"""app/uploads.py: which uploads are accepted, and that they reach the trainer unchanged."""

import contextlib
import errno
import shutil

import PIL.Image
import pytest
from images.runs import load_images

from app.folders import SETS, UPLOADS, Folders
from app.image_folders import add, options_of
from app.jobs import FEW, Entry, Jobs
from app.library import Library
from app.runs import RunError
from app.uploads import store_images


@pytest.fixture
def sent(tmp_path):
    """The folder of the files that a user uploads."""
    (tmp_path / "sent").mkdir()
    return tmp_path / "sent"


def image(path, colour="red"):
    PIL.Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


def test_what_is_uploaded_is_what_the_trainer_reads(sent, tmp_path):
    """In all formats, with captions as tools of Windows and kohya write them, of any length."""
    for name in ("a.png", "b.gif", "c.tif", "red_fox-1.JPG", "e.webp"):
        image(sent / name)
    long = "tag, " * 1000
    (sent / "a.txt").write_text("a café", encoding="utf-16")
    (sent / "b.txt").write_text(long, encoding="utf-8-sig")
    (sent / "c.caption").write_text("kohya's\r\nsecond line", newline="")
    uploads = [str(path) for path in sorted(sent.iterdir())]
    found = load_images(options_of().replace(train_data_dir=str(store_images(tmp_path / "new", uploads, ""))))
    captions = [["a café"], [long.strip()], ["kohya's\r\nsecond line"], ["e"], ["red fox 1"]]
    assert found.captions == captions and found.left_out == ()
    shown = Jobs(Library(tmp_path)).preview_images(None, uploads)
    assert len(shown) == 5 <= FEW


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("b.png", b"not an image", "b.png cannot be used (not an image)"),
        ("a.txt", "café".encode("latin-1"), "a.txt cannot be used (its caption is not UTF-8)"),
        ("A.txt", b"a fox", "A.txt cannot be used (a caption, but no image has its name)"),
        ("metadata.jsonl", b"{}", "metadata.jsonl cannot be used (neither an image nor a caption)"),
        ("a.caption", b"another", "Several files are named a"),
    ],
)
def test_what_would_be_lost_is_named(sent, tmp_path, name, content, line):
    image(sent / "a.png")
    (sent / "a.txt").write_text("a fox")
    (sent / name).write_bytes(content)
    with pytest.raises(RunError) as refusal:
        store_images(tmp_path / "new", [str(path) for path in sent.iterdir()], "")
    assert line in str(refusal.value) and "\n" not in str(refusal.value) and not (tmp_path / "new").exists()


def test_captions_of_one_name_from_two_folders_are_not_mixed_up(sent, tmp_path):
    uploads = []
    for number in "12":
        (sent / number).mkdir()
        (sent / number / "a.txt").write_text(number)
        uploads += [image(sent / number / "a.png"), str(sent / number / "a.txt")]
    for of_these in (uploads, uploads[:3]):
        with pytest.raises(RunError, match="Several files are named a"):
            store_images(tmp_path / "new", of_these, "")
    assert len(list(store_images(tmp_path / "new", uploads[::2], "mine").iterdir())) == 4
    with pytest.raises(RunError, match="None of the uploaded files is an image"):
        store_images(tmp_path / "new", uploads[1::2], "")


@pytest.fixture
def lined(tmp_path):
    """A queue that starts nothing."""
    (tmp_path / "runs").mkdir()
    queue = Jobs(Library(tmp_path / "runs"))
    queue.advance = lambda: None
    return queue


def again(queue: Jobs, name: str, uploads, caption: str = "words") -> str:
    """Return the image folder of a run that is started again because it never began."""
    with contextlib.suppress(RunError):
        queue.remove(name)
    return queue.add(Entry(name), uploads, caption).folder


def test_what_was_uploaded_before_is_never_replaced(lined, sent, tmp_path):
    """The same uploads give the same folder, other uploads another one; edits of the stored images are not lost."""
    kept, red, blue = tmp_path / "runs" / ".images", [image(sent / "a.png")], [image(sent / "b.png", "blue")]
    assert again(lined, "my", red) == "runs/my"
    before = {path.name: path.stat().st_mtime_ns for path in (kept / "my").iterdir()}
    assert again(lined, "my", red) == "runs/my"
    assert {path.name: path.stat().st_mtime_ns for path in (kept / "my").iterdir()} == before
    assert again(lined, "my", blue) == again(lined, "my", blue) == "runs/my-2"
    assert again(lined, "my", red, "other words") == "runs/my-3"
    (kept / "my" / "00000.txt").write_text("put in order")
    with pytest.raises(RunError, match="runs/my was changed"):
        again(lined, "my", red)
    assert again(lined, "my", blue) == "runs/my-2" and lined.add(Entry("new", folder="runs/my")).folder == "runs/my"
    assert (kept / "my" / "00000.txt").read_text() == "put in order"
    assert again(lined, "my", red, "third words") == "runs/my-4"
    assert sorted(path.name for path in kept.iterdir()) == ["my", "my-2", "my-3", "my-4"]


def test_a_full_disk_leaves_nothing_of_an_upload(lined, sent, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    uploads = [image(sent / "a.png"), image(sent / "b.png")]
    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
        patch.setattr(shutil, "copyfile", full)
        again(lined, "my", uploads)
    assert lined.entries() == [] and list((tmp_path / "runs" / ".images").iterdir()) == []
    assert again(lined, "my", uploads) == "runs/my"


def test_where_no_folder_can_be_made_it_is_said_in_a_line(lined, sent, tmp_path):
    for place in (SETS, UPLOADS):
        (tmp_path / "runs" / place).write_text("in its place")
    uploads = [image(sent / "a.png")]
    folders = Folders(tmp_path / "runs")
    for attempt in (lambda: add(folders, "mine", uploads, ""), lambda: again(lined, "my", uploads)):
        with pytest.raises(RunError, match=r"^The images cannot be stored \(.+\)\.$"):
            attempt()
