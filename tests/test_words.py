"""Numbers in sentences."""

from reslora.words import are, counted


def test_one_is_not_several():
    assert [counted(number, "image") for number in (0, 1, 2, 1234)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,234 images",
    ]
    assert [are(number) for number in (0, 1, 2)] == ["are", "is", "are"]
