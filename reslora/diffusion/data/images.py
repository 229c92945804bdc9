"""One image: opened right, cropped and scaled."""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import PIL.TiffImagePlugin
import torch

from ...common.errors import first_line
from ..content import Content
from .size import Size

ORIENTATION = PIL.ExifTags.Base.Orientation
UNREADABLE = "cannot be read now"
NOTHING_COUNTS = "its mask is black or transparent everywhere, so nothing of it would be trained"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
TEXTS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG file that may say its orientation

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".tga", ".ppm",
    ".heic", ".heif",
}  # fmt: skip
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")  # what such a file says that it is


def is_image(path: Path) -> bool:
    """Whether a file is called as images are."""
    return path.suffix.lower() in SUFFIXES


def image_size(source: Content) -> tuple[int, int] | str:
    """Width and height of the upright image, from headers, or why there are none; no pixel is decoded.

    PIL refuses what would decode to gigabytes.
    """
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():
            return "not a file" if Path(source).exists() else "no such file"
        with _opened(source) as image:
            size = image.size
            if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):  # PIL has turned this one already
                size = image.tag_v2[256], image.tag_v2[257]
            return size[::-1] if _orientation(image) in SIDEWAYS else size
    except Exception as error:  # each format's reader has exceptions of its own
        if passes(error):
            return damage(error)
        if type(error).__name__ == "DecompressionBombError":
            return "too many pixels"
        return "HEIC, which Pillow does not read: convert it to JPEG" if _is_heic(source) else "not an image"


def _is_heic(source: Content) -> bool:
    """Whether it begins as photos of iPhones do."""
    head = source[:12] if isinstance(source, bytes) else b""
    with suppress(OSError):
        if not isinstance(source, bytes):
            with Path(source).open("rb") as file:
                head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC


def open_image(source: Content, ground: str = "white") -> PIL.Image.Image:
    """The image as 8-bit RGB: upright, transparency on `ground`, 16 bits scaled down, an animation's first frame."""
    image = _upright(source)
    if _has_alpha(image):
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def damage(error: Exception) -> str:
    """Why an image could not be opened; each format's reader has exceptions of its own."""
    return f"{UNREADABLE if passes(error) else 'damaged'} ({first_line(error)})"


def passes(error: Exception) -> bool:
    """Whether an image may be whole that could not be opened: the memory, the disk or the network was short.

    PIL's own errors have no number, but for the place in a damaged file that it cannot seek.
    """
    lasting = (None, errno.EINVAL, errno.ENAMETOOLONG)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in lasting)


def open_masked(source: Content, mask: Content) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """The image as 8-bit RGB, and in 8-bit grey how much each pixel counts: white fully, black not at all.

    That is what its mask says, which is black where it is transparent; of an image without one its alpha channel, and
    the colours below that are as they are.
    """
    if mask:
        return open_image(source), open_image(mask, "black").convert("L")
    image = _upright(source)
    if not _has_alpha(image):
        return image.convert("RGB"), PIL.Image.new("L", image.size, "white")
    image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")


def is_masked(source: Content, mask: Content) -> bool:
    """Whether an image has a mask or an alpha channel; no pixel is decoded."""
    with _opened(source) as image:
        return bool(mask) or _has_alpha(image)


def mask_problem(mask: Content, size: tuple[int, int]) -> str:
    """Why this cannot be the mask of an image of that width and height; empty where it can, or there is none."""
    found = image_size(mask) if mask else size
    if isinstance(found, str):
        return f"its mask: {found}"
    return "" if found == size else f"its mask is {found[0]} x {found[1]}, it is {size[0]} x {size[1]}"


def _has_alpha(image: PIL.Image.Image) -> bool:
    return "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands()


def _upright(source: Content) -> PIL.Image.Image:
    """The image as it is shown, with 8 bits a channel."""
    with _opened(source) as opened:
        opened.load()
        image = PIL.ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these at 255
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():  # it would be black or white all over
            raise ValueError("pixels that are not finite")
        top = 65535 if image.mode != "F" or values.max() > 255 else 255 if values.max() > 1 else 1
        image = PIL.Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    return image


def crop_and_scale(
    image: PIL.Image.Image, crop: Sequence[float], flip: bool, size: Size, interpolation: str
) -> torch.Tensor:
    """A [3, height, width] tensor in [-1, 1]: the part at `crop` (0 to 1 across and down) of the image, as large as can
    be, that has the shape of `size`. Of a grey image it has one channel.

    Cropping before scaling gives what scaling before cropping gives, and a 1 x 5000 image stays small.
    """
    width, height = image.size
    kept = (min(width, height * size.width / size.height), min(height, width * size.height / size.width))
    left, top = (fraction * (length - part) for fraction, length, part in zip(crop, image.size, kept, strict=True))
    name = interpolation.upper().replace("NEAREST_EXACT", "NEAREST")
    box = (left, top, left + kept[0], top + kept[1])
    image = image.resize((size.width, size.height), PIL.Image.Resampling[name], box=box)
    pixels = torch.from_numpy(np.array(image)).view(size.height, size.width, -1).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(2) if flip else pixels


def crop_mask(mask: PIL.Image.Image, crop: Sequence[float], flip: bool, size: Size) -> torch.Tensor:
    """A [1, height, width] tensor in [0, 1]: the same part of a mask; what lies beside a pixel's area adds nothing."""
    return (crop_and_scale(mask, crop, flip, size, "box") + 1) / 2


def crop_sizes(original: tuple[int, int], crop: Sequence[float], flip: bool, size: Size) -> list[int]:
    """Height and width of the image, top and left of the crop once it is scaled, height and width of the result.

    SDXL is told these (Podell et al., 2023, Section 2.2). A mirrored image was mirrored before it was cropped.
    """
    width, height = original
    by_width = size.width * height >= size.height * width  # whichever side has nothing to spare
    target, side = (size.width, width) if by_width else (size.height, height)
    spare = (width * target / side - size.width, height * target / side - size.height)
    across, down = (fraction * length for fraction, length in zip(crop, spare, strict=True))
    if flip:
        across = spare[0] - across
    return [height, width, round(down), round(across), size.height, size.width]


def _opened(source: Content) -> PIL.ImageFile.ImageFile:
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _orientation(image: PIL.ImageFile.ImageFile) -> object:
    """As `exif_transpose` reads it, which decodes a PNG file first: there it may come after the pixels."""
    exif = PIL.Image.Image.getexif(image)
    if image.format == "PNG" and ORIENTATION not in exif:
        assert image.fp is not None
        with PIL.Image.open(_without_pixels(image.fp)) as bare:
            exif = PIL.Image.Image.getexif(bare)
    return exif.get(ORIENTATION)


def _without_pixels(file: IO[bytes]) -> io.BytesIO:
    """A PNG file with its texts before the place of its pixels, and no pixels."""
    file.seek(0)
    content = file.read(8 + 25)  # the signature and the chunk that says the size
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] in TEXTS:
            content += _chunk(head[4:], file.read(length))
            file.seek(4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)
    return io.BytesIO(content + _chunk(b"IDAT", b""))


def _chunk(name: bytes, content: bytes) -> bytes:
    """With the checksum that it should have: PIL checks those after the pixels no more."""
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
