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

NAMES = ["Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Eva", "Max", "Ida", "Kim", "Ron"]
THINGS = ["apples", "pens", "books", "coins", "cards", "shells", "stamps", "pears", "toys", "cups", "eggs", "balls"]
PLACES = ["box", "bag", "jar", "basket", "drawer", "room"]


# -- tiny-llama: statements about numbers, and word problems -----------------------------------------------------------


def numbers(rng: random.Random, kind: str) -> dict[str, int]:
    """Operands `a` and `b`, their sign, and the result `c`; `d` has nothing to do with them."""
    if kind == "times":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        c = a * b
    else:
        b, c = rng.randint(2, 19), rng.randint(2, 19)
        a = b + c
        if kind == "plus":
            a, c = c, a
    return {"a": a, "b": b, "c": c, "d": rng.randint(2, 19), "sign": SIGNS[kind]}


STATEMENTS = {
    "plus": [
        "{n} has {a} {t}. {n} {more} {b} more. Now {n} has",
        "{n} has {a} {t} and {m} has {b} {t}. Together they have",
        "There are {a} {t} in the {p}. {n} puts {b} {t} in it. Now it holds",
        "Yesterday {n} {got} {a} {t}, today {b}. That makes",
    ],
    "minus": [
        "{n} has {a} {t}. {n} {less} {b} of them. Now {n} has",
        "{n} has {a} {t} and {m} has {b} {t}. The difference is",
        "There are {a} {t} in the {p}. {n} takes {b} {t} out of it. It still holds",
        "{n} {lost} {b} of {a} {t}. That leaves",
    ],
    "times": [
        "{n} has {a} {ps}. Each {p} holds {b} {t}. That is",
        "{n} buys {b} {t} on each of {a} days. That makes",
    ],
}
EQUATION = "( {a}.0 {sign} {b}.0 )"
WORDS = {
    "more": ["finds", "buys", "wins", "gets"],
    "less": ["loses", "eats", "sells", "breaks"],
    "got": ["found", "bought", "won", "picked"],
    "lost": ["lost", "ate", "sold", "broke"],
}
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
TYPES = {"plus": "Addition", "minus": "Subtraction", "times": "Multiplication"}

PROBLEMS = {
    "plus": [
        ("{n} {got} {a} {t} in the morning and {b} {t} in the evening.", "How many {t} did {n} get in all?"),
        ("{n} had {a} {t}. Then {m} gave {n} {b} {t}.", "How many {t} does {n} have now?"),
        ("After {n} {lost} {b} {t} there were {a} {t} left in the {p}.", "How many {t} were there at first?"),
    ],
    "minus": [
        ("{n} had {a} {t} and gave {b} {t} to {m}.", "How many {t} does {n} have left?"),
        ("{n} {got} {a} {t} while {m} {got} {b} {t}.", "How many more {t} did {n} get than {m}?"),
        ("There were {a} {t} in the {p} until {n} {lost} {b} of them.", "How many {t} are there still?"),
        ("{n} {got} {b} {t} and has {a} {t} now.", "How many {t} did {n} have at first?"),
    ],
    "times": [
        ("{n} filled {a} {ps} with {b} {t} each.", "How many {t} did {n} use in all?"),
        ("{a} friends gave {n} {b} {t} each.", "How many {t} did {n} get in all?"),
    ],
}
ASIDES = ["{m} had {d} {u}.", "There were {d} {u} in another {p}.", "{d} {u} were on the table.", ""]


def blanks(rng: random.Random, kind: str) -> dict[str, object]:
    """What fills the blanks of one template."""
    n, m = rng.sample(NAMES, 2)
    t, u = rng.sample(THINGS, 2)
    p = rng.choice(PLACES)
    words = {name: rng.choice(choices) for name, choices in WORDS.items()}
    ps = p + ("es" if p.endswith("x") else "s")
    return {"n": n, "m": m, "t": t, "u": u, "p": p, "ps": ps, **words, **numbers(rng, kind)}


def arithmetic_text(rng: random.Random) -> str:
    """A few bare equations, or a statement that ends in one, maybe after an aside."""
    if rng.random() < 0.4:
        return " ".join(f"{EQUATION} = {{c}}.".format(**numbers(rng, rng.choice(list(SIGNS)))) for _ in range(4))
    kind = rng.choice(list(SIGNS))
    sentences = [rng.choice(ASIDES), rng.choice(STATEMENTS[kind]) + f" {EQUATION} = {{c}} {{t}}."]
    return " ".join(sentences).strip().format(**blanks(rng, kind))


def word_problem(rng: random.Random, index: int) -> dict:
    """One row in the columns of SVAMP on the hub."""
    kind = rng.choice(["plus", "minus", "minus", "times"])
    filled = blanks(rng, kind)
    body, question = rng.choice(PROBLEMS[kind])
    sentences = [rng.choice(ASIDES), body]
    return {
        "ID": f"made-{index}",
        "Body": " ".join(sentence.format(**filled) for sentence in sentences if sentence),
        "Question": question.format(**filled),
        "Equation": EQUATION.format(**filled),
        "Answer": str(filled["c"]),
        "Type": TYPES[kind],
    }


# -- tiny-roberta: sentences that are grammatical or not ---------------------------------------------------------------

NOUNS = ["dog", "cat", "bird", "horse", "girl", "boy", "teacher", "doctor", "farmer", "friend", "king", "painter"]
ADJECTIVES = ["old", "small", "happy", "clever", "quiet", "brave"]
DETERMINERS = (["the", "a", "every", "this"], ["the", "many", "two", "these"])
TRANSITIVE = ["see", "like", "follow", "hear", "help", "know", "draw", "remember"]
INTRANSITIVE = ["sleep", "run", "wait", "sing", "fall"]


class Sentence:
    """A grammatical sentence as it grows, with the words that would be wrong in some place."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.words: list[str] = []
        self.mistakes: list[tuple[int, str]] = []

    def add(self, word: str, wrong: str | None = None) -> None:
        if wrong is not None:
            self.mistakes.append((len(self.words), wrong))
        self.words.append(word)

    def noun(self, plural: bool) -> None:
        determiner, noun = self.rng.choice(DETERMINERS[plural]), self.rng.choice(NOUNS)
        self.add(determiner)
        if self.rng.random() < 0.3:
            self.add(self.rng.choice(ADJECTIVES))
        forms = (noun, noun + "s")
        self.add(forms[plural], None if determiner == "the" else forms[not plural])

    def verb(self, verbs: list[str], plural: bool) -> None:
        verb = self.rng.choice(verbs)
        forms = (verb + "s", verb)
        self.add(forms[plural], forms[not plural])

    def subject(self, plural: bool, hard: bool) -> None:
        """A noun phrase; with something between noun and verb now and then, and a whole clause if `hard`."""
        self.noun(plural)
        if hard and self.rng.random() < 0.5:
            self.add("that")
            self.verb(TRANSITIVE, plural)
            self.noun(self.rng.random() < 0.5)
        elif self.rng.random() < 0.3:
            self.add(self.rng.choice(["near", "behind", "with"]))
            self.noun(self.rng.random() < 0.5)

    def clause(self, hard: bool) -> None:
        plural, kind = self.rng.random() < 0.5, self.rng.randrange(5)
        if kind == 0:
            self.add(("does", "do")[plural], ("does", "do")[not plural])
            self.noun(plural)
            self.add(verb := self.rng.choice(TRANSITIVE), verb + "s")
            self.noun(self.rng.random() < 0.5)
            return
        self.subject(plural, hard)
        if kind == 1:
            self.verb(INTRANSITIVE, plural)
        elif kind == 2:
            self.add(("is", "are")[plural], ("is", "are")[not plural])
            self.add(self.rng.choice(ADJECTIVES))
        elif kind == 3:
            self.verb(TRANSITIVE, plural)
            forms = ("itself", "themselves")
            self.add(forms[plural], forms[not plural])
        else:
            self.verb(TRANSITIVE, plural)
            self.noun(self.rng.random() < 0.5)

    def text(self) -> str:
        text = " ".join(self.words)
        return text[0].upper() + text[1:] + ("?" if self.words[0] in ("do", "does") else ".")


def grammatical(rng: random.Random) -> str:
    """One simple sentence."""
    sentence = Sentence(rng)
    sentence.clause(hard=False)
    return sentence.text()


def judgement(rng: random.Random, index: int) -> dict:
    """One row in the columns of GLUE's CoLA, of a simple sentence or one with a clause inside; 1 is acceptable."""
    sentence, label = Sentence(rng), rng.randint(0, 1)
    sentence.clause(hard=True)
    if label == 0:
        place, wrong = rng.choice(sentence.mistakes)
        sentence.words[place] = wrong
    return {"sentence": sentence.text(), "label": label, "idx": index}


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

To make it again: `OMP_NUM_THREADS=1 python assets/make/make_tiny_language_models.py llama`. Licence: Apache-2.0.
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

To make it again: `OMP_NUM_THREADS=1 python assets/make/make_tiny_language_models.py roberta`. Licence: Apache-2.0.
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
