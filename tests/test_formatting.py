"""Numbers and names in messages."""

from reslora.formatting import enumerated, is_or_are, pluralize, printable


def test_one_is_not_several():
    assert [pluralize(number, "image") for number in (0, 1, 2, 1234)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,234 images",
    ]
    assert [enumerated(words) for words in ([], ["one"], "ab", "abc")] == ["", "one", "a and b", "a, b and c"]
    assert [is_or_are(number) for number in (0, 1, 2)] == ["are", "is", "are"]


def test_what_a_terminal_would_obey_is_escaped():
    """Clear the screen, a new line, a C1 control, and a change of the text direction; readable characters stay."""
    assert printable("a\x1b[2J\n\x9b1A\u202egnp.exe") == r"a\x1b[2J\n\x9b1A\u202egnp.exe"
    assert printable("é 圖 🎈\u3000.png") == "é 圖 🎈\u3000.png"
