"""Captions are written as the trainer reads them, and only if they are still those that the user saw."""

import json

import pytest
from images.runs import load_images
from pipelines import image_folder

from app import caption_files
from app import changes as folder_changes
from app.caption_files import Edit, write
from app.changes import changes
from app.folders import Folder
from app.image_folders import Images, options_of, read
from app.runs import RunError


def images_in(folder) -> Images:
    return read(Folder("set", folder.resolve()), options_of())


def undo(folder) -> None:
    next(changes(Folder("set", folder.resolve()))).restore()


def trained_with(folder) -> list[list[str]]:
    """Return the captions as the trainer reads them."""
    return list(load_images(options_of().replace(train_data_dir=str(folder))).captions)


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("text", ["a “red” fox, {x|y}", 'one, "two"\nthree \\ ü', "x"])
def test_what_is_written_is_trained_with_and_can_be_taken_back(tmp_path, layout, text):
    folder = image_folder(tmp_path / "set", 4, layout=layout)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    captions = trained_with(folder)
    was = images_in(folder).images["1.png"].captions
    write(images_in(folder), [Edit("1.png", was, (text,))])
    assert trained_with(folder) == [captions[0], [text], *captions[2:]]
    undo(folder)
    assert trained_with(folder) == captions
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_rows_and_columns_of_a_table_stay_byte_for_byte(tmp_path):
    folder = image_folder(tmp_path / "set", 3, layout=None)
    lines = [
        '{"file_name":  "0.png", "text": ["a", "b"], "n": 1.50}', "",
        '{"file_name": "1.png", "text": "caf\\u00e9", "n": {"deep": [1]}}', '{"file_name": "2.png", "text": null}',
    ]  # fmt: skip
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    write(images_in(folder), [Edit("1.png", ("café",), ("thé",))])
    content = (folder / "metadata.jsonl").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf") and content.decode("utf-8-sig").split("\r\n")[0] == lines[0]
    assert '"text": "th\\u00e9", "n": {"deep": [1]}}' in content.decode() and lines[3] in content.decode()
    write(images_in(folder), [Edit("0.png", ("a", "b"), ("c",)), Edit("2.png", (), ("now",))])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8-sig").split("\n") if line.strip()]
    assert [row["text"] for row in rows] == [["c"], "thé", "now"]


def test_a_csv_with_lines_in_cells_keeps_its_other_rows(tmp_path):
    folder = image_folder(tmp_path / "set", 3, layout=None)
    head, first, last = "file_name,note,text\n", '0.png,"two\nlines","a, b"\n', "2.png,'x',c\n"
    (folder / "metadata.csv").write_text(f"{head}{first}1.png\n\n{last}")
    write(images_in(folder), [Edit("1.png", (), ('say "hi",\nthere',))])
    assert (folder / "metadata.csv").read_text() == f'{head}{first}1.png,,"say ""hi"",\nthere"\n\n{last}'
    assert trained_with(folder)[1] == ['say "hi",\nthere']


def test_blank_lines_before_the_columns_of_a_csv_stay(tmp_path):
    folder = image_folder(tmp_path / "set", 2, layout=None)
    (folder / "metadata.csv").write_text("\n\nfile_name,text\n0.png,red\n")
    write(images_in(folder), [Edit("0.png", ("red",), ("a, b",)), Edit("1.png", None, ("blue",))])
    assert (folder / "metadata.csv").read_text() == '\n\nfile_name,text\n0.png,"a, b"\n1.png,blue\n'


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
def test_what_somebody_else_has_changed_stays_and_nothing_else_is_written(tmp_path, layout):
    folder = image_folder(tmp_path / "set", 3, layout=layout)
    images = images_in(folder)
    edits = [Edit(name, image.captions, ("mine",)) for name, image in images.images.items()]
    changed = folder / ("1.txt" if layout == "txt" else f"metadata.{layout}")
    changed.write_text(changed.read_text().replace("blue", "green"))
    theirs = trained_with(folder)
    with pytest.raises(RunError, match=r"1\.png was changed in the meantime"):
        write(images, edits)
    assert trained_with(folder) == theirs


def test_a_table_that_is_replaced_while_it_is_rewritten_stays(tmp_path, monkeypatch):
    """Also if it is replaced between reading and renaming."""
    folder = image_folder(tmp_path / "set", 2)
    images, table = images_in(folder), folder / "metadata.jsonl"
    original = caption_files.Table.edit

    def late(self, edit):
        original(self, edit)
        table.write_text(table.read_text() + "\n")

    monkeypatch.setattr(caption_files.Table, "edit", late)
    theirs = table.read_text() + "\n"
    with pytest.raises(RunError, match=r"metadata\.jsonl was changed in the meantime"):
        write(images, [Edit("0.png", images.images["0.png"].captions, ("mine",))])
    assert table.read_text() == theirs and not list(folder.glob(".*.tmp"))


def test_a_disk_that_fails_half_way_leaves_all_captions_as_they_were(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "set", 4, layout="txt")
    images, captions, written = images_in(folder), trained_with(folder), []
    original = folder_changes.write

    def failing(path, *rest):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        original(path, *rest)

    monkeypatch.setattr(folder_changes, "write", failing)
    with pytest.raises(RunError, match="Nothing was changed: No space left"):
        write(images, [Edit(name, image.captions, ("new",)) for name, image in images.images.items()])
    monkeypatch.undo()
    assert trained_with(folder) == captions and list(folder.glob(".*")) == []


def test_an_image_without_a_caption_gets_one_where_the_folder_has_them(tmp_path):
    for layout in ("jsonl", "csv", "txt"):
        folder = image_folder(tmp_path / layout, 2, layout=layout)
        (folder / "1.png").rename(folder / "new one.png")
        if layout == "txt":
            (folder / "1.txt").unlink()
        images = images_in(folder)
        assert images.images["new one.png"].captions is None and images.images["new one.png"].problem
        write(images, [Edit("new one.png", None, ("it, too",))])
        assert ["it, too"] in trained_with(folder)
        undo(folder)
        assert ["it, too"] not in trained_with(folder)


def test_a_caption_that_is_changed_while_others_are_written_stays_and_so_do_they(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "set", 3, layout="txt")
    images, captions = images_in(folder), trained_with(folder)
    original = folder_changes.write

    def meanwhile(path, *rest):
        if path.name == "0.txt":
            (folder / "2.txt").write_text("theirs, longer")
        original(path, *rest)

    monkeypatch.setattr(folder_changes, "write", meanwhile)
    with pytest.raises(RunError, match=r"2\.txt was changed in the meantime"):
        write(images, [Edit(name, image.captions, ("mine",)) for name, image in images.images.items()])
    assert trained_with(folder) == [*captions[:2], ["theirs, longer"]]
