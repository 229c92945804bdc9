"""Texts in the training loop: exact resume, losses by hand, AdaLoRA, schedules and the log."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from core_models import tiny_llama
from suites import quick
from transformers import get_scheduler

from reslora.errors import InvalidArgument, RunFailed, Stopped
from reslora.linking import base_model
from reslora.methods.adapters import load_adapter, rank_allocator
from reslora.model import connection_of
from reslora.options.texts import LlmOptions
from reslora.runtime.checkpoint_folders import numbered, step_of
from reslora.runtime.signals import StopRequest
from reslora.texts.arguments import resolve
from reslora.texts.batches import BatchPlan
from reslora.texts.study import schedule_of
from reslora.training import loop, stopping

from .helpers import (
    METHODS,
    STEPS,
    TinyTexts,
    adapter_of,
    assert_same,
    attach,
    build,
    read_log,
    trained,
    trained_in,
)

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def weights(learner) -> dict[str, torch.Tensor]:
    return trained(learner.denoiser)


@pytest.mark.parametrize(("method", "shortcut", "more"), quick(METHODS, METHODS[0]))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, method, shortcut, more):
    flags = EVALUATED | more | {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "lora_dropout": 0.2}
    whole = trained_in(tmp_path / "whole", method, shortcut, **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    (tmp_path / "resumed" / "exports.json").unlink()
    resumed = trained_in(tmp_path / "resumed", method, shortcut, resume="latest", **flags)
    assert_same(weights(whole), weights(resumed))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "resumed")
    if shortcut in ("input", "middle"):
        norms = [connection_of(base_model(model.denoiser)).wires.norms for model in (whole, resumed)]
        assert norms[0].count == norms[1].count == 3 + 3 + 2 + 3 + 3 + 2  # eight batches in an epoch
        torch.testing.assert_close(norms[0].values, norms[1].values, rtol=0, atol=0, equal_nan=True)
    if method == "adalora":
        assert_same(*[rank_allocator(model.denoiser).state_dict() for model in (whole, resumed)])


def test_a_stopped_run_is_saved_and_goes_on_as_if_it_never_was(tmp_path, monkeypatch):
    whole, take = trained_in(tmp_path / "whole", **EVALUATED), loop.take_step

    def stopped_in_step(learner, *more):
        value = take(learner, *more)
        if learner.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    with StopRequest() as stop, monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", stopped_in_step)
        with pytest.raises(Stopped, match="reslora stopped after step 1; resume with"):
            trained_in(tmp_path / "run", stop=stop, **EVALUATED)
    assert numbered(tmp_path / "run")[0].name == "checkpoint-1"
    assert_same(weights(whole), weights(trained_in(tmp_path / "run", resume="latest", **EVALUATED)))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "run")


def test_minutes_save_checkpoints_that_change_nothing(tmp_path, monkeypatch):
    """A step takes 40 seconds, so that every second step is saved, and the last."""
    flags = {"max_steps": 5, "save_steps": 100}
    whole, now, take = trained_in(tmp_path / "whole", **flags), [0.0], loop.take_step

    def take_long(*given):
        now[0] += 40
        return take(*given)

    monkeypatch.setattr(loop, "take_step", take_long)
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saved = trained_in(tmp_path / "saved", checkpointing_minutes=1.0, **flags)
    assert [step_of(path) for path in numbered(tmp_path / "whole")] == [5]
    assert [step_of(path) for path in numbered(tmp_path / "saved")] == [5, 4, 2]
    assert_same(weights(whole), weights(saved))


def test_the_best_adapter_is_kept_and_training_ends_early(tmp_path, capsys):
    """A learning rate that is too high raises the loss."""
    flags = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 3.0, "lr_scheduler_type": "constant"}
    learner = trained_in(tmp_path, "lora", save_best=True, early_stopping_patience=2, **flags)
    found = [row["loss"] for row in read_log(tmp_path) if row["split"] == "validation"]
    (best,) = (tmp_path / "best").iterdir()
    assert best.name == f"step-{1 + found.index(min(found)):06d}"
    assert learner.step == 1 + found.index(min(found)) + 2 < STEPS
    assert "--early_stopping_patience 2" in capsys.readouterr().out
    with pytest.raises(InvalidArgument, match="--save_best: nothing is validated"):
        trained_in(tmp_path / "no", save_best=True)


def test_adalora_is_trained_as_peft_says_and_its_regularizer_stays_out_of_the_losses(tmp_path):
    flags = {"max_grad_norm": 0.0, "optim": "torch.optim.SGD", "model_name_or_path": "tiny"}
    texts = TinyTexts()
    learner = trained_in(tmp_path, "adalora", "none", texts=texts, **flags)
    torch.manual_seed(42)
    base = tiny_llama(layers=3).float()
    torch.manual_seed(42)
    reference = attach(base, adapter_of("adalora", shortcut=["none"]), STEPS)
    plan = BatchPlan(texts.rows, texts.collate, resolve(LlmOptions, {"per_device_train_batch_size": 4}).training, 1, 0)
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    reported = [row["loss"] for row in read_log(tmp_path)]
    for step in range(1, STEPS + 1):
        (batch,) = map(plan.__getitem__, plan.of_step(step))
        assert reported[step - 1] == pytest.approx(reference.get_base_model()(**batch).loss.item(), rel=1e-5)
        reference(**batch).loss.backward()
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        schedule.step()
    for name, value in trained(reference).items():
        torch.testing.assert_close(weights(learner)[name], value, rtol=1e-4, atol=1e-6)
    assert learner.denoiser.peft_config["default"].rank_pattern == reference.peft_config["default"].rank_pattern


@pytest.mark.exhaustive
def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = [trained_in(tmp_path / str(on), shortcut="middle", gradient_checkpointing=on) for on in (True, False)]
    assert found[0].denoiser.get_base_model().is_activation_checkpointing
    assert_same(*map(weights, found))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    base = tiny_llama(layers=3).float()
    with torch.no_grad():
        base.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match="reslora: train loss nan at step 1; start in another --output_dir"):
        trained_in(tmp_path, base=base)
    assert not numbered(tmp_path)


def test_a_schedule_free_optimizer_exports_and_measures_its_average(tmp_path):
    """The last checkpoint contains both sets of weights."""
    pytest.importorskip("schedulefree")
    learner = trained_in(tmp_path, "lora", "none", optim="schedule_free_adamw", **EVALUATED)
    saved, _ = build("lora", "none")
    load_adapter(saved, tmp_path / f"checkpoint-{STEPS}")
    assert any(not torch.equal(value, trained(saved)[name]) for name, value in weights(learner).items())
    with learner.averaged():
        assert_same(weights(learner), trained(saved))
        loss = TinyTexts().validation(None, learner.denoiser.eval(), lambda: None)["loss"]
    assert read_log(tmp_path)[-1]["loss"] == pytest.approx(loss, rel=1e-6)


# -- batches and schedules ---------------------------------------------------------------------------------------------


def plan(examples: int, processes: int, accumulation: int = 1, process: int = 0, **more) -> BatchPlan:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, **more}
    texts = [{"input_ids": [number] * (1 + number % 5), "labels": []} for number in range(examples)]
    return BatchPlan(texts, list, resolve(LlmOptions, values).training, processes, process)


@pytest.mark.parametrize(
    ("examples", "processes", "accumulation", "epochs", "steps"),
    [(20, 2, 1, 1, 3), (17, 2, 1, 3, 9), (20, 4, 8, 2, 2)],
)
def test_a_last_batch_that_not_every_process_has_is_a_step(examples, processes, accumulation, epochs, steps):
    """Batches of 4: 20 examples make 5 batches; two processes have 3 and 2, which are filled up."""
    updates = plan(examples, processes, accumulation).updates
    options = resolve(LlmOptions, {"num_train_epochs": epochs, "method": ["lora"]})
    assert schedule_of(updates, options)[0].steps == steps


def test_an_epoch_has_every_example_once_and_processes_share_it():
    """Two processes take the batches of one with as many examples in a step; 22 are filled up with the first two."""

    def numbers(found: BatchPlan, steps: int) -> list[list[int]]:
        places = [place for step in range(1, steps + 1) for place in found.of_step(step)]
        return [[row["input_ids"][0] for row in found[place]] for place in places]

    one = numbers(plan(22, 1, 2, group_by_length=True), 6)
    assert [len(batch) for batch in one] == [4, 4, 4, 4, 4, 2] * 2
    for epoch in (one[:6], one[6:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(22))
    assert one[:6] != one[6:]
    two = [numbers(plan(22, 2, process=rank, group_by_length=True), 3) for rank in range(2)]
    joined = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert joined[:5] == one[:5] and joined[5] == one[5] + one[0][:2]
    lengths = [1 + number % 5 for number in one[1]]
    assert max(lengths) - min(lengths) < 4


NAMES = [name for name in LlmOptions.table()["lr_scheduler_type"].choices if name != "piecewise_constant"]


@pytest.mark.parametrize("name", quick(NAMES, "inverse_sqrt"))
def test_learning_rates_are_those_of_transformers(tmp_path, name):
    trained_in(tmp_path, "lora", lr_scheduler_type=name, warmup_steps=2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    schedule = get_scheduler(name, optimizer, 2, STEPS)
    expected = []
    for _ in range(STEPS):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert [row["lr"] for row in read_log(tmp_path)] == pytest.approx(expected)
