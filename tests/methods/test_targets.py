"""Targets that match modules which cannot be adapted: the message names them, and PEFT accepts the suggestion."""

import pytest
from core_models import assert_one_line, tiny_llama, tiny_roberta, tiny_unet
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from reslora.errors import InvalidArgument
from reslora.methods.targets import check_layers

QKV = ["to_q", "to_k", "to_v"]


def refused(model: nn.Module, targets: list[str] | str, *words: str, **options) -> str:
    """Return the error's line, which contains these words."""
    with pytest.raises(InvalidArgument) as error:
        check_layers(model, targets, **options)
    assert_one_line(error, *words)
    return str(error.value)


def adapted(model: nn.Module, targets: list[str] | str) -> set[str]:
    """Return the layers that PEFT adapts by these targets, which must not be refused."""
    check_layers(model, targets)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_what_can_be_adapted_is_taken():
    """`check_layers` raises an error for other targets."""
    unet = tiny_unet()
    for targets in (["to_q", "to_out.0", "conv_in"], r".*attn1\.to_[qk]", "all-linear"):
        check_layers(unet, targets)


def test_a_list_around_a_layer_is_refused_by_the_name_of_the_layer():
    unet = tiny_unet()
    line = refused(unet, [*QKV, "to_out"], "--target_modules to_out: ", "attn1.to_out cannot be adapted (ModuleList)")
    assert line.endswith("; give to_out.0")
    assert any(name.endswith("attn2.to_out.0") for name in adapted(unet, [*QKV, "to_out.0"]))


def test_a_block_is_refused_by_the_first_of_its_layers():
    line = refused(tiny_unet(), ["transformer_blocks.0"], "(BasicTransformerBlock)", "or the like")
    assert line.count("transformer_blocks.0.attn") == 8


def test_an_expression_is_to_fit_layers_alone():
    assert refused(tiny_unet(), ".*attn1.*", "attn1 cannot be adapted (Attention)").endswith("attn1.to_q")
    assert refused(tiny_unet(), ".*dropout", "(Dropout)").endswith("; match only layers")


def test_a_linear_layer_that_holds_modules_is_a_layer():
    """Such as one with a norm of its weight or, in transformers, of its input."""
    model = nn.ModuleDict({"q": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    assert next(model["q"].children(), None) is not None and adapted(model, ["q"]) == {"q"}


def test_what_trains_whole_is_no_target():
    """PEFT skips a classification head that is named."""
    refused(tiny_roberta(), ["query", "classifier"], "(RobertaClassificationHead)", "classifier.out_proj")
    check_layers(tiny_roberta(), ["query", "classifier"], whole=["classifier"])
    check_layers(tiny_llama(), ["q_proj", "embed_tokens"])
