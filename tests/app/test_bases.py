"""app/bases.py: the model that a run trains."""

import json

import pytest

from app.bases import PIPELINES, Base, base_of
from app.library import Library
from app.runs import RunError
from reslora.common.assets import ASSETS


def base_with(folder, named: str) -> Base:
    (folder / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": named}))
    return base_of(Library(folder).find(folder.name))


def test_without_a_name_it_is_the_bundled_unet(tmp_path):
    assert base_of(None) == Base() == base_with(tmp_path, "")


@pytest.mark.parametrize("word", PIPELINES)
def test_a_bundled_pipeline_of_another_machine_is_the_one_here(tmp_path, word):
    for named in (word, f"/elsewhere/{word}", str(ASSETS.parent / word)):
        assert base_with(tmp_path, named) == Base(str(ASSETS.parent / word))


def test_a_damaged_config_names_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"pretrained_model_name_or_path": "owner/mo')
    with pytest.raises(RunError, match=r"its config\.json cannot be read, so its model is not known"):
        base_of(Library(tmp_path).find(tmp_path.name))


def test_another_folder_is_itself(tmp_path):
    """As well where it is called as a bundled one is."""
    there = tmp_path / "assets" / "pipeline-flow"
    there.mkdir(parents=True)
    for named in (str(there), "/elsewhere/assets/other", "owner/model"):
        assert base_with(tmp_path, named) == Base(named)
