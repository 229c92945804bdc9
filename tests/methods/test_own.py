"""Methods that a user brings: names, what they may return, and PEFT's conversion to LoRA."""

import json
import math
from argparse import ArgumentTypeError

import pytest
import torch
from core_models import assert_one_line, tiny_llama, token_inputs, unet_inputs
from core_models import tiny_unet as untrained_unet
from peft import LoraConfig, PeftModel
from torch import nn

from examples.my_method import SharedA, shared_a
from reslora.errors import InvalidArgument
from reslora.export import export_peft, merged_state_dict
from reslora.methods.adapters import attach, check_usable, load_adapter, save_adapter, trained_state
from reslora.methods.conversion import convert, with_lora, write_converted
from reslora.methods.entries import settings_in_words
from reslora.methods.own import configuration, conversion_in_words, find
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config, known_method, own_name
from reslora.methods.updates import delta_error, layers

VERA = "peft.VeraConfig"


def tiny_unet() -> nn.Module:
    """Return a U-Net whose weights are the same in each call."""
    torch.manual_seed(0)
    return untrained_unet()


def settings(targets: tuple[str, ...] = ("to_q", "to_k"), **more) -> AdapterSettings:
    return AdapterSettings(**{"r": 2, "alpha": 4, "dropout": 0.0, "targets": targets, "total_steps": 10, **more})


def attached(method: str, base: nn.Module, targets: tuple[str, ...] = ("to_q", "to_k")) -> nn.Module:
    """Return a model with a method's adapter of random values."""
    torch.manual_seed(1)
    model = attach(base, adapter_config(method, settings(targets), base))
    check_usable(model)
    for value in model.parameters():
        if value.requires_grad:
            value.data = torch.randn_like(value) * 0.3
    return model


def test_a_name_is_a_folder_and_has_a_title():
    assert known_method("my.module:function_of_mine") == "my.module.function_of_mine"
    assert own_name("my.module:f") == "my.module.f" and own_name("lora ema:0.9") == "lora ema:0.9"  # a variant's label
    row = METHODS["my.module.function_of_mine"]
    assert (row.title, row.own) == ("function of mine (module)", True) and "my.module.function_of_mine" in METHODS
    vera = METHODS[known_method("peft:VeraConfig")]
    assert (vera.name, vera.title, vera.alpha, vera.dropout, vera.of_layers) == (VERA, "Vera", False, True, False)
    assert "vera" not in METHODS and "../vera.x" not in METHODS and next(iter(METHODS)) == "lora"


def test_an_entry_of_pefts_comparison_is_a_method(tmp_path, monkeypatch):
    folder = tmp_path / "experiments" / "lora" / "rank3-all"
    folder.mkdir(parents=True)
    LoraConfig(r=3, lora_alpha=12, use_rslora=True).save_pretrained(folder)
    (folder / "training_params.json").write_text('{"optimizer_kwargs": {"lr": 0.3}, "max_steps": 7}')
    monkeypatch.chdir(tmp_path)
    name = known_method("experiments/lora/rank3-all/")
    assert name == "peft--experiments--lora--rank3-all" == own_name(name) and METHODS[name].title == "lora rank3-all"
    config = adapter_config(name, settings(r=2), tiny_unet())
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (3, 12, True, {"to_q", "to_k"})
    assert "is not applied; to train like this entry, give options for lr 0.3, max_steps 7" in settings_in_words(name)
    assert known_method("rank3-all") == "rank3-all" and "rank3-all" not in METHODS
    monkeypatch.chdir(folder.parent)
    assert find(known_method("rank3-all"))(None, settings()).r == 3  # a name without a slash
    with pytest.raises(ArgumentTypeError, match="only have letters"):
        known_method("experiments/lora rank 3/x")
    with pytest.raises(InvalidArgument) as error:
        find(known_method("no/entry"))
    assert_one_line(error, "--method no/entry", "there is no adapter_config.json")


def test_settings_reach_the_fields_that_a_tuner_has():
    base = tiny_unet()
    config = adapter_config(VERA, settings(r=3, dropout=0.5), base)
    assert (config.r, config.vera_dropout, config.target_modules) == (3, 0.5, {"to_q", "to_k"})
    config = adapter_config("peft.LoHaConfig", settings(), base)
    assert (config.r, config.alpha) == (2, 4)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("no_such_module.f", "no_such_module cannot be imported"),
        ("examples.my_method.shared_b", "did you mean shared_a?"),
        ("peft.VeraConfg", "did you mean VeraConfig?"),
        ("peft.get_peft_model", "no configuration get_peft_model"),
    ],
)
def test_a_name_that_is_not_found_is_one_line(method, words):
    with pytest.raises(InvalidArgument) as error:
        find(method)
    module, _, function = method.rpartition(".")
    assert_one_line(error, f"--method {module}:{function}", words)


class Half(nn.Module):
    """An update whose delta has the wrong shape."""

    def delta(self) -> torch.Tensor:
        return torch.zeros(1, 1)


RETURNED = {
    "a text": ("mine", "it returned str"),
    "no layer": ({"nowhere": nn.Identity()}, "'nowhere' is no linear layer"),
    "no update": ({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": nn.Identity()}, "with delta()"),
    "another shape": ({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": Half()}, "has the shape (1, 1)"),
    "an empty dict": ({}, "nothing would be trained"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_function_may_not_return_is_one_line(case, monkeypatch):
    import examples.my_method as module

    result, words = RETURNED[case]
    monkeypatch.setattr(module, "mine", lambda model, settings: result, raising=False)
    base = tiny_unet()
    with pytest.raises(ValueError) as error:
        attach(base, configuration("examples.my_method.mine", settings(), base))
    assert_one_line(error, words)


def test_an_adapter_that_cannot_be_merged_or_trains_nothing_is_refused():
    base = tiny_unet()
    model = attach(base, adapter_config("peft.PolyConfig", settings(), base))
    with pytest.raises(ValueError, match="cannot merge"):
        check_usable(model)
    model = attached(VERA, tiny_unet())
    model.conv_in.requires_grad_(True)
    with pytest.raises(ValueError, match="is trained, but is not in one of PEFT"):
        check_usable(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves nothing trainable"):
        check_usable(model)


def test_a_delta_that_is_not_what_was_trained_is_measured(monkeypatch):
    model = attached("examples.my_method.shared_a", tiny_unet())
    assert delta_error(model) < 1e-5
    monkeypatch.setattr(SharedA, "delta", lambda self: 2 * self.up @ self.down * 2)  # the scale is 2, not 4
    assert delta_error(model) == pytest.approx(0.5, rel=1e-4)
    record = {"rank": 2, "error": 0.0, "delta_error": 0.5}
    assert "all files have delta(), from which forward() differs by 50%" in conversion_in_words(record)


@pytest.mark.parametrize("method", [VERA, "examples.my_method.shared_a"])
def test_one_is_saved_and_merged_like_any_method(method, tmp_path):
    model, other = attached(method, tiny_unet()), attached(method, tiny_unet())
    expected = model(**unet_inputs()).sample
    for value in (value for value in other.parameters() if value.requires_grad):
        value.data.zero_()
    assert not torch.equal(other(**unet_inputs()).sample, expected)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert trained_state(model).keys() == trained_state(other).keys()
    assert torch.equal(other(**unet_inputs()).sample, expected)
    plain = tiny_unet()
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain(**unet_inputs()).sample, expected)


def test_peft_loads_vera_that_was_added_to_a_denoiser_in_place(tmp_path):
    """Its matrices A and B are shared over layers, and belong to PEFT's wrapper."""
    model = attached(VERA, tiny_unet())
    loaded = PeftModel.from_pretrained(tiny_unet(), export_peft(model, tmp_path))
    torch.testing.assert_close(loaded(**unet_inputs()).sample, model(**unet_inputs()).sample)


def test_shared_a_is_its_formula_and_shares_a():
    base = tiny_llama()
    found = shared_a(base, settings(("q_proj", "v_proj")))
    assert found.keys() == layers(base, settings(("q_proj", "v_proj"))).keys() and len(found) > 2
    first, *others = found.values()
    nn.init.normal_(first.up)
    x = torch.randn(3, first.down.shape[1])
    torch.testing.assert_close(first(x), 4 / 2 * x @ first.down.T @ first.up.T)
    torch.testing.assert_close(first(x), x @ first.delta().T)
    assert all(other.down is first.down for other in others)


def test_the_conversion_is_the_best_approximation_and_its_error_is_by_hand(tmp_path):
    """LoHa of rank 2 has changes of rank 4; the error of rank 3 is that of the singular values left out."""
    torch.manual_seed(0)
    model = attached("peft.LoHaConfig", tiny_llama(), ("q_proj",))
    kept = left = 0.0
    for _, layer in model.named_modules():
        if hasattr(layer, "hada_w1_a"):
            values = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()).square()
            kept, left = kept + float(values[:3].sum()), left + float(values[3:].sum())
    converted, error = convert(model, 3)
    assert error == pytest.approx(math.sqrt(left / (kept + left)), rel=1e-4) and error > 1e-3
    exact, error = convert(model, 4)
    assert error < 1e-5
    write_converted(model, exact, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(loaded(**token_inputs()).logits, model(**token_inputs()).logits, rtol=1e-4, atol=1e-5)
    twin = with_lora(model, converted)
    assert {value.shape[0] for name, value in twin.named_parameters() if "lora_A" in name} == {3}
