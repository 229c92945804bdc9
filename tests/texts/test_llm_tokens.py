"""Examples as tokens, and generated answers."""

import pytest
import torch
from core_models import tiny_llama
from tokenizers import processors

from reslora.options.texts import LlmOptions
from reslora.texts import llm
from reslora.texts.adapter import attach
from reslora.texts.llm_tasks import Example
from reslora.texts.llm_tokens import Encoder, calibration_batches, count_right, generate
from texts.helpers import adapter_of

from .helpers import bytes_tokenizer


def test_the_loss_is_on_the_answer_and_the_end_which_is_learnt_though_it_pads():
    tokenizer = bytes_tokenizer()
    encoder = Encoder(tokenizer)
    assert encoder.pad == encoder.end == tokenizer.eos_token_id == 0
    short, long = Example("ab", "", "1"), Example("abcdef", "xyz", "2")
    batch = encoder.collate([encoder(short), encoder(long)])
    for number, example in enumerate((short, long)):
        learnt = batch["labels"][number] != -100
        text = tokenizer.decode(batch["input_ids"][number][learnt])
        assert text == example.answer + "<end>"
        assert torch.equal(batch["labels"][number][learnt], batch["input_ids"][number][learnt])
        length = int(batch["attention_mask"][number].sum())
        assert tokenizer.decode(batch["input_ids"][number][:length]) == f"{example.prompt}\n{example.answer}<end>"
        assert int(learnt.nonzero()[-1]) == length - 1
    prompts = encoder.padded([encoder.prompt(short), encoder.prompt(long)], "left")
    assert prompts["input_ids"][0].tolist() == [0] * 4 + encoder.prompt(short)
    assert prompts["attention_mask"][0].tolist() == [0] * 4 + [1] * 3
    # A generated answer starts from the tokens that were trained on.
    assert encoder(long)["input_ids"][: len(encoder.prompt(long))] == encoder.prompt(long)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <end>", special_tokens=[("<end>", 0)]
    )
    encoder = Encoder(tokenizer)
    assert 0 not in encoder.prompt(Example("ab", "", "1"))
    assert encoder(Example("ab", "", "1"))["input_ids"].count(0) == 1


def test_calibration_batches_have_no_padding():
    rows = [{"input_ids": list(range(length))} for length in (9, 3, 5, 4, 8)]
    batches = calibration_batches(rows, 4, 2)
    assert [batch["input_ids"].tolist() for batch in batches] == [
        [[0, 1, 2], [0, 1, 2]],
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    ]
    assert calibration_batches(rows, 0, 2) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "shortcut"), [("reslora", "middle"), ("lora", "none")])
def test_generation_with_cache_equals_the_arg_max_of_whole_forwards(method, shortcut):
    torch.manual_seed(0)
    base = tiny_llama(layers=4, vocab_size=257, max_position_embeddings=128, pad_token_id=None, bos_token_id=None)
    base.generation_config.repetition_penalty = 1.5  # as chat models ship it; the answers must not depend on it
    model = attach(base, adapter_of(method=method, shortcut=shortcut), 10).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    encoder = Encoder(bytes_tokenizer())
    examples = [Example("a", "", "1"), Example("Tom has 5 pens.", "", "2"), Example("xyz", "", "3")]
    asked = []
    encoder.tokenizer.batch_decode = lambda tokens, **_: asked.extend(tokens.tolist())
    generate(model, encoder, examples, 12)
    assert base.generation_config.repetition_penalty == 1.5
    assert any(len(set(answer)) > 2 for answer in asked)
    for example, answer in zip(examples, asked, strict=True):
        tokens = encoder.prompt(example)
        for expected in answer:
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert int(logits.argmax()) == expected
            tokens = [*tokens, expected]
            if expected == encoder.end:
                break


SUMS = [Example(f"{'1 + ' * number}1?", "", str(number + 1)) for number in range(5)]


def answers(model, encoder, examples: list[Example], max_new_tokens: int) -> list[str]:
    """A stand-in for a model that answers correctly below four."""
    return [f"The answer is {example.gold if example.gold in '123' else 0}." for example in examples]


def test_right_answers_are_counted_by_hand():
    """By the value of the answer; a number without an answer phrase does not count."""
    said = ["It is 1 + 1. The answer is 02.0.", "3", "The answer is 3. The answer is 4.", "The answer is -5.", ""]
    assert count_right(said, [Example("", "", gold) for gold in ("2", "3", "4", "-5", "2")]) == 3
    assert count_right(said, [Example("", "", gold) for gold in ("3", "3", "3", "5", "")]) == 0


def test_losses_of_an_experiment_are_in_the_order_of_its_examples(monkeypatch):
    """They are computed in the order of length."""
    asked = []
    monkeypatch.setattr(llm, "generate", answers)
    texts, (first, *rest) = llm.LlmTexts(), SUMS
    texts.encoder, texts.examples = Encoder(bytes_tokenizer()), {"test": [*reversed(rest), first]}
    shortest = len(texts.encoder(first)["input_ids"])

    def losses_of(model, encoder, rows):  # the number of a sum's ones, in each of its tokens
        return [torch.full((2,), 1.0 + (len(row["input_ids"]) - shortest) / 4) for row in rows]

    monkeypatch.setattr(llm, "example_losses", losses_of)
    options = LlmOptions.of(max_new_tokens=8, eval_batch_size=2)
    losses, figures = texts.measured(options, None, lambda: asked.append(1))
    assert losses == [5, 4, 3, 2, 1] and figures == {"accuracy": 3 / 5} and len(asked) == -(-5 // 2)
    assert texts.figures(options, None, lambda: None) == {"loss": 3, "accuracy": 3 / 5}
