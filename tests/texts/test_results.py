"""Merge tables that leave the model unchanged, and exports that stock libraries load."""

import copy
import json

import pytest
import torch
from core_models import assert_one_line, tiny_bert, tiny_llama, token_inputs
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import reslora
from reslora.errors import RunFailed
from reslora.linking import base_model
from reslora.methods.adapters import save_adapter
from reslora.model import connection_of
from reslora.texts.adapter import attach
from reslora.texts.results import export, merge_table, table_text, write_results
from texts.helpers import adapter_of

from .helpers import METHODS, STEPS, assert_same, build, trained, trained_in, trained_parameters


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


def figures():
    calls = []

    def evaluate(model):
        with torch.no_grad():
            calls.append(model(**token_inputs(seed=5)).logits)
        return {"loss": float(calls[-1].square().mean())}

    return evaluate, calls


@pytest.mark.exhaustive
def test_the_merge_table_has_every_method_and_leaves_the_model_as_it_was():
    model, _ = random_model(shortcut="middle")
    model.train()
    for seed in range(3):
        model(**token_inputs(seed=seed))
    norms = connection_of(base_model(model)).wires.norms.values.clone()
    before = trained(model)
    evaluate, calls = figures()
    model.eval()
    calibration = [token_inputs(batch=8, length=12, seed=seed) for seed in (3, 4)]
    table = merge_table(model, evaluate, calibration)

    assert list(table) == ["unmerged", "none", "input", "weights", "lstsq"]
    evaluate(model)
    assert torch.equal(calls[0], calls[-1])
    assert_same(before, trained(model))
    after = connection_of(base_model(model)).wires.norms.values
    torch.testing.assert_close(norms, after, rtol=0, atol=0, equal_nan=True)
    for method, logits in zip(list(table)[1:], calls[1:], strict=False):
        expected, _ = random_model(shortcut="middle")
        load_from(expected, model)
        report = reslora.merge(expected, method, None if method == "input" else calibration)
        assert torch.equal(logits, expected(**token_inputs(seed=5)).logits), method
        assert table[method]["report"] == report.to_dict()
        assert not torch.equal(logits, calls[0])
    assert json.loads(json.dumps(table)) == table
    assert len(table_text(table).splitlines()) == 6


def test_the_table_in_words_has_the_mean_error_of_the_blocks_that_have_one():
    blocks = [{"error": error} for error in (0.1, None, 0.3)]
    table = {"unmerged": {"loss": 1.0, "accuracy": 0.5}, "lstsq": {"loss": 1.25, "report": {"blocks": blocks}}}
    table["lstsq"]["accuracy"] = 0.375
    assert [" ".join(line.split()) for line in table_text(table).splitlines()] == [
        "loss accuracy", "unmerged 1.0000 0.5000", "lstsq 1.2500 0.3750 error of a block 20.00% on average",
    ]  # fmt: skip


def load_from(model, other) -> None:
    """Give `model` the weights and norms of another connected model."""
    with torch.no_grad():
        for mine, theirs in zip(trained_parameters(model), trained_parameters(other), strict=True):
            mine.copy_(theirs)
    norms = connection_of(base_model(other)).wires.norms
    connection_of(base_model(model)).wires.norms.restore(norms.values.clone(), norms.count)
    model.eval()


def test_block_merges_are_exact_and_undone():
    model, _ = random_model(shortcut="block", lora_alpha=3.0)
    before, patterns = trained(model), model.peft_config["default"].rank_pattern
    evaluate, calls = figures()
    table = merge_table(model.eval(), evaluate, [token_inputs()])
    assert list(table) == ["unmerged", "none", "exact"]
    torch.testing.assert_close(calls[0], calls[2])
    assert not torch.allclose(calls[0], calls[1])
    assert table["exact"]["report"]["method"] == "exact"
    assert max(block["rank"] for block in table["exact"]["report"]["blocks"]) == 16
    evaluate(model)
    assert torch.equal(calls[0], calls[-1])
    assert_same(before, trained(model))
    assert model.peft_config["default"].rank_pattern == patterns


def test_without_calibration_or_norms_fewer_merges_apply():
    model, _ = random_model()
    evaluate, _ = figures()
    assert list(merge_table(model.eval(), evaluate)) == ["unmerged", "none", "weights"]
    assert list(merge_table(model, evaluate, [token_inputs()], ["lstsq"])) == ["unmerged", "lstsq"]
    for plain in (random_model("lora")[0], random_model("adalora")[0], random_model(pre_num=0)[0]):
        assert list(merge_table(plain, lambda model: {"loss": 1.0})) == ["unmerged"]


def test_figures_that_are_not_finite_end_the_run():
    value = float("nan")
    with pytest.raises(RunFailed) as error:
        merge_table(random_model("reslora")[0], lambda model: {"accuracy": 0.5, "loss": value})
    assert_one_line(error, f"loss is {value}", "diverged", "--learning_rate")


def test_a_merged_model_of_an_earlier_export_goes(tmp_path):
    """It contains another adapter than peft/."""
    for merge_and_save in (True, False):
        export(build("lora", "none")[0], tmp_path, adapter_of("lora", merge_and_save=merge_and_save))
        assert (tmp_path / "merged").exists() == merge_and_save


def test_adalora_is_exported_with_the_ranks_of_its_weights(tmp_path):
    """Its latest allocation may have fewer, for example if --save_best chooses an earlier step."""
    torch.manual_seed(0)
    base = tiny_llama(layers=3).float()
    model, _ = random_model("adalora", "none", copy.deepcopy(base))
    expected = model.eval()(**token_inputs()).logits
    ranks = {name: value for name, value in model.base_model.model.named_parameters() if "lora_E" in name}
    model.peft_config["default"].rank_pattern = {name: [True, *[False] * 5] for name in ranks}
    export(model, tmp_path, adapter_of("adalora"))
    stock = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    torch.testing.assert_close(stock(**token_inputs()).logits, expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "shortcut", "more"), METHODS)
def test_exports_load_in_stock_peft_and_transformers_with_the_same_logits(tmp_path, method, shortcut, more):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    learner = trained_in(tmp_path / "run", method, shortcut, base=base, learning_rate=0.05, **more)
    model, arguments = learner.denoiser.eval(), adapter_of(method=method, shortcut=shortcut)
    unmerged = model(**token_inputs()).logits
    table = {"unmerged": {"loss": 1.0}}
    report = export(model, tmp_path, adapter_of(merge_and_save=True), [token_inputs(batch=8, length=16)])
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

    content = write_results(tmp_path, arguments, table, report, task="none", steps=STEPS)
    assert content == json.loads((tmp_path / "results.json").read_text())
    assert content["method"] == method and content["steps"] == STEPS and content["task"] == "none"
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
    model = attach(base, adapter_of(shortcut="block"), STEPS)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in trained_parameters(model):
            value.add_(torch.randn(value.shape, generator=generator) / 8)
    expected = model.eval()(**token_inputs()).logits
    save_adapter(model, tmp_path / "adapter")
    export(model, tmp_path, adapter_of(merge_and_save=True))
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    whole = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for loaded in (stock, whole):
        torch.testing.assert_close(loaded(**token_inputs()).logits, expected, rtol=1e-5, atol=1e-5)
