"""Tokenization of a causal model's examples, and a trainer that also evaluates generated answers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..attributes import override_attributes
from ..chains import base_model
from ..errors import InvalidArgument
from ..formatting import is_or_are
from ..runtime.processes import all_gather, say
from .llm_tasks import Example, extract_answer, same_answer
from .trainer import AdapterTrainer

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

        Labels, not padding tokens, select the tokens with loss. So the end token is learned even if it is also the
        padding token.
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
        say(f"{long} of {len(rows)} training examples {is_or_are(long)} longer than {max_length} tokens: left out")
    return kept


def calibration_batches(rows: list[dict], count: int, size: int) -> list[dict[str, torch.Tensor]] | None:
    """Return batches of the first `count` rows for a merge, without padding; None without rows.

    A batch has `size` rows of similar length, which are truncated to the length of the shortest one.
    """
    chosen = sorted((row["input_ids"] for row in rows[:count]), key=len)
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [{"input_ids": torch.tensor([ids[: len(group[0])] for ids in group])} for group in groups] or None


# -- training and evaluation -------------------------------------------------------------------------------------------


class LlmTrainer(AdapterTrainer):
    """An `AdapterTrainer` that evaluates the loss per answer token, and the accuracy of generated answers."""

    control: Any  # set by `Trainer`

    def __init__(
        self,
        *args,
        encoder: Encoder,
        examples: dict[str, list[Example]],
        max_new_tokens: int,
        eval_accuracy: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, data_collator=encoder.collate, **kwargs)
        self.encoder, self.examples = encoder, examples
        self.max_new_tokens, self.eval_accuracy = max_new_tokens, eval_accuracy

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return and log validation metrics: `eval_loss`, and `eval_accuracy` with --eval_accuracy."""
        figures = self.figures("validation", accuracy=self.eval_accuracy)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def figures(self, split: str, accuracy: bool = True) -> dict[str, float]:
        """Return the loss per answer token and, on request, the accuracy, over all processes."""
        training = self.model.training
        self.model.eval()
        self.take_average()
        figures = {"loss": self._loss(split)}
        if accuracy:
            figures["accuracy"] = self._accuracy(split)
        self.model.train(training)
        return figures

    @torch.no_grad()
    def _loss(self, split: str) -> float:
        rows = [self.encoder(example) for example in self._mine(split)]
        loss, tokens = 0.0, 0
        for batch in self._batches(sorted(rows, key=lambda row: len(row["input_ids"])), f"{split} loss"):
            logits, labels, _ = learnt_tokens(self.model, self.encoder, batch)
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += len(labels)
        return _ratio_over_processes(loss, tokens)

    def _accuracy(self, split: str) -> float:
        examples = sorted(self._mine(split), key=lambda example: len(example.prompt))
        right = 0
        for batch in self._batches(examples, f"{split} answers"):
            answers = generate(self.model, self.encoder, batch, self.max_new_tokens)
            right += count_right(answers, batch)
        return _ratio_over_processes(right, len(examples))

    def _mine(self, split: str) -> list[Example]:
        return self.examples[split][self.args.process_index :: self.args.world_size]

    def _batches(self, items: list, title: str) -> Iterator[list]:
        size = self.args.per_device_eval_batch_size
        starts = range(0, len(items), size)
        quiet = self.args.disable_tqdm or self.args.process_index > 0
        for start in tqdm(starts, desc=title, leave=False, disable=quiet, dynamic_ncols=True):
            self.stopping.check("stopped while evaluating; resume with --resume_from_checkpoint latest")
            yield items[start : start + size]


def _ratio_over_processes(total: float, count: int) -> float:
    """Return `total` / `count`, each summed over all processes."""
    totals, counts = zip(*all_gather((total, count)), strict=True)
    return sum(totals) / sum(counts)


@torch.no_grad()
def example_losses(model: PreTrainedModel, encoder: Encoder, examples: list[Example]) -> list[float]:
    """Return the mean loss of each example's answer tokens, computed in one batch."""
    logits, labels, counts = learnt_tokens(model, encoder, [*map(encoder, examples)])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    return [float(own.mean()) for own in losses.split(counts)]


def learnt_tokens(
    model: Any, encoder: Encoder, rows: list[dict[str, list[int]]]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return logits and labels of the tokens with loss, and the number of these tokens in each row.

    Logits are tokens x vocabulary, in at least float32; labels have shape (tokens,).
    """
    inputs = {name: value.to(model.device) for name, value in encoder.collate(rows).items()}
    labels = inputs.pop("labels")[:, 1:]
    learnt = labels != IGNORED
    logits = model(**inputs).logits[:, :-1][learnt]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[learnt], learnt.sum(1).tolist()


def count_right(answers: list[str], examples: list[Example]) -> int:
    """Return the number of correct answers."""
    pairs = zip(answers, examples, strict=True)
    return sum(same_answer(extract_answer(answer), example.gold) for answer, example in pairs)


@torch.no_grad()
def generate(model: PreTrainedModel, encoder: Encoder, examples: list[Example], max_new_tokens: int) -> list[str]:
    """Return greedy answers to the prompts of `examples`, generated in one left-padded batch with a KV cache.

    The model's own generation settings, such as a repetition penalty, are ignored.
    """
    inputs = encoder.padded([encoder.prompt(example) for example in examples], "left")
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
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
