"""The methods as PEFT configurations."""

import pytest
import torch
from conftest import tiny_llama, token_inputs
from peft import get_peft_model

from reslora.methods import METHODS, adapter_config, known_targets

FLAGS = {"r": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj"], "total_steps": 100}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_the_base_model_and_trains_its_targets(method):
    torch.manual_seed(0)
    base = tiny_llama()
    expected = base(**token_inputs()).logits
    model = get_peft_model(base, adapter_config(method, **FLAGS, task_type="CAUSAL_LM")).eval()
    torch.testing.assert_close(model(**token_inputs()).logits, expected)
    trained = {name.split(".self_attn.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_lora_x2_is_lora_with_doubled_alpha_and_reslora_is_lora():
    lora, doubled, wired = (adapter_config(method, **FLAGS) for method in ("lora", "lora_x2", "reslora"))
    assert (lora.lora_alpha, doubled.lora_alpha) == (8, 16)
    assert {**doubled.to_dict(), "lora_alpha": 8} == lora.to_dict() == wired.to_dict()
    assert (lora.r, lora.lora_dropout) == (4, 0.1)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 10, 1000])
def test_adalora_has_a_schedule_for_any_number_of_steps(total_steps):
    config = adapter_config("adalora", **{**FLAGS, "total_steps": total_steps})
    assert (config.init_r, config.target_r) == (6, 4)
    assert config.tinit < config.total_step - config.tfinal and config.deltaT >= 1


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_kronecker_and_hadamard_methods_drop_ranks(method):
    config = adapter_config(method, **FLAGS)
    assert (config.r, config.alpha, config.rank_dropout) == (4, 8, 0.1)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'dora' is not one of 'lora'"):
        adapter_config("dora", **FLAGS)


def test_known_targets_are_query_and_value():
    assert known_targets("llama") == ["q_proj", "v_proj"]
    assert known_targets("roberta") == known_targets("bert") == ["query", "value"]
    assert known_targets("nothing") is None
