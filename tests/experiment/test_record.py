"""experiment.json has the keys and types that docs/experiment_json.md documents."""

import json
import runpy
from pathlib import Path

import pytest

from .documented import unlike
from .examples import experiment

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_types_say_and_describes_every_key():
    page = runpy.run_path(str(DOCS / "experiment_json_page.py"))["reference"]()
    assert (DOCS / "experiment_json.md").read_text(encoding="utf-8") == page, (
        "run python docs/experiment_json_page.py > docs/experiment_json.md"
    )
    assert "|  |" not in page


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda found: found.update(more=1), "more"),
        (lambda found: found.pop("notes"), "notes"),
        (lambda found: found["arms"][0].update(seed="0"), "arms.0.seed"),
        (lambda found: found["base"]["losses"].append("nan"), "base"),
    ],
)
def test_other_keys_and_types_are_found(change, place):
    found = json.loads(json.dumps(experiment(None)))
    assert unlike(found) == []
    change(found)
    assert unlike(found) == [place]
