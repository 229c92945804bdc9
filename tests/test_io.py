"""Files are written atomically, also by several writers, and changes of their content are detected."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from reslora.io import (
    CHECKSUMS_NAME,
    check_checksums,
    forget_checksums,
    read_object,
    remove_leftovers,
    replacing,
    write_checksums,
    write_json,
    write_one_by_one,
)


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


def test_one_flipped_bit_is_named(folder):
    name = "weights.bin"
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


def test_what_is_forgotten_is_not_checked_and_the_rest_is(folder):
    forget_checksums(folder, iter(["weights.bin", "log.jsonl"]))
    assert list(json.loads((folder / CHECKSUMS_NAME).read_text())) == ["unet/config.json"]
    flip(folder / "weights.bin")
    check_checksums(folder)
    (folder / CHECKSUMS_NAME).write_text("damaged")
    forget_checksums(folder, ["weights.bin"])
    check_checksums(folder)


def test_a_folder_without_checksums_passes(tmp_path):
    """`check_checksums` raises an error for a file that differs from its checksum."""
    (tmp_path / "weights.bin").write_bytes(b"old")
    check_checksums(tmp_path)


def test_a_temporary_of_another_writer_is_not_listed(folder):
    with replacing(folder / "log.jsonl") as temporary:
        temporary.write_text("half")
        write_checksums(folder)
    assert list(json.loads((folder / CHECKSUMS_NAME).read_text())) == ["unet/config.json", "weights.bin"]


@pytest.mark.parametrize("content", ["[]", '{"/dev/zero": "0"}'])
def test_damaged_checksums_are_refused(folder, content):
    (folder / CHECKSUMS_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert CHECKSUMS_NAME in refusal(folder)


# -- temporaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Path.write_text, lambda path, text: (path.mkdir(), (path / "a").write_text(text))])
def test_two_who_write_at_once_do_not_meet(tmp_path, make):
    """As two machines with the same process id on one disk would."""
    path = tmp_path / "out"
    with replacing(path) as one:
        make(one, "one")
        with replacing(path) as other:
            make(other, "other")
        assert (path if path.is_file() else path / "a").read_text() == "other"
    assert (path if path.is_file() else path / "a").read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("named", [None, "/part"])  # by a write, and by who opens it or a file in it
def test_a_full_disk_names_what_was_to_be_written(tmp_path, named):
    with pytest.raises(OSError, match="No space left") as error, replacing(tmp_path / "out") as temporary:
        raise OSError(28, "No space left on device", *([] if named is None else [f"{temporary}{named}"]))
    assert error.value.filename == str(tmp_path / "out") + (named or "")
    assert str(error.value).endswith(f"device: '{tmp_path}/out{named or ''}'")


def left_by(folder: Path, dies: bool) -> tuple[int, Path]:
    """Start a process that writes into the folder and is killed, or waits to be; return its temporary file too."""
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        with replacing(folder / "out") as temporary:
            (temporary / "part").mkdir(parents=True)
            os.write(writes, os.fsencode(temporary))
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
    path = Path(os.fsdecode(os.read(reads, 4096)))
    os.close(reads)
    os.close(writes)
    if dies:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    return process, path


def test_what_a_killed_process_left_goes_and_what_another_is_writing_stays(tmp_path):
    (dead, left), (alive, written) = left_by(tmp_path, dies=True), left_by(tmp_path, dies=False)
    try:
        remove_leftovers(tmp_path)
        assert not left.exists() and written.is_dir()  # nobody has waited for the dead one yet
        remove_leftovers(tmp_path / "missing")
    finally:
        os.kill(alive, signal.SIGKILL)
        for process in (dead, alive):
            os.waitpid(process, 0)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- tensors one by one ------------------------------------------------------------------------------------------------


def test_a_path_that_is_not_utf_8_is_read_back_from_json_as_it_was(tmp_path):
    content = {"output_dir": os.fsdecode(b'caf\xe9\\\x80"\\'), "train_data_dir": "café 🎈 \\udce9"}
    write_json(tmp_path / "config.json", content)
    assert read_object(tmp_path / "config.json") == content
    assert "café 🎈" in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_tensors_written_one_by_one_are_the_file_that_safetensors_writes(tmp_path):
    values = {
        "b": torch.randn(3, 2),
        "a": torch.randn(2, 3).t(),
        "half": torch.randn(5).bfloat16(),
        "number": torch.tensor(7),
        "none": torch.empty(0, 2),
    }
    write_one_by_one(tmp_path / "file", {name: value.to("meta") for name, value in values.items()}, values.get)
    expected = save({name: value.contiguous() for name, value in values.items()}, {"format": "pt"})
    assert (tmp_path / "file").read_bytes() == expected


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="weight is torch"):
        write_one_by_one(tmp_path / "file", {"weight": torch.empty(3, 2)}, lambda _: torch.ones(2, 3))
