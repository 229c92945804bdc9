"""The adapter of a language model, as the options specify it."""

import copy

import pytest
import torch
from core_models import assert_one_line, tiny_bert, tiny_llama, token_inputs

from reslora.config import ResLoraConfig
from reslora.errors import InvalidArgument, RunFailed
from reslora.linking import base_model
from reslora.methods.adapters import save_adapter
from reslora.model import connection_of
from reslora.texts.adapter import attach, put_start
from texts.helpers import adapter_of

from .helpers import STEPS, build, trained, trained_parameters


def test_the_adapter_is_what_the_flags_say():
    flags = {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["k_proj"]}
    model, _ = build("reslora", "middle", pre_num=2, head="none", **flags)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (2, 6, 0.25, "CAUSAL_LM")
    assert config.target_modules == {"k_proj"}
    assert connection_of(base_model(model)).config == ResLoraConfig("middle", 2, "none")


@pytest.mark.parametrize("method", ["rslora", "reslora"])
def test_the_first_output_is_that_of_the_base_plus_the_lora(tmp_path, method):
    torch.manual_seed(0)
    base = tiny_llama(layers=3).float()
    lora, _ = build("lora", base=copy.deepcopy(base), lora_r=2, lora_alpha=6)
    with torch.no_grad():
        for value in trained_parameters(lora):
            value.normal_()
    lora.save_pretrained(tmp_path)
    started, adapter = build(method, "none", base, init_lora=str(tmp_path))
    put_start(started, adapter)
    torch.testing.assert_close(started.eval()(**token_inputs()).logits, lora.eval()(**token_inputs()).logits)


@pytest.mark.parametrize("whole", [False, True])
def test_a_lora_of_the_embedding_is_a_start_with_and_without_the_base_embedding(tmp_path, whole):
    base, targets = tiny_llama(layers=3).float(), ["embed_tokens", "q_proj"]
    lora, _ = build("lora", base=copy.deepcopy(base), target_modules=targets)
    with torch.no_grad():
        for value in trained_parameters(lora):
            value.normal_()
    lora.save_pretrained(tmp_path, save_embedding_layers=whole)
    started, adapter = build("lora", base=base, init_lora=str(tmp_path), target_modules=targets)
    put_start(started, adapter)
    torch.testing.assert_close(started.eval()(**token_inputs()).logits, lora.eval()(**token_inputs()).logits)


def test_tied_embeddings_are_not_adapted_where_they_would_be_merged():
    base = tiny_llama(tie_word_embeddings=True)
    arguments = adapter_of(method="lora", target_modules=["q_proj", "lm_head"], merge_and_save=True)
    with pytest.raises(InvalidArgument) as error:
        attach(base, arguments, STEPS)
    assert_one_line(error, "lm_head", "--merge_and_save")
    attach(tiny_llama(tie_word_embeddings=False), arguments, STEPS)


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


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(InvalidArgument) as error:
        build("reslora", target_modules=["q_proj", "query"])
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


@pytest.mark.parametrize("method", ["reslora", "adalora"])
def test_a_rank_larger_than_a_layer_is_refused(method):
    with pytest.raises(InvalidArgument) as error:
        build(method, lora_r=100_000)
    assert_one_line(error, "--lora_r 100000", "v_proj", "at most 16")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, _ = build()
    with torch.no_grad():
        next(iter(trained_parameters(model))).fill_(torch.inf)
    with pytest.raises(RunFailed) as error:
        save_adapter(model, tmp_path / "adapter")
    assert_one_line(error, "lora_A", "not finite", "earlier checkpoints are intact")
    assert not (tmp_path / "adapter").exists()
