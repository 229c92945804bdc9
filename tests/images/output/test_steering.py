"""Validation decides: the best adapter is exported, training ends early, and a resumed run is the same."""

from pathlib import Path

import pytest
import torch
from pipelines import image_folder, tiny_clip_of_images
from safetensors import safe_open
from safetensors.torch import load_file

from app.runs import Run
from images.runs import assert_same, digests, last_line, main, only, printed, refused, without
from reslora.io import read_object, write_json
from reslora.runtime.log import of_split, read_log
from reslora.training import loop
from reslora.training.best import best_of
from reslora.training.state import Learner
from reslora.training.stopping import Asked, Requests

STEPS = 30


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("steering")
    (folder / "prompts.txt").write_text("red disc --d 5\nblue box --w 48 --s 1 --n red --l 2")
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(image_folder(folder / "images"))),
        *("--resolution", "32", "--validation_split", "0.3", "--train_batch_size", "2", "--rank", "4"),
        *("--learning_rate", "0.05", "--lora_dropout", "0.2", "--max_train_steps", str(STEPS), "--method", "lora"),
        *("--validation_prompt", str(folder / "prompts.txt"), "--num_validation_images", "1"),
        *("--validation_steps", "3", "--checkpointing_steps", "2", "--num_inference_steps", "2"),
        *("--save_best", "--early_stopping_patience", "2", "--validation_noises", "2"),
        *("--metric_model", str(tiny_clip_of_images(folder / "clip")), "--report_to", "none"),
        *("--cache_dir", str(folder / "cache")),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, printed(*flags, "--output_dir", output)


@pytest.fixture(scope="module")
def resumed(flags, tmp_path_factory) -> Path:
    """A run with a requested checkpoint and samples after the first step; stopped after step 5, resumed from 2."""
    output = tmp_path_factory.mktemp("resumed") / "out"
    output.mkdir()
    for name in ("save.now", "sample.now"):
        (output / name).touch()
    steps, after_step = [], Requests.after_step

    def stop_at_the_fifth(self: Requests) -> Asked:
        steps.append(len(steps) + 1)
        return after_step(self)._replace(stop=len(steps) == 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Requests, "after_step", stop_at_the_fifth)
        assert main(*flags, "--output_dir", output) > 128
    assert best_of(output / "lora").step == 3
    write_json(output / "lora" / "best" / "step-000005" / "loss.json", {"step": 5, "loss": 0.0})  # of what is forgotten
    assert main(*flags, "--output_dir", output, "--resume_from_checkpoint", "checkpoint-2") == 0
    return output


def losses_of(output: Path) -> list[float]:
    return [row["loss"] for row in of_split(read_log(output / "lora" / "log.jsonl"), "validation") if row["step"]]


@pytest.mark.exhaustive
def test_it_ends_when_patience_does_and_exports_the_best(whole):
    output, lines = whole
    losses, record = losses_of(output), read_object(output / "lora" / "exports.json")
    assert len(losses) > 3 and min(losses[-2:]) >= min(losses[:-2]) == min(losses)
    assert record["step"] == 3 * len(losses) < STEPS
    step = 3 * (losses.index(min(losses)) + 1)
    assert record["best"] == {"step": step, "loss": min(losses)} and step < record["step"]
    only(lines, "no longer decreases", f"trained for {record['step']} steps")
    only(lines, f"of step {step}, which has the lowest validation loss")
    with safe_open(output / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == str(step)
    kept = exported_of(output, best_of(output / "lora").path)
    assert [path.name for path in (output / "lora" / "best").iterdir()] == [f"step-{step:06d}"]
    last = load_file(output / "lora" / f"checkpoint-{record['step']}" / "adapter.safetensors")
    assert any(not torch.equal(last[name], kept[name]) for name in kept)
    run = Run(output.name, output)
    assert run.status == "finished" and run.progress == (record["step"], record["step"])


def exported_of(output: Path, best: Path) -> dict[str, torch.Tensor]:
    """Return the adapter in `best`, after a check that it is the exported one."""
    kept = load_file(best / "adapter.safetensors")
    exported = load_file(output / "lora" / "peft" / "adapter_model.safetensors")
    assert_same(exported, {f"base_model.model.{name.replace('.default', '')}": value for name, value in kept.items()})
    return kept


@pytest.mark.exhaustive
def test_a_run_that_diverges_exports_the_best(flags, monkeypatch, capsys, tmp_path):
    """With the exit status of a diverged run, and unfinished: it can be resumed from a checkpoint."""
    take_step = loop.take_step

    def diverges(learner: Learner, *rest) -> torch.Tensor:
        value = take_step(learner, *rest)
        return value * torch.nan if learner.step == 5 else value

    monkeypatch.setattr(loop, "take_step", diverges)
    output = tmp_path / "out"
    words = without(without(flags, "--metric_model"), "--validation_prompt")
    assert main(*words, "--num_validation_images", 0, "--output_dir", output) == 1
    said = capsys.readouterr()
    assert last_line(said.err).startswith("train_sd.py: lora: train loss nan at step 5; ")
    only(said.out.splitlines(), "lora: training has diverged; exporting the best adapter, of step 3")
    with safe_open(output / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "3"
    exported_of(output, output / "lora" / "best" / "step-000003")
    assert (output / "lora" / "kohya.safetensors").is_file() and not (output / "lora" / "exports.json").exists()


@pytest.mark.exhaustive
def test_the_log_has_losses_by_timestep_and_similarities(whole):
    rows = read_log(whole[0] / "lora" / "log.jsonl")
    for row in of_split(rows, "validation"):
        assert sum(row["by_timestep"].values()) / 8 == pytest.approx(row["loss"])
    found = of_split(rows, "samples")
    assert [row["step"] for row in found] == [row["step"] for row in of_split(rows, "validation")]
    assert all(-1 <= row[f"{of}_similarity"] <= 1 for row in found for of in ("image", "caption"))


@pytest.mark.exhaustive
def test_a_resumed_run_is_an_uninterrupted_one(whole, resumed):
    """Additional samples and checkpoints change nothing."""
    assert (resumed / "lora" / "samples" / "step-000001" / "1-0.png").is_file()
    assert (resumed / "lora" / "checkpoint-1").is_dir() and not list(resumed.glob("*.now"))
    assert losses_of(resumed) == losses_of(whole[0])
    for pattern in ("best/**/*", "pytorch_lora_weights.safetensors", "samples/step-000006/*"):
        assert digests_of(resumed, pattern) == digests_of(whole[0], pattern)


def digests_of(output: Path, pattern: str) -> dict[str, str]:
    files = {path for path in (output / "lora").glob(pattern) if path.is_file()}
    return {name: value for file in files for name, value in digests(file.parent, file.name).items()}


@pytest.mark.exhaustive
def test_the_same_command_has_nothing_to_do_and_more_patience_trains_on(flags, whole, capsys):
    output, _ = whole
    only(printed(*flags, "--output_dir", output), "contains this run, which is finished")
    words = [*flags, "--output_dir", output, "--early_stopping_patience", "5"]
    assert "contains an unfinished run" in refused(capsys, *words)


def test_what_cannot_steer_is_refused(capsys, model, data):
    flag = ("--save_best",)
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, *flag]
    assert f"{' '.join(flag)}: no images are held out" in refused(capsys, *words)
    assert f"{flag[0]}: this is an experiment" in refused(capsys, *words, "--learning_rate", "1e-3", "2e-3")
