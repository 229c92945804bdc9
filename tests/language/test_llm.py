"""train_llm.py: prompts, answers, end-of-sequence, generation, errors, and whole runs of a tiny model."""

import json
import shutil

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from conftest import tiny_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from reslora.errors import InvalidArgument
from reslora.language import llm
from reslora.language.arguments import MethodArguments
from reslora.language.llm_tasks import TASKS, Example, examples_of, extract_answer, same_answer, to_number
from reslora.language.llm_trainer import Encoder, calibration_batches, generate
from reslora.language.trainer import attach
from reslora.script import run_script

from .helpers import bytes_tokenizer, flags, row, write_rows


def run(argv: list[str]) -> int:
    return run_script(llm.PROG, llm.main, argv)


# -- prompts and answers -----------------------------------------------------------------------------------------------


def test_examples_have_the_form_of_the_paper():
    assert TASKS["svamp"].example(row(1)) == Example("Tom has 2 pens. He finds 1. How many?", "2 + 1.", "3")
    assert TASKS["svamp"].example(row(1)).answer == "2 + 1. The answer is 3."
    gsm = {"question": "How much?", "answer": "It is 48/2=<<48/2=24>>24.\nSo <<24+1=25>>25.\n#### 1,025"}
    assert TASKS["gsm8k"].example(gsm).answer == "It is 48/2=24. So 25. The answer is 1,025."
    meta = {"query": "What?", "response": "Add.\n#### 5\nThe answer is: 5"}
    assert TASKS["metamathqa"].example(meta).answer == "Add.\n#### 5 The answer is 5."
    options = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
    maths = {"Problem": "Gain?", "Rationale": '"explanation : x"', "options": options, "correct": "a"}
    example = TASKS["mathqa"].example(maths)
    assert example.prompt == f"Gain?\nThere are 5 options: {options}\nPlease answer the correct option."
    assert example.answer == "explanation : x. The answer is a."
    swag = {"ctx": "He throws.", "endings": ["It flies.", "It sings.", "It eats.", "It."], "label": "2"}
    example = TASKS["hellaswag"].example(swag)
    assert '"He throws."\nThere are 4 options as an ending:\n0: It flies.\n1: It sings.' in example.prompt
    assert example.answer == "The answer is 2."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3. The answer is 5.", "5"),
        ("The answer is 3.50. And so on", "3.50"),
        ("The answer is: $1,200", "$1,200"),
        ("The answer is 7\nmore", "7"),
        ("The answer is a.", "a"),
        ("It is 5.", None),
        ("The answer is", None),
        ("", None),
    ],
)
def test_what_follows_the_answer_is_taken(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1,200", "1200.0"), ("1200", "1,200"), ("$3", "3"), ("3/4", "0.75"), ("1 1/2", "1.5"), ("-7", "\u22127.0"),
        ("50%", "50"), (".5", "0.5"), ("5.", "5"), ("+4", "4"), ("2e3", "2000"), ("0.333333333", "1/3"),
        ("1,000,000", "1e6"), ("B", "b"), ("none of  these", "None of these"),
    ],
)  # fmt: skip
def test_equal_answers_are_equal_however_they_are_written(given, expected):
    assert same_answer(given, expected) and same_answer(expected, given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "5"), ("", "5"), ("5", "50"), ("5 apples", "5"), ("1/0", "1"), ("a", "b"), ("0.33", "1/3"), ("-7", "7"),
     ("1e999999", "5"), ("9" * 5000, "9")],
)  # fmt: skip
def test_other_answers_are_not(given, expected):
    assert not same_answer(given, expected)


def test_numbers_are_exact():
    assert to_number("0.1") * 3 == to_number("0.3")
    assert to_number("nan") is to_number("inf") is to_number("1/0") is to_number("1 2.5") is None


# -- tokens ------------------------------------------------------------------------------------------------------------


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
    prompts = encoder.left_padded([encoder.prompt(short), encoder.prompt(long)])
    assert prompts["input_ids"][0].tolist() == [0] * 4 + encoder.prompt(short)
    assert prompts["attention_mask"][0].tolist() == [0] * 4 + [1] * 3
    # A generated answer starts from the tokens that were trained on.
    assert encoder(long)["input_ids"][: len(encoder.prompt(long))] == encoder.prompt(long)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    from tokenizers import processors

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


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shortcut"), [("reslora", "input"), ("reslora", "middle"), ("reslora", "block"), ("lora", "none")]
)
def test_generation_with_cache_equals_the_arg_max_of_whole_forwards(method, shortcut):
    torch.manual_seed(0)
    base = tiny_llama(layers=4, vocab_size=257, max_position_embeddings=128, pad_token_id=None, bos_token_id=None)
    base.generation_config.repetition_penalty = 1.5  # as chat models ship it; the answers must not depend on it
    model = attach(base, MethodArguments(method=method, shortcut=shortcut), 10, task_type="CAUSAL_LM").eval()
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


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shortcut", "table"),
    [
        ("reslora", "input", ["unmerged", "none", "input", "weights", "lstsq"]),
        ("reslora", "middle", ["unmerged", "none", "input", "weights", "lstsq"]),
        ("reslora", "block", ["unmerged", "none", "exact"]),
        ("lora", "input", ["unmerged"]),
        ("adalora", "input", ["unmerged"]),
    ],
)
def test_a_run_leaves_results_and_files_that_stock_libraries_load(
    tiny, data, tmp_path, capsys, method, shortcut, table
):
    argv = flags(tiny, data, tmp_path / "run", "--method", method, "--shortcut", shortcut, "--merge_and_save")
    assert run(argv) == 0
    output = tmp_path / "run"
    results = json.loads((output / "results.json").read_text())
    assert list(results["table"]) == table
    assert all(set(figures) - {"report"} == {"loss", "accuracy"} for figures in results["table"].values())
    assert (results["task"], results["steps"], results["test_examples"]) == ("svamp", 4, 6)
    assert "unmerged" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text())["lora_r"] == 4

    examples = examples_of(TASKS["svamp"], "test", [row(n) for n in range(36, 42)])
    encoder = Encoder(AutoTokenizer.from_pretrained(output / "merged"))
    whole = AutoModelForCausalLM.from_pretrained(output / "merged").eval()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), output / "peft").eval()
    losses = [token_loss(model, encoder, examples) for model in (whole, stock)]
    expected = results["table"].get(results["merge"] or "unmerged")["loss"]
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    assert token_loss(AutoModelForCausalLM.from_pretrained(tiny), encoder, examples) > expected + 1e-4


@torch.no_grad()
def token_loss(model, encoder: Encoder, examples: list[Example]) -> float:
    """Mean over all answer tokens, one example at a time."""
    losses = []
    for example in examples:
        encoded = encoder(example)
        logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
        learnt = [(n, label) for n, label in enumerate(encoded["labels"]) if label != -100]
        losses += [-logits[n - 1, label].item() for n, label in learnt]
    return sum(losses) / len(losses)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, data, tmp_path):
    more = ["--shortcut", "middle", "--lora_dropout", "0.2", "--eval_strategy", "steps", "--eval_steps", "2"]
    assert run(flags(tiny, data, tmp_path / "whole", *more)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    (tmp_path / "resumed" / "results.json").unlink()
    assert run(flags(tiny, data, tmp_path / "resumed", *more)) == 2  # it would mix two runs
    assert run(flags(tiny, data, tmp_path / "resumed", *more, "--lora_r", 2, "--resume_from_checkpoint", "latest")) == 2
    assert run(flags(tiny, data, tmp_path / "resumed", *more, "--resume_from_checkpoint", "latest")) == 0
    for name in ("peft/adapter_model.safetensors", "merge.json", "checkpoint-4/reslora_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    tables = [json.loads((tmp_path / name / "results.json").read_text())["table"] for name in ("whole", "resumed")]
    assert tables[0] == tables[1]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "resumed")]
    logs = [[{**json.loads(line), "seconds": 0} for line in lines] for lines in logs]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_gradient_checkpointing_and_bf16_run(tiny, data, tmp_path):
    more = ["--gradient_checkpointing", "--bf16", "--shortcut", "middle", "--max_steps", "2", "--save_steps", "2"]
    more += ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_accuracy"]
    assert run(flags(tiny, data, tmp_path, *more)) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["split"] == "validation" and 0 <= log[-1]["accuracy"] <= 1


def test_metamathqa_is_tested_on_gsm8k_and_draws_its_examples(tiny, tmp_path):
    train = [{"query": f"What is {n}?", "response": f"Count.\nThe answer is: {n}"} for n in range(20)]
    data = write_rows(tmp_path / "data", train=train, test=[{"question": "1 + 1?", "answer": "Add.\n#### 2"}])
    common = ["--task", "metamathqa", "--max_train_samples", 5]

    def load(*more):
        arguments, _, training = llm.parse(flags(tiny, data, tmp_path, *common, *more))
        return llm.load_examples(arguments, training)

    examples = load()
    assert examples["test"] == [Example("1 + 1?", "Add.", "2")] and not examples["validation"]
    assert len(examples["train"]) == 5 == len(set(examples["train"]))
    assert examples["train"] == load()["train"] != load("--seed", 1)["train"]
    arguments, _, _ = llm.parse(flags(tiny, data, tmp_path, "--task", "metamathqa"))
    assert arguments.max_train_samples == 40_000


def numbered(count: int, start: int = 0) -> list[dict]:
    return [{**row(number), "Body": f"Row {number}."} for number in range(start, start + count)]


@pytest.mark.parametrize("splits", [["test"], ["validation"]])
def test_a_checkpoint_is_never_chosen_by_what_it_is_tested_on(tiny, tmp_path, capsys, splits):
    """Without examples for validation alone, a part of those for training is held out, the same for the same seed."""
    data = write_rows(tmp_path / "data", train=numbered(50), **{split: numbered(10, 50) for split in splits})

    def load(*more):
        arguments, _, training = llm.parse(flags(tiny, data, tmp_path, "--eval_strategy", "steps", *more))
        return llm.load_examples(arguments, training)

    found = load()
    assert "5 of 50 training examples are held out for validation" in capsys.readouterr().out
    assert [len(found[split]) for split in ("train", "validation", "test")] == [45, 5, 10]
    bodies = {split: {example.prompt for example in examples} for split, examples in found.items()}
    assert not bodies["train"] & bodies["validation"] and not bodies["validation"] & bodies["test"]
    assert len(bodies["train"] | bodies["validation"]) == 50
    assert found == load() and found["validation"] != load("--seed", 1)["validation"]
    fewer = load("--max_train_samples", 20)
    assert fewer["validation"] == found["validation"] and set(fewer["train"]) < set(found["train"])
    assert len(load("--eval_strategy", "no")["train"]) == 50


def test_validation_examples_of_their_own_are_taken(tiny, data, tmp_path, capsys):
    arguments, _, training = llm.parse(flags(tiny, data, tmp_path, "--eval_strategy", "steps"))
    found = llm.load_examples(arguments, training)
    assert [len(found[split]) for split in ("train", "validation", "test")] == [32, 4, 6]
    assert "held out" not in capsys.readouterr().out


def test_a_single_training_example_cannot_be_held_out(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "data", train=[row(0)], test=[row(1)])
    one_line(flags(tiny, data, tmp_path / "run", "--eval_strategy", "steps"), capsys, ["--eval_strategy", "validate"])


def test_the_best_checkpoint_is_chosen_on_held_out_training_examples(tiny, tmp_path):
    data = write_rows(tmp_path / "data", train=numbered(30), test=numbered(6, 30))
    more = ["--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "--method", "lora"]
    assert run(flags(tiny, data, tmp_path / "run", *more)) == 0
    arguments, _, training = llm.parse(flags(tiny, data, tmp_path / "other", *more))
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny))
    held_out = llm.load_examples(arguments, training)["validation"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "run" / "peft").eval()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    best = min(line["loss"] for line in log if line["split"] == "validation")
    assert token_loss(stock, encoder, held_out) == pytest.approx(best, rel=1e-5)


def test_the_bundled_deepspeed_configuration_is_zero_2_with_offloading():
    configuration = HfDeepSpeedConfig(str(llm.ZERO2_OFFLOAD))
    assert configuration._stage == 2 and configuration.is_offload()
    assert configuration.get_value("zero_optimization.offload_optimizer.device") == "cpu"
    assert configuration.get_value("zero_force_ds_cpu_optimizer") is False  # the optimizer is the trainer's


# -- errors ------------------------------------------------------------------------------------------------------------


def changed(**columns) -> list[dict]:
    return [row(0), {**row(1), **columns}]


BAD_FLAGS = [
    (["--task", "triviaqa"], ["--task triviaqa", "gsm8k, svamp"]),
    (["--method", "dora"], ["--method", "dora"]),
    (["--shortcut", "outer"], ["--shortcut", "outer"]),
    (["--merge", "all"], ["--merge", "all"]),
    (["--lora_r", "0"], ["--lora_r 0", "at least 1"]),
    (["--lora_r", "four"], ["--lora_r", "four"]),
    (["--lora_alpha", "nan"], ["--lora_alpha nan"]),
    (["--lora_dropout", "1"], ["--lora_dropout 1"]),
    (["--learning_rate", "nan"], ["--learning_rate nan"]),
    (["--learning_rate", "-1"], ["--learning_rate -1"]),
    (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size 0"]),
    (["--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps 0"]),
    (["--max_steps", "0"], ["--max_steps 0"]),
    (["--save_steps", "0"], ["--save_steps 0"]),
    (["--max_new_tokens", "0"], ["--max_new_tokens 0"]),
    (["--max_train_samples", "0"], ["--max_train_samples 0"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--seed", "4294967296"], ["--seed 4294967296"]),
    (["--report_to", "tensorbord"], ["--report_to tensorbord", "tensorboard"]),
    (["--optim", "paged_adamw_8bit"], ["--optim paged_adamw_8bit"]),
    (["--lr_scheduler_type", "cosine_with_min_lr"], ["--lr_scheduler_type cosine_with_min_lr", "min_lr"]),
    (["--no_such_flag"], ["no_such_flag"]),
    (["--eval_strategy", "sometimes"], ["sometimes"]),
    (["--load_best_model_at_end"], ["load_best_model_at_end"]),
    (["--metric_for_best_model", "bleu"], ["--metric_for_best_model bleu", "accuracy"]),
    (["--dtype", "int8"], ["--dtype", "int8"]),
    (["--output_dir", "/dev/null/run"], ["--output_dir /dev/null/run", "choose another"]),
    (["--fp16"], ["--fp16", "needs a GPU"]),
    (["--bf16", "--use_cpu", "false"], ["--bf16", "add --use_cpu"]),
    (["--push_to_hub"], ["--push_to_hub", "hf upload"]),
    (["--deepspeed"], ["--deepspeed", "not installed"]),
    (["--load_in_4bit"], ["--load_in_4bit", "not installed"]),
    (["--model_name_or_path", "/no/such/folder"], ["--model_name_or_path /no/such/folder", "no such folder"]),
    (["--data_dir", "/no/such/folder"], ["--data_dir /no/such/folder", "train.jsonl", "Body, Question"]),
    (["--target_modules", "nothing"], ["--target_modules nothing", "q_proj"]),
    (["--max_length", "5"], ["--max_length 5", "give at least"]),
    (["--max_new_tokens", "250"], ["--max_new_tokens 250", "256 positions", "give at most"]),
    (["--resume_from_checkpoint", "/no/such/folder"], ["--resume_from_checkpoint /no/such/folder"]),
]


@pytest.mark.parametrize(("bad", "words"), BAD_FLAGS, ids=[" ".join(bad) for bad, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_line_and_status_2(tiny, data, tmp_path, capsys, monkeypatch, bad, words):
    missing = {"deepspeed", "bitsandbytes"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = llm.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name in missing else find_spec(name, *more)
    )
    one_line(flags(tiny, data, tmp_path / "run", *bad), capsys, words)
    found_out_late = {"--resume_from_checkpoint", "--optim", "--lr_scheduler_type"}
    assert not (tmp_path / "run" / "config.json").exists() or bad[0] in found_out_late


def one_line(argv: list[str], capsys, words) -> None:
    capsys.readouterr()
    try:
        status = run(argv)
    except SystemExit as stopped:
        status = stopped.code
    output = capsys.readouterr().err
    lines = [line for line in output.splitlines() if "error:" in line]
    assert status == 2 and "Traceback" not in output
    assert len(lines) == 1 and lines[0].startswith("train_llm.py: error: ")
    for word in words:
        assert word in lines[0]


BAD_DATA = {
    "missing column": ("svamp", {"train": [{"Body": "x", "Question": "y"}]}, ["row 1", "no column Equation, Answer"]),
    "no number": ("svamp", {"train": changed(Answer="many"), "test": [row(0)]}, ["train.jsonl row 2", "'many'"]),
    "wrong type": ("svamp", {"train": changed(Body=5), "test": [row(0)]}, ["train.jsonl row 2"]),
    "not a row": ("svamp", {"train": [[1, 2]], "test": [row(0)]}, ["train.jsonl row 1", "Body"]),
    "no train": ("svamp", {"test": [row(0)]}, ["no train examples", "train.jsonl"]),
    "empty train": ("svamp", {"train": [], "test": [row(0)]}, ["no train examples"]),
    "no test": ("svamp", {"train": [row(0)]}, ["no test examples", "test.jsonl"]),
    "label": (
        "hellaswag",
        {"train": [{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "4"}]},
        ["row 1", "'4'", "outside 0 to 3"],
    ),
    "option": (
        "mathqa",
        {"train": [{"Problem": "a", "Rationale": "b", "options": "a ) 1 , b ) 2", "correct": "e"}]},
        ["row 1", "'e'", "a, b"],
    ),
    "answer": ("gsm8k", {"train": [{"question": "a", "answer": "no mark"}]}, ["row 1", "####"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_status_2(tiny, tmp_path, capsys, name):
    task, splits, words = BAD_DATA[name]
    data = write_rows(tmp_path / "data", **splits)
    one_line(flags(tiny, data, tmp_path / "run", "--task", task), capsys, words)


def test_a_line_that_is_not_json_is_named(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "data", train=[row(0)], test=[row(0)])
    with (data / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    one_line(flags(tiny, data, tmp_path / "run"), capsys, ["train.jsonl line 2", "not JSON"])


def test_separators_inside_a_row_do_not_end_its_line(tiny, tmp_path):
    data = write_rows(tmp_path / "data", train=[row(0)], test=[row(0)])
    odd = json.dumps({**row(0), "Body": "One\u2028two\u0085three"}, ensure_ascii=False)
    (data / "train.jsonl").write_text(f"\n{odd}\r\n", encoding="utf-8", newline="")
    arguments, _, training = llm.parse(flags(tiny, data, tmp_path))
    assert llm.load_examples(arguments, training)["train"][0].prompt.startswith("One\u2028two\u0085three")


def test_a_data_set_that_needs_code_or_cannot_be_reached_is_refused_with_the_file_form(
    tiny, tmp_path, capsys, monkeypatch
):
    import datasets

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found math_qa.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    argv = flags(tiny, tmp_path, tmp_path / "run", "--task", "mathqa")
    at = argv.index("--data_dir")
    one_line(argv[:at] + argv[at + 2 :], capsys, ["needs code from the hub", "Problem, Rationale, options, correct"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    one_line(argv[:at] + argv[at + 2 :], capsys, ["allenai/math_qa", "no network", "--data_dir DIR"])


def test_rows_from_the_hub_are_read_split_by_split(tiny, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(*args, split, **kwargs):
        asked.append((*args, split))
        return [{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    argv = flags(tiny, tmp_path, tmp_path / "run", "--task", "hellaswag")
    at = argv.index("--data_dir")
    arguments, _, training = llm.parse(argv[:at] + argv[at + 2 :])
    examples = llm.load_examples(arguments, training)
    assert asked == [("Rowan/hellaswag", "train"), ("Rowan/hellaswag", "validation")]
    assert len(examples["test"]) == 1 and not examples["validation"]


def test_a_model_that_is_no_causal_one_is_refused(tiny, data, tmp_path, capsys):
    from conftest import tiny_bert

    tiny_bert().save_pretrained(tmp_path / "bert")
    bytes_tokenizer().save_pretrained(tmp_path / "bert")
    one_line(
        flags(tmp_path / "bert", data, tmp_path / "run"), capsys, ["--model_name_or_path", "no causal language model"]
    )


def test_a_four_bit_model_cannot_be_written_merged(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: object())
    with pytest.raises(InvalidArgument, match="--merge_and_save"):
        llm.parse(flags(tiny, data, tmp_path, "--load_in_4bit", "--merge_and_save"))


def test_a_loss_that_is_no_number_is_one_line_and_status_1(tiny, data, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    assert run(flags(tmp_path / "broken", data, tmp_path / "run")) == 1
    assert "train_llm.py: loss nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
