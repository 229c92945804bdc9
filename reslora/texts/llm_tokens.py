"""Tokenization of a causal model's examples, their losses, and generated answers."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..attributes import override_attributes
from ..errors import InvalidArgument
from ..formatting import is_or_are
from ..linking import base_model
from ..runtime.processes import say
from ..tracing import to_device
from .llm_tasks import Example, extract_answer, same_answer

IGNORED = -100  # label of tokens without loss


# -- tokens ------------------------------------------------------------------------------------------------------------


class Encoder:
    """Tokenizes an example as its prompt, its answer and an end token; the prompt's tokens have no labels.

    Prompt and answer are tokenized separately, so that generation starts from the same tokens as in training.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end

    def prompt(self, example: Example) -> list[int]:
        """Return the tokens of the prompt, with the tokenizer's start tokens but without its end token."""
        ids = self.tokenizer(example.prompt + "\n")["input_ids"]
        return ids[:-1] if ids[-1] == self.end else ids

    def __call__(self, example: Example) -> dict[str, list[int]]:
        """Return `input_ids` and `labels` of one example."""
        prompt = self.prompt(example)
        answer = [*self.tokenizer(example.answer, add_special_tokens=False)["input_ids"], self.end]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return a batch (batch x tokens), padded on the right.

        Labels, not padding tokens, select the tokens with loss. So the end token is learned even if the end token is
        also the padding token.
        """
        inputs = self.padded([row["input_ids"] for row in rows], "right")
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {**inputs, "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)}

    def padded(self, texts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        """Return a batch of tokens and its attention mask (batch x tokens), padded on the `left` or `right` side."""
        tokens = [torch.tensor(text) for text in texts]
        masks = [torch.ones_like(text) for text in tokens]
        return {
            "input_ids": pad_sequence(tokens, batch_first=True, padding_value=self.pad, padding_side=side),
            "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
        }


def encode_training(encoder: Encoder, examples: list[Example], max_length: int) -> list[dict[str, list[int]]]:
    """Return the encoded training examples, without those longer than `max_length` tokens.

    Raises `InvalidArgument` if all are longer.
    """
    rows = [encoder(example) for example in examples]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if not kept:
        shortest = min(len(row["input_ids"]) for row in rows)
        raise InvalidArgument(
            f"--max_length {max_length}", "every training example is longer", f"give at least {shortest}"
        )
    if len(kept) < len(rows):
        long = len(rows) - len(kept)
        place = next(each.place for each, row in zip(examples, rows, strict=True) if len(row["input_ids"]) > max_length)
        count = f"{long} of {len(rows)} training examples {is_or_are(long)}"
        say(f"{count} longer than {max_length} tokens: left out (for example {place})")
    return kept


def calibration_batches(rows: list[dict], count: int, size: int) -> list[dict[str, torch.Tensor]] | None:
    """Return batches of the first `count` rows for a merge, without padding; None without rows.

    A batch (`size` x tokens) has rows of similar length, which are truncated to the length of the shortest one.
    """
    chosen = sorted((row["input_ids"] for row in rows[:count]), key=len)
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [{"input_ids": torch.tensor([ids[: len(group[0])] for ids in group])} for group in groups] or None


# -- losses and answers ------------------------------------------------------------------------------------------------


@torch.no_grad()
def example_losses(model: PreTrainedModel, encoder: Encoder, rows: list[dict[str, list[int]]]) -> list[torch.Tensor]:
    """Return the losses of each row's answer tokens, of shape (answer tokens,), in float64, computed in one batch."""
    batch = encoder.collate(rows)
    counts = (batch["labels"] != IGNORED).sum(1).tolist()
    return list(token_losses(model, batch).double().split(counts))


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of each token that has a label, of shape (tokens,), in at least float32."""
    inputs = to_device(batch, model.device)
    labels = inputs.pop("labels")[:, 1:]
    answers = labels != IGNORED
    logits = model(**inputs, use_cache=False).logits[:, :-1][answers]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels[answers], reduction="none")


def count_right(answers: list[str], examples: list[Example]) -> int:
    """Return the number of correct answers."""
    pairs = zip(answers, examples, strict=True)
    return sum(same_answer(extract_answer(answer), example.gold) for answer, example in pairs)


@torch.no_grad()
def generate(model: PreTrainedModel, encoder: Encoder, examples: list[Example], max_new_tokens: int) -> list[str]:
    """Return greedy answers to the prompts of `examples`, generated in one left-padded batch with a KV cache.

    The model's own generation settings, such as a repetition penalty, are ignored.
    """
    inputs = to_device(encoder.padded([encoder.prompt(example) for example in examples], "left"), model.device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=encoder.end,
        pad_token_id=encoder.pad,
    )
    base = base_model(model)
    with override_attributes(base, generation_config=GenerationConfig()):
        tokens = base.generate(**inputs, generation_config=greedy)
    return encoder.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
