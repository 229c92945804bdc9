"""ResLoRA in transformers' Trainer: exact resume, checkpoints without the base, AdaLoRA, log, merge table, exports."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line, randomize, tiny_bert, tiny_llama, token_inputs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import reslora
from reslora.arguments import AdapterTrainingArguments, InvalidArgument, MethodArguments, RunFailed, settings
from reslora.chains import base_model
from reslora.model import connection_of
from reslora.trainer import (
    AdapterTrainer,
    LogCallback,
    attach,
    export,
    load_adapter,
    merge_table,
    save_adapter,
    table_text,
    total_steps,
    unmerged_afterwards,
    usable_checkpoint,
    write_results,
)

METHODS = [("reslora", "input"), ("reslora", "middle"), ("reslora", "block"), ("lora", "none"), ("adalora", "none")]
METHODS += [("loha", "none"), ("lokr", "none"), ("lora_x2", "none")]
STEPS = 6


def rows(count: int = 16, length: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 64, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def build(method: str = "reslora", shortcut: str = "input", base=None, **flags):
    torch.manual_seed(0)
    base = tiny_llama(layers=3).float() if base is None else base
    arguments = MethodArguments(method=method, shortcut=shortcut, **flags)
    return attach(base, arguments, STEPS, task_type="CAUSAL_LM"), arguments


def trainer_for(model, folder, callbacks=True, **flags) -> AdapterTrainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = AdapterTrainingArguments(**{**defaults, **flags})
    log = [LogCallback(Path(folder) / "log.jsonl")] if callbacks else None
    return AdapterTrainer(model, args, train_dataset=rows(), eval_dataset=rows(8), callbacks=log)


def read_log(folder) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "shortcut"), METHODS)
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
        allocators = [model.base_model.rankallocator for model in (whole, resumed)]
        assert_same(allocators[0].exp_avg_ipt, allocators[1].exp_avg_ipt)
        assert whole.peft_config["default"].rank_pattern == resumed.peft_config["default"].rank_pattern


@pytest.mark.parametrize(("method", "shortcut"), [("reslora", "input"), ("lora", "none"), ("adalora", "none")])
def test_a_checkpoint_never_holds_the_base_model(tmp_path, method, shortcut):
    model, _ = build(method, shortcut)
    trainer_for(model, tmp_path).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    expected = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
    ours = {"reslora_config.json", "reslora_model.safetensors", "checksums.json"}
    expected |= ours if method == "reslora" else {"adapter.safetensors"}
    expected |= {"allocator.json", "allocator.safetensors"} if method == "adalora" else set()
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.glob("*.safetensors"):
        assert not any("base_layer" in key or "embed" in key for key in load_file(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reslora_model.safetensors", "half"),
        ("reslora_config.json", "half"),
        ("trainer_state.json", None),
        ("optimizer.pt", "half"),
        ("scheduler.pt", None),
        ("rng_state.pth", None),
    ],
)
def test_a_damaged_last_checkpoint_is_left_out(tmp_path, monkeypatch, name, content):
    warnings = []
    monkeypatch.setattr("reslora.trainer.logger.warning", warnings.append)
    model, _ = build()
    trainer_for(model, tmp_path).train()
    path = tmp_path / "checkpoint-6" / name
    data = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(data[: len(data) // 2])
    (tmp_path / "checkpoint-notes").mkdir()
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert len(warnings) == 1 and "checkpoint-6 is damaged" in warnings[0] and "\n" not in warnings[0]
    with pytest.raises(InvalidArgument) as error:
        trainer_for(build()[0], tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_one_line(error, "checkpoint-6", "damaged", "use latest")


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


def test_latest_without_a_checkpoint_starts_afresh(tmp_path):
    model, _ = build()
    trainer = trainer_for(model, tmp_path)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == STEPS


def test_latest_is_refused_where_no_checkpoint_can_be_used(tmp_path):
    trainer_for(build()[0], tmp_path).train()
    log = read_log(tmp_path)
    for folder in tmp_path.glob("checkpoint-*"):  # what two processes would have written
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    with pytest.raises(InvalidArgument) as error:
        trainer_for(build()[0], tmp_path).train(resume_from_checkpoint="latest")
    assert_one_line(error, "--resume_from_checkpoint latest", f"checkpoint-{STEPS}", "processes")
    assert read_log(tmp_path) == log


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    trainer = trainer_for(build()[0], tmp_path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFailed) as error:
        trainer.train()
    assert_one_line(error, "checkpoint of step 2", "disk")


def test_tied_embeddings_are_not_adapted_where_they_would_be_merged():
    base = tiny_llama(tie_word_embeddings=True)
    arguments = MethodArguments(method="lora", target_modules=["q_proj", "lm_head"], merge_and_save=True)
    with pytest.raises(InvalidArgument) as error:
        attach(base, arguments, STEPS)
    assert_one_line(error, "lm_head", "--merge_and_save")
    attach(tiny_llama(tie_word_embeddings=False), arguments, STEPS)


def test_settings_hold_no_token():
    assert settings(AdapterTrainingArguments(output_dir="x", use_cpu=True, hub_token="secret"), Token()) == {
        **settings(AdapterTrainingArguments(output_dir="x", use_cpu=True))
    }


@dataclass
class Token:
    token: str = "secret"


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


def test_the_best_checkpoint_of_adalora_is_exported_as_it_was_evaluated(tmp_path):
    model, _ = build("adalora", "none", lora_r=2)
    flags = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer_for(model, tmp_path, greater_is_better=True, **flags).train()
    tokens = torch.stack([row["input_ids"] for row in rows()])
    expected = model.eval()(input_ids=tokens).logits
    export(model, tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(tiny_llama(layers=3).float(), tmp_path / "peft").eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, expected)


def test_total_steps_is_what_the_trainer_takes(tmp_path):
    for flags in (
        {"num_train_epochs": 1.5},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": 3},
    ):
        trainer = trainer_for(build()[0], tmp_path / "run", **{"max_steps": -1, "save_strategy": "no", **flags})
        trainer.train()
        assert total_steps(trainer.args, len(rows())) == trainer.state.max_steps == trainer.state.global_step


# -- training ----------------------------------------------------------------------------------------------------------


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
    assert_one_line(error, "loss nan at step 1", "--learning_rate")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, _ = build()
    with torch.no_grad():
        next(iter(trained_parameters(model))).fill_(torch.inf)
    with pytest.raises(RunFailed) as error:
        save_adapter(model, tmp_path / "adapter")
    assert_one_line(error, "lora_A", "not finite")
    assert not (tmp_path / "adapter").exists()


def trained_parameters(model):
    return (value for value in model.parameters() if value.requires_grad)


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


# -- the log -----------------------------------------------------------------------------------------------------------


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


def test_a_fresh_run_starts_a_fresh_log_and_a_resumed_one_drops_later_rows(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 99, "seconds": 1}\n')
    trainer_for(build()[0], tmp_path).train()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "sec')  # cut short by a kill
    shutil.rmtree(tmp_path / "checkpoint-6")
    trainer_for(build()[0], tmp_path, max_steps=5).train(resume_from_checkpoint="latest")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]


# -- attach ------------------------------------------------------------------------------------------------------------


def test_targets_are_known_for_llama_and_bert():
    llama, _ = build()
    assert {name.rpartition(".")[2] for name in trained_layers(llama)} == {"q_proj", "v_proj"}
    bert = attach(tiny_bert(), MethodArguments(shortcut="middle"), STEPS, task_type="SEQ_CLS")
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


def test_a_model_of_an_unknown_type_needs_targets():
    base = tiny_llama(layers=3)
    base.config.model_type = "unheard_of"
    with pytest.raises(InvalidArgument) as error:
        build(base=base)
    assert_one_line(error, "--target_modules", "unheard_of", "q_proj")


def test_a_shortcut_without_a_link_is_refused():
    with pytest.raises(InvalidArgument) as error:
        build(base=tiny_llama(layers=1))
    assert_one_line(error, "--target_modules", "no link")


# -- merging and exporting ---------------------------------------------------------------------------------------------


def random_model(method: str = "reslora", shortcut: str = "input", base=None, **flags):
    torch.manual_seed(0)
    model, arguments = build(method, shortcut, base or tiny_llama(layers=4), **flags)
    with torch.no_grad():
        for value in trained_parameters(model):
            value.copy_(
                torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()), dtype=torch.float64)
                / 8
            )
    return model, arguments


def figures_of(model):
    calls = []

    def evaluate():
        with torch.no_grad():
            calls.append(model(**token_inputs(seed=5)).logits)
        return {"loss": float(calls[-1].square().mean())}

    return evaluate, calls


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_the_merge_table_has_every_method_and_leaves_the_model_as_it_was(shortcut):
    model, _ = random_model(shortcut=shortcut)
    model.train()
    for seed in range(3):
        model(**token_inputs(seed=seed))
    norms = connection_of(base_model(model)).wires.norms.values.clone()
    before = trained(model)
    evaluate, calls = figures_of(model.eval())
    calibration = [token_inputs(batch=8, length=12, seed=seed) for seed in (3, 4)]
    table = merge_table(model, evaluate, calibration)

    assert list(table) == ["unmerged", "none", "input", "weights", "lstsq"]
    evaluate()
    assert torch.equal(calls[0], calls[-1])
    assert_same(before, trained(model))
    after = connection_of(base_model(model)).wires.norms.values
    torch.testing.assert_close(norms, after, rtol=0, atol=0, equal_nan=True)
    for method, logits in zip(list(table)[1:], calls[1:], strict=False):
        expected, _ = random_model(shortcut=shortcut)
        load_from(expected, model)
        report = reslora.merge(expected, method, None if method == "input" else calibration)
        assert torch.equal(logits, expected(**token_inputs(seed=5)).logits), method
        assert table[method]["report"] == report.to_dict()
        assert not torch.equal(logits, calls[0])
    assert json.loads(json.dumps(table)) == table
    text = table_text(table).splitlines()
    assert len(text) == 6 and "error of a block" in text[-1]


def load_from(model, other) -> None:
    """Give `model` the weights and norms of another connected one."""
    with torch.no_grad():
        for mine, theirs in zip(trained_parameters(model), trained_parameters(other), strict=True):
            mine.copy_(theirs)
    norms = connection_of(base_model(other)).wires.norms
    connection_of(base_model(model)).wires.norms.restore(norms.values.clone(), norms.count)
    model.eval()


def test_block_merges_are_exact_and_undone():
    model, _ = random_model(shortcut="block", lora_alpha=3.0)
    before, patterns = trained(model), model.peft_config["default"].rank_pattern
    evaluate, calls = figures_of(model.eval())
    optimizer = torch.optim.SGD(list(trained_parameters(model)), lr=0.1)
    table = merge_table(model, evaluate, [token_inputs()])
    assert list(table) == ["unmerged", "none", "exact"]
    torch.testing.assert_close(calls[0], calls[2])
    assert not torch.allclose(calls[0], calls[1])
    assert table["exact"]["report"]["method"] == "exact"
    assert max(block["rank"] for block in table["exact"]["report"]["blocks"]) == 16
    evaluate()
    assert torch.equal(calls[0], calls[-1])
    assert_same(before, trained(model))
    assert model.peft_config["default"].rank_pattern == patterns
    assert [p.data_ptr() for p in optimizer.param_groups[0]["params"]] == [
        p.data_ptr() for p in trained_parameters(model)
    ]


def test_without_calibration_or_norms_fewer_merges_apply():
    model, _ = random_model()
    evaluate, _ = figures_of(model.eval())
    assert list(merge_table(model, evaluate)) == ["unmerged", "none", "weights"]
    assert list(merge_table(model, evaluate, [token_inputs()], ["lstsq"])) == ["unmerged", "lstsq"]
    for plain in (random_model("lora")[0], random_model("adalora")[0], random_model(pre_num=0)[0]):
        assert list(merge_table(plain, lambda: {"loss": 1.0})) == ["unmerged"]


def test_a_failing_evaluation_leaves_the_model_unmerged():
    model, _ = random_model()
    evaluate, calls = figures_of(model.eval())
    evaluate()
    with pytest.raises(ZeroDivisionError), unmerged_afterwards(model):
        reslora.merge(model, "none")
        raise ZeroDivisionError
    evaluate()
    assert torch.equal(calls[0], calls[1])


def test_training_goes_on_after_a_merge_table_with_gradient_checkpointing(tmp_path):
    runs = []
    for interrupted in (False, True):
        model, _ = build(shortcut="input")
        trainer_for(model, tmp_path, max_steps=2, save_steps=2, gradient_checkpointing=True).train()
        if interrupted:
            evaluate, _ = figures_of(model.eval())
            merge_table(model, evaluate, [token_inputs()])
        optimizer = torch.optim.SGD(list(trained_parameters(model)), lr=0.1)
        model.train()
        model(**rows_batch()).loss.backward()
        optimizer.step()
        runs.append(trained(model))
    assert_same(*runs)


def rows_batch() -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize(("method", "shortcut"), METHODS)
def test_exports_load_in_stock_peft_and_transformers_with_the_same_logits(tmp_path, method, shortcut):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, arguments = build(method, shortcut, base)
    trainer = trainer_for(model, tmp_path, save_strategy="no", learning_rate=0.05)
    trainer.train()
    model.eval()
    unmerged = model(**token_inputs()).logits
    table = {"unmerged": {"loss": 1.0}}
    report = export(model, tmp_path, calibration=[token_inputs(batch=8, length=16)], merged=True)
    expected = model(**token_inputs()).logits
    assert not torch.allclose(expected, base_logits(tmp_path / "base"), atol=1e-2)
    if shortcut in ("block", "none"):
        torch.testing.assert_close(expected, unmerged)

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft").eval()
    torch.testing.assert_close(stock(**token_inputs()).logits, expected, rtol=1e-5, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(whole(**token_inputs()).logits, expected, rtol=1e-5, atol=1e-5)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (tmp_path / "base" / "config.json").read_text()
    )

    content = write_results(trainer, arguments, table, report, task="none")
    assert content == json.loads((tmp_path / "results.json").read_text())
    assert content["method"] == method and content["steps"] == STEPS and content["train_seconds"] > 0
    assert content["trainable_parameters"] == trainer.trainable_parameters
    assert (tmp_path / "merge.json").exists() == (method == "reslora")
    assert content["merge"] == {"input": "lstsq", "middle": "lstsq", "block": "exact"}.get(shortcut)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@torch.no_grad()
def base_logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()(**token_inputs()).logits


def test_a_classifier_head_is_exported_too(tmp_path):
    torch.manual_seed(0)
    tiny_bert().float().save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = attach(base, MethodArguments(shortcut="block"), STEPS, task_type="SEQ_CLS")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in trained_parameters(model):
            value.add_(torch.randn(value.shape, generator=generator) / 8)
    expected = model.eval()(**token_inputs()).logits
    save_adapter(model, tmp_path / "adapter")
    export(model, tmp_path, merged=True)
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    whole = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for loaded in (stock, whole):
        torch.testing.assert_close(loaded(**token_inputs()).logits, expected, rtol=1e-5, atol=1e-5)


def test_training_losses_stand_on_the_bar_and_evaluations_get_a_line(tmp_path, capsys):
    trainer_for(build()[0], tmp_path, eval_strategy="steps", eval_steps=3, disable_tqdm=False).train()
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("step 3: validation loss ")
    assert "loss=" in captured.err
