"""Outputs appear whole or not at all: they are written beside their place and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save

from .errors import first_line

CHECKSUMS_NAME = "checksums.json"
_TEMPORARY = re.compile(r"\..+\.\d+(\.old)?\.tmp")  # what `replacing` writes to before it renames


class Damaged(ValueError):
    """A file is missing, or its content is not what was written; one that cannot be read just now is not damaged."""


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the body leaves there, file or folder, becomes `path` afterwards.

    If the body raises, `path` is as it was and the temporary is removed; an `OSError` that names no file names `path`
    (a full disk is noticed by a write, which knows none).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over another one: the old one steps aside first.
            aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            _remove(aside)
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)
        else:
            temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        _remove(temporary)


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all: the same tensors and metadata give the same bytes.

    safetensors itself writes the metadata in random order, and the file readable by its owner only.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    content = save(tensors, metadata=metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)
    with replacing(path) as temporary:
        temporary.write_bytes(len(ordered).to_bytes(8, "little") + ordered + content[start:])


def write_json(path: str | os.PathLike, content: object) -> None:
    """Writes JSON that a person can read, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_object(path: str | os.PathLike) -> dict:
    """The JSON object of a file; empty where it is missing or damaged. Raises `OSError` if it cannot be read now."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def write_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Writes `checksums.json`: the SHA-256 of every file below `folder`, or of `names` beside those already listed.

    Call it last, and again after every change: a file that is not listed is not checked.
    """
    folder = Path(folder)
    known = {}
    if names is not None:
        with suppress(ValueError):  # a damaged list is replaced
            known = _read_checksums(folder)
    found = (path for path in folder.rglob("*") if path.is_file() and not _TEMPORARY.fullmatch(path.name))
    names = [path.relative_to(folder).as_posix() for path in found] if names is None else names
    sums = known | {name: _sha256(folder / name) for name in names if name != CHECKSUMS_NAME}
    write_json(folder / CHECKSUMS_NAME, dict(sorted(sums.items())))


def check_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Compares the files of `folder`, or only `names`, with its `checksums.json`; without that file all is well.

    Raises `Damaged` naming the first file that is missing or differs, and `OSError` for one that cannot be read now.
    """
    folder = Path(folder)
    sums = _read_checksums(folder)
    for name in sums if names is None else [name for name in names if name in sums]:
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name} is missing, though {CHECKSUMS_NAME} lists it")
        if _sha256(folder / name) != sums[name]:
            raise Damaged(
                f"{folder / name} is damaged: its SHA-256 is not the one in {CHECKSUMS_NAME} (which you may delete if "
                "you have changed the file yourself)"
            )


def _read_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS_NAME
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {first_line(error)}") from error
    plain = isinstance(sums, dict) and all(isinstance(value, str) for value in sums.values())
    if not plain or any(Path(name).is_absolute() or ".." in Path(name).parts for name in sums):
        raise Damaged(f"{path} is damaged: it is no list of files and their SHA-256")
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
