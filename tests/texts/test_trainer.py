"""ResLoRA in transformers' Trainer: exact resume, checkpoints without the base, AdaLoRA."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line, randomize, tiny_bert, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from suites import quick
from transformers import TrainerCallback

from reslora.chains import base_model
from reslora.config import ResLoraConfig
from reslora.errors import EndedElsewhere, InvalidArgument, RunFailed
from reslora.methods.adapters import load_adapter, rank_allocator, save_adapter
from reslora.methods.decay import factor_at
from reslora.model import connection_of
from reslora.runtime.checkpoint_folders import numbered
from reslora.runtime.folder_lock import locked
from reslora.texts.callbacks import DecayShortcuts
from reslora.texts.checkpoints import damage
from reslora.texts.results import export
from reslora.texts.resuming import check_resume
from reslora.texts.trainer import AdapterTrainer, attach, total_steps
from reslora.texts.training_arguments import AdapterTrainingArguments
from texts.helpers import adapter_of

from .helpers import (
    METHODS,
    STEPS,
    assert_not_resumed,
    assert_same,
    build,
    read_log,
    rows,
    trained,
    trained_parameters,
    trainer_for,
)


def test_the_adapter_is_what_the_flags_say():
    flags = {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["k_proj"]}
    model, _ = build("reslora", "middle", pre_num=2, head="none", **flags)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (2, 6, 0.25, "CAUSAL_LM")
    assert config.target_modules == {"k_proj"}
    assert connection_of(base_model(model)).config == ResLoraConfig("middle", 2, "none")


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "shortcut"), quick(METHODS, METHODS[0]))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, method, shortcut):
    flags = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    flags |= {"per_device_train_batch_size": 2}
    whole, _ = build(method, shortcut, lora_dropout=0.2)
    trainer = trainer_for(whole, tmp_path / "whole", **flags)
    trainer.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")

    resumed, _ = build(method, shortcut, lora_dropout=0.2)
    randomize(resumed, seed=9)
    again = trainer_for(resumed, tmp_path / "resumed", **flags)
    again.train(resume_from_checkpoint="latest")

    assert_same(trained(whole), trained(resumed))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "resumed")
    if shortcut in ("input", "middle"):
        norms = [connection_of(base_model(model)).wires.norms for model in (whole, resumed)]
        assert norms[0].count == norms[1].count == 2 * STEPS
        torch.testing.assert_close(norms[0].values, norms[1].values, rtol=0, atol=0, equal_nan=True)
    if method == "adalora":
        states = [rank_allocator(model).state_dict() for model in (whole, resumed)]
        assert_same(*states)


def test_decayed_shortcuts_resume_exactly_and_the_best_checkpoint_has_its_own_factor(tmp_path):
    def decayed(folder, resume: str | None = None, **flags):
        model, _ = build("reslora", "middle", shortcut_decay=0.75)
        trainer = trainer_for(model, folder, **flags)
        trainer.add_callback(DecayShortcuts(0.75, model))
        trainer.train(resume_from_checkpoint=resume)
        return model

    def factor(model) -> float:
        return connection_of(base_model(model)).wires.factor

    whole = decayed(tmp_path / "whole", eval_strategy="steps", eval_steps=2)
    for step in (2, 4, 6):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        assert json.loads((folder / "reslora_config.json").read_text())["factor"] == factor_at(step, STEPS, 0.75)
    assert factor(whole) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    resumed = decayed(tmp_path / "resumed", "latest", eval_strategy="steps", eval_steps=2)
    assert_same(trained(whole), trained(resumed))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "resumed")
    undecayed, _ = build("reslora", "middle")
    trainer_for(undecayed, tmp_path / "undecayed").train()
    assert any(not torch.equal(value, trained(undecayed)[name]) for name, value in trained(whole).items())
    load_adapter(whole, tmp_path / "whole" / "checkpoint-2")
    assert factor(whole) == factor_at(2, STEPS, 0.75) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "shortcut"), [("reslora", "input"), ("lora", "none"), ("adalora", "none")])
def test_a_checkpoint_never_holds_the_base_model(tmp_path, method, shortcut):
    model, _ = build(method, shortcut)
    trainer_for(model, tmp_path).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    expected = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "checksums.json"}
    expected |= {"reslora_config.json", "reslora_model.safetensors"} if method == "reslora" else {"adapter.safetensors"}
    expected |= {"allocator.safetensors"} if method == "adalora" else set()
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.glob("*.safetensors"):
        assert not any("base_layer" in key or "embed" in key for key in load_file(path))


@pytest.mark.exhaustive
def test_a_finished_run_is_not_trained_on_and_checkpoints_can_be_named_inside_the_run(tmp_path):
    finished, _ = build()
    trainer_for(finished, tmp_path).train()
    log = read_log(tmp_path)
    for resume in ("latest", f"checkpoint-{STEPS}"):
        model, _ = build()
        trainer = trainer_for(model, tmp_path)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == STEPS
        assert_same(trained(model), trained(finished))
        assert read_log(tmp_path) == log


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("reslora.texts.trainer.logger.warning", said.append)
    model, _ = build()
    trainer = trainer_for(model, tmp_path)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == STEPS
    assert len(said) == 1 and f"no checkpoint in {tmp_path}" in said[0] and "\n" not in said[0]


def test_latest_is_refused_where_no_checkpoint_can_be_used(tmp_path):
    trainer_for(build()[0], tmp_path).train()
    log = read_log(tmp_path)
    for folder in tmp_path.glob("checkpoint-*"):  # what two processes would have written
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert_not_resumed(
        tmp_path,
        "latest",
        "--resume_from_checkpoint latest",
        f"checkpoint-{STEPS}",
        "; use as many processes as before",
    )
    assert read_log(tmp_path) == log
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    assert_not_resumed(tmp_path, "latest", "for: no trainer_state.json; remove them to start afresh")


@pytest.mark.parametrize("named", ["checkpoint-9", "true"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path, named):
    assert_not_resumed(tmp_path, named, f"--resume_from_checkpoint {named}: no such checkpoint; leave it out")
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert_not_resumed(
        tmp_path, named, f"{named}: no such checkpoint; give latest, or one of checkpoint-4, checkpoint-2"
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "told",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
        OSError(28, "No space left on device"),
    ],
    ids=["in the middle of a file", "as a small one is closed", "as a text is"],
)
def test_a_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch, told):
    """One that has no whole checkpoint yet begins afresh then, and is not kept from that by what it has set aside."""

    def full(*_, **__):
        raise told

    trainer = trainer_for(build()[0], tmp_path)
    with monkeypatch.context() as patched, pytest.raises(RunFailed) as error:
        patched.setattr(torch, "save", full)
        trainer.train()
    assert_one_line(error, "checkpoint of step 2", "disk")
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-2"]
    trainer = trainer_for(build()[0], tmp_path)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == STEPS and damage(tmp_path / "checkpoint-2") is None
    for path in numbered(tmp_path):
        shutil.rmtree(path)
    assert list(tmp_path.glob("*-checkpoint-2"))
    check_resume(tmp_path, "latest", {}, ())


@pytest.mark.exhaustive
def test_a_folder_that_is_moved_ends_the_run_before_its_next_checkpoint(tmp_path):
    """It would be made anew, with that checkpoint alone."""
    output, moved = tmp_path / "out", tmp_path / "moved"

    class Moves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                output.rename(moved)

    with locked(output):
        trainer = trainer_for(build()[0], output)
        trainer.add_callback(Moves())
        with pytest.raises(RunFailed) as error:
            trainer.train()
    assert_one_line(error, f"--output_dir {output} was moved or removed", "--resume_from_checkpoint latest")
    assert not output.exists() and (moved / "checkpoint-2").is_dir()
    trainer_for(build()[0], moved).train(resume_from_checkpoint="latest")
    assert (moved / f"checkpoint-{STEPS}").is_dir()


def test_tied_embeddings_are_not_adapted_where_they_would_be_merged():
    base = tiny_llama(tie_word_embeddings=True)
    arguments = adapter_of(method="lora", target_modules=["q_proj", "lm_head"], merge_and_save=True)
    with pytest.raises(InvalidArgument) as error:
        attach(base, arguments, STEPS)
    assert_one_line(error, "lm_head", "--merge_and_save")
    attach(tiny_llama(tie_word_embeddings=False), arguments, STEPS)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer_for(build("lora", "none")[0], tmp_path).train()
    for other in (build("lora", "none", lora_r=2)[0], build("loha", "none")[0], build()[0]):
        before = trained(other)
        with pytest.raises(InvalidArgument) as error:
            trainer_for(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert_one_line(error, "checkpoint-6")
        assert_same(before, trained(other))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, _ = build()
    flags = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_for(model, tmp_path, greater_is_better=True, **flags)  # the worst, so that it is an early one
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    other, _ = build()
    load_adapter(other, best)
    assert best.name != f"checkpoint-{STEPS}"
    assert_same(trained(model), trained(other))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kept", [False, True], ids=["moved", "copied"])
def test_the_best_checkpoint_moves_with_its_folder(tmp_path, kept):
    """Stock `Trainer` knows it by the path that it had, and takes the last one in its place."""
    flags = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    first = trainer_for(build()[0], tmp_path / "first", greater_is_better=True, **flags)
    first.train()
    shutil.copytree(tmp_path / "first", tmp_path / "then")
    if not kept:
        shutil.rmtree(tmp_path / "first")
    model, _ = build()
    again = trainer_for(model, tmp_path / "then", greater_is_better=True, **flags)
    again.train(resume_from_checkpoint=str(tmp_path / "then" / f"checkpoint-{STEPS}"))
    best = Path(again.state.best_model_checkpoint)
    assert best.parent == tmp_path / "then" and best.name == Path(first.state.best_model_checkpoint).name
    other, _ = build()
    load_adapter(other, best)
    assert best.name != f"checkpoint-{STEPS}"
    assert_same(trained(model), trained(other))


def test_the_best_checkpoint_of_adalora_is_exported_as_it_was_evaluated(tmp_path):
    model, _ = build("adalora", "none", lora_r=2)
    flags = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer_for(model, tmp_path, greater_is_better=True, **flags).train()
    tokens = torch.stack([row["input_ids"] for row in rows()])
    expected = model.eval()(input_ids=tokens).logits
    export(model, tmp_path, adapter_of())
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(tiny_llama(layers=3).float(), tmp_path / "peft").eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, expected)


@pytest.mark.exhaustive
def test_total_steps_is_what_the_trainer_takes(tmp_path):
    for flags in (
        {"num_train_epochs": 1.5},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": 3},
        {"num_train_epochs": 2, "per_device_train_batch_size": 6, "dataloader_drop_last": True},
    ):
        trainer = trainer_for(build()[0], tmp_path / "run", **{"max_steps": -1, "save_strategy": "no", **flags})
        trainer.train()
        assert total_steps(trainer.args, len(rows())) == trainer.state.max_steps == trainer.state.global_step


@pytest.mark.parametrize(
    ("examples", "processes", "accumulation", "epochs", "steps"),
    [(20, 2, 1, 1, 3), (16, 2, 1, 1, 2), (17, 2, 1, 3, 9), (20, 2, 2, 1, 2), (20, 4, 8, 2, 2), (3, 1, 1, 2.5, 3)],
)
def test_a_last_batch_that_not_every_process_has_is_a_step(examples, processes, accumulation, epochs, steps):
    """Batches of 4: 20 examples are 5 of them, for two processes 3 and 2, which accelerate fills up."""
    arguments = SimpleNamespace(
        max_steps=-1, per_device_train_batch_size=4, world_size=processes, num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation, dataloader_drop_last=False,
    )  # fmt: skip
    assert total_steps(arguments, examples) == steps


@pytest.mark.parametrize("max_steps", [-1, 5])
def test_fewer_examples_than_a_batch_are_refused_where_the_last_is_dropped(max_steps):
    arguments = SimpleNamespace(
        max_steps=max_steps, per_device_train_batch_size=4, world_size=2, dataloader_drop_last=True
    )
    with pytest.raises(InvalidArgument) as error:
        total_steps(arguments, 7)
    assert_one_line(error, "--dataloader_drop_last True", "7 training examples", "a batch of 8", "batch_size")


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
def test_gradient_checkpointing_changes_nothing(tmp_path, shortcut):
    runs = []
    for flag in ("gradient_checkpointing", None):
        model, _ = build(shortcut=shortcut)
        trainer_for(model, tmp_path, **({flag: True} if flag else {}), save_strategy="no").train()
        assert model.get_base_model().is_activation_checkpointing == bool(flag)
        runs.append(trained(model))
    assert_same(*runs)


def test_adalora_is_trained_as_peft_says_and_its_regularizer_stays_out_of_the_losses(tmp_path):
    model, _ = build("adalora", "none")
    trainer = trainer_for(model, tmp_path, max_grad_norm=0, eval_strategy="steps", eval_steps=3, optim="sgd")
    start = trained(model)
    trainer.train()

    reference, _ = build("adalora", "none")
    assert_same(start, trained(reference))
    order = trainer_for(build("adalora", "none")[0], tmp_path / "order").get_train_dataloader()
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    step, reported = 0, [row["loss"] for row in read_log(tmp_path) if row["split"] == "train"]
    for epoch in range(2):
        order.set_epoch(epoch)
        for batch in order:
            step += 1
            if step > STEPS:
                break
            plain = reference.get_base_model()(**batch).loss
            assert reported[step - 1] == pytest.approx(plain.item(), rel=1e-5)
            reference(**batch).loss.backward()
            optimizer.step()
            reference.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            schedule.step()
    for name, value in trained(reference).items():
        torch.testing.assert_close(trained(model)[name], value, rtol=1e-4, atol=1e-6)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == reference.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) / len(pattern) == 4


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    model, _ = build()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.fill_(torch.nan)
    with pytest.raises(RunFailed) as error:
        trainer_for(model, tmp_path).train()
    assert_one_line(error, "loss nan at step 1", "--learning_rate", "what was saved before is intact")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, _ = build()
    with torch.no_grad():
        next(iter(trained_parameters(model))).fill_(torch.inf)
    with pytest.raises(RunFailed) as error:
        save_adapter(model, tmp_path / "adapter")
    assert_one_line(error, "lora_A", "not finite", "earlier checkpoints are intact")
    assert not (tmp_path / "adapter").exists()


def test_what_the_main_process_cannot_save_ends_the_others_too(tmp_path, monkeypatch):
    """They would wait for it at the end of the checkpoint."""
    trainer = trainer_for(build()[0], tmp_path)

    def told(decide):
        raise EndedElsewhere(1, diverged=True)

    monkeypatch.setattr("reslora.texts.trainer.broadcast_from_main", told)
    monkeypatch.setattr(AdapterTrainingArguments, "should_save", False)
    with pytest.raises(EndedElsewhere):
        trainer.save_model(str(tmp_path / "adapter"))


def test_sharding_is_refused(tmp_path):
    stage3 = tmp_path / "zero3.json"
    stage3.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    model, _ = build()
    args = AdapterTrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    for name, value in (("fsdp", True), ("deepspeed", str(stage3))):
        sharding = copy.copy(args)
        setattr(sharding, name, value)
        with pytest.raises(InvalidArgument) as error:
            AdapterTrainer(model, sharding)
        assert_one_line(error, f"--{name}", "ZeRO-2")


def test_a_schedule_free_optimizer_leaves_its_average_without_a_validation(tmp_path):
    """The last checkpoint holds what is trained, and resumes to the bit."""
    left, between = build("lora", "none")[0], build("lora", "none")[0]
    trainer_for(left, tmp_path, optim="schedule_free_adamw").train()
    load_adapter(between, tmp_path / f"checkpoint-{STEPS}")
    state = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt")
    (beta, _), moments = state["param_groups"][0]["betas"], state["state"].values()
    with torch.no_grad():
        for value, moment in zip(trained_parameters(between), moments, strict=True):
            value.lerp_(moment["z"], 1 - 1 / beta)
    assert_same(trained(left), trained(between))


# -- attach ------------------------------------------------------------------------------------------------------------


def test_targets_are_known_for_llama_and_bert():
    llama, _ = build()
    assert {name.rpartition(".")[2] for name in trained_layers(llama)} == {"q_proj", "v_proj"}
    bert = attach(tiny_bert(), adapter_of(shortcut="middle"), STEPS)
    assert {name.rpartition(".")[2] for name in trained_layers(bert)} == {"query", "value"}
    assert any("classifier" in name for name in trained(bert))
    assert connection_of(base_model(bert)).config.shortcut == "middle"


def trained_layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_all_linear_layers_can_be_adapted():
    model, _ = build("lora", target_modules=["all-linear"])
    kinds = {name.rpartition(".")[2] for name in trained_layers(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("method", ["lora", "reslora", "loha"])
def test_targets_that_match_nothing_are_refused(method):
    with pytest.raises(InvalidArgument) as error:
        build(method, target_modules=["q_proj", "query"])
    assert_one_line(error, "--target_modules q_proj query", "query matches no layer", "v_proj")


def test_targets_that_are_made_of_layers_are_refused_by_these():
    with pytest.raises(InvalidArgument) as error:
        build("lora", target_modules=["q_proj", "mlp"])
    fix = "(LlamaMLP); give mlp.gate_proj mlp.up_proj mlp.down_proj"
    assert_one_line(error, "--target_modules mlp: ", "layers.0.mlp cannot be adapted", fix)


def test_a_model_of_an_unknown_type_needs_targets():
    base = tiny_llama(layers=3)
    base.config.model_type = "unheard_of"
    with pytest.raises(InvalidArgument) as error:
        build(base=base)
    assert_one_line(error, "--target_modules", "unheard_of", "q_proj")


@pytest.mark.parametrize("method", ["lora", "reslora", "adalora"])
def test_a_rank_larger_than_a_layer_is_refused(method):
    with pytest.raises(InvalidArgument) as error:
        build(method, lora_r=100_000)
    assert_one_line(error, "--lora_r 100000", "v_proj", "at most 16")


def test_adalora_needs_steps_to_move_ranks():
    with pytest.raises(InvalidArgument) as error:
        attach(tiny_llama(layers=3), adapter_of(method="adalora"), total_steps=2)
    assert_one_line(error, "--method adalora with 2 steps", "3 steps to move ranks")
    attach(tiny_llama(layers=3), adapter_of(method="adalora"), total_steps=3)


def test_a_shortcut_without_a_link_is_refused():
    with pytest.raises(InvalidArgument) as error:
        build(base=tiny_llama(layers=1))
    assert_one_line(error, "--target_modules", "no link")
