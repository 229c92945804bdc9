"""Make the two tiny language models that train_llm.py and train_glue.py train by default, and their tasks.

    OMP_NUM_THREADS=1 python assets/make/make_tiny_language_models.py llama
    OMP_NUM_THREADS=1 python assets/make/make_tiny_language_models.py roberta

All text is generated here from a few templates and seeds; nothing is downloaded. Each model is pretrained on sentences
of one kind and comes with a task that asks about the same things in sentences it never saw: `tiny-llama` reads
statements such as "Mia has 7 pens. Mia finds 5 more. Now Mia has ( 7.0 + 5.0 ) = 12 pens." and is fine-tuned on word
problems in the columns of SVAMP; `tiny-roberta` fills blanks in simple sentences, and is fine-tuned to tell grammatical
sentences from others, in the columns of GLUE's CoLA. A few minutes each on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_texts import arithmetic_text, grammatical, judgement, word_problem
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    get_cosine_schedule_with_warmup,
)

ASSETS = Path(__file__).resolve().parent.parent
WIDTH, LENGTH, BATCH = 128, 128, 32


# -- data and tokenizers -----------------------------------------------------------------------------------------------


def write_task(folder: Path, sizes: dict[str, int], make: Callable, key: Callable) -> list[dict]:
    """Writes `<split>.jsonl`; no two rows of any splits have the same key. Returns all rows."""
    rng, seen, rows = random.Random(1), set(), []
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        part = []
        while len(part) < size:
            row = make(rng, len(part))
            if key(row) not in seen:
                seen.add(key(row))
                part.append(row)
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        rows += part
    return rows


def train_tokenizer(texts: list[str], size: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE, so that any text can be read; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def packed(tokenizer, make: Callable[[random.Random], str], rng: random.Random) -> torch.Tensor:
    """A batch of texts end to end, [BATCH, LENGTH]."""
    tokens: list[int] = []
    while len(tokens) < BATCH * LENGTH:
        tokens += tokenizer(make(rng) + tokenizer.eos_token)["input_ids"]
    return torch.tensor(tokens[: BATCH * LENGTH]).view(BATCH, LENGTH)


# -- training ----------------------------------------------------------------------------------------------------------


def pretrain(model, batch: Callable[[], dict], steps: int, learning_rate: float = 3e-3) -> float:
    """AdamW with a cosine schedule; returns the mean loss of the last fifty steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    losses, start = [], time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            mean = math.fsum(losses[-50:]) / 50
            print(f"step {step}/{steps}  loss {mean:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return math.fsum(losses[-50:]) / len(losses[-50:])


def save(model, tokenizer, folder: Path, card: str) -> None:
    """Weights in half precision, tokenizer and model card."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_llama(steps: int) -> None:
    folder = ASSETS / "tiny-llama"
    shutil.rmtree(folder, ignore_errors=True)
    sizes = {"train": 800, "validation": 60, "test": 200}
    rows = write_task(folder / "task", sizes, word_problem, lambda row: (row["Body"], row["Question"]))
    rng = random.Random(0)
    words = [arithmetic_text(rng) for _ in range(3000)] + [f"{row['Body']} {row['Question']}" for row in rows]
    words += ["Question: Answer: The answer is 12.\n"] * 300
    tokenizer = train_tokenizer(words, 640, ["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)

    def batch() -> dict:
        tokens = packed(tokenizer, arithmetic_text, rng)
        return {"input_ids": tokens, "labels": tokens}

    loss = pretrain(model, batch, steps)
    size = sum(parameter.numel() for parameter in model.parameters())
    card = LLAMA_CARD.format(size=size, steps=steps, batch=BATCH, length=LENGTH, loss=loss, **sizes)
    save(model, tokenizer, folder, card)


LLAMA_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny-llama

A LLaMA of {size:,} parameters (5 layers, 128 wide, grouped-query attention) that knows statements such as "Mia has 7
pens. Mia finds 5 more. Now Mia has ( 7.0 + 5.0 ) = 12 pens.", and nothing else. It is what `train_llm.py` fine-tunes
when no model is named, so that a fine-tuning can be watched in a few minutes on a CPU. It is of no other use.

- **Data**: generated from templates by `assets/make/make_tiny_language_models.py`; no text of anyone else is in it.
- **Training**: {steps} steps of {batch} x {length} tokens; loss at the end {loss:.3f}. Half-precision weights.
- **Tokenizer**: byte-level BPE; every digit is one token; `<s>`, `</s>`, `<pad>`.
- **`task/`**: word problems in SVAMP's columns (ID, Body, Question, Equation, Answer, Type), asked in sentences that
  the pretraining did not hold; {train} to train, {validation} to validate, {test} to test, no two alike.

To make it again: `OMP_NUM_THREADS=1 python assets/make/make_tiny_language_models.py llama --steps {steps}`.
Licence: Apache-2.0.
"""


def masked(tokenizer, rng: random.Random) -> dict:
    """A batch of sentences as `RobertaForMaskedLM` wants it: of the tokens 15% hidden, 5% exchanged, 5% confirmed."""
    batch = tokenizer([grammatical(rng) for _ in range(3 * BATCH)], padding=True, return_tensors="pt")
    tokens, luck = batch["input_ids"], torch.rand(batch["input_ids"].shape)
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))
    labels = tokens.masked_fill((luck > 0.25) | special, -100)
    shown = torch.where(
        (luck < 0.05) & ~special, tokens.flatten()[torch.randperm(tokens.numel())].view_as(tokens), tokens
    )
    shown = shown.masked_fill((luck > 0.1) & (luck < 0.25) & ~special, tokenizer.mask_token_id)
    return {**batch, "input_ids": shown, "labels": labels}


def make_roberta(steps: int) -> None:
    folder = ASSETS / "tiny-roberta"
    shutil.rmtree(folder, ignore_errors=True)
    sizes = {"train": 1200, "validation": 300}
    rows = write_task(folder / "task", sizes, judgement, lambda row: row["sentence"])
    rng = random.Random(0)
    words = [grammatical(rng) for _ in range(3000)] + [row["sentence"] for row in rows]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = train_tokenizer(words, 512, special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.1,
    )
    model = AutoModelForMaskedLM.from_config(config)
    loss = pretrain(model, lambda: masked(tokenizer, rng), steps)
    size = sum(parameter.numel() for parameter in model.parameters())
    save(model, tokenizer, folder, ROBERTA_CARD.format(size=size, steps=steps, batch=3 * BATCH, loss=loss, **sizes))


ROBERTA_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: fill-mask
---

# tiny-roberta

A RoBERTa of {size:,} parameters (4 layers, 128 wide) that fills blanks in simple sentences such as "Two clever dogs
follow the king.", and knows nothing else. It is what `train_glue.py` fine-tunes when no model is named, so that a
fine-tuning can be watched in a few minutes on a CPU. It is of no other use.

- **Data**: generated from a small grammar by `assets/make/make_tiny_language_models.py`;
  no text of anyone else is in it.
- **Training**: masked tokens, {steps} steps of {batch} sentences; loss at the end {loss:.3f}. Half-precision weights.
- **Tokenizer**: byte-level BPE with RoBERTa's special tokens.
- **`task/`**: in the columns of GLUE's CoLA (sentence, label, idx): is the sentence grammatical (1), or is a word of it
  in the wrong form (0)? Half of the sentences have a clause inside, which the pretraining did not hold, and it saw no
  wrong one; {train} to train, {validation} to validate, no two alike.

To make it again: `OMP_NUM_THREADS=1 python assets/make/make_tiny_language_models.py roberta --steps {steps}`.
Licence: Apache-2.0.
"""


MAKERS = {"llama": make_llama, "roberta": make_roberta}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MAKERS))
    parser.add_argument("--steps", type=int, default=1500, help="pretraining steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    MAKERS[args.model](args.steps)


if __name__ == "__main__":
    main()
