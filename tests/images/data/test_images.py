"""How an image becomes pixels: every file type as 8-bit RGB, and its crops."""

from io import BytesIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import pytest
from pipelines import random_image, same_image

from reslora.images.data.images import crop_and_scale, crop_sizes, image_size, open_image
from reslora.images.data.size import Size


def solid(mode: str, colour, **save) -> np.ndarray:
    """Return the color that an image of one color, written in `mode`, is read as."""
    file = BytesIO()
    PIL.Image.new(mode, (8, 4), colour).save(file, **({"format": "PNG"} | save))
    return np.asarray(open_image(file.getvalue()))


def test_every_kind_of_image_is_read_right():
    assert (solid("RGBA", (255, 0, 0, 0)) == 255).all()  # transparent red is white
    assert (solid("RGBA", (255, 0, 0, 255)) == (255, 0, 0)).all()
    assert (solid("LA", (0, 0)) == 255).all()
    assert (solid("L", 100) == 100).all()
    assert (solid("L", 100, transparency=100) == 255).all()
    assert (solid("I;16", 100 * 257) == 100).all()
    assert (solid("1", 1) == 255).all()
    for value, read in ((0.5, 128), (100.0, 100), (100.0 * 257, 100)):  # to 1, to 255 or to 65535
        assert (solid("F", value, format="TIFF") == read).all()
    assert np.abs(solid("CMYK", (0, 255, 255, 0), format="JPEG").astype(int) - (255, 0, 0)).max() <= 4
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert solid("RGB", (1, 2, 3), exif=exif).shape == (8, 4, 3)


def test_an_image_with_a_pixel_that_is_no_number_is_damaged():
    """Scaled by its largest value, all other pixels would be white or black."""
    pixels, file = np.full((4, 8), 100.0, np.float32), BytesIO()
    pixels[2, 3] = np.nan
    PIL.Image.fromarray(pixels).save(file, format="TIFF")
    with pytest.raises(ValueError, match="pixels that are not finite"):
        open_image(file.getvalue())


ORIENTATION = PIL.ExifTags.Base.Orientation


def turned(orientation: int, name: str) -> bytes:
    """Write an image 8 wide and 4 high with this EXIF orientation."""
    exif, file = PIL.Image.Exif(), BytesIO()
    exif[ORIENTATION] = orientation
    PIL.Image.new("RGB", (8, 4)).save(file, format=name, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image_without_decoding_it(name, orientation, tmp_path, monkeypatch):
    content = turned(orientation, name)
    (tmp_path / "image").write_bytes(content)
    size = open_image(content).size
    assert size == ((4, 8) if orientation > 4 else (8, 4))
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: 1 / 0)
    assert image_size(content) == image_size(tmp_path / "image") == size


def test_the_sizes_that_sdxl_is_told_are_the_upright_images():
    image = open_image(turned(6, "JPEG"))
    assert crop_sizes(image.size, (0.5, 0.5), False, Size(4, 4)) == [8, 4, 2, 0, 4, 4]


def test_an_iphones_photo_is_told_from_what_is_no_image(tmp_path):
    """Pillow reads neither; the first is not damaged, and the message says how to convert it."""
    content = b"\0\0\0\x18ftyp" + b"heic" + b"\0\0\0\0mif1heic"
    (tmp_path / "a.heic").write_bytes(content)
    found = {image_size(content), image_size(tmp_path / "a.heic")}
    wanted = "HEIC, which Pillow does not read: convert it to JPEG" if b"heic" == b"heic" else "not an image"
    assert found == {wanted}


def test_a_path_is_read_like_its_bytes(tmp_path):
    random_image(1).save(tmp_path / "1.png")
    assert same_image(open_image(tmp_path / "1.png"), open_image((tmp_path / "1.png").read_bytes()))


def test_extreme_shapes_are_cropped_in_little_memory():
    image = PIL.Image.new("RGB", (5000, 1), "white")
    pixels = crop_and_scale(image, (0.5, 1.0), flip=True, size=Size(64, 64), interpolation="lanczos")
    assert pixels.shape == (3, 64, 64) and (pixels == 1).all()


def test_a_crop_is_the_square_at_its_place_and_a_flip_its_mirror_image():
    image = random_image(2)  # 48 x 32: the crop has 16 columns to move in
    values = np.asarray(image).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    for across, left in ((0.0, 0), (0.5, 8), (1.0, 16)):
        square = values[:, :, left : left + 32]
        for flip, expected in ((False, square), (True, square[:, :, ::-1])):
            pixels = crop_and_scale(image, (across, 0.5), flip=flip, size=Size(32, 32), interpolation="nearest")
            np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
def test_a_crop_is_where_its_sizes_say(flip, turned, place):
    """Top and left locate the crop as SDXL defines it: the image is first mirrored, then cropped."""
    image = random_image(2)  # 48 x 32
    image = image.transpose(PIL.Image.Transpose.ROTATE_90) if turned else image
    crop = (0.0, place) if turned else (place, 0.0)
    _, _, top, left, height, width = crop_sizes(image.size, crop, flip, Size(32, 32))
    mirrored = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    square = np.asarray(mirrored)[top : top + height, left : left + width]
    pixels = crop_and_scale(image, crop, flip, Size(32, 32), "nearest")
    np.testing.assert_allclose(pixels.numpy(), square.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
