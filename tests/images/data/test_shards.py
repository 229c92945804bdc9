"""Webdatasets: which of their files are read, and which entries."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from pipelines import random_image, same_image

from images.runs import only, printed, refused

from .test_dataset import gather


def webdataset(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path.parent


def png(number: int) -> bytes:
    file = io.BytesIO()
    random_image(number).save(file, "PNG")
    return file.getvalue()


@pytest.mark.exhaustive
def test_a_webdataset_is_read(brief_flags, tmp_path):
    """Its columns are suffixes; with a train split, the other split is skipped with a note."""
    folder, flags = tmp_path / "p", ("--cache_dir", str(tmp_path / "cache"))
    for number, name in enumerate(["train-0.tar", "train-1.tar", "test-0.tar"]):
        webdataset(folder / name, {f"{number}.png": png(number), f"{number}.txt": f"box {number}".encode()})
    found = gather(folder, *flags)
    assert found.captions == [["box 0"], ["box 1"]]
    assert all(same_image(found.open(number), random_image(number)) for number in range(2))
    lines = printed(*brief_flags, "--train_data_dir", folder, *flags, "--output_dir", tmp_path / "out")
    assert "1 of 3 files" in only(lines, "training split")
    assert "png" in only(lines, "images are") and "txt" in only(lines, "images are")


@pytest.mark.parametrize("name", ["0.pth", "0.pickle"])
def test_pickle_in_a_webdataset_is_refused(tmp_path, capsys, name):
    content = pickle.dumps(Path("/nowhere"))
    folder = webdataset(tmp_path / "p" / "0.tar", {"0.png": png(0), "0.txt": b"box", name: content})
    flags = ("--train_data_dir", folder, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
    line = refused(capsys, *flags)
    assert name in line and "pickle" in line and not (tmp_path / "cache").exists()


def test_a_damaged_webdataset_is_refused(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.tar").write_bytes(b"no tar" * 1000)
    assert "p" in refused(capsys, "--train_data_dir", tmp_path / "p", "--cache_dir", tmp_path / "cache", quiet=False)


def test_an_archive_that_is_cut_between_its_files_is_noted(tmp_path):
    """tarfile ends there without an error, and so does `datasets`."""
    members = {f"{number}.{kind}": content for number in range(3) for kind, content in contents(number)}
    flags = ("--cache_dir", str(tmp_path / "cache"))
    path = webdataset(tmp_path / "p" / "0.tar", members) / "0.tar"
    assert not [note for note in gather(path.parent, *flags).notes if "cut off" in note]
    with tarfile.open(path) as archive:
        start = archive.getmember("2.png").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:start])
    found = gather(path.parent, *flags)
    assert len(found) == 2
    assert "0.tar has no end after 1.txt: is it cut off, or damaged there?" in found.notes


def contents(number: int) -> list[tuple[str, bytes]]:
    return [("png", png(number)), ("txt", b"box")]
