"""Between the steps: the log, the progress bar, and a request to stop."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from torch._inductor.exc import CppCompileError, InductorError
from transformers import TrainerCallback, TrainerState

from reslora.errors import Stopped
from reslora.runtime.signals import StopRequest
from reslora.texts.callbacks import AllocateRanks, LogCallback

from .helpers import STEPS, assert_same, build, read_log, trained, trainer_for


@pytest.mark.parametrize(("skipped", "moved"), [(False, [5]), (True, [])])
def test_ranks_move_after_each_step_by_its_number_and_not_where_it_was_skipped(skipped, moved):
    """Trainer counts a step once its callbacks are done."""
    steps, accelerator = [], SimpleNamespace(optimizer_step_was_skipped=skipped)
    callback = AllocateRanks(SimpleNamespace(step=steps.append), accelerator)
    callback.on_optimizer_step(None, TrainerState(global_step=4), None)
    assert steps == moved


def test_the_log_has_the_form_of_train_sd(tmp_path):
    trainer_for(build()[0], tmp_path, eval_strategy="steps", eval_steps=3).train()
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in found] == [
        (1, "train"), (2, "train"), (3, "train"), (3, "validation"),
        (4, "train"), (5, "train"), (6, "train"), (6, "validation"),
    ]  # fmt: skip
    assert all(list(row)[:5] == ["step", "split", "loss", "lr", "seconds"] for row in found)
    seconds = [row["seconds"] for row in found]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert found[0]["lr"] == 1e-2


@pytest.mark.exhaustive
def test_a_fresh_run_starts_a_fresh_log_and_a_resumed_one_drops_later_rows(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 99, "seconds": 1}\n')
    trainer_for(build()[0], tmp_path).train()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "sec')  # cut short by a kill
    shutil.rmtree(tmp_path / "checkpoint-6")
    trainer_for(build()[0], tmp_path, max_steps=5).train(resume_from_checkpoint="latest")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]


def test_training_losses_stand_on_the_bar_and_evaluations_get_a_line(tmp_path, capsys):
    trainer_for(build()[0], tmp_path, eval_strategy="steps", eval_steps=3, disable_tqdm=False).train()
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("step 3: validation loss ")
    assert "loss=" in captured.err


def assert_goes_on_as(whole, folder, **flags) -> None:
    """A stopped run in `folder`/run goes on to the weights and the log of an uninterrupted one in `folder`/whole."""
    model, _ = build()
    trainer_for(model, folder / "run", **flags).train(resume_from_checkpoint="latest")
    assert_same(trained(model), trained(whole))
    assert read_log(folder / "run") == read_log(folder / "whole")


class Signal(TrainerCallback):
    """Sends a signal to this process during a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Before the step's number is counted up."""
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def stopped_at(step: int, folder, number: int = signal.SIGTERM, **flags):
    """A run that is asked to stop during a step, and its trainer."""
    with StopRequest() as stop:
        trainer = trainer_for(build()[0], folder, stop=stop, **flags)
        trainer.add_callback(Signal(step, number))
        with pytest.raises(Stopped, match=f"stopped after step {step}; resume with --resume_from_checkpoint latest"):
            trainer.train()
    return trainer


# The checkpoint of the highest loss is kept, so that it is an early one.
WORST = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("step", "flags", "number"),
    [
        (3, {"eval_strategy": "epoch", "save_strategy": "epoch"}, signal.SIGINT),  # within an epoch of four steps
        (4, {"eval_strategy": "epoch", "save_strategy": "epoch"}, signal.SIGTERM),  # at its end
        (3, {"eval_strategy": "steps", "eval_steps": 3}, signal.SIGTERM),
        (1, {"save_strategy": "no"}, signal.SIGINT),
        (3, {**WORST, "load_best_model_at_end": True, "save_total_limit": 1}, signal.SIGINT),
        (4, {**WORST, "save_strategy": "best"}, signal.SIGINT),  # evaluated, and not the best
        (3, {"save_only_model": True}, signal.SIGTERM),
    ],
)
def test_a_stopped_run_is_saved_and_goes_on_as_if_it_never_was(tmp_path, step, flags, number):
    whole, _ = build()
    trainer_for(whole, tmp_path / "whole", **flags).train()
    trainer = stopped_at(step, tmp_path / "run", number, **flags)
    assert trainer.state.global_step == step
    assert (tmp_path / "run" / f"checkpoint-{step}" / "checksums.json").is_file()
    assert_goes_on_as(whole, tmp_path, **flags)


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [4, STEPS])
def test_a_run_that_is_killed_as_it_validates_an_epoch_does_so_when_it_goes_on(tmp_path, step):
    """Though checkpoints are by steps: none is of a step that is to be validated yet."""

    class Killed(TrainerCallback, Exception):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise self

    whole, _ = build()
    trainer_for(whole, tmp_path / "whole", eval_strategy="epoch").train()
    trainer = trainer_for(build()[0], tmp_path / "run", eval_strategy="epoch")
    trainer.add_callback(Killed())
    with pytest.raises(Killed):
        trainer.train()
    assert_goes_on_as(whole, tmp_path, eval_strategy="epoch")
    assert (tmp_path / "run" / f"checkpoint-{STEPS}").is_dir()


def compiler_ended_in(monkeypatch, trainer, step: int, number: int | None = signal.SIGTERM) -> None:
    """In that step the signal reaches this process and the compiler, whose end torch tells."""
    train = type(trainer).training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            if number is not None:
                os.kill(os.getpid(), number)
            raise InductorError(CppCompileError(["g++"], "killed"), None)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "training_step", training_step)


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_stop_that_ends_the_compiler_too_saves_the_steps_before(tmp_path, monkeypatch, strategy):
    whole, _ = build()
    trainer_for(whole, tmp_path / "whole", save_strategy=strategy).train()
    with StopRequest() as stop, monkeypatch.context() as patched:
        trainer = trainer_for(build()[0], tmp_path / "run", stop=stop, save_strategy=strategy)
        compiler_ended_in(patched, trainer, step=4)
        with pytest.raises(Stopped, match="stopped after step 3; resume with --resume_from_checkpoint latest"):
            trainer.train()
        assert stop.signal == signal.SIGTERM
    assert_goes_on_as(whole, tmp_path, save_strategy=strategy)


def test_a_stop_that_ends_the_compiler_in_the_first_step_has_nothing_to_save(tmp_path, monkeypatch):
    with StopRequest() as stop:
        trainer = trainer_for(build()[0], tmp_path, stop=stop)
        compiler_ended_in(monkeypatch, trainer, step=1)
        with pytest.raises(Stopped, match="stopped before training began"):
            trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_compiler_that_fails_unasked_is_told_as_ever(tmp_path, monkeypatch):
    trainer = trainer_for(build()[0], tmp_path)
    compiler_ended_in(monkeypatch, trainer, step=1, number=None)
    with pytest.raises(InductorError):
        trainer.train()


def test_who_stops_because_another_process_was_asked_ends_as_that_one(tmp_path, monkeypatch):
    """By SIGTERM, which `run_script` makes the status of."""
    monkeypatch.setattr("reslora.runtime.processes.any_of", lambda condition: True)
    stop = StopRequest()
    with pytest.raises(Stopped, match="stopped after step 1"):
        trainer_for(build()[0], tmp_path, stop=stop).train()
    assert stop.signal == signal.SIGTERM


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_stop_at_the_last_step_changes_nothing(tmp_path, strategy):
    with StopRequest() as stop:
        trainer = trainer_for(build()[0], tmp_path, stop=stop, save_strategy=strategy)
        trainer.add_callback(Signal(STEPS))
        trainer.train()
        assert trainer.state.global_step == STEPS
        with pytest.raises(Stopped, match="while evaluating; resume with --resume_from_checkpoint latest"):
            trainer.evaluate()
    model, _ = build()
    trainer_for(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert_same(trained(model), trained(trainer.model))


def test_an_evaluation_within_the_training_is_finished(tmp_path):
    class DuringEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop:
        stop._before_leaving = 1000  # it is sent with every batch
        trainer = trainer_for(build()[0], tmp_path, stop=stop, eval_strategy="steps", eval_steps=2)
        trainer.add_callback(DuringEvaluation())
        with pytest.raises(Stopped, match="after step 3"):
            trainer.train()
    assert [row["step"] for row in read_log(tmp_path) if row["split"] == "validation"] == [2]


def test_an_evaluation_before_the_training_leaves_the_log_alone(tmp_path):
    trainer_for(build()[0], tmp_path).train()
    log = read_log(tmp_path)
    trainer_for(build()[0], tmp_path).evaluate()
    assert read_log(tmp_path) == log


@pytest.mark.parametrize(("step", "seconds"), [(0, 0.0), (2, 2.5), (3, 4.0)])
def test_seconds_go_on_from_the_step_that_is_resumed(tmp_path, step, seconds):
    rows = [{"step": 1, "seconds": 1.0}, {"step": 2, "seconds": 2.5}, {"step": 3, "seconds": 4.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = LogCallback(tmp_path / "log.jsonl")
    log.on_train_begin(None, TrainerState(global_step=step, is_world_process_zero=True), None)
    assert log.seconds == seconds
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3][:step]
