"""Read captions from files next to the images, in UTF-8 or in the encodings that Windows' editors write."""

import codecs
from pathlib import Path

CAPTIONS = (".txt", ".caption")  # the second suffix is kohya's; if both files exist, the .txt is read


def caption_files(image: Path) -> list[Path]:
    """Return the existing caption files of an image, the preferred one first.

    Suffixes may be upper case, as cameras and Windows write them.
    """
    spelt = ([image.with_suffix(suffix), image.with_suffix(suffix.upper())] for suffix in CAPTIONS)
    return [text for both in spelt if (text := next(filter(Path.is_file, both), None))]


def read_caption(path: Path) -> list[str] | str:
    """Return a list with the caption in a text file, or a string with the reason why the file cannot be decoded."""
    return caption_in(path.read_bytes())


def caption_in(content: bytes) -> list[str] | str:
    """Return a list with the caption in a file's content, or a string with the reason why it cannot be decoded.

    The content may be UTF-8 with or without a byte order mark, or UTF-16 with a byte order mark.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return [content.decode("utf-16" if marked else "utf-8-sig").strip()]
    except UnicodeDecodeError:
        return "its caption is not UTF-8"
