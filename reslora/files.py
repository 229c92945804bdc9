"""Outputs appear whole or not at all: they are written beside their place and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the body leaves there, file or folder, becomes `path` afterwards.

    If the body raises, `path` is as it was and the temporary is removed.
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
