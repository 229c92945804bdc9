"""Images and captions: every layout of a folder, and which images are left out."""

import json
import shutil
from pathlib import Path

import datasets
import PIL.Image
import pyarrow.parquet
import pytest
from pipelines import image_folder, random_image, red_or_blue, same_image

from images.runs import load_images, only, printed, refused
from reslora.errors import InvalidArgument
from reslora.images.data.dataset import ImageDataset
from reslora.images.settings import parse_args


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


def test_caption_files_beside_a_table_are_told_because_they_are_not_read(tmp_path):
    layout = "jsonl"
    folder = image_folder(tmp_path / "p", 3, layout=layout)
    (folder / "0.txt").write_text("edited")
    (folder / "2.caption").write_text("edited")
    found, told = gather(folder), "with a caption file, which is not read: the captions are those of metadata"
    assert_are_three(found)
    assert only(list(found.notes), told) == f"2 images {told}.{layout}"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_column_group_names_the_group_of_each_image(tmp_path, suffix):
    folder = image_folder(tmp_path / "images", count=3)
    path, names = folder / f"metadata.{suffix}", ["a", "b", "a"]
    (folder / "metadata.jsonl").unlink()

    def write(names: list[str | None]) -> None:
        rows = [{"file_name": f"{number}.png", "text": "t", "group": name} for number, name in enumerate(names)]
        lines = [json.dumps(row) for row in rows]
        if suffix == "csv":
            lines = ["file_name,text,group", *(",".join(value or "" for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))

    write(names)
    found = gather(folder)
    assert found.groups == names and list(found.select([2, 1]).groups) == ["a", "b"]
    write(["a", None, "a"])
    with pytest.raises(InvalidArgument, match=r"metadata.* line [23]: no group, but other images have one; fill it in"):
        gather(folder)


def test_parquet_shards_hold_images_too(tmp_path):
    """As `push_to_hub` and `to_parquet` write them."""
    folder = tmp_path / "p" / "data"
    folder.mkdir(parents=True)
    three_images().to_parquet(folder / "train-00000-of-00001.parquet")
    found = load_images(parse_args(["--train_data_dir", str(folder.parent), "--cache_dir", str(tmp_path / "cache")]))
    assert_are_three(found)


def file_rows(**columns: str) -> datasets.Dataset:
    """Return a row that names its files by paths; `datasets` itself would write their content."""
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({name: image for name in columns} | {"text": datasets.Value("string")})
    rows = {name: [{"bytes": None, "path": path}] for name, path in columns.items()} | {"text": ["red disc"]}
    return datasets.Dataset.from_dict(rows, features)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["text", "path", "mask"])
def test_rows_name_no_file_outside_the_folder(tmp_path, layout):
    """The line does not reveal whether the file exists or is an image."""
    folder, outside = tmp_path / "p", tmp_path / "secret.png"
    folder.mkdir()
    random_image(1).save(folder / "0.png")
    rows = file_rows(image=str(outside))
    if layout == "text":
        rows = datasets.Dataset.from_dict({"image": [str(outside)], "text": ["red disc"]})
    if layout == "mask":
        rows = file_rows(image=str(folder / "0.png"), mask=str(outside))
    pyarrow.parquet.write_table(rows.data.table, folder / "0.parquet")
    words = ["--train_data_dir", str(folder), "--cache_dir", str(tmp_path / "cache"), "--masked_loss"]
    lines = set()
    for content in (None, b"root:x:0:0", (folder / "0.png").read_bytes()):
        if content:
            outside.write_bytes(content)
        with pytest.raises(InvalidArgument) as refusal:
            load_images(parse_args(words))
        lines.add(str(refusal.value))
    said = f"names {outside}, which is outside of the folder; move the image into the folder"
    assert lines == {f"--train_data_dir {folder} row 0: {said}"}


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


@pytest.mark.parametrize("splits", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path, splits):
    """In whatever format its rows were set to be returned."""
    rows = three_images()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = datasets.Dataset.from_dict({"image": rows["image"], "text": [[text] for text in rows["text"]]}, features)
    if splits:
        rows = datasets.DatasetDict({"test": rows.select([2]), "train": rows})
    rows.with_format("numpy").save_to_disk(tmp_path / "p")
    found = load_images(parse_args(["--train_data_dir", str(tmp_path / "p")]))
    assert_are_three(found)
    assert found.notes == (("the split train is trained on, not test",) if splits else ())


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


def test_captions_from_windows_editors(tmp_path):
    folder = image_folder(tmp_path / "p", 4, layout="none")
    for number, encoding in enumerate(["utf-8-sig", "utf-16", "latin-1", "utf-8"]):
        (folder / f"{number}.txt").write_text("café", encoding=encoding)
    found = gather(folder)
    assert found.captions == [["café"]] * 3
    assert len(found.left_out) == 1 and "2.png" in found.left_out[0] and "not UTF-8" in found.left_out[0]


def test_a_runs_own_samples_are_no_images(tmp_path):
    folder = image_folder(tmp_path / "p", 2, layout="txt")
    (folder / "out").mkdir()
    shutil.copy(folder / "0.png", folder / "out" / "comparison.png")
    (folder / "loop").symlink_to(folder / "loop")
    found = gather(folder, "--output_dir", str(folder / "out"))
    assert len(found) == 2 and not found.left_out


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


@pytest.mark.exhaustive
def test_images_that_metadata_does_not_list_are_counted(brief_flags, tmp_path):
    layout = "jsonl"
    folder = image_folder(tmp_path / "p", 5, layout=layout)
    metadata = folder / f"metadata.{layout}"
    metadata.write_text("\n".join(metadata.read_text().splitlines()[:3]))
    lines = printed(*brief_flags, "--train_data_dir", folder, "--output_dir", tmp_path / "out")
    assert "2 images" in only(lines, metadata.name)


# -- bad folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    ['{"file_name": "a\\u0000.png", "text": "x"}', "[" * 100_000],
)
def test_rows_that_name_no_file_are_refused(tmp_path, capsys, row):
    folder = image_folder(tmp_path / "p", layout="none")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "metadata.jsonl").write_text(row)
    assert str(folder) in refused(capsys, "--train_data_dir", folder, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "line", "word"),
    [(["0.png,red", "1.png,red, round disc"], 3, "quotes"), (["0.png,red", "../1.png,red"], 3, "outside")],
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
def test_metadata_that_is_not_utf_8_is_refused(tmp_path, capsys, name, row):
    (tmp_path / name).write_bytes(row.encode("latin-1"))
    assert "not UTF-8; save the file as UTF-8" in refused(capsys, "--train_data_dir", tmp_path)


@pytest.mark.parametrize("content", ["", '{"file_name": "../0.png", "text": "x"}'])
def test_bad_metadata_is_refused(tmp_path, capsys, content):
    folder = image_folder(tmp_path / "p", layout="none")
    (folder / "metadata.jsonl").write_text(content)
    assert "--" in refused(capsys, "--train_data_dir", folder, "--output_dir", tmp_path / "out")


def test_a_first_line_of_metadata_csv_without_columns_is_named(tmp_path, capsys):
    folder = image_folder(tmp_path / "p", 1, layout="none")
    (folder / "metadata.csv").write_text("file_name\ttext\n0.png\tred disc")
    line = refused(capsys, "--train_data_dir", folder)
    assert (
        r"metadata.csv line 1: the columns are 'file_name\ttext', without file_name; write file_name,text there" in line
    )


def test_folder_without_captions_is_refused(tmp_path, capsys):
    image_folder(tmp_path / "p" / "cats", 2, layout="none")
    assert "2 images without captions" in refused(capsys, "--train_data_dir", tmp_path / "p")


def test_the_folder_above_kohyas_folders_is_named(tmp_path, capsys):
    image_folder(tmp_path / "p" / "img" / "10_sks cat", 2, layout="none")
    line = refused(capsys, "--train_data_dir", tmp_path / "p" / "img/10_sks cat")
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


def test_a_file_that_is_listed_twice_is_refused_with_both_lines(tmp_path, capsys):
    again = "0.png"
    folder = image_folder(tmp_path / "p", 2)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": again, "text": "another"}))
    line = refused(capsys, "--train_data_dir", folder)
    assert f"metadata.jsonl line 3: names {folder / '0.png'}, as line 1 does; keep one of them" in line


@pytest.mark.parametrize("layout", ["json", "parquet"])
def test_an_image_in_two_rows_of_a_table_is_refused_with_both_rows(tmp_path, capsys, layout):
    folder = image_folder(tmp_path / "p", 2, layout="none")
    rows = datasets.Dataset.from_dict({"image": ["0.png", "1.png", "./0.png"], "text": ["disc", "box", "another"]})
    (rows.to_json if layout == "json" else rows.to_parquet)(folder / f"train.{layout}")
    line = refused(capsys, "--train_data_dir", folder, "--cache_dir", tmp_path / "cache")
    assert f"row 2: names {folder / '0.png'}, as row 0 does; keep one of them" in line


def test_a_column_of_files_is_refused(tmp_path, capsys):
    name = "image_column"
    folder = image_folder(tmp_path / "p", 2, layout="jsonl")
    line = refused(capsys, "--train_data_dir", folder, f"--{name}", "photo")
    assert f"--{name} photo: the {name.partition('_')[0]}s are files" in line and "leave it out" in line
