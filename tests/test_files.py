"""Checksums: what is written is noticed when it changes."""

import hashlib
import json

import pytest

from reslora.files import CHECKSUMS_NAME, check_checksums, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}\n")
    write_checksums(tmp_path)
    return tmp_path


def flip(path, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def refusal(folder, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        check_checksums(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_file_below_the_folder_is_listed_with_its_sha256(folder):
    sums = json.loads((folder / CHECKSUMS_NAME).read_text())
    assert list(sums) == ["unet/config.json", "weights.bin"]
    assert sums["weights.bin"] == hashlib.sha256(bytes(range(256)) * 8).hexdigest()
    check_checksums(folder)


@pytest.mark.parametrize("name", ["weights.bin", "unet/config.json"])
def test_one_flipped_bit_is_named(folder, name):
    flip(folder / name)
    assert f"{folder / name} is damaged" in refusal(folder)


def test_a_missing_file_is_named(folder):
    (folder / "weights.bin").unlink()
    assert f"{folder / 'weights.bin'} is missing" in refusal(folder)


def test_writing_again_covers_what_came_since(folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "weights.bin").write_bytes(b"other")
    write_checksums(folder)
    check_checksums(folder)
    flip(folder / "optimizer.pt")
    assert "optimizer.pt is damaged" in refusal(folder)


def test_only_the_named_files_are_listed_and_checked(folder):
    (folder / "log.jsonl").write_text("one\n")
    (folder / "weights.bin").write_bytes(b"other")
    write_checksums(folder, ["weights.bin"])
    check_checksums(folder)
    assert set(json.loads((folder / CHECKSUMS_NAME).read_text())) == {"unet/config.json", "weights.bin"}
    flip(folder / "unet" / "config.json")
    check_checksums(folder, ["weights.bin", "log.jsonl"])
    assert "config.json is damaged" in refusal(folder)


def test_a_folder_without_checksums_passes(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"old")
    check_checksums(tmp_path)


def test_a_temporary_of_another_writer_is_not_listed(folder):
    (folder / ".log.jsonl.123.tmp").write_text("half")
    write_checksums(folder)
    assert list(json.loads((folder / CHECKSUMS_NAME).read_text())) == ["unet/config.json", "weights.bin"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1}', '{"/dev/zero": "0"}', '{"../a": "0"}', "[" * 100_000, "\udcff"]
)
def test_damaged_checksums_are_refused(folder, content):
    (folder / CHECKSUMS_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert CHECKSUMS_NAME in refusal(folder)
