"""The reference of all options is that of the tables."""

from pathlib import Path

from reslora.options.reference import SCRIPTS, reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_the_page_is_what_the_tables_say():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run python -m reslora.options.reference > docs/options.md"


def test_every_option_has_a_row():
    text = reference()
    for kind in SCRIPTS.values():
        for option in kind.table().values():
            assert f"| `{option.flag}`" in text
