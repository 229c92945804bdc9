"""Ranks and alphas of single layers: which layers an entry matches, and their values in every method."""

import math

import pytest
import torch
from core_models import STACK_INPUTS, Stack, assert_one_line, tiny_llama, tiny_unet
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import reslora
from reslora.errors import InvalidArgument
from reslora.export import merged_state_dict
from reslora.linking import base_model
from reslora.methods.adapters import attach
from reslora.methods.patterns import entries, spell_out
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config, refuse_settings

RANKS, ALPHAS = {"attn2.to_k": 3, "mid_block.*to_q": 2}, {r"attn1\.to_[qk]": 5, "attn2.to_q": 0.5}
TAKING = [name for name, row in METHODS.items() if row.of_layers and not row.shortcuts]


def spelled(method: str = "lora", r: int = 4, **patterns):
    """Return a tiny U-Net with the method's adapter and alpha 8, as in a run."""
    unet = tiny_unet()
    settings = AdapterSettings(r, 8, 0.0, ["to_q", "to_k", "to_v"], 10, **patterns)
    config = adapter_config(method, settings)
    spell_out(unet, config)
    return attach(unet, config)


def layers_of(model) -> dict:
    return {name: module for name, module in base_model(model).named_modules() if isinstance(module, BaseTunerLayer)}


# -- what is written ---------------------------------------------------------------------------------------------------


def test_entries_are_names_and_numbers():
    assert entries("rank_pattern", ["attn2.to_k=4", "(?=x)to_q=16"]) == {"attn2.to_k": 4, "(?=x)to_q": 16}
    assert entries("alpha_pattern", ["to_k=4", "to_q=0.5"]) == {"to_k": 4, "to_q": 0.5}
    assert entries("lr_pattern", ["mid_block.*=0.5 to_k=2"]) == {"mid_block.*": 0.5, "to_k": 2}  # as from a quoted list
    assert entries("rank_pattern", None) == {}


@pytest.mark.parametrize(
    ("field", "texts", "words"),
    [
        ("rank_pattern", ["to_k"], "not NAME=VALUE"),
        ("rank_pattern", ["to_k=0"], "'0' is not a whole number"),
        ("rank_pattern", ["to_k=2.5"], "'2.5' is not a whole number"),
        ("alpha_pattern", ["to_k=-1"], "'-1' is not a finite number above 0"),
        ("alpha_pattern", ["to_k=inf"], "'inf' is not a finite number above 0"),
        ("alpha_pattern", ["to_(k=2"], "to_(k is not a regular expression"),
        ("rank_pattern", ["to_k=2", "to_k=3"], "to_k is given twice"),
    ],
)
def test_other_texts_are_refused(field, texts, words):
    with pytest.raises(InvalidArgument) as error:
        entries(field, texts)
    assert_one_line(error, f"--{field} {texts[-1]}", words)


# -- which layers they mean --------------------------------------------------------------------------------------------


def test_entries_mean_the_layers_that_they_mean_to_peft():
    stock = get_peft_model(
        tiny_unet(),
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], rank_pattern=RANKS, alpha_pattern=ALPHAS
        ),
    )
    ours, theirs = layers_of(spelled(rank_pattern=RANKS, alpha_pattern=ALPHAS)), layers_of(stock)
    assert {name: (layer.r, layer.scaling) for name, layer in ours.items()} == {
        name: (layer.r, layer.scaling) for name, layer in theirs.items()
    }
    assert {layer.r["default"] for layer in ours.values()} == {2, 3, 4}


def test_a_configuration_is_left_with_whole_names():
    model = spelled(rank_pattern=RANKS)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == {
        "^" + name.replace(".", r"\."): layer.r["default"]
        for name, layer in layers_of(model).items()
        if layer.r["default"] != 4
    }
    spell_out(tiny_unet(), model.peft_config["default"])
    assert model.peft_config["default"].rank_pattern == pattern


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"rank_pattern": {"attn9": 2}}, ["--rank_pattern attn9=2", "no adapted layer"]),
        ({"alpha_pattern": {"mid_block": 2}}, ["--alpha_pattern mid_block=2", "mid_block.*"]),  # PEFT wants the end
        ({"alpha_pattern": {"conv_in": 2}}, ["--alpha_pattern conv_in=2", "no adapted layer"]),
        ({"rank_pattern": {"to_k": 2, "attn2.to_k": 3}}, ["--rank_pattern attn2.to_k=3", "also matches to_k=2"]),
        ({"rank_pattern": {"attn1.to_k": 900}}, ["--rank_pattern 900", "attn1.to_k is 8", "give a rank of at most"]),
    ],
)
def test_what_fits_no_layer_or_two_ways_is_refused(patterns, words):
    with pytest.raises(InvalidArgument) as error:
        spelled(**patterns)
    assert_one_line(error, *words)


# -- every method ------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", TAKING)
def test_every_method_that_has_ranks_and_alphas_has_them_by_layer(method):
    times = 2 if method == "lora_x2" else 1
    root = math.sqrt if method == "rslora" else float
    for name, layer in layers_of(spelled(method, rank_pattern=RANKS, alpha_pattern=ALPHAS)).items():
        of_middle = name.startswith("mid_block") and name.endswith("to_q")
        rank = RANKS["attn2.to_k"] if name.endswith("attn2.to_k") else 2 if of_middle else 4
        alpha = 5 if "attn1.to_q" in name or "attn1.to_k" in name else 0.5 if "attn2.to_q" in name else 8
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(times * alpha / root(rank), rel=1e-12), name


def test_methods_without_them_are_refused_by_name():
    refuse_settings(["lora", "lokr", "oft"], 0.0, {"rank_pattern": None, "alpha_pattern": None})
    for name in ("adalora", "oft"):
        with pytest.raises(InvalidArgument) as error:
            refuse_settings(["lora", name], 0.0, {"rank_pattern": ["to_k=2"]})
        assert_one_line(error, "--rank_pattern to_k=2", f"--method {name}")
    with pytest.raises(InvalidArgument) as error:
        refuse_settings(["lora", "oft"], 0.1, {})
    assert_one_line(error, "--lora_dropout 0.1", "--method oft")


# -- shortcuts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_chains_end_where_ranks_differ_and_what_is_merged_is_the_base_plus_the_adapter(shortcut):
    torch.manual_seed(0)
    stack = Stack(layers=6).double()
    patterns = {"rank_pattern": {"layers.2.proj": 2}, "alpha_pattern": {"layers.3.proj": 9}}
    config = adapter_config("reslora", AdapterSettings(4, 8, 0.0, ["proj"], 10, **patterns))
    spell_out(stack, config)
    model = attach(stack, config, reslora.ResLoraConfig(shortcut=shortcut), STACK_INPUTS).double()
    plan = reslora.chains(model)
    assert [[int(block.name.split(".")[1]) for block in chain] for chain in plan] == [[0, 1], [2], [3, 4, 5]]
    assert plan[1][0].cut == "rank 2 follows rank 4" and plan[2][0].cut == "rank 4 follows rank 2"
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    reslora.merge(model, "weights")
    plain = Stack(layers=6).double()
    plain.load_state_dict(merged_state_dict(base_model(model)))
    torch.testing.assert_close(plain(**STACK_INPUTS), model(**STACK_INPUTS), rtol=1e-12, atol=1e-12)
    scales = {2: 8 / 2, 3: 9 / 4}
    for number, layer in enumerate(layers_of(model).values()):
        assert layer.scaling["default"] == pytest.approx(scales.get(number, 8 / 4), rel=1e-12)


def test_a_language_model_has_them_too():
    llama = tiny_llama()
    config = adapter_config("lora", AdapterSettings(4, 8, 0.0, ["q_proj", "v_proj"], 10, rank_pattern={"v_proj": 2}))
    spell_out(llama, config)
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in layers_of(attach(llama, config)).items()}
    assert ranks == {"q_proj": 4, "v_proj": 2}
