"""Captions by an image-text model: which images are captioned, which captions stay, and undo."""

import json
import shutil

import pytest
from images.test_captioning import blip
from pipelines import image_folder

from app.captioning import Captioning
from app.folders import BUNDLED
from app.image_edits import ImageEdits
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError


@pytest.fixture
def captioning(tmp_path):
    """Captioning of a folder `set` of six images, of which one has no caption."""
    (tmp_path / "runs").mkdir()
    image_folder(tmp_path / "data" / "set", layout="txt")
    min((tmp_path / "data" / "set").glob("*.txt")).unlink()
    library = Library(tmp_path / "runs")
    return Captioning(ImageEdits(Jobs(library, tmp_path / "data")))


def captions(captioning, name="set") -> dict:
    return {image.name: image.captions for image in captioning.edits.look(name).images.values()}


def written(captioning, name="set", overwrite=False, model="blip") -> str:
    job = captioning.start(captioning.edits.look(name), model, "", "sks", overwrite)
    for _ in captioning.follow(job):
        pass
    return job.line


@pytest.mark.exhaustive
def test_a_model_writes_the_captions_that_are_missing_and_all_of_them_when_asked(captioning, tmp_path):
    """In a metadata table, too; both changes can be undone."""
    for part in blip():
        part.save_pretrained(tmp_path / "runs" / "models" / "blip")
    before = captions(captioning)
    assert written(captioning) == "set: 1 caption written."
    after = captions(captioning)
    changed = [name for name in before if before[name] != after[name]]
    assert [before[name] for name in changed] == [None] and after[changed[0]][0].startswith("sks ")
    with pytest.raises(RunError, match="Every image has a caption"):
        written(captioning)
    assert written(captioning, overwrite=True) == "set: 6 captions written."
    assert all(text.startswith("sks ") for (text,) in captions(captioning).values())
    for expected in (after, before):
        captioning.edits.undo(captioning.edits.look("set"))
        assert captions(captioning) == expected
    folder = image_folder(tmp_path / "data" / "table")
    assert written(captioning, "table", overwrite=True) == "table: 6 captions written."
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["text"].startswith("sks ") for row in rows)
    with pytest.raises(RunError, match=r"^reslora-caption: .*owner/none"):
        written(captioning, overwrite=True, model="owner/none")


def test_only_listed_models_and_folders_that_may_change_are_captioned(captioning, monkeypatch):
    images = captioning.edits.look("set")
    for model in ("", "/etc", "../models/blip", "blip", None, 7):
        with pytest.raises(RunError, match="Give an image-text model"):
            captioning.start(images, model, "", "", False)
    with pytest.raises(RunError, match="bundled images cannot be changed"):
        captioning.start(captioning.edits.look(BUNDLED), "owner/model", "", "", True)
    with pytest.raises(RunError, match="by true or false"):
        captioning.start(images, "owner/model", "", "", "false")
    monkeypatch.setattr(captioning, "work", lambda *_: None)  # it goes on
    captioning.start(images, "owner/model", "--prefix", "", False)
    with pytest.raises(RunError, match="captions of set are being written"):
        captioning.start(images, "owner/model", "", "", False)
    assert "stored" in captioning.stop() and captioning.job.stopped


def test_captions_are_stored_where_two_images_share_a_file_and_no_file_is_met_that_cannot_be(captioning, monkeypatch):
    """All captions are stored or none: what keeps one from being stored is found before the model is loaded."""

    def caption(job, folder, words) -> str:
        for link in list((folder / "images").iterdir()):
            link.with_suffix(".txt").write_text(f"sks {link.stem}")
        return ""

    monkeypatch.setattr(captioning, "caption", caption)
    folder, (first, *_) = captioning.edits.look("set").folder.path, sorted(captions(captioning))
    shutil.copy(folder / first, (folder / first).with_suffix(".webp"))
    assert written(captioning, model="owner/model") == "set: 1 caption written."
    assert captions(captioning)[first] == captions(captioning)[f"{(folder / first).stem}.webp"] == ("sks 000000",)
    assert written(captioning, overwrite=True, model="owner/model") == "set: 6 captions written."
    (folder / first).with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(RunError, match=f"^{(folder / first).stem}.txt: its caption is not UTF-8; correct this file"):
        written(captioning, overwrite=True, model="owner/model")


def test_what_is_written_is_stored_when_the_application_is_closed(captioning, monkeypatch):
    def caption(job, folder, words) -> str:
        (folder / "images" / "000000.txt").write_text("sks dog")
        captioning.jobs.closed.wait(10)
        return "terminated"

    monkeypatch.setattr(captioning, "caption", caption)
    captioning.start(captioning.edits.look("set"), "owner/model", "", "", False)
    captioning.jobs.close()
    assert ("sks dog",) in captions(captioning).values()
