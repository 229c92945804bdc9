"""Messages about chains, for each method that reads --shortcut."""

import pytest
from core_models import tiny_llama
from peft import LoraConfig, get_peft_model

from reslora import ResLoraConfig, connect
from reslora.methods.links import print_links

SHORTER = "--pre_num {}: 1 of 1 chain is shorter (shortest: 3 blocks); the longest has 3, so this equals --pre_num 2"


@pytest.mark.parametrize(
    ("method", "shortcut", "pre_num", "said"),
    [
        ("reslora", "block", 3, [SHORTER.format(3)]),
        ("lora_matched", "middle", 3, [SHORTER.format(3)]),
        ("reslora", "input", 5, ["--pre_num 5: the longest chain has 3 blocks, and --shortcut input uses only one"]),
        ("reslora", "input", 4, []),  # the default, of which input uses one as well
        ("reslora", "block", 2, []),
        ("reslora", "block", -1, []),
        ("reslora", "none", 9, []),
        ("lora", "block", 9, []),
    ],
)
def test_a_number_of_blocks_that_is_more_than_there_are_is_told(method, shortcut, pre_num, said):
    model = get_peft_model(tiny_llama(layers=3), LoraConfig(r=2, target_modules=["q_proj"]))
    config, told = ResLoraConfig(shortcut, pre_num), []
    if method == "reslora":
        connect(model, config)
    print_links(model, method, config, told.append)
    assert told == said


def test_layers_that_stay_plain_are_told():
    model, told = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])), []
    print_links(model, "reslora", ResLoraConfig("block", 1), told.append)
    assert told == ["--shortcut: 1 layer left as plain LoRA, such as model.embed_tokens (embedding)"]
