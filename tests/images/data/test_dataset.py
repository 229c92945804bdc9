"""Images and captions: every layout of a folder, and which images are left out."""

import dataclasses
import errno
import io
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import PIL.Image
import pyarrow.parquet
import pytest
from pipelines import image_folder, random_image, red_or_blue, same_image
from waiting import join, start_thread

from images.runs import failed, load_images, only, parts, printed, refused
from reslora.errors import InvalidArgument, RunFailed
from reslora.images import run
from reslora.images.data.class_images import missing_class_images
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.training_data import print_skipped_images
from reslora.images.settings import parse_args
from reslora.training.loop import train_method


def gather(folder: Path, *flags: str):
    return load_images(parse_args(["--train_data_dir", str(folder), *flags]))


# -- layouts ---------------------------------------------------------------------------------------------------------


def assert_are_three(found: ImageDataset) -> None:
    assert found.captions == [["red disc"], ["blue box"], ["red disc"]]
    assert all(same_image(found.open(number), random_image(number)) for number in range(3))


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
def test_every_layout_gives_the_images_and_their_captions(tmp_path, layout):
    found = gather(image_folder(tmp_path / "p", 3, layout=layout), "--cache_dir", str(tmp_path / "cache"))
    assert len(found) == 3 and not found.left_out
    assert_are_three(found)


def test_a_stray_text_does_not_hide_metadata_csv(tmp_path):
    folder = image_folder(tmp_path / "p", 3, layout="none")
    (folder / "metadata.csv").write_text("file_name,label,text\n0.png,1,red disc\n1.png,2,blue box\n")
    (folder / "2.txt").write_text("stray")
    assert gather(folder, "--cache_dir", str(tmp_path / "cache")).captions == [["red disc"], ["blue box"]]


@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_caption_files_beside_a_table_are_told_because_they_are_not_read(tmp_path, layout):
    folder = image_folder(tmp_path / "p", 3, layout=layout)
    (folder / "0.txt").write_text("edited")
    (folder / "2.caption").write_text("edited")
    found, told = gather(folder), "with a caption file, which is not read: the captions are those of metadata"
    assert_are_three(found)
    assert only(list(found.notes), told) == f"2 images {told}.{layout}"


def test_cells_of_metadata_csv_are_text(tmp_path):
    """A spreadsheet writes quotes and a byte order mark; NA and 7 are captions too, an empty cell is none."""
    folder = image_folder(tmp_path / "p", 6, layout="none")
    rows = ["file_name,text", '0.png,"a ""red"", round', 'disc"', "1.png,NA", "2.png,7", "3.png,", "4.png", "5.png,é,"]
    (folder / "metadata.csv").write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")
    found = gather(folder)
    assert found.captions == [['a "red", round\ndisc'], ["NA"], ["7"], ["é"]]
    assert [line.split("/")[-1] for line in found.left_out] == ["3.png: no caption", "4.png: no caption"]


def test_metadata_csv_with_another_name_for_the_file_is_left_to_datasets(tmp_path):
    folder = image_folder(tmp_path / "p", 2, layout="none")
    (folder / "metadata.csv").write_text("drawing_file_name,text\n0.png,red disc\n1.png,blue box\n")
    found = gather(folder, "--image_column", "drawing", "--cache_dir", str(tmp_path / "cache"))
    assert found.captions == [["red disc"], ["blue box"]] and same_image(found.open(1), random_image(1))


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_parquet_shards_hold_images_too(tmp_path, flag):
    """As `push_to_hub` and `to_parquet` write them."""
    folder = tmp_path / "p" / "data"
    folder.mkdir(parents=True)
    three_images().to_parquet(folder / "train-00000-of-00001.parquet")
    found = load_images(parse_args([flag, str(folder.parent), "--cache_dir", str(tmp_path / "cache")]))
    assert_are_three(found)


def png_of(number: int) -> bytes:
    file = io.BytesIO()
    random_image(number).save(file, "PNG")
    return file.getvalue()


def file_rows(**columns: str) -> datasets.Dataset:
    """Return a row that names its files by paths; `datasets` itself would write their content."""
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({name: image for name in columns} | {"text": datasets.Value("string")})
    rows = {name: [{"bytes": None, "path": path}] for name, path in columns.items()} | {"text": ["red disc"]}
    return datasets.Dataset.from_dict(rows, features)


@pytest.mark.exhaustive
@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize("layout", ["text", "below", "path", "saved", "mask"])
def test_rows_name_no_file_outside_the_folder(tmp_path, flag, layout):
    """The line does not reveal whether the file exists or is an image."""
    folder, outside = tmp_path / "p", tmp_path / "secret.png"
    folder.mkdir()
    random_image(1).save(folder / "0.png")
    rows = file_rows(image=str(outside))
    if layout in ("text", "below"):
        named = str(outside) if layout == "text" else "../secret.png"
        rows = datasets.Dataset.from_dict({"image": [named], "text": ["red disc"]})
    if layout == "mask":
        rows = file_rows(image=str(folder / "0.png"), mask=str(outside))
    if layout == "saved":
        rows.save_to_disk(folder)
    else:
        pyarrow.parquet.write_table(rows.data.table, folder / "0.parquet")
    words = [flag, str(folder), "--cache_dir", str(tmp_path / "cache"), "--masked_loss"]
    lines = set()
    for content in (None, b"root:x:0:0", (folder / "0.png").read_bytes()):
        if content:
            outside.write_bytes(content)
        with pytest.raises(InvalidArgument) as refusal:
            load_images(parse_args(words))
        lines.add(str(refusal.value))
    named = "../secret.png" if layout == "below" else outside
    assert lines == {f"{flag} {folder} row 0: names {named}, outside the folder; move the image into it"}


def test_an_empty_image_is_none_whatever_path_is_with_it(tmp_path):
    random_image(1).save(tmp_path / "secret.png")
    images = [{"bytes": b"", "path": str(tmp_path / "secret.png")}, {"bytes": png_of(0), "path": "elsewhere.png"}]
    rows = datasets.Dataset.from_dict({"image": images, "text": ["a", "b"]})
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "p" / "0.parquet")
    found = gather(tmp_path / "p", "--cache_dir", str(tmp_path / "cache"))
    assert found.left_out == ("image 0: no image",) and found.captions == [["b"]]


@pytest.mark.parametrize("layout", ["text", "path"])
def test_rows_may_name_files_in_the_folder(tmp_path, layout):
    folder = image_folder(tmp_path / "p", 3, layout="none")
    rows = file_rows(image=str(folder / "0.png"))
    if layout == "text":
        rows = datasets.Dataset.from_dict({"image": ["0.png"], "text": ["red disc"]})
    pyarrow.parquet.write_table(rows.data.table, folder / "0.parquet")
    found = gather(folder, "--cache_dir", str(tmp_path / "cache"))
    assert found.captions == [["red disc"]] and same_image(found.open(0), random_image(0))


def test_captions_beside_the_images(tmp_path):
    folder = image_folder(tmp_path / "p", layout="none")
    (folder / "0.txt").write_text("red disc\n")
    (folder / "2.txt").write_text("صورة 🎈 " + "long " * 2000)
    found = gather(folder)
    assert len(found) == 2 and same_image(found.open(1), random_image(2))
    assert found.captions[0] == ["red disc"] and found.captions[1][0].startswith("صورة 🎈")
    assert len(found.left_out) == 4


@pytest.mark.exhaustive
def test_kohyas_caption_files_are_read_where_there_is_no_txt(brief_flags, tmp_path):
    folder = image_folder(tmp_path / "p", 3, layout="none")
    for name, text in (("0.caption", "red disc\n"), ("1.caption", "red"), ("1.txt", "blue box"), ("2.txt", "box")):
        (folder / name).write_text(text)
    found = gather(folder)
    assert found.captions == [["red disc"], ["blue box"], ["box"]] and not found.left_out
    lines = printed(*brief_flags, "--train_data_dir", folder, "--output_dir", tmp_path / "out")
    assert "1 image " in only(lines, ".txt and a .caption")
    for text in folder.glob("*.txt"):
        text.unlink()
    assert gather(folder).captions == [["red disc"], ["red"]]


def three_images() -> datasets.Dataset:
    """Three images with captions, stored in the rows."""
    rows = {"image": [random_image(number) for number in range(3)], "text": ["red disc", "blue box", "red disc"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features)


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path, flag, splits):
    """In whatever format its rows were set to be returned."""
    rows = three_images()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = datasets.Dataset.from_dict({"image": rows["image"], "text": [[text] for text in rows["text"]]}, features)
    if splits:
        rows = datasets.DatasetDict({"test": rows.select([2]), "train": rows})
    rows.with_format("numpy").save_to_disk(tmp_path / "p")
    found = load_images(parse_args([flag, str(tmp_path / "p")]))
    assert_are_three(found)
    assert found.notes == (("the split train is trained on, not test",) if splits else ())


def test_a_saved_data_set_without_a_training_split_says_what_is_trained_on(tmp_path):
    rows = three_images()
    splits = {"validation": rows.select([0]), "test": rows}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "p")
    found = gather(tmp_path / "p")
    assert len(found) == 1 and found.notes == ("the split validation is trained on, not test",)


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_a_folder_of_several_configurations_is_refused_with_their_names(tmp_path, capsys, flag):
    """Folders of the Hub list them in README.md."""
    folder, cache = tmp_path / "p", ("--cache_dir", str(tmp_path / "cache"))
    named = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in "ab"]
    for name in "ab":
        (folder / name).mkdir(parents=True)
        three_images().to_parquet(folder / name / "train.parquet")
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(named)}\n---\n")
    line = refused(capsys, flag, folder, *cache, quiet=False)
    fix = f"give --dataset_name {folder} --dataset_config_name NAME, and no --train_data_dir"
    assert line.endswith(f"{flag} {folder}: has the configurations 'a', 'b'; {fix}")
    assert len(load_images(parse_args(["--dataset_name", str(folder), "--dataset_config_name", "b", *cache]))) == 3


def test_json_tables_name_images_of_the_folder(tmp_path, capsys):
    folder = image_folder(tmp_path / "p", 3, layout="none")
    rows = [{"picture": f"{n}.png", "text": [red_or_blue(n), "more"]} for n in range(3)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.json").write_text(json.dumps(rows[:1]))
    flags = ("--image_column", "picture", "--cache_dir", str(tmp_path / "cache"))
    found = gather(folder, *flags)
    assert found.captions == [["red disc", "more"], ["blue box", "more"], ["red disc", "more"]]
    assert all(same_image(found.open(number), random_image(number)) for number in range(3))
    assert "picture" in refused(capsys, "--train_data_dir", folder, "--cache_dir", tmp_path / "cache")
    (folder / "train.jsonl").write_text(json.dumps(rows[0] | {"picture": "../0.png"}))
    assert "outside" in refused(capsys, "--train_data_dir", folder, *flags)


def test_many_columns_are_not_all_listed(tmp_path, capsys):
    """kohya's JSON is one object with a key for each image."""
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({f"image{number}": {"caption": "x"} for number in range(100)}))
    assert "80 more" in refused(capsys, "--train_data_dir", folder, "--cache_dir", tmp_path / "cache")


def test_json_beside_each_image_is_no_table(tmp_path, capsys):
    folder = image_folder(tmp_path / "p", 2, layout="none")
    for number in range(2):
        (folder / f"{number}.json").write_text('{"image": "0.png", "text": "likes"}')
    assert "2 images without captions" in refused(capsys, "--train_data_dir", folder)


def test_captions_from_windows_editors(tmp_path):
    folder = image_folder(tmp_path / "p", 4, layout="none")
    for number, encoding in enumerate(["utf-8-sig", "utf-16", "latin-1", "utf-8"]):
        (folder / f"{number}.txt").write_text("café", encoding=encoding)
    found = gather(folder)
    assert found.captions == [["café"]] * 3
    assert len(found.left_out) == 1 and "2.png" in found.left_out[0] and "not UTF-8" in found.left_out[0]


def test_half_a_character_in_a_caption_is_replaced(tmp_path):
    folder = image_folder(tmp_path / "p", 2, layout="none")
    rows = [json.dumps({"file_name": f"{n}.png", "text": "cat \ud83d"}) for n in range(2)]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    assert gather(folder).captions == [["cat ?"]] * 2


def test_a_runs_own_samples_are_no_images(tmp_path):
    folder = image_folder(tmp_path / "p", 2, layout="txt")
    (folder / "out").mkdir()
    shutil.copy(folder / "0.png", folder / "out" / "comparison.png")
    (folder / "loop").symlink_to(folder / "loop")
    found = gather(folder, "--output_dir", str(folder / "out"))
    assert len(found) == 2 and not found.left_out


def test_a_folder_inside_the_runs_own_is_read_where_it_is_named(tmp_path):
    folder = image_folder(tmp_path / "project" / "images", 2, layout="txt")
    output = ("--output_dir", str(folder.parent))
    assert len(gather(folder, *output)) == 2
    of_class = ("--class_data_dir", str(folder), "--class_prompt", "a disc", "--num_class_images", "3")
    assert missing_class_images(*parts(parse_args([*of_class, *output]), "data", "output")) == 1


def test_a_pipe_among_the_images_is_not_opened(tmp_path):
    """Opening a FIFO for reading waits for a writer; here a writer waits for a reader, so that the test cannot hang."""
    folder = image_folder(tmp_path / "p", 2, layout="txt")
    fifo = folder / "2.png"
    (folder / "2.txt").write_text("red disc")
    os.mkfifo(fifo)
    opened = threading.Event()

    def wait_for_a_reader() -> None:
        with fifo.open("wb"):
            opened.set()

    thread = start_thread(wait_for_a_reader)
    found = gather(folder)
    was_opened = opened.is_set()
    os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
    join(thread)
    assert not was_opened
    assert len(found) == 2 and "2.png" in found.left_out[0]


@pytest.mark.parametrize("named", ["0.png", "mask.png"])
def test_an_image_that_cannot_be_read_just_now_ends_the_run(tmp_path, monkeypatch, named):
    """If it were left out, it would be missing from all runs that resume this one."""
    folder = image_folder(tmp_path / "p", 2, layout="none")
    random_image(1).save(folder / "mask.png")
    rows = [{"file_name": "0.png", "text": "disc"}, {"file_name": "1.png", "text": "box", "mask": "mask.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = PIL.Image.open

    def fails(file, *rest):
        if str(file).endswith(named):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return read(file, *rest)

    monkeypatch.setattr(PIL.Image, "open", fails)
    with pytest.raises(RunFailed, match=rf"cannot be read now .*{folder}/{named}"):
        gather(folder, "--masked_loss")


@pytest.mark.parametrize("name", ["more", "lost+found"])
def test_a_folder_that_cannot_be_listed_ends_the_run(tmp_path, monkeypatch, name):
    """Except lost+found, which only root may list."""
    folder = image_folder(tmp_path / "p", 2, layout="txt")
    inner = image_folder(folder / name, 2, layout="txt")
    read = os.scandir

    def fails(place):
        if os.fspath(place) == str(inner):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return read(place)

    monkeypatch.setattr(os, "scandir", fails)
    if name == "lost+found":
        assert len(gather(folder)) == 2
    else:
        with pytest.raises(PermissionError, match=str(inner)):
            gather(folder)


def test_a_name_that_is_too_long_is_no_image(tmp_path):
    """This is a permanent error."""
    folder = image_folder(tmp_path / "p", 2)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "9" * 300, "text": "disc"}))
    assert gather(folder).left_out == (f"{folder}/{'9' * 300}: not an image",)


def test_names_that_a_terminal_would_obey_are_printed_escaped(tmp_path):
    folder = image_folder(tmp_path / "p", 1)
    (folder / "\x1b[2J.png").write_bytes(b"no image")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "\x1b[2J.png", "text": "a"}))
    said = []
    context = SimpleNamespace(accelerator=SimpleNamespace(print=said.append))
    print_skipped_images(dataclasses.replace(gather(folder), notes=("not read: \x1b[1A.png",)), context)
    left_out = f"left out: {folder}/\\x1b[2J.png: not an image"
    assert said == ["not read: \\x1b[1A.png", left_out, "left out 1 image, kept 1"]


# -- what is left out is said ----------------------------------------------------------------------------------------


def test_images_that_cannot_be_used_are_named_and_left_out(tmp_path, capsys):
    folder = image_folder(tmp_path / "p", caption=lambda i: [None, "a\0b", "", ["x", "y"], "gone", "text"][i])
    (folder / "4.png").unlink()
    (folder / "5.png").write_text("not an image")
    found = gather(folder)
    assert found.captions == [["ab"], ["x", "y"]]
    assert [line.split("/")[-1] for line in found.left_out] == [
        "0.png: no caption", "2.png: no caption", "4.png: no such file", "5.png: not an image"
    ]  # fmt: skip
    assert "0.png" in refused(capsys, "--train_data_dir", folder, "--strict", "--output_dir", tmp_path / "out")


def test_images_of_less_than_a_latent_are_left_out(tmp_path, capsys):
    folder = image_folder(tmp_path / "p", 4)
    for number, size in enumerate([(1, 1), (64, 7), (8, 8)]):
        PIL.Image.new("RGB", size).save(folder / f"{number}.png")
    left_out = [line.removeprefix(f"{folder}/") for line in gather(folder).left_out]
    assert left_out == [f"{name} pixels, less than a latent (8 x 8)" for name in ("0.png: 1 x 1", "1.png: 64 x 7")]
    assert "0.png: 1 x 1 pixels" in refused(capsys, "--train_data_dir", folder, "--strict")


def test_names_that_are_not_utf_8_are_left_out(tmp_path, capsys):
    """As in an old archive; Arrow, which stores the rows, does not accept them."""
    folder = image_folder(tmp_path / "p", 3, layout="none")
    (folder / "1.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    (folder / "2.png").rename(folder / os.fsdecode(b"\x82.png"))
    rows = [{"file_name": "0.png", "mask": "\udc82.png", "text": "x"}, {"file_name": "caf\udce9.png", "text": "y"}]
    for text in ("0.txt", os.fsdecode(b"caf\xe9.txt")):
        (folder / text).write_text("red disc")
    found = gather(folder)
    assert found.captions == [["red disc"]] and "caf?.png: its path is not UTF-8" in found.left_out[0]
    assert "not UTF-8" in refused(capsys, "--train_data_dir", folder, "--strict", "--output_dir", tmp_path / "out")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "0.png: its path is not UTF-8" in refused(capsys, "--train_data_dir", folder, "--masked_loss")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layout", "head"), [("jsonl", 0), ("csv", 1)])
def test_images_that_metadata_does_not_list_are_counted(brief_flags, tmp_path, layout, head):
    folder = image_folder(tmp_path / "p", 5, layout=layout)
    metadata = folder / f"metadata.{layout}"
    metadata.write_text("\n".join(metadata.read_text().splitlines()[: head + 3]))
    lines = printed(*brief_flags, "--train_data_dir", folder, "--output_dir", tmp_path / "out")
    assert "2 images" in only(lines, metadata.name)


@pytest.mark.exhaustive
def test_folders_that_are_not_followed_and_repeats_that_do_not_count_are_said(brief_flags, tmp_path):
    """kohya's scripts would not search so deep for `10_disc`; see test_sources.py for folders where they do."""
    folder = image_folder(tmp_path / "p" / "deep" / "10_disc", 2, layout="txt").parents[1]
    image_folder(folder / "deep" / "3_box", 1, layout="txt")
    image_folder(tmp_path / "elsewhere", 1, layout="txt")
    for name in ("one", "two"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    lines = printed(*brief_flags, "--train_data_dir", folder, "--output_dir", tmp_path / "out")
    assert "2 " in only(lines, "link")
    assert "3 " in only(lines, "repeat")


# -- bad folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "a\\u0000.png", "text": "x"}',
        '{"file_name": "\\ud800.png", "text": "x"}',
        '{"file_name": "loop.png", "text": "x"}',
        "[" * 100_000,
    ],
)
def test_rows_that_name_no_file_are_refused(tmp_path, capsys, row):
    folder = image_folder(tmp_path / "p", layout="none")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "metadata.jsonl").write_text(row)
    assert str(folder) in refused(capsys, "--train_data_dir", folder, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "line", "word"),
    [
        (["0.png,red", "1.png,red, round disc"], 3, "quotes"),
        (["0.png,red", '1.png,"red', "2.png,red"], 4, "read"),
        (["0.png,red", "../1.png,red"], 3, "outside"),
        (["0.png,red", ",red"], 3, "file_name"),
    ],
)
def test_a_bad_row_of_metadata_csv_is_refused_with_its_line(tmp_path, capsys, rows, line, word):
    folder = image_folder(tmp_path / "p", 3, layout="none")
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    message = refused(capsys, "--train_data_dir", folder, "--output_dir", tmp_path / "out")
    assert f"metadata.csv line {line}" in message and word in message


@pytest.mark.parametrize(
    ("name", "row"),
    [("metadata.jsonl", '{"file_name": "0.png", "text": "é"}'), ("metadata.csv", "file_name,text\n0.png,é")],
)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_metadata_that_is_not_utf_8_is_refused(tmp_path, capsys, name, row, encoding):
    (tmp_path / name).write_bytes(row.encode(encoding))
    assert "not UTF-8; save the file as UTF-8" in refused(capsys, "--train_data_dir", tmp_path)


@pytest.mark.parametrize("content", ["", '{"file_name": "../0.png", "text": "x"}', '{"file_name": "0.png"}', "{"])
def test_bad_metadata_is_refused(tmp_path, capsys, content):
    folder = image_folder(tmp_path / "p", layout="none")
    (folder / "metadata.jsonl").write_text(content)
    assert "--" in refused(capsys, "--train_data_dir", folder, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("first", ["file_name;text", '"file_name";"text"', "text;file_name"])
def test_semicolons_in_metadata_csv_are_named(tmp_path, capsys, first):
    """Excel writes them where numbers have decimal commas."""
    folder = image_folder(tmp_path / "p", 1, layout="none")
    (folder / "metadata.csv").write_text(f"{first}\n0.png;red disc, blue box\n", encoding="utf-8-sig")
    line = refused(capsys, "--train_data_dir", folder)
    assert "metadata.csv line 1: semicolons between the columns; separate them with commas" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "file_name\ttext\n0.png\tred disc",
            r"metadata.csv line 1: the columns are 'file_name\ttext', without file_name; write file_name,text there",
        ),
        ("0.png,red disc\n", "metadata.csv line 1: the columns are '0.png', 'red disc', without file_name"),
        ("\n\r\n0.png,red disc\n", "metadata.csv line 3: the columns are '0.png', 'red disc', without file_name"),
        ("\n\n", "metadata.csv: is empty; write file_name,text there, and below it a row for each image"),
    ],
)
def test_a_first_line_of_metadata_csv_without_columns_is_named(tmp_path, capsys, content, words):
    folder = image_folder(tmp_path / "p", 1, layout="none")
    (folder / "metadata.csv").write_text(content)
    line = refused(capsys, "--train_data_dir", folder)
    assert words in line


@pytest.mark.parametrize("text", ["red disc", "red, disc"])
def test_blank_lines_before_the_columns_of_metadata_csv_are_passed_over(tmp_path, capsys, text):
    """They still count in the line numbers of messages."""
    folder = image_folder(tmp_path / "p", 1, layout="none")
    (folder / "metadata.csv").write_bytes(f"\r\n\r\nfile_name,text\r\n\r\n0.png,{text}\r\n".encode())
    if "," in text:
        assert "metadata.csv line 5: has more cells" in refused(capsys, "--train_data_dir", folder)
    else:
        assert gather(folder).captions == [["red disc"]]


def test_a_blank_in_a_columns_name_is_seen(tmp_path, capsys):
    folder = image_folder(tmp_path / "p", 1, layout="none")
    (folder / "metadata.csv").write_text("file_name, text\n0.png, red disc")
    assert "has the columns ' text', 'file_name'; name one of these" in refused(capsys, "--train_data_dir", folder)


def test_a_table_of_something_else_does_not_hide_a_saved_data_set(tmp_path):
    three_images().save_to_disk(tmp_path / "p")
    (tmp_path / "p" / "metadata.csv").write_text("name,license\n0,MIT\n")
    assert len(gather(tmp_path / "p")) == 3


@pytest.mark.parametrize(
    "content", ["", "file_name,text", '"file_name,text\n0.png,red disc', "name;text\n0.png;red disc"]
)
def test_bad_metadata_csv_is_refused(tmp_path, capsys, content):
    folder = image_folder(tmp_path / "p", layout="none")
    (folder / "metadata.csv").write_text(content)
    assert str(folder) in refused(capsys, "--train_data_dir", folder, "--output_dir", tmp_path / "out")


def test_folder_without_captions_is_refused(tmp_path, capsys):
    image_folder(tmp_path / "p" / "cats", 2, layout="none")
    assert "2 images without captions" in refused(capsys, "--train_data_dir", tmp_path / "p")


@pytest.mark.parametrize("named", ["img/10_sks cat", "."])
def test_the_folder_above_kohyas_folders_is_named(tmp_path, capsys, named):
    image_folder(tmp_path / "p" / "img" / "10_sks cat", 2, layout="none")
    line = refused(capsys, "--train_data_dir", tmp_path / "p" / named)
    assert f"2 images without captions (folder names are not captions); give {tmp_path / 'p' / 'img'}, in which" in line
    for number, other in enumerate(("0_none", "2024_summer")):  # which are not kohya's
        image_folder(tmp_path / f"q{number}" / other, 1, layout="none")
        assert "in which kohya's" not in refused(capsys, "--train_data_dir", tmp_path / f"q{number}")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(capsys, "--train_data_dir", tmp_path / "empty")


# -- what cannot be meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["jsonl", "csv", "txt"])
def test_an_image_with_a_blank_caption_is_left_out_in_every_layout(tmp_path, layout):
    found = gather(image_folder(tmp_path / "p", 3, ["", " \t", "red disc"].__getitem__, layout))
    assert found.captions == [["red disc"]] and len(found.left_out) == 2
    assert all(line.endswith("no caption") for line in found.left_out)


@pytest.mark.parametrize("again", ["0.png", "./0.png"])
def test_a_file_that_is_listed_twice_is_refused_with_both_lines(tmp_path, capsys, again):
    folder = image_folder(tmp_path / "p", 2)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": again, "text": "another"}))
    line = refused(capsys, "--train_data_dir", folder)
    assert f"metadata.jsonl line 3: names {again}, as line 1 does; remove one" in line


@pytest.mark.parametrize(
    ("layout", "name"),
    [("jsonl", "image_column"), ("txt", "image_column"), ("txt", "caption_column")],
)
def test_a_column_of_files_is_refused(tmp_path, capsys, layout, name):
    folder = image_folder(tmp_path / "p", 2, layout=layout)
    line = refused(capsys, "--train_data_dir", folder, f"--{name}", "photo")
    assert f"--{name} photo: the {name.partition('_')[0]}s are files" in line and "leave it out" in line


def test_an_image_that_is_removed_while_training_is_named_with_the_fix(brief_flags, tmp_path, capsys, monkeypatch):
    folder = image_folder(tmp_path / "images", 3)
    removed = lambda *args: [path.unlink() for path in folder.glob("*.png")]  # noqa: E731
    monkeypatch.setattr(run, "train_method", lambda *args: removed() and train_method(*args))
    flags = [*brief_flags, "--train_data_dir", folder, "--no-cache_latents", "--num_validation_images", "0"]
    line = failed(capsys, *flags, "--output_dir", tmp_path / "out")
    assert ".png cannot be read now" in line and line.endswith(
        "restore the file, and resume: the last checkpoint is intact"
    )
