"""The content of files in short, wherever they are: another one in the place of an image or a model is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

Content = str | os.PathLike | bytes
"""A file, or a file's content."""

PIECES, PIECE = 8, 4096  # of a tensor in a safetensors file, as many stretches of so many bytes are read
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself
UNREAD = {".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pt", ".pth"}  # weights that are never loaded


def content_mark(source: Content) -> str:
    """Size and a hash of a file, given as a path or as its content.

    All of it is read, but for safetensors files: a model of 24 GB would take half a minute. Of these the header and
    pieces of every tensor are, from its beginning to its end, so that any tensor that was trained, merged, scaled or
    exchanged is noticed; a few numbers changed within a large one need not be.
    """
    if isinstance(source, bytes):
        return f"{len(source)}:{hashlib.blake2b(source, digest_size=8).hexdigest()}"
    path = Path(source)
    with path.open("rb", buffering=0) as file:
        size, digest = path.stat().st_size, hashlib.blake2b(digest_size=8)
        spans = _tensors(file, size) if path.suffix.lower() == ".safetensors" else None
        if spans is None:
            file.seek(0)
            return f"{size}:{hashlib.file_digest(file, lambda: digest).hexdigest()}"
        for start, length in spans:
            file.seek(start)
            digest.update(file.read(length))
        return f"{size}:{digest.hexdigest()}"


def folder_mark(folder: Path) -> str:
    """Return a hash of all files below a folder, but for weights that are never loaded: their names and contents."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in UNREAD):
        digest.update(f"{path.relative_to(folder)} {content_mark(path)}\n".encode())
    return digest.hexdigest()


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]] | None:
    """Where to read a safetensors file: starts and lengths; None for one that is damaged."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LONGEST_HEADER):
        return None
    try:
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        spans = sorted((int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for entry in entries.values())
        whole = all(0 <= start <= end <= size for start, end in spans)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return [(0, 8 + length), *_pieces(spans, 8 + length)] if whole else None


def _pieces(spans: list[tuple[int, int]], offset: int) -> Iterator[tuple[int, int]]:
    for start, end in spans:
        length = end - start
        if length <= PIECES * PIECE:
            yield offset + start, length
        else:
            yield from ((offset + start + i * (length - PIECE) // (PIECES - 1), PIECE) for i in range(PIECES))
