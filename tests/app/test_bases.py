"""app/bases.py: the base model of a run."""

import json
import shutil

import pytest
from app_runs import write_run

from app.bases import PIPELINES, base_of, stamps_of, word_of_model
from app.differences import setting
from app.library import Library
from app.runs import Run, RunError
from reslora.bundled import ASSETS
from reslora.images.model.families import load_family
from reslora.images.model.loading import Model


def base_with(folder, named: str) -> str:
    (folder / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": named}))
    return base_of(Library(folder).find(folder.name)).model.pretrained_model_name_or_path


def test_without_a_name_it_is_the_bundled_unet(tmp_path):
    bundled = str(ASSETS / "pipeline")
    assert base_of(None).model.pretrained_model_name_or_path == bundled == base_with(tmp_path, "")


@pytest.mark.parametrize("word", PIPELINES)
def test_a_bundled_pipeline_of_another_machine_is_the_one_here(tmp_path, word):
    for named in (word, f"/elsewhere/{word}", str(ASSETS.parent / word)):
        assert base_with(tmp_path, named) == str(ASSETS.parent / word)


def test_a_copy_of_a_bundled_pipeline_is_the_one_here_until_it_differs(tmp_path):
    """The path may be from another clone of the repository."""
    (word, here), there = next(iter(PIPELINES.items())), tmp_path / "clone" / "assets" / "pipeline"
    shutil.copytree(here, there)
    (there / "README.md").write_text("another version")
    run, owner = tmp_path / "run", write_run(tmp_path / "mine", pretrained_model_name_or_path=str(here))
    run.mkdir()
    assert base_with(run, str(there)) == str(here) and word_of_model("run", Run("run", run).config) == word
    assert setting(Run("run", run).config, "pretrained_model_name_or_path") == setting(
        Run("mine", owner).config, "pretrained_model_name_or_path"
    )
    (there / "scheduler" / "scheduler_config.json").write_text("{}")
    assert base_with(run, str(there)) == str(there)


def test_a_damaged_config_names_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"pretrained_model_name_or_path": "owner/mo')
    with pytest.raises(RunError, match=r"its config\.json cannot be read, so the run's base model is not known"):
        base_of(Library(tmp_path).find(tmp_path.name))


def test_another_folder_is_itself(tmp_path):
    """Also if the folder has the name of a bundled one."""
    there = tmp_path / "assets" / "pipeline-flow"
    there.mkdir(parents=True)
    for named in (str(there), "/elsewhere/assets/other", "owner/model"):
        assert base_with(tmp_path, named) == named


def test_a_transformers_file_is_loaded_from_the_runs_own_cache(tmp_path):
    """The trainer has converted the file there; the option is passed to the code that loads the model."""
    file = tmp_path / "transformer.safetensors"
    run = write_run(
        tmp_path / "run", pretrained_model_name_or_path="owner/model", pretrained_transformer_file=str(file)
    )
    base = base_of(Library(tmp_path).find(run.name))
    assert base.model.pretrained_model_name_or_path == "owner/model"
    assert base.model.pretrained_transformer_file == str(file) and base.output.output_dir == str(run)
    model = Model(tmp_path / "model", load_family("FluxPipeline"), "--model")
    file.touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    assert set(stamps_of(base, model)) == {file, tmp_path / "model" / "model_index.json"}
