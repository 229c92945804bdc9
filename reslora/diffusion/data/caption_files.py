"""Captions in files beside the images, in whatever encoding Windows' editors write."""

from __future__ import annotations

import codecs
from pathlib import Path

CAPTIONS = (".txt", ".caption")  # the second one is kohya's; the first of them that is there counts


def caption_files(image: Path) -> list[Path]:
    """The caption files beside an image; the first one is read. Cameras and Windows write suffixes in capitals."""
    spelt = ([image.with_suffix(suffix), image.with_suffix(suffix.upper())] for suffix in CAPTIONS)
    return [text for both in spelt if (text := next(filter(Path.is_file, both), None))]


def read_caption(path: Path) -> list[str] | str:
    """The caption in a text file, or what is wrong with it."""
    return caption_in(path.read_bytes())


def caption_in(content: bytes) -> list[str] | str:
    """The caption in a text file's content, or what is wrong with it; there are UTF-16 and byte order marks."""
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return [content.decode("utf-16" if marked else "utf-8-sig").strip()]
    except UnicodeDecodeError:
        return "its caption is not UTF-8"
