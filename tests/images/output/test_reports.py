"""The log and the trackers: a row for every step, losses read late from the device, nothing non-finite saved."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from images import exact_steps
from images.runs import failed, main
from reslora.errors import RunFailed
from reslora.images.data.batch import collate
from reslora.images.data.samples import ValidationSamples
from reslora.images.output import reports
from reslora.images.output.reports import ImageReports, Validation, save_images
from reslora.options.images import Options
from reslora.runtime.log import read_log
from reslora.runtime.signals import StopRequest
from reslora.training import loop as training
from reslora.training.schedule import Schedule


@pytest.fixture
def steps(monkeypatch) -> Callable:
    """Replace every step's loss by a function of the step's number and the loss."""

    def replace(change: Callable) -> None:
        take_step = training.take_step

        def changed(learner, *rest) -> object:
            loss = take_step(learner, *rest)
            return change(learner.step, loss)

        monkeypatch.setattr(training, "take_step", changed)

    return replace


def trained(output: Path) -> list[int]:
    return [row["step"] for row in read_log(output / "lora" / "log.jsonl") if row["split"] == "train"]


@pytest.mark.exhaustive
def test_a_loss_that_is_not_finite_is_named_and_not_saved(brief_flags, tmp_path, capsys, steps):
    steps(lambda step, loss: loss * float("nan") if step == 2 else loss)
    flags = [*brief_flags, "--max_train_steps", "5", "--checkpointing_steps", "2"]
    line = failed(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "loss nan at step 2; start in another --output_dir with a lower --learning_rate" in line
    assert "intact" not in line
    assert trained(tmp_path / "out") == [1]
    assert not list((tmp_path / "out" / "lora").glob("checkpoint-*"))


def test_checkpoints_before_a_loss_that_is_not_finite_are_said_to_be_intact(brief_flags, tmp_path, capsys, steps):
    steps(lambda step, loss: loss * float("nan") if step == 2 else loss)
    flags = [*brief_flags, "--max_train_steps", "5", "--checkpointing_steps", "1"]
    line = failed(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "loss nan at step 2" in line and "checkpoints before it are intact" in line
    assert [path.name for path in (tmp_path / "out" / "lora").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.exhaustive
def test_tensorboard_has_the_rows_of_the_log(brief_flags, tmp_path):
    """Of both methods; the steps of the second begin at 1 again."""
    flags = [*brief_flags, "--max_train_steps", "3", "--report_to", "tensorboard", "--validation_split", "0.3"]
    assert main(*flags, "--method", "lora", "lora_x2", "--output_dir", tmp_path / "out") == 0
    found = EventAccumulator(str(tmp_path / "out" / "logs" / "train_sd"))
    found.Reload()
    (settings,) = (tmp_path / "out" / "logs").rglob("hparams.yml")
    assert "max_train_steps: 3\n" in settings.read_text()
    for method in ("lora", "lora_x2"):
        for split in ("train", "validation"):
            rows = [row for row in read_log(tmp_path / "out" / method / "log.jsonl") if row["split"] == split]
            events = found.Scalars(f"{split}_loss/{method}")
            assert [event.step for event in events] == [row["step"] for row in rows]
            assert [event.value for event in events] == pytest.approx([row["loss"] for row in rows])
            assert len(rows) > 0


# -- by themselves -----------------------------------------------------------------------------------------------------


def test_validation_loss_is_the_unweighted_mean_over_all_noises_of_all_held_out_images(model):
    """One sample at a time, divided by its min-SNR weight; batches of three leave a smaller one at the end."""
    training_data, loss, denoiser = exact_steps.setting(model, None, "--train_batch_size", "3")
    samples, expected = ValidationSamples(training_data), []
    assert len(samples.draws) == 4 * len(training_data.held_out) == 8
    for sample in map(samples.__getitem__, samples.draws):
        with torch.no_grad():
            weighted = loss(denoiser.eval(), collate([sample]))
        weight = training_data.objective.weight(sample.timesteps)
        assert abs(weight - 1) > 1e-3
        expected.append(weighted.item() / weight.item())
    denoiser.train()
    modes = []
    denoiser.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    found = Validation(loss, training_data, None, Accelerator(cpu=True), StopRequest()).losses(denoiser).mean()
    assert found.item() == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert denoiser.training and modes == [False] * 3


def test_a_row_that_is_not_finite_is_an_error_and_not_written(tmp_path):
    loss = float("nan")
    learner = SimpleNamespace(name="lora", before=0, step=0, seconds=1.0, learning_rate=1e-3, used_rate=None)
    accelerator = SimpleNamespace(trackers=[], is_main_process=True)
    reports = ImageReports(tmp_path, learner, Schedule(4, 4, 0, False), accelerator)
    for step, value in ((1, 0.5), (2, loss)):
        learner.step = step
        reports.note("train", torch.tensor(value))
        if step == 1:
            assert reports.flush() == 0.5
    with pytest.raises(RunFailed, match=f"loss {loss} at step 2"):
        reports.flush()
    reports.close()
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1]


@pytest.mark.parametrize(("step", "kept"), [(0, set()), (2, {"step-000000", "step-000002", "step-best"})])
def test_samples_of_what_the_log_forgets_go_as_well(tmp_path, step, kept):
    """Samples of another training that was killed before its first checkpoint, or of steps after the resumed one.

    Samples of the merged model stay if the method is exported.
    """
    for name in ("step-000000", "step-000002", "step-000003", "step-best"):
        save_images(tmp_path / "samples" / name, [Image.new("RGB", (8, 8))], ["red disc"])
    save_images(tmp_path / "merged", [Image.new("RGB", (8, 8))], ["red disc"])
    (tmp_path / "exports.json").write_text("{}")
    learner = SimpleNamespace(name="lora", before=0, step=step)
    ImageReports(
        tmp_path, learner, Schedule(4, 2, 0, False), SimpleNamespace(trackers=[], is_main_process=True)
    ).close()
    assert {path.name for path in (tmp_path / "samples").iterdir()} == kept | {"step-best"}
    assert (tmp_path / "merged").exists()


def test_similarities_by_hand(monkeypatch):
    """Two prompts with two samples each: each sample to both held-out images, and to its own prompt."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
    metric = SimpleNamespace(
        reads_captions=True,
        images=lambda samples: images[[sample.getpixel((0, 0))[0] for sample in samples]],
        of=lambda sources, held_out: torch.tensor([[1.0, 0.0], [0.8, -0.6]]),
        captions=lambda captions: torch.tensor([{"a": (1.0, 0.0), "b": (0.6, 0.8)}[caption] for caption in captions]),
    )
    monkeypatch.setattr(reports, "load_metric", lambda *_: metric)
    flags = Options.of(
        metric_model="any", max_validation_images=64, num_validation_images=2, validation_prompt=["a", "b"],
        validation_prompt_options=None,
    )  # fmt: skip
    source = SimpleNamespace(images=SimpleNamespace(marks=["0", "1"]))
    training_data = SimpleNamespace(validation=flags.validation, held_out=[(0, 0), (0, 1)], sources=(source,))
    found = {}
    kept = SimpleNamespace(samples=lambda *_: None, similarities=found.update)
    drawn = [np.full((2, 2, 3), number / 255) for number in range(4)]
    Validation(None, training_data, None, SimpleNamespace(device="cpu"), None)._keep_samples(None, kept, drawn)
    to_images, to_captions = (1 + 0.8 + 0 - 0.6 + 0.6 + 0 + 0.8 + 0.28) / 8, (1 + 0 + 1 + 0.96) / 4
    assert found == pytest.approx({"image_similarity": to_images, "caption_similarity": to_captions})
