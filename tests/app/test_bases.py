"""app/bases.py: the base model of a run."""

import json

import pytest

from app.bases import PIPELINES, base_of
from app.runs import Run, RunError
from reslora.bundled import ASSETS


def base_with(folder, named: str) -> str:
    (folder / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": named}))
    return base_of(Run("run", folder)).model.pretrained_model_name_or_path


def test_without_a_name_it_is_the_bundled_unet(tmp_path):
    bundled = str(ASSETS / "pipeline")
    assert base_of(None).model.pretrained_model_name_or_path == bundled == base_with(tmp_path, "")


@pytest.mark.parametrize("word", PIPELINES)
def test_a_bundled_pipeline_of_another_machine_is_the_one_here(tmp_path, word):
    for named in (word, f"/elsewhere/{word}", str(ASSETS.parent / word)):
        assert base_with(tmp_path, named) == str(ASSETS.parent / word)


def test_a_damaged_config_names_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"pretrained_model_name_or_path": "owner/mo')
    with pytest.raises(RunError, match=r"its config\.json cannot be read, so the run's base model is not known"):
        base_of(Run("run", tmp_path))


def test_another_folder_is_itself(tmp_path):
    """Also if the folder has the name of a bundled one."""
    there = tmp_path / "assets" / "pipeline-flow"
    there.mkdir(parents=True)
    for named in (str(there), "/elsewhere/assets/other", "owner/model"):
        assert base_with(tmp_path, named) == named
