"""docs/options.md equals the page generated from the tables."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = runpy.run_path(str(DOCS / "options_page.py"))


def test_the_page_is_what_the_tables_say():
    assert (DOCS / "options.md").read_text(encoding="utf-8") == PAGE["reference"](), (
        "run python docs/options_page.py > docs/options.md"
    )


def test_every_option_has_a_row():
    text = PAGE["reference"]()
    for kind in PAGE["SCRIPTS"].values():
        for option in kind.table().values():
            assert f"| `{option.flag}`" in text
