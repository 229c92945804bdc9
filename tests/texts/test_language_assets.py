"""The bundled tiny language models and their tasks: they load, are small, and have the stated content."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaForCausalLM,
    RobertaForMaskedLM,
)

ASSETS = Path(__file__).resolve().parents[2] / "assets"
sys.path.insert(0, str(ASSETS / "make"))


LLAMA, ROBERTA = ASSETS / "tiny-llama", ASSETS / "tiny-roberta"


def read_task(folder: Path) -> dict[str, list[dict]]:
    files = sorted((folder / "task").glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


@pytest.mark.parametrize("folder", [LLAMA, ROBERTA], ids=lambda folder: folder.name)
def test_files_are_small_and_complete(folder):
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sizes["model.safetensors"] < 2_000_000 and sum(sizes.values()) < 2_500_000
    assert {"README.md", "config.json", "tokenizer.json"} <= set(sizes)
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in sizes)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "make_tiny_language_models.py" in card
    assert str(len(read_task(folder)["train"])) in card


def test_the_llama_loads_and_reads_what_it_knows():
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32),
        AutoTokenizer.from_pretrained(LLAMA),
    )
    assert isinstance(model, LlamaForCausalLM) and model.config.num_hidden_layers >= 4
    assert tokenizer.is_fast and len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer("Mia has 17 pens.\nÜber")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert {"1", "7"} <= set(tokenizer.convert_ids_to_tokens(ids))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Mia has 17 pens.\nÜber"
    losses = {}
    for name, text in {
        "known": "( 12.0 + 5.0 ) = 17. ( 9.0 - 4.0 ) = 5.",
        "wrong": "( 12.0 + 5.0 ) = 39. ( 9.0 - 4.0 ) = 6.",
    }.items():
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        losses[name] = model(input_ids=tokens, labels=tokens).loss.item()
    assert losses["known"] < losses["wrong"] - 0.2


def test_the_roberta_loads_and_knows_grammar():
    model, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(ROBERTA, dtype=torch.float32),
        AutoTokenizer.from_pretrained(ROBERTA),
    )
    assert isinstance(model, RobertaForMaskedLM) and model.config.num_hidden_layers >= 4
    assert tokenizer.is_fast and tokenizer.model_max_length <= model.config.max_position_embeddings - 2
    pair = tokenizer("The dog runs.", "It falls.")["input_ids"]
    assert pair[0] == tokenizer.cls_token_id and pair.count(tokenizer.sep_token_id) == 3
    for text, right, wrong in (("The dogs near the cat {} old.", " are", " is"), ("A king {} old.", " is", " are")):
        tokens = tokenizer(text.format(tokenizer.mask_token).replace(" <mask>", "<mask>"), return_tensors="pt")
        place = (tokens["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
        logits = model(**tokens).logits[0, place]
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (right, wrong)]
        assert [len(word) for word in ids] == [1, 1] and logits[ids[0]] > logits[ids[1]]
