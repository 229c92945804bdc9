"""Which image folders are shown, what the trainer reads in them, and edits with undo."""

import json
import os
import shutil
from types import SimpleNamespace

import PIL.Image
import pytest
from app_runs import HOSTILE
from images.runs import load_images
from pipelines import image_folder

from app import image_edits
from app.folders import BUNDLED
from app.image_edits import (
    ADD_TAG,
    AFTER,
    ALIKE,
    BEFORE,
    LEFT_OUT,
    REMOVE_TAG,
    REPLACE,
    WITHOUT_CAPTION,
    ImageEdits,
)
from app.image_folders import defaults
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError
from app.tabs.dataset import DatasetTab
from reslora.images.data.listing import TRASH


@pytest.fixture
def edits(tmp_path):
    """Edits of a data folder with a folder `set` of six images."""
    (tmp_path / "runs").mkdir()
    image_folder(tmp_path / "data" / "set", layout="txt")
    return ImageEdits(Jobs(Library(tmp_path / "runs"), tmp_path / "data"))


@pytest.fixture
def folder(edits, tmp_path):
    return tmp_path / "data" / "set"


def trained(folder, **flags):
    """Return the images as the trainer reads them."""
    return load_images(defaults().replace(train_data_dir=str(folder), **flags))


def summary(edits) -> str:
    images = edits.look("set")
    return DatasetTab.summary(SimpleNamespace(edits=edits), images, len(images.images))


def files_of(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_only_folders_on_the_list_are_shown(edits, tmp_path):
    (tmp_path / "data" / "out").symlink_to("/etc")
    (tmp_path / "data" / ".hidden").mkdir()
    (tmp_path / "data" / os.fsdecode(b"caf\xe9")).mkdir()  # a browser cannot receive this name
    image_folder(tmp_path / "runs" / ".images" / "old")
    assert list(edits.folders.all()) == [".", "set", "runs/old", BUNDLED]
    for name in (*HOSTILE, "out", ".hidden", "set/..", "runs/.."):
        if name != ".":
            with pytest.raises(RunError):
                edits.look(name)


def test_what_is_left_out_and_why_is_what_the_trainer_says(edits, folder):
    (folder / "1.png").write_bytes(b"nothing")
    (folder / "2.txt").unlink()
    (folder / "3.txt").write_bytes(b"\xff\xfe\xff")
    images, loaded = edits.look("set"), trained(folder)
    assert {name: image.problem for name, image in images.images.items() if image.problem} == {
        line.split(": ", 1)[0].removeprefix(f"{folder}/"): line.split(": ", 1)[1] for line in loaded.left_out
    }
    used = [image for image in images.images.values() if not image.problem]
    assert [list(image.captions) for image in used] == loaded.captions
    assert [image.size for image in used] == list(loaded.sizes)
    assert [image.name for image in edits.shown(images, LEFT_OUT)] == ["1.png", "2.png", "3.png"]
    assert [image.name for image in edits.shown(images, WITHOUT_CAPTION)] == ["2.png", "3.png"]
    with pytest.raises(RunError, match=r"3\.txt: its caption is not UTF-8"):
        edits.save_caption("set", "3.png", "", "x")


def test_images_without_captions_are_a_sentence_without_options_of_the_command_line(edits, folder):
    for text in folder.glob("*.txt"):
        text.unlink()
    assert "6 images have no caption" in summary(edits) and "--" not in summary(edits)
    (folder / "0.png").rename(folder / "<script>.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "<script>.png", "text": 1}')
    assert "<script>" not in summary(edits)


def test_a_truncated_image_is_called_damaged_also_if_it_has_no_caption(edits, folder):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-30])
    (folder / "3.txt").unlink()
    images = edits.look("set")
    list(edits.looks.check(list(images.images.values())))
    assert edits.looks.problem(images.images["3.png"]).startswith("damaged (") and "no caption:" not in summary(edits)


def test_folders_mean_what_they_mean_to_the_trainer(edits, folder):
    shutil.copytree(folder, folder / ".ipynb_checkpoints")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two"]}))
    images, loaded = edits.look("set"), trained(folder)
    assert [list(image.captions) for image in images.images.values() if not image.problem] == loaded.captions
    assert images.notes == [note.replace(f"{folder}/", "") for note in loaded.notes]


def test_an_image_in_one_of_kohyas_folders_has_the_folders_caption(edits, folder):
    (folder / "5.txt").unlink()
    folder.rename(folder.parent / "3_sks fox")
    folder.mkdir()
    (folder.parent / "3_sks fox").rename(folder / "3_sks fox")
    assert edits.look("set").images["3_sks fox/5.png"].captions == ("sks fox",)
    edits.change_captions("set", ["3_sks fox/5.png"], AFTER, ", red")
    assert trained(folder / "3_sks fox").captions[5] == ["sks fox, red"]


def test_a_table_that_cannot_be_read_is_named_and_its_captions_stay(edits, folder, tmp_path):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"')
    images = edits.look("set")
    assert "line 1: is not JSON" in images.refused and str(tmp_path) not in images.refused
    assert "--" not in images.refused and len(images.images) == 6
    with pytest.raises(RunError, match="line 1: is not JSON"):
        edits.change_captions("set", ["0.png"], ADD_TAG, "x")


def test_masks_and_reference_images_are_shown_and_removed_with_their_images(edits, folder):
    (folder / "before").mkdir()
    for name in ("mask.png", "before/0.png", "before/shared.png"):
        PIL.Image.new("RGB", (640, 1280), "red").save(folder / name)
    pairs = {0: "before/0.png", 1: "before/shared.png", 2: "before/shared.png", 3: "4.png"}
    rows = [{"file_name": f"{n}.png", "text": "a", "conditioning_image": pairs.get(n)} for n in range(6)]
    rows[0]["mask"] = "mask.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before, images = files_of(folder), edits.look("set")
    assert list(images.images) == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png"]
    list(edits.looks.check([images.images["0.png"]]))
    _, reference = edits.looks.of(images.images["0.png"]).pictures
    with PIL.Image.open(reference) as large:
        assert large.size == (512, 1024)
    edits.throw_away("set", ["0.png", "1.png"])
    assert {path.name for path in folder.rglob("*.png") if TRASH not in str(path)} == {
        "2.png", "3.png", "4.png", "5.png", "shared.png",
    }  # fmt: skip
    edits.undo("set")
    assert files_of(folder) == before


def test_damaged_images_and_duplicates_are_marked_once_all_are_opened(edits, folder):
    patches = PIL.Image.effect_noise((4, 4), 100).convert("RGB").resize((200, 200), PIL.Image.Resampling.NEAREST)
    patches.save(folder / "a.png")
    shutil.copy(folder / "a.png", folder / "copy.png")
    patches.resize((90, 90)).save(folder / "near.jpg", quality=90)
    content = (folder / "a.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    for name in ("a", "copy", "near", "half"):
        (folder / f"{name}.txt").write_text(name)
    images = edits.look("set")
    assert edits.looks.alike(images) == {} and not edits.shown(images, LEFT_OUT)
    assert "opens every image" in summary(edits)
    assert list(edits.looks.check(list(images.images.values())))[-1] == 10
    assert {name: line for name, (_, line) in edits.looks.alike(images).items()} == {
        "copy.png": "the same image as a.png", "near.jpg": "looks like a.png",
    }  # fmt: skip
    assert [image.name for image in edits.shown(images, ALIKE)] == ["a.png", "copy.png", "near.jpg"]
    (damaged,) = edits.shown(images, LEFT_OUT)
    assert damaged.name == "half.png" and edits.looks.problem(damaged).startswith("damaged (")
    shutil.copy(folder / "a.png", folder / "half.png")
    assert edits.looks.problem(edits.look("set").images["half.png"]) == ""


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "text", "other", "before", "after"),
    [
        (REPLACE, "red", "blue {1}", "a red, red fox", "a blue {1}, blue {1} fox"),
        (BEFORE, "sks, ", "", "a fox", "sks, a fox"),
        (AFTER, ", 4k", "", "a fox", "a fox, 4k"),
        (ADD_TAG, "4k, a fox", "", "a fox,hill", "a fox,hill, 4k"),
        (REMOVE_TAG, "hill, a fox", "", "a fox, 4k, hill", "4k"),
    ],
)
def test_captions_are_changed_and_changed_back(edits, folder, operation, text, other, before, after):
    (folder / "2.txt").write_text(before)
    captions = trained(folder).captions
    edits.change_captions("set", ["2.png"], operation, text, other)
    assert trained(folder).captions == [*captions[:2], [after], *captions[3:]]
    assert edits.undo("set") == f"Undone: {operation.lower()}, 1 caption."
    assert trained(folder).captions == captions


def test_edits_that_make_no_sense_are_refused(edits):
    for change, line in (
        (lambda: edits.change_captions("set", ["0.png"], BEFORE, " "), "enter words or a tag first"),
        (lambda: edits.change_captions("set", [], BEFORE, "x"), "Select images first"),
        (lambda: edits.change_captions("set", ["9.png"], BEFORE, "x"), r"9\.png is no longer in this folder"),
        (lambda: edits.change_captions(BUNDLED, ["0.png"], BEFORE, "x"), "bundled images cannot be changed"),
    ):
        with pytest.raises(RunError, match=line):
            change()


def test_one_caption_is_saved_only_over_what_was_seen(edits, folder):
    (folder / "0.txt").write_bytes(b"one\r\ntwo\rthree")  # a browser has one kind of line ends
    assert edits.save_caption("set", "0.png", "one\ntwo\nthree", " a\nb ") == "a\nb"
    with pytest.raises(RunError, match="Its caption is now"):
        edits.save_caption("set", "0.png", "one\ntwo\nthree", "late")
    assert (folder / "0.txt").read_text() == "a\nb"
    edits.undo("set")
    assert (folder / "0.txt").read_bytes() == b"one\r\ntwo\rthree"
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two"]}))
    assert edits.save_caption("set", "0.png", "one\n\ntwo", "one\n\n\n three") == "one\n\nthree"
    assert trained(folder).captions == [["one", "three"]]


def test_undo_takes_back_the_last_change_and_no_later_edit_of_another_program(edits, folder):
    before = files_of(folder)
    edits.change_captions("set", ["0.png", "1.png"], ADD_TAG, "x")
    edits.undo("set")
    assert files_of(folder) == before and edits.undo("set") == "There is nothing to undo."
    edits.change_captions("set", ["0.png", "1.png"], ADD_TAG, "z")
    (folder / "1.txt").write_text("theirs")
    with pytest.raises(RunError, match="was changed later"):
        edits.undo("set")
    assert trained(folder).captions[:2] == [["red disc, z"], ["theirs"]]


def test_a_disk_that_fails_half_way_leaves_all_captions_as_they_were(edits, folder, monkeypatch):
    before, put = files_of(folder), image_edits.put

    def failing(path, content):
        if path.name == "3.txt":
            raise OSError(28, "No space left on device")
        put(path, content)

    monkeypatch.setattr(image_edits, "put", failing)
    with pytest.raises(RunError, match="Nothing was changed: No space left"):
        edits.change_captions("set", list(edits.look("set").images), ADD_TAG, "x")
    assert files_of(folder) == before


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
def test_trash_is_not_trained_on_and_comes_back(edits, tmp_path, layout):
    folder = image_folder(tmp_path / "data" / "other", layout=layout)
    before, captions = files_of(folder), trained(folder).captions
    edits.throw_away("other", ["1.png", "4.png"])
    loaded = trained(folder)
    assert (loaded.captions, loaded.left_out, loaded.notes) == ([captions[n] for n in (0, 2, 3, 5)], (), ())
    assert len(edits.look("other").images) == 4
    assert not {"1.png", "4.png", "1.txt", "4.txt"} & {path.name for path in folder.iterdir()}
    edits.undo("other")
    assert files_of(folder) == before


def test_images_that_are_trained_on_are_not_thrown_away(edits, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "busy"
    run.mkdir()
    monkeypatch.setattr(edits.jobs, "all_active", lambda: iter([Library(tmp_path / "runs").find("busy")]))
    (run / "config.json").write_text(json.dumps({"class_data_dir": str(tmp_path / "data")}))
    with pytest.raises(RunError, match="busy is training"):
        edits.throw_away("set", ["1.png"])
    (run / "config.json").write_text(json.dumps({"train_data_dir": [str(tmp_path / "elsewhere")]}))
    edits.throw_away("set", ["1.png"])
