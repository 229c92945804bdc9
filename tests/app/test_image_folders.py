"""Which image folders are shown, what the trainer reads in them, duplicates, and the trash."""

import base64
import io
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import datasets
import PIL.Image
import pytest
from app_runs import HOSTILE, write_run
from images.runs import load_images, parts
from pipelines import image_folder, random_image

from app import changes, image_cards, image_folders, looks
from app.folders import BUNDLED
from app.image_edits import ADD_TAG, AFTER, ALIKE, BEFORE, LEFT_OUT, NO_CAPTION, REMOVE_TAG, REPLACE, ImageEdits
from app.image_folders import options_of
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError
from reslora.images.data.folders import load_folders
from reslora.images.data.listing import TRASH
from reslora.images.data.size import Size


@pytest.fixture
def edits(tmp_path):
    """Edits of a data folder with a folder `set` of six images."""
    (tmp_path / "runs").mkdir()
    image_folder(tmp_path / "data" / "set", layout="txt")
    library = Library(tmp_path / "runs")
    return ImageEdits(Jobs(library, tmp_path / "data"))


def trained(folder, **flags):
    """Return the images as the trainer reads them."""
    return load_images(options_of().replace(train_data_dir=str(folder), **flags))


def test_what_the_trainer_says_of_a_folder_names_no_place_of_this_machine(edits, tmp_path):
    """For one of kohya's folders, the trainer names its parent."""
    image_folder(tmp_path / "data" / "10_sks", 2, layout="txt")
    image_folder(tmp_path / "data" / "5_none", 2, layout="none")
    found = [image_folders.read(edits.folders.find(name), options_of()) for name in ("10_sks", "5_none")]
    said = [*found[0].notes, found[1].refused]
    assert all(str(tmp_path) not in line for line in said)
    assert "give the folder above as the folder of images" in said[0] and "give the folder above, in which" in said[-1]


def test_a_card_tells_width_and_then_height():
    image = image_folders.Image("a.png", Path("a.png"), (), (640, 480), (Size(height=48, width=64),))
    assert image_cards.sizes(image) == "640 &times; 480 &rarr; 64 &times; 48"


def test_only_folders_on_the_list_are_shown(edits, tmp_path):
    (tmp_path / "data" / "out").symlink_to("/etc")
    (tmp_path / "data" / ".hidden").mkdir()
    image_folder(tmp_path / "runs" / ".images" / "old")
    assert edits.jobs.folders() == [".", "set", "runs/old"]
    assert edits.folders.of_paths(["set\0"], "a run") == "images of a run (not on the list)"
    assert list(edits.folders.all()) == [".", "set", "runs/old", BUNDLED]
    for name in (*HOSTILE, "out", ".hidden", "set/..", "runs/../old", "runs/.."):
        if name != ".":
            with pytest.raises(RunError):
                edits.look(name)
    assert edits.jobs.choose_images("new", "runs/old", None) == tmp_path / "runs" / ".images" / "old"


def test_nothing_outside_a_folder_is_shown(edits, tmp_path):
    random_image(9).save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("secret words")
    folder = tmp_path / "data" / "set"
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "link.txt").write_text("mine")
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to(tmp_path / "secret.txt")
    images = edits.look("set")
    html = image_cards.cards(edits, images, list(images.images.values()), 1)
    assert "secret" not in html and html.count("data:image") == 5
    assert {images.images[name].problem for name in ("0.png", "link.png")} == {
        "leads out of the folder: not shown here"
    }
    assert html.count(" readonly>") == 2
    for change in (
        lambda: edits.save_caption(images, "0.png", "", "mine"),
        lambda: edits.change_captions(images, list(images.images), ADD_TAG, "mine"),
    ):
        with pytest.raises(RunError, match="is a link to outside of the folder") as refusal:
            change()
        assert "secret" not in str(refusal.value)
    edits.change_captions(images, ["1.png"], ADD_TAG, "mine")
    (folder / "1.txt").unlink()
    (folder / "1.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RunError, match="is a link to outside of the folder"):
        edits.undo(images)  # which was read before
    assert (tmp_path / "secret.txt").read_text() == "secret words"


def test_names_that_are_not_utf8_break_no_page(edits, tmp_path):
    """A browser cannot receive them: such a folder is left out, and an image gets a readable name."""
    folder, odd = tmp_path / "data" / "set", [os.fsdecode(name) for name in (b"\xe9.png", b"\xea.png")]
    image_folder(tmp_path / "data" / os.fsdecode(b"caf\xe9"))
    write_run(tmp_path / "runs" / os.fsdecode(b"caf\xe9"))
    assert list(edits.folders.all()) == [".", "set", BUNDLED] and edits.jobs.library.everything() == []
    (folder / "0.png").rename(folder / "?.png")  # a name of its own
    for number, name in enumerate(odd, 1):
        (folder / f"{number}.png").rename(folder / name)
    images = edits.look("set")
    assert list(images.images) == ["3.png", "4.png", "5.png", "?.png", "?.png (2)", "?.png (3)"]
    shown = edits.shown(images, LEFT_OUT)
    assert [image.path.name for image in shown if "not UTF-8" in image.problem] == sorted(odd)
    (image_cards.cards(edits, images, shown, 1) + image_cards.summary(edits, images, 6)).encode()
    edits.throw_away(images, ["?.png (3)"])
    assert {path.name for path in folder.glob("?.png")} == {"3.png", "4.png", "5.png", "?.png", min(odd)}
    edits.undo(edits.look("set"))
    assert {path.name for path in folder.glob("?.png")} >= set(odd)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "?.png", "text": "listed"}))
    images = edits.look("set")
    assert images.images["?.png"].captions == ("listed",) and len(images.images) == 6
    image_cards.cards(edits, images, list(images.images.values()), 1).encode()


def test_what_is_left_out_and_why_is_what_the_trainer_says(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    (folder / "1.png").write_bytes(b"nothing")
    (folder / "2.txt").unlink()
    (folder / "3.txt").write_bytes(b"\xff\xfe\xff")
    images, said = edits.look("set"), trained(folder)
    assert {name: image.problem for name, image in images.images.items() if image.problem} == {
        line.split(": ", 1)[0].removeprefix(f"{folder}/"): line.split(": ", 1)[1] for line in said.left_out
    }
    assert [list(image.captions) for image in images.images.values() if not image.problem] == said.captions
    assert [image.size for image in images.images.values() if not image.problem] == list(said.sizes)
    assert [i.name for i in edits.shown(images, LEFT_OUT)] == ["1.png", "2.png", "3.png"]
    assert [i.name for i in edits.shown(images, NO_CAPTION)] == ["2.png", "3.png"]
    for number in range(6):
        (folder / f"{number}.txt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="6 images without captions") as refusal:
        trained(folder)
    assert edits.look("set").refused == str(refusal.value).replace(str(folder), "set")


def test_rows_that_are_wrong_and_images_that_are_not_listed_are_told(edits, tmp_path):
    folder = image_folder(tmp_path / "data" / "rows", 3)
    random_image(7).save(folder / "beside.png")
    images = edits.look("rows")
    assert images.images["beside.png"].problem == "not listed in metadata.jsonl"
    assert images.notes == ("1 image not listed in metadata.jsonl",) == trained(folder).notes
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"')
    images = edits.look("rows")
    assert "line 1: is not JSON" in images.refused and str(tmp_path) not in images.refused
    with pytest.raises(RunError, match="line 1: is not JSON"):
        edits.change_captions(images, ["0.png"], ADD_TAG, "x")


def replace_texts(table: Path, rows: list[dict]) -> None:
    """Write a table of captions, and remove the caption files next to it."""
    table.write_text("\n".join(map(json.dumps, rows)))
    for text in table.parent.glob("*.txt"):
        text.unlink()


def test_masks_are_no_images_and_go_and_come_with_theirs(edits, tmp_path):
    folder, table = tmp_path / "data" / "set", tmp_path / "data" / "set" / "metadata.jsonl"
    for name in ("mask.png", "shared.png"):
        PIL.Image.new("L", (9, 9)).save(folder / name)  # of another size, which matters to --masked_loss alone
    masks = {"0.png": "mask.png", "1.png": "shared.png", "2.png": "./shared.png", "3.png": "4.png"}
    rows = [{"file_name": f"{n}.png", "text": "a", "mask": masks.get(f"{n}.png")} for n in range(6)]
    replace_texts(table, rows)
    before = {path.name for path in folder.iterdir()}
    images = edits.look("set")
    assert list(images.images) == [f"{n}.png" for n in range(6)]
    assert (images.notes, edits.shown(images, LEFT_OUT), trained(folder).left_out) == ((), [], ())
    for names, gone in ((["0.png"], {"mask.png"}), (["1.png"], set()), (["2.png", "3.png"], {"shared.png"})):
        there = {path.name for path in folder.glob("*.png")}
        edits.throw_away(edits.look("set"), names)
        assert there - {path.name for path in folder.glob("*.png")} == {*names, *gone}
    assert list(edits.look("set").images) == ["4.png", "5.png"]
    for _ in range(3):
        edits.undo(edits.look("set"))
    assert {path.name for path in folder.iterdir()} - {TRASH} == before and len(edits.look("set").images) == 6
    table.write_text(json.dumps({"file_name": "0.png", "text": "a", "mask": 5}))
    assert edits.look("set").images["0.png"].captions == ("a",)


def test_a_pair_of_images_is_shown_together_and_nothing_outside_the_folder(edits, tmp_path, monkeypatch):
    """Reference images of a table's column are no images of their own; they are removed together with theirs."""
    folder, table = tmp_path / "data" / "set", tmp_path / "data" / "set" / "metadata.jsonl"
    (folder / "before").mkdir()
    for name in ("before/0.png", "before/1.png", "../secret.png"):
        PIL.Image.new("RGB", (640, 1280), "red").save(folder / name)
    pairs = {0: "before/0.png", 1: "before/1.png", 2: "3.png"}
    rows = [{"file_name": f"{n}.png", "text": "a", "conditioning_image": pairs.get(n)} for n in range(6)]
    replace_texts(table, rows)
    images = edits.look("set")
    assert [image.reference and image.reference.name for image in images.images.values()] == [
        *("0.png", "1.png", "3.png"), *[None] * 3
    ]  # fmt: skip
    assert len(images.images) == 6 and images.notes == () and edits.shown(images, LEFT_OUT) == []
    html = image_cards.cards(edits, images, list(images.images.values()), 1)
    assert html.count("enlarge the pair ") == 3 and html.count("enlarge the image ") == 3
    monkeypatch.setattr(looks, "thumbnail", None)  # whose cache is for small images
    shown = edits.looks.enlarged(images.images["0.png"], images.folder)
    assert [title for title, _ in shown] == ["image", "reference image"]
    with PIL.Image.open(io.BytesIO(base64.b64decode(shown[1][1].partition(",")[2]))) as large:
        assert large.size == (512, 1024)
    assert [title for title, _ in edits.looks.enlarged(images.images["5.png"], images.folder)] == ["image"]
    (folder / "before" / "0.png").unlink()
    (folder / "before" / "0.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(RunError, match=r"0\.png: its reference image cannot be shown") as refusal:
        edits.looks.enlarged(images.images["0.png"], images.folder)
    assert str(tmp_path) not in str(refusal.value)
    assert edits.look("set").images["1.png"].reference is None  # the table names a file outside: nothing is paired
    (folder / "before" / "0.png").unlink()
    shutil.copy(folder / "0.png", folder / "before")
    edits.throw_away(edits.look("set"), ["0.png", "2.png"])
    assert not (folder / "before" / "0.png").exists() and (folder / "3.png").exists()
    edits.undo(edits.look("set"))
    assert edits.look("set").images["0.png"].reference == folder / "before" / "0.png"


def test_hidden_folders_are_passed_over_as_by_the_trainer(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    shutil.copytree(folder, folder / ".ipynb_checkpoints")
    images = edits.look("set")
    assert list(images.images) == [f"{n}.png" for n in range(6)] and len(trained(folder)) == 6
    (note,), (said,) = images.notes, trained(folder).notes
    assert note == said.replace(f"{folder}/", "") and note.startswith("6 hidden images are not read")
    shutil.rmtree(folder / ".ipynb_checkpoints")
    edits.throw_away(edits.look("set"), ["0.png"])
    assert edits.look("set").notes == trained(folder).notes == ()


def test_kohyas_folders_mean_what_they_mean_to_the_trainer(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    shutil.move(folder, tmp_path / "data" / "kohya" / "3_sks fox")
    (tmp_path / "data" / "kohya" / "3_sks fox" / "5.txt").unlink()
    images = edits.look("kohya")
    (said,) = load_folders(
        *parts(
            options_of().replace(train_data_dir=str(tmp_path / "data" / "kohya")), "model", "data", "training", "output"
        ),
    )
    assert [list(image.captions) for image in images.images.values()] == said.captions
    assert said.captions[5] == ["sks fox"]
    edits.change_captions(images, ["3_sks fox/5.png"], AFTER, ", red")
    assert trained(tmp_path / "data" / "kohya" / "3_sks fox").captions[5] == ["sks fox, red"]
    edits.undo(edits.look("kohya"))
    assert not (tmp_path / "data" / "kohya" / "3_sks fox" / "5.txt").exists()


def test_buckets_are_the_trainers(edits):
    image = edits.look("set", ("32 64", False, "")).images["0.png"]
    assert [(size.height, size.width) for size in image.buckets] == [(32, 32), (64, 64)]
    for wrong in ("x", "-5", "4", "--help"):
        with pytest.raises(RunError):
            edits.look("set", (wrong, False, ""))


@pytest.mark.parametrize(
    ("operation", "text", "other", "before", "after"),
    [
        (REPLACE, "red", "blue {1}", "a red, red fox", "a blue {1}, blue {1} fox"),
        (REPLACE, "red", "", "a red", "a"),
        (BEFORE, "sks, ", "", "a fox", "sks, a fox"),
        (AFTER, ", 4k", "", "a fox", "a fox, 4k"),
        (ADD_TAG, " 4k ", "", "a fox,4k", "a fox,4k"),
        (ADD_TAG, "4k", "", "a fox", "a fox, 4k"),
        (REMOVE_TAG, "fox", "", "fox,a fox , fox", "a fox"),
        (REMOVE_TAG, "cat", "", "fox,a  fox", "fox,a  fox"),
        (ADD_TAG, "4k, a fox", "", "a fox, hill", "a fox, hill, 4k"),
        (REMOVE_TAG, "hill, a fox", "", "a fox, 4k, hill", "4k"),
        (REPLACE, "red ", None, "a red fox", "a fox"),
    ],
)
def test_captions_are_changed_and_changed_back(edits, tmp_path, operation, text, other, before, after):
    folder = tmp_path / "data" / "set"
    (folder / "2.txt").write_text(before)
    others = [caption for number, caption in enumerate(trained(folder).captions) if number != 2]
    line = edits.change_captions(edits.look("set"), ["2.png"], operation, text, other)
    assert trained(folder).captions[2] == [after]
    assert [caption for number, caption in enumerate(trained(folder).captions) if number != 2] == others
    assert edits.undo(edits.look("set")) == (
        "There is nothing to undo." if line.startswith("No caption") else f"Undone: {operation.lower()}, 1 caption."
    )
    assert trained(folder).captions[2] == [before.strip()]


def test_a_tag_is_added_to_a_blank_caption(edits, tmp_path):
    """Training skips the image until then."""
    folder = tmp_path / "data" / "set"
    (folder / "2.txt").write_text("")
    edits.change_captions(edits.look("set"), ["2.png"], ADD_TAG, "4k", "")
    assert trained(folder).captions[2] == ["4k"]


def test_words_that_are_missing_and_filters_that_are_unknown_are_refused(edits):
    images = edits.look("set")
    with pytest.raises(RunError, match="enter words or a tag first"):
        edits.change_captions(images, list(images.images), BEFORE, None)
    with pytest.raises(RunError, match="choose one of: All images, Skipped by training"):
        edits.shown(images, "Duplicate")


def test_undo_is_refused_once_and_only_for_what_was_changed_again(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    edits.change_captions(edits.look("set"), ["0.png"], ADD_TAG, "x")
    edits.change_captions(edits.look("set"), ["1.png"], ADD_TAG, "y")
    (folder / "1.txt").write_text("somebody else's")
    with pytest.raises(RunError, match="was changed later"):
        edits.undo(edits.look("set"))
    assert "add tag" in edits.undo(edits.look("set"))
    assert trained(folder).captions[:2] == [["red disc"], ["somebody else's"]]


def test_what_a_killed_server_has_written_of_many_captions_can_be_taken_back(edits, tmp_path, monkeypatch):
    """A copy of the folder during the change stands for the folder after the kill."""
    folder, killed, write = tmp_path / "data" / "set", tmp_path / "data" / "killed", changes.write
    (folder / "5.txt").unlink()

    def half_way(path, *rest):
        if path.name == "3.txt":
            shutil.copytree(folder, killed)
        write(path, *rest)

    captions = {name: image.captions for name, image in edits.look("set").images.items()}
    monkeypatch.setattr(changes, "write", half_way)
    edits.change_captions(edits.look("set"), list(captions), BEFORE, "sks, ")
    assert all(map(str.__contains__, trained(folder).captions[3], ["sks, "]))
    assert [caption.startswith("sks") for (caption,) in trained(killed).captions] == [True] * 3 + [False] * 2
    (killed / "1.txt").write_text("changed since")
    change = edits.last(edits.look("killed").folder)
    assert change is not None and edits.undo(edits.look("killed"), change.place.name) == f"Undone: {change.line}."
    now = {name: image.captions for name, image in edits.look("killed").images.items()}
    assert now == captions | {"1.png": ("changed since",)}
    assert edits.last(edits.look("killed").folder) is None


def test_undo_takes_back_what_its_button_says_change_by_change(edits, tmp_path):
    """Also if another user does the same in between."""
    folder, names = tmp_path / "data" / "set", []
    for image, tag in (("0.png", "mine"), ("0.png", "again"), ("1.png", "theirs")):
        edits.change_captions(edits.look("set"), [image], ADD_TAG, tag)
        names.append(edits.last(edits.look("set").folder).place.name)
    with pytest.raises(RunError, match=r"Nothing was undone.*add tag, 1 caption"):
        edits.undo(edits.look("set"), names[1])
    assert trained(folder).captions[:2] == [["red disc, mine, again"], ["blue box, theirs"]]
    edits.undo(edits.look("set"))  # theirs, by themselves
    for name, caption in ((names[1], "red disc, mine"), (names[0], "red disc")):
        edits.undo(edits.look("set"), name)
        assert trained(folder).captions[:2] == [[caption], ["blue box"]]
    assert edits.last(edits.look("set").folder) is None


def test_captions_are_changed_back_after_a_restart_and_only_the_last_changes_are_kept(edits, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "set"
    monkeypatch.setattr(changes, "MOST", 2)
    edits.throw_away(edits.look("set"), ["5.png"])
    for tag in "abc":
        edits.change_captions(edits.look("set"), ["0.png", "1.png"], ADD_TAG, tag)
    restarted = ImageEdits(edits.jobs)
    for captions in (["red disc, a, b", "blue box, a, b"], ["red disc, a", "blue box, a"]):
        restarted.undo(restarted.look("set"))
        assert [caption for (caption,) in trained(folder).captions[:2]] == captions
    restarted.undo(restarted.look("set"))  # the image that was thrown away is kept
    assert len(trained(folder)) == 6 and restarted.undo(restarted.look("set")) == "There is nothing to undo."


def test_one_caption_is_saved_only_over_what_was_seen(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    assert edits.save_caption(edits.look("set"), "0.png", "red disc", " a\nb ") == "a\nb"
    with pytest.raises(RunError, match="Its caption is now"):
        edits.save_caption(edits.look("set"), "0.png", "red disc", "late")
    assert (folder / "0.txt").read_text() == "a\nb"
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two"]}))
    assert edits.save_caption(edits.look("set"), "0.png", "one\n\ntwo", "one\n\n\n three") == "one\n\nthree"
    assert trained(folder).captions == [["one", "three"]]
    for was, text in ((None, "x"), ("one\n\nthree", 5)):
        with pytest.raises(RunError, match="A caption is text"):
            edits.save_caption(edits.look("set"), "0.png", was, text)
    captions = ["one\r\n\r\nmore", "two"]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": captions}))
    with pytest.raises(RunError, match="has an empty line"):
        edits.save_caption(edits.look("set"), "0.png", "one\n\nmore\n\ntwo", "one\n\nmore\n\nTWO")
    assert trained(folder).captions == [captions]


def test_captions_with_other_line_ends_are_saved_from_a_browser_which_has_one_kind(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    (folder / "0.txt").write_bytes(b"one\r\ntwo\rthree")
    with pytest.raises(RunError, match="Its caption is now"):
        edits.save_caption(edits.look("set"), "0.png", "one two\nthree", "late")
    assert edits.save_caption(edits.look("set"), "0.png", "one\ntwo\nthree", "one\ntwo") == "one\ntwo"
    assert (folder / "0.txt").read_bytes() == b"one\ntwo"
    edits.undo(edits.look("set"))
    assert (folder / "0.txt").read_bytes() == b"one\r\ntwo\rthree"


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
def test_trash_is_not_trained_on_and_comes_back(edits, tmp_path, layout):
    folder = image_folder(tmp_path / "data" / "other", layout=layout)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    captions = trained(folder).captions
    edits.throw_away(edits.look("other"), ["1.png", "4.png"])
    assert (trained(folder).captions, trained(folder).left_out, trained(folder).notes) == (
        [captions[n] for n in (0, 2, 3, 5)], (), (),
    )  # fmt: skip
    assert len(edits.look("other").images) == 4
    assert layout != "txt" or len(trained(tmp_path / "data")) == 10  # read from above, too
    assert not {"1.png", "4.png", "1.txt", "4.txt"} & {path.name for path in folder.iterdir()}
    restarted = ImageEdits(edits.jobs)
    restarted.undo(restarted.look("other"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert restarted.last(restarted.look("other").folder) is None


def test_the_datasets_library_passes_over_trash_too(tmp_path):
    """It reads folders that contain metadata."""
    folder = image_folder(tmp_path / "set" / "train", 3).parent
    (folder / TRASH / "1").mkdir(parents=True)
    random_image(8).save(folder / TRASH / "1" / "8.png")
    assert len(datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "c"))["train"]) == 3
    assert len(trained(folder, cache_dir=str(tmp_path / "cache"))) == 3


def test_trash_that_cannot_come_back_stays(edits, tmp_path):
    folder = tmp_path / "data" / "set"
    edits.throw_away(edits.look("set"), ["1.png"])
    (folder / "1.txt").write_text("another one")
    with pytest.raises(RunError, match=r"1\.txt exists again"):
        edits.undo(edits.look("set"))
    assert (folder / "1.txt").read_text() == "another one" and not (folder / "1.png").exists()
    place = next(changes.changes(edits.look("set").folder)).place
    (place / "1.png").rename(folder / "1.png")
    with pytest.raises(RunError, match=r"1\.txt exists again"):  # though a part has been put back by hand
        edits.undo(edits.look("set"))
    (folder / "1.txt").unlink()
    edits.undo(edits.look("set"))
    assert (folder / "1.png").exists() and (folder / "1.txt").exists() and not (folder / TRASH).exists()


@pytest.mark.parametrize("linked", ["", "{place}", "{place}/set"])
def test_links_in_the_trash_are_not_followed(edits, tmp_path, linked):
    """Others may write in the folder."""
    edits.throw_away(edits.look("."), ["set/1.png"])
    trash = tmp_path / "data" / TRASH
    (place,) = trash.iterdir()
    link = trash / linked.format(place=place.name)
    link.rename(outside := tmp_path / "outside")
    link.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert edits.undo(edits.look(".")) == "There is nothing to undo."
    with pytest.raises(RunError, match="is a link") if linked == "" else nullcontext():
        edits.change_captions(edits.look("."), ["set/0.png"], ADD_TAG, "x")
    assert sorted(outside.rglob("*")) == before


def test_images_that_are_trained_on_are_not_thrown_away(edits, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "busy"
    run.mkdir()
    elsewhere, here = str(tmp_path / "elsewhere"), str(tmp_path / "data")
    monkeypatch.setattr(edits.jobs, "all_active", lambda: iter([Library(tmp_path / "runs").find("busy")]))
    for flags in (
        {"train_data_dir": here},
        {"train_data_dir": [elsewhere], "class_data_dir": here},
        {"dataset_name": here},
    ):
        (run / "config.json").write_text(json.dumps(flags))
        with pytest.raises(RunError, match="busy is training"):
            edits.throw_away(edits.look("set"), ["1.png"])
    (run / "config.json").write_text(json.dumps({"train_data_dir": [elsewhere], "class_data_dir": elsewhere}))
    edits.throw_away(edits.look("set"), ["1.png"])


def test_damaged_images_and_duplicates_are_marked_once_all_are_opened(edits, tmp_path):
    folder = tmp_path / "data" / "set"
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
    assert "opens every image to find more damaged images" in image_cards.summary(edits, images, 10)
    assert list(edits.check(images)) == [0, 10]
    assert {name: line for name, (_, line) in edits.looks.alike(images).items()} == {
        "copy.png": "the same image as a.png", "near.jpg": "looks like a.png",
    }  # fmt: skip
    assert [image.name for image in edits.shown(images, ALIKE)] == ["a.png", "copy.png", "near.jpg"]
    (damaged,) = edits.shown(images, LEFT_OUT)
    assert damaged.name == "half.png" and edits.looks.problem(damaged).startswith("damaged (")
    assert "Training would skip 1 image:" in image_cards.summary(edits, images, 10)
    shutil.copy(folder / "a.png", folder / "half.png")
    assert edits.looks.problem(edits.look("set").images["half.png"]) == ""


def test_names_and_captions_are_no_markup(edits, tmp_path):
    folder, attack = tmp_path / "data" / "set", '"><script>${x}{{y}}'
    (folder / "0.png").rename(folder / f"{attack}.png".replace("/", ""))
    (folder / "1.txt").write_text(f"</textarea>{attack}")
    images = edits.look("set")
    html = image_cards.cards(edits, images, edits.shown(images, "All images"), 1) + image_cards.summary(
        edits, images, 6
    )
    assert "<script>" not in html and "${" not in html and "{{" not in html and html.count("</textarea>") == 6


def test_an_upload_is_a_folder_of_its_own(edits, tmp_path):
    random_image(1).save(tmp_path / "red fox.png")
    folder = image_folders.add(edits.folders, "mine", [str(tmp_path / "red fox.png")], "")
    assert folder.name == "uploads/mine" in edits.jobs.folders()
    assert trained(edits.jobs.choose_images("new", "uploads/mine", None)).captions == [["red fox"]]
    for name in ("mine", "../x", "", None):
        with pytest.raises(RunError):
            image_folders.add(edits.folders, name, [str(tmp_path / "red fox.png")], "")
    with pytest.raises(RunError, match="bundled"):
        edits.change_captions(edits.look(BUNDLED), list(edits.look(BUNDLED).images)[:1], ADD_TAG, "x")
