"""Targets that fit what cannot be adapted: the line names it, and what it says to give is what PEFT takes."""

import json
import re
import shlex
from pathlib import Path

import diffusers
import pytest
from conftest import assert_one_line, tiny_llama, tiny_roberta, tiny_unet
from peft import LoraConfig, inject_adapter_in_model
from pipelines import FAMILIES
from torch import nn

from reslora.common.errors import InvalidArgument
from reslora.common.targets import check_layers

QKV = ["to_q", "to_k", "to_v"]


def refused(model: nn.Module, targets: list[str] | str, *words: str, **options) -> str:
    """The line, which holds these words."""
    with pytest.raises(InvalidArgument) as error:
        check_layers(model, targets, **options)
    assert_one_line(error, *words)
    return str(error.value)


def adapted(model: nn.Module, targets: list[str] | str) -> set[str]:
    """The layers that PEFT adapts by these targets, which are not refused."""
    check_layers(model, targets)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_what_can_be_adapted_is_taken():
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


def test_what_has_no_layer_inside_is_to_be_left_out():
    assert refused(tiny_unet(), ["to_q", "norm1"], "--target_modules norm1", "(LayerNorm)").endswith("; leave it out")


def test_an_expression_is_to_fit_layers_alone():
    assert refused(tiny_unet(), ".*attn1.*", "attn1 cannot be adapted (Attention)").endswith("attn1.to_q")
    assert refused(tiny_unet(), ".*dropout", "(Dropout)").endswith("; let it fit layers alone")


def test_a_name_of_a_layer_here_and_of_a_list_there_is_refused_by_an_expression(tmp_path):
    """FLUX.2's: in its double blocks `to_out` is a list, in the single ones a layer."""
    model = denoiser("flux2_klein", tmp_path)
    refused(model, ["to_q", "to_out"], "; give to_out.0, and single_transformer_blocks.0.attn.to_out and the like")
    line = refused(
        model, ["to_q", "to_out", "norm_added_q"], "transformer_blocks.0.attn.to_out cannot", expressions=True
    )
    names = {name for name, _ in model.named_modules()}
    outs = {name for name in names if re.fullmatch(r"single.*\.to_out|.*\.to_out\.0", name)}
    assert len(outs) > 2
    assert adapted(model, expression_of(line)) == outs | {name for name in names if name.endswith(".to_q")}


def test_a_name_of_a_layer_here_and_of_an_activation_there(tmp_path):
    """Z-Image's: `adaLN_modulation` begins with a layer in its blocks, with a SiLU in its last layer."""
    targets = ["adaLN_modulation.0"]
    line = refused(model := denoiser("z_image", tmp_path), targets, "(SiLU)")
    assert line.endswith("; give noise_refiner.0.adaLN_modulation.0 and the like by their whole names")
    expression = expression_of(refused(model, targets, "(SiLU)", expressions=True))
    ended = {name for name, module in model.named_modules() if name.endswith("n.0") and isinstance(module, nn.Linear)}
    assert len(ended) > 1 and adapted(model, expression) == ended


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expression_that_is_given_is_taken(family, tmp_path):
    model, found = denoiser(family, tmp_path), 0
    names = [name.split(".") for name, _ in model.named_modules()][1:]
    for end in {".".join(parts[-length:]) for parts in names for length in (1, 2, 3)}:
        try:
            check_layers(model, [end], expressions=True)
        except InvalidArgument as error:
            if "in place of all" in str(error):
                check_layers(model, expression_of(str(error)))
                found += 1
    assert found


def denoiser(family: str, folder: Path) -> nn.Module:
    parts = json.loads((FAMILIES[family](folder / "model") / "model_index.json").read_text())
    part = "unet" if "unet" in parts else "transformer"
    return getattr(diffusers, parts[part][1]).from_pretrained(folder / "model", subfolder=part)


def expression_of(line: str) -> str:
    """What a line says to give in place of all."""
    (expression,) = shlex.split(re.search("; give (.*) in place of all", line)[1])
    return expression


def test_a_linear_layer_that_holds_modules_is_a_layer():
    """As one with a norm of its weight or, in transformers, of its input."""
    model = nn.ModuleDict({"q": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    assert next(model["q"].children(), None) is not None and adapted(model, ["q"]) == {"q"}


def test_what_trains_whole_is_no_target():
    """PEFT passes over a head for classification that is named."""
    refused(tiny_roberta(), ["query", "classifier"], "(RobertaClassificationHead)", "classifier.out_proj")
    check_layers(tiny_roberta(), ["query", "classifier"], whole=["classifier"])
    check_layers(tiny_llama(), ["q_proj", "embed_tokens"])
