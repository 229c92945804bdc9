"""Captions by an image-text model: which images are captioned, which captions stay, and undo."""

import threading

import pytest
from images.test_captioning import blip
from pipelines import image_folder
from waiting import wait_until

from app.captioning import Captioning
from app.folders import BUNDLED
from app.image_edits import ImageEdits
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError


@pytest.fixture
def captioning(tmp_path):
    """Captioning of a folder `set` of six images, of which the first has no caption."""
    (tmp_path / "runs").mkdir()
    image_folder(tmp_path / "data" / "set", layout="txt")
    (tmp_path / "data" / "set" / "0.txt").unlink()
    return Captioning(ImageEdits(Jobs(Library(tmp_path / "runs"), tmp_path / "data")))


def captions(captioning, name="set") -> dict:
    return {image.name: image.captions for image in captioning.edits.look(name).images.values()}


def written(captioning, name="set", model="blip", **options) -> str:
    return list(captioning.write(name, model, "", "sks", **options))[-1][0]


@pytest.mark.exhaustive
def test_a_model_writes_the_captions_that_are_missing_and_all_of_them_when_asked(captioning, tmp_path):
    """In a metadata table, too; a change can be undone."""
    for part in blip():
        part.save_pretrained(tmp_path / "runs" / "models" / "blip")
    before = captions(captioning)
    assert written(captioning) == "set: 1 caption written."
    after = captions(captioning)
    assert after == before | {"0.png": after["0.png"]} and after["0.png"][0].startswith("sks ")
    with pytest.raises(RunError, match="Every image has a caption"):
        written(captioning)
    assert written(captioning, overwrite=True) == "set: 6 captions written."
    assert all(text.startswith("sks ") for (text,) in captions(captioning).values())
    captioning.edits.undo("set")
    assert captions(captioning) == after
    image_folder(tmp_path / "data" / "table")
    assert written(captioning, "table", overwrite=True) == "table: 6 captions written."
    assert all(text.startswith("sks ") for (text,) in captions(captioning, "table").values())
    with pytest.raises(RunError, match=r"^reslora-caption: .*owner/none"):
        written(captioning, overwrite=True, model="owner/none")


def test_only_listed_models_and_folders_that_may_change_are_captioned(captioning, monkeypatch):
    for model in ("", "/etc", "../models/blip", "blip", None):
        with pytest.raises(RunError, match="Give an image-text model"):
            written(captioning, model=model)
    with pytest.raises(RunError, match="bundled images cannot be changed"):
        written(captioning, BUNDLED, "owner/model", overwrite=True)
    monkeypatch.setattr(captioning, "run", lambda *_: iter([0]))
    other = captioning.write("set", "owner/model")
    next(other)
    with pytest.raises(RunError, match="Captions are being written"):
        written(captioning, model="owner/model")
    other.close()
    assert written(captioning, model="owner/model") == "set: 0 captions written. 1 image left as they were."


def test_what_is_written_is_stored_when_the_application_is_closed(captioning, monkeypatch, tmp_path):
    """But not over a caption that was written by hand in the meantime."""

    def run(images, options):
        for number in range(2):
            (images / f"{number:06d}.txt").write_text("sks dog")
        (tmp_path / "data" / "set" / "1.txt").write_text("mine")
        yield 2
        captioning.jobs.closed.wait(10)

    monkeypatch.setattr(captioning, "run", run)
    thread = threading.Thread(target=written, args=(captioning, "set", "owner/model"), kwargs={"overwrite": True})
    thread.start()
    wait_until(captioning.jobs.captioning.locked, "the captions")
    captioning.jobs.close()
    found = captions(captioning)
    assert (found["0.png"], found["1.png"]) == (("sks dog",), ("mine",))
    thread.join()
