"""What a run goes on with: the settings and the examples that it was begun with."""

import json

import pytest
from conftest import assert_one_line

from reslora.errors import InvalidArgument
from reslora.options.texts import GlueOptions, LlmOptions
from reslora.texts import resuming
from reslora.texts.resuming import check_data, fingerprint, free_on_resume

FREE = free_on_resume(LlmOptions) | free_on_resume(GlueOptions)


def check_resume(output_dir, resume, current) -> None:
    """As for both scripts."""
    resuming.check_resume(output_dir, resume, current, FREE)


def test_runs_are_not_mixed(tmp_path):
    here = {"lora_r": 4, "method": "reslora", "max_steps": 10}
    check_resume(tmp_path, None, here)
    check_resume(tmp_path, "latest", here)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(here))
    with pytest.raises(InvalidArgument) as error:
        check_resume(tmp_path, None, here)
    assert_one_line(error, "--output_dir", "unfinished", "--resume_from_checkpoint latest")
    check_resume(tmp_path, "latest", {**here, "max_steps": 20})
    with pytest.raises(InvalidArgument) as error:
        check_resume(tmp_path, "latest", {**here, "lora_r": 8})
    assert_one_line(error, "--lora_r 8", "trained with 4")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InvalidArgument) as error:
        check_resume(tmp_path, None, here)
    assert_one_line(error, "a finished run")
    (tmp_path / "config.json").write_text("{broken")
    check_resume(tmp_path, "latest", here)
    (tmp_path / "checkpoint-1").rmdir()
    for resume in (None, "latest"):
        with pytest.raises(
            InvalidArgument, match=r"has been trained, but the checkpoint to resume from is missing; .* remove"
        ):
            check_resume(tmp_path, resume, here)
    check_resume(tmp_path, "elsewhere/checkpoint-1", here)


@pytest.mark.parametrize("named", ["path", "link"])
def test_a_checkpoint_from_elsewhere_brings_its_settings(tmp_path, monkeypatch, named):
    said = []
    monkeypatch.setattr("reslora.texts.resuming.logger.warning", said.append)
    checkpoint, output = tmp_path / "a" / "checkpoint-50", tmp_path / "b"
    checkpoint.mkdir(parents=True)
    output.mkdir()
    there = {"method": "lora", "learning_rate": 1e-4, "seed": 1, "data": "some", "max_steps": 50}
    (tmp_path / "a" / "config.json").write_text(json.dumps(there))
    resume = str(checkpoint)
    if named == "link":
        (output / "checkpoint-50").symlink_to(checkpoint)
        resume = "checkpoint-50"
    check_resume(output, resume, {**there, "max_steps": 100})
    check_data(output, resume, "some")
    for name, value in {"method": "lora_x2", "learning_rate": 1e-3, "seed": 2}.items():
        with pytest.raises(InvalidArgument) as error:
            check_resume(output, resume, {**there, name: value})
        assert_one_line(error, f"--{name} {value}", f"{tmp_path / 'a'} was trained with {there[name]}", "start afresh")
    with pytest.raises(InvalidArgument) as error:
        check_data(output, resume, "other")
    assert_one_line(error, f"{tmp_path / 'a'} was trained on other examples")
    (output / "config.json").write_text(json.dumps({"seed": 2}))
    with pytest.raises(InvalidArgument, match=f"{output} was trained with 2"):  # nor are two runs mixed
        check_resume(output, resume, there)
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "latest").mkdir()
    (output / "checkpoint-2").mkdir()
    check_resume(output, "latest", {"method": "lora_x2", "seed": 2})  # that of the folder, whatever lies about
    assert not said
    (tmp_path / "a" / "config.json").unlink()
    check_resume(output, resume, {"seed": 2})
    assert len(said) == 1 and f"no config.json in {tmp_path / 'a'}" in said[0] and "\n" not in said[0]


def test_a_flag_is_fixed_on_resume_unless_it_is_said_to_be_free(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a_new_flag": 1, "merge": "auto", "logging_steps": 1}))
    check_resume(tmp_path, "latest", {"a_new_flag": 1, "merge": "none", "logging_steps": 5})
    with pytest.raises(InvalidArgument) as error:
        check_resume(tmp_path, "latest", {"a_new_flag": 2})
    assert_one_line(error, "--a_new_flag 2", "trained with 1")


@pytest.mark.parametrize(
    "flag", ["learning_rate", "optim", "per_device_train_batch_size", "bf16", "ignore_data_skip", "dtype", "revision"]
)
def test_what_changes_the_training_is_fixed_on_resume(tmp_path, flag):
    (tmp_path / "config.json").write_text(json.dumps({flag: "one"}))
    with pytest.raises(InvalidArgument, match=f"--{flag} other"):
        check_resume(tmp_path, "latest", {flag: "other"})


def test_values_are_told_as_they_are_typed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(InvalidArgument) as error:
        check_resume(tmp_path, "latest", {"target_modules": ["q_proj"]})
    assert_one_line(error, "--target_modules q_proj: ", "was trained with q_proj v_proj;")


def test_a_folder_that_has_moved_is_the_same_model(tmp_path):
    for place in ("old", "new"):
        (tmp_path / place / "tiny").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_name_or_path": str(tmp_path / "old" / "tiny")}))
    check_resume(tmp_path, "latest", {"model_name_or_path": str(tmp_path / "new" / "tiny")})
    (tmp_path / "new" / "small").mkdir()
    for other in (tmp_path / "new" / "small", "meta-llama/tiny"):
        with pytest.raises(InvalidArgument, match="--model_name_or_path"):
            check_resume(tmp_path, "latest", {"model_name_or_path": str(other)})


def test_the_training_examples_decide_wherever_they_lie(tmp_path):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    same, other = fingerprint(iter(rows)), fingerprint([rows[0], {"input_ids": [5]}])
    assert same == fingerprint(rows) != other != fingerprint(rows[::-1])
    check_data(tmp_path, "latest", same)  # nothing to compare with
    (tmp_path / "config.json").write_text(json.dumps({"data": same, "data_dir": "elsewhere"}))
    check_data(tmp_path, "latest", same)
    check_data(tmp_path, None, other)
    with pytest.raises(InvalidArgument) as error:
        check_data(tmp_path, "latest", other)
    assert_one_line(error, "--resume_from_checkpoint", "other examples", "--output_dir")
    for broken in ("[1]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        check_data(tmp_path, "latest", other)
