"""Hashes of file contents, to detect that an image or a model was replaced."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

Content = str | os.PathLike | bytes
"""Path of a file, or its content."""

PIECES, PIECE = 8, 4096  # number and size in bytes of the parts that are read of each tensor in a safetensors file
LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
UNREAD = {".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pt", ".pth"}  # weights that are never loaded


def content_mark(source: Content) -> str:
    """Return the size and a hash of a file, given as a path or as its content.

    The complete file is hashed, unless it is a path of a safetensors file: hashing a model of 24 GB would take half a
    minute. Of a safetensors file, the header and several parts of every tensor are hashed. This hash detects every
    tensor that was trained, merged, scaled or replaced, but may miss a few changed numbers within a large tensor.
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


def files_mark(paths: Iterable[Path]) -> str:
    """Return the sizes and hashes of several files, as in `content_mark`."""
    return "+".join(map(content_mark, paths))


def folder_mark(folder: Path) -> str:
    """Return a hash of the names and contents of all files below a directory, except weights that are never loaded."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in UNREAD):
        digest.update(f"{path.relative_to(folder)} {content_mark(path)}\n".encode())
    return digest.hexdigest()


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]] | None:
    """Return the offsets and lengths of the bytes of a safetensors file to hash; None if the file is damaged."""
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
