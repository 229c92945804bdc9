"""Open, crop and scale one image."""

import base64
import errno
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import PIL.TiffImagePlugin
import torch

from ...content_hash import Content
from ...errors import first_line
from .size import Size

UNREADABLE = "cannot be read now"
NOTHING_COUNTS = "its mask is black or transparent everywhere, so no part of the image would be trained"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".tga", ".ppm",
    ".heic", ".heif",
}  # fmt: skip
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")  # brands in the header of a HEIC file


def is_image(path: Path) -> bool:
    """Return whether a file has an image's suffix."""
    return path.suffix.lower() in SUFFIXES


def image_size(source: Content) -> tuple[int, int] | str:
    """Return width and height after the EXIF rotation, or a string with the problem; only headers are read.

    An image that would decode to gigabytes counts as a problem, because PIL rejects it.
    """
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():
            return "not a file" if Path(source).exists() else "no such file"
        with _opened(source) as image:
            size = image.size
            if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):  # `image.size` includes the EXIF rotation
                size = image.tag_v2[256], image.tag_v2[257]
            return size[::-1] if _orientation(image) in SIDEWAYS else size
    except Exception as error:  # each format's reader raises its own types
        if passes(error):
            return damage(error)
        if type(error).__name__ == "DecompressionBombError":
            return "too many pixels"
        return "HEIC, which Pillow does not read: convert it to JPEG" if _is_heic(source) else "not an image"


def _is_heic(source: Content) -> bool:
    """Return whether the content starts like a HEIC photo of an iPhone."""
    with suppress(OSError), io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        head = file.read(12)
        return head[4:8] == b"ftyp" and head[8:] in HEIC
    return False


def open_image(source: Content, ground: str = "white") -> PIL.Image.Image:
    """Return the first frame of an image as 8-bit RGB, rotated upright and composited on the color `ground`.

    Channels of 16 bits are scaled down.
    """
    image = _upright(source)
    if _has_alpha(image):
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def data_uri(image: PIL.Image.Image, side: int, quality: int) -> str:
    """Scale an image down to at most `side` pixels in width and height, and return it as a data URI (WebP)."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def damage(error: Exception) -> str:
    """Return why an image could not be opened."""
    return f"{UNREADABLE if passes(error) else 'damaged'} ({first_line(error)})"


def passes(error: Exception) -> bool:
    """Return whether an error may be temporary: a lack of memory, or an error of the disk or the network.

    PIL's own errors have no errno, except EINVAL for an invalid seek in a damaged file.
    """
    lasting = (None, errno.EINVAL, errno.ENAMETOOLONG)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in lasting)


def open_masked(source: Content, mask: Content) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Return the image as 8-bit RGB, and its loss mask as 8-bit grayscale: white counts fully, black not at all.

    If a mask is given, its transparent pixels become black. If `mask` is empty, the image's alpha channel is the mask,
    and the colors of transparent pixels are unchanged. The mask of an image without alpha channel is white.
    """
    if mask:
        return open_image(source), open_image(mask, "black").convert("L")
    image = _upright(source)
    if not _has_alpha(image):
        return image.convert("RGB"), PIL.Image.new("L", image.size, "white")
    image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")


def is_masked(source: Content, mask: Content) -> bool:
    """Return whether an image has a mask or an alpha channel; no pixel is decoded."""
    with _opened(source) as image:
        return bool(mask) or _has_alpha(image)


def mask_problem(mask: Content, size: tuple[int, int]) -> str:
    """Return why `mask` does not fit an image of that width and height; "" if it fits, or without a mask."""
    found = image_size(mask) if mask else size
    if isinstance(found, str):
        return f"its mask: {found}"
    return "" if found == size else f"its mask is {found[0]} x {found[1]}, the image is {size[0]} x {size[1]}"


def _has_alpha(image: PIL.Image.Image) -> bool:
    return "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands()


def _upright(source: Content) -> PIL.Image.Image:
    """Return the image rotated upright, with 8 bits per channel."""
    with _opened(source) as opened:
        opened.load()
        image = PIL.ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these at 255
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():  # the image would become all black or all white
            raise ValueError("pixels that are not finite")
        top = 65535 if image.mode != "F" or values.max() > 255 else 255 if values.max() > 1 else 1
        image = PIL.Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    return image


def crop_and_scale(
    image: PIL.Image.Image, crop: Sequence[float], flip: bool, size: Size, interpolation: str
) -> torch.Tensor:
    """Return the crop as a [3, height, width] tensor in [-1, 1]; one channel for a grayscale image."""
    image = cropped(image, crop, size, interpolation)
    pixels = torch.from_numpy(np.array(image)).view(size.height, size.width, -1).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(2) if flip else pixels


def cropped(image: PIL.Image.Image, crop: Sequence[float], size: Size, interpolation: str) -> PIL.Image.Image:
    """Return the largest part of an image with the aspect ratio of `size`, scaled to that size.

    `crop` is the position of the crop across and down, each from 0 to 1. The image is cropped before it is scaled. The
    reverse order would give the same crop, but would first scale a 1 x 5000 image to a huge one.
    """
    width, height = image.size
    kept = (min(width, height * size.width / size.height), min(height, width * size.height / size.width))
    left, top = (fraction * (length - part) for fraction, length, part in zip(crop, image.size, kept, strict=True))
    name = interpolation.upper().replace("NEAREST_EXACT", "NEAREST")
    box = (left, top, left + kept[0], top + kept[1])
    return image.resize((size.width, size.height), PIL.Image.Resampling[name], box=box)


def crop_mask(mask: PIL.Image.Image, crop: Sequence[float], flip: bool, size: Size) -> torch.Tensor:
    """Return a mask's crop, like that of its image, as a [1, height, width] tensor in [0, 1].

    Each value is the mean over the pixel's area.
    """
    return (crop_and_scale(mask, crop, flip, size, "box") + 1) / 2


def crop_sizes(original: tuple[int, int], crop: Sequence[float], flip: bool, size: Size) -> list[int]:
    """Return SDXL's size conditions for a crop (Podell et al., 2023, Section 2.2).

    The conditions are the image's height and width, the top and left of the crop in the scaled image, and the height
    and width of the scaled crop. With `flip`, left is measured in the flipped image.
    """
    width, height = original
    by_width = size.width * height >= size.height * width  # the dimension in which nothing is cut off
    target, side = (size.width, width) if by_width else (size.height, height)
    spare = (width * target / side - size.width, height * target / side - size.height)
    across, down = (fraction * length for fraction, length in zip(crop, spare, strict=True))
    if flip:
        across = spare[0] - across
    return [height, width, round(down), round(across), size.height, size.width]


def _opened(source: Content) -> PIL.ImageFile.ImageFile:
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _orientation(image: PIL.ImageFile.ImageFile) -> object:
    """Return the EXIF orientation without decoding pixels.

    In a PNG file, the orientation may follow the pixels; PIL's own `getexif` of a PNG file would decode them.
    """
    if image.format == "PNG" and "exif" not in image.info:
        image.load_prepare()
        with suppress(OSError):  # a truncated file; it fails when it is decoded
            image.load_end()  # skips the pixels, and reads what follows them
    return PIL.Image.Image.getexif(image).get(PIL.ExifTags.Base.Orientation)
