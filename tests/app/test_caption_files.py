"""Captions are written as the trainer reads them; other rows and columns of a table stay."""

import json

import pytest
from images.runs import load_images
from pipelines import image_folder

from app.caption_files import with_captions
from app.folders import Folder
from app.image_folders import defaults, read


def write(folder, captions) -> None:
    for path, content in with_captions(read(Folder("set", folder.resolve())), captions).items():
        path.write_bytes(content)


def trained_with(folder) -> list[list[str]]:
    """Return the captions as the trainer reads them."""
    return list(load_images(defaults().replace(train_data_dir=str(folder))).captions)


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
def test_what_is_written_is_trained_with(tmp_path, layout):
    """Also the caption of an image that had none."""
    folder, text = image_folder(tmp_path / "set", 4, layout=layout), 'one “red”, "two"\nthree \\ {x|y}'
    captions = trained_with(folder)
    (folder / "3.png").rename(folder / "new one.png")
    (folder / "3.txt").unlink(missing_ok=True)
    if layout != "txt":
        table = folder / f"metadata.{layout}"
        table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    write(folder, {"1.png": [text], "new one.png": ["it, too"]})
    assert trained_with(folder) == [captions[0], [text], captions[2], ["it, too"]]


def test_other_rows_and_columns_of_a_table_stay(tmp_path):
    folder = image_folder(tmp_path / "set", 3, layout=None)
    lines = [
        '{"file_name":  "0.png", "text": ["a", "b"], "n": 1.50}', "",
        '{"file_name": "1.png", "text": "café", "n": {"deep": [1]}}', '{"file_name": "2.png", "text": null}',
    ]  # fmt: skip
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    write(folder, {"1.png": ["thé"]})
    content = (folder / "metadata.jsonl").read_bytes()
    rows = [json.loads(line) for line in lines if line]
    written = [json.loads(line) for line in content.decode("utf-8-sig").splitlines()]
    assert written == [rows[0], rows[1] | {"text": "thé"}, rows[2]]
    write(folder, {"0.png": ["c"], "2.png": ["now"]})
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8-sig").splitlines()]
    assert [row["text"] for row in rows] == ["c", "thé", "now"]


def test_a_csv_with_lines_in_cells_keeps_its_other_rows(tmp_path):
    folder = image_folder(tmp_path / "set", 3, layout=None)
    head, first, last = "file_name,note,text\n", '0.png,"two\nlines","a, b"\n', "2.png,'x',c\n"
    (folder / "metadata.csv").write_text(f"\n{head}{first}1.png\n\n{last}")
    write(folder, {"1.png": ['say "hi",\nthere']})
    assert (folder / "metadata.csv").read_text() == f'{head}{first}1.png,,"say ""hi"",\nthere"\n{last}'
    assert trained_with(folder)[1] == ['say "hi",\nthere']
