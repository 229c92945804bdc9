"""train_llm.py: complete runs of a tiny model, its data, and refusals."""

import importlib.util
import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from suites import quick
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_llm
from reslora.errors import InvalidArgument
from reslora.options.texts import LlmTaskOptions, TrainingOptions
from reslora.runtime.folder_lock import locked
from reslora.runtime.script import run_script
from reslora.texts import llm, study
from reslora.texts.adapter import attach
from reslora.texts.llm_tasks import TASKS, Example, examples_of
from reslora.texts.llm_tokens import Encoder
from reslora.texts.plan import saved_bytes
from reslora.training import loop
from texts.helpers import parsed

from .helpers import bytes_tokenizer, flags, row, token_loss, write_rows


def loaded(options) -> dict[str, list[Example]]:
    """Return the examples of a run."""
    return llm.load_examples(options.task, options.training.seed, options.validation.eval_strategy != "no")


def run(argv: list[str]) -> int:
    return run_script("train_llm.py", train_llm.start, argv)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shortcut", "table"),
    quick(
        [
            ("reslora", "input", ["unmerged", "none", "input", "weights", "lstsq"]),
            ("reslora", "middle", ["unmerged", "none", "input", "weights", "lstsq"]),
            ("reslora", "block", ["unmerged", "none", "exact"]),
            ("lora", "input", ["unmerged"]),
            ("adalora", "input", ["unmerged"]),
        ],
        ("reslora", "middle", ["unmerged", "none", "input", "weights", "lstsq"]),
    ),
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
    rows = list(map(Encoder(AutoTokenizer.from_pretrained(output / "merged")), examples))
    whole = AutoModelForCausalLM.from_pretrained(output / "merged").eval()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), output / "peft").eval()
    losses = [token_loss(model, rows) for model in (whole, stock)]
    expected = results["table"].get(results["merge"] or "unmerged")["loss"]
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    assert token_loss(AutoModelForCausalLM.from_pretrained(tiny), rows) > expected + 1e-4


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, data, tmp_path):
    more = ["--shortcut", "middle", "--lora_dropout", "0.2", "--eval_strategy", "steps", "--eval_steps", "2"]
    assert run(flags(tiny, data, tmp_path / "whole", *more)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    for name in ("results.json", "exports.json"):
        (tmp_path / "resumed" / name).unlink()
    assert run(flags(tiny, data, tmp_path / "resumed", *more)) == 2  # it would mix two runs
    assert run(flags(tiny, data, tmp_path / "resumed", *more, "--lora_r", 2, "--resume_from_checkpoint", "latest")) == 2
    other = [*more, "--learning_rate", "2e-2", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"]
    assert run(flags(tiny, data, tmp_path / "other", *other)) == 2
    assert run(flags(tiny, data, tmp_path / "resumed", *more, "--resume_from_checkpoint", "latest")) == 0
    for name in ("peft/adapter_model.safetensors", "merge.json", "checkpoint-4/reslora_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    tables = [json.loads((tmp_path / name / "results.json").read_text())["table"] for name in ("whole", "resumed")]
    assert tables[0] == tables[1]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "resumed")]
    logs = [[{**json.loads(line), "seconds": 0} for line in lines] for lines in logs]
    assert logs[0] == logs[1] and len(logs[0]) == 6


@pytest.mark.exhaustive
def test_gradient_checkpointing_and_bf16_run(tiny, data, tmp_path, monkeypatch):
    """One of the four validation examples has the answer seven, which is predicted for all."""
    answers = llm.generate

    def sevens(model, encoder, examples, max_new_tokens):
        return ["The answer is 7." for _ in answers(model, encoder, examples, max_new_tokens)]

    monkeypatch.setattr(llm, "generate", sevens)
    more = ["--gradient_checkpointing", "--bf16", "--shortcut", "middle", "--max_steps", "2", "--save_steps", "2"]
    more += ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_accuracy"]
    assert run(flags(tiny, data, tmp_path, *more)) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["split"] == "validation" and log[-1]["accuracy"] == 1 / 4


def test_metamathqa_is_tested_on_gsm8k_and_draws_its_examples(tiny, tmp_path):
    train = [{"query": f"What is {n}?", "response": f"Count.\nThe answer is: {n}"} for n in range(20)]
    data = write_rows(tmp_path / "data", train=train, test=[{"question": "1 + 1?", "answer": "Add.\n#### 2"}])
    common = ["--task", "metamathqa", "--max_train_samples", 5]

    def load(*more):
        return loaded(parsed(flags(tiny, data, tmp_path, *common, *more)))

    examples = load()
    assert examples["test"] == [Example("1 + 1?", "Add.", "2")] and not examples["validation"]
    assert len(examples["train"]) == 5 == len(set(examples["train"]))
    assert examples["train"] == load()["train"] != load("--seed", 1)["train"]
    options = parsed(flags(tiny, data, tmp_path, "--task", "metamathqa"))
    assert options.task.max_train_samples == 40_000


def numbered(count: int, start: int = 0) -> list[dict]:
    return [{**row(number), "Body": f"Row {number}."} for number in range(start, start + count)]


def test_a_checkpoint_is_never_chosen_by_what_it_is_tested_on(tiny, tmp_path, capsys):
    """Without validation examples, some training examples are held out, the same ones for the same seed."""
    data = write_rows(tmp_path / "data", train=numbered(50), **{split: numbered(10, 50) for split in ["test"]})

    def load(*more):
        return loaded(parsed(flags(tiny, data, tmp_path, "--eval_strategy", "steps", *more)))

    found = load()
    assert "5 of 50 training examples are held out, because" in capsys.readouterr().out
    assert [len(found[split]) for split in ("train", "validation", "test")] == [45, 5, 10]
    bodies = {split: {example.prompt for example in examples} for split, examples in found.items()}
    assert not bodies["train"] & bodies["validation"] and not bodies["validation"] & bodies["test"]
    assert len(bodies["train"] | bodies["validation"]) == 50
    assert found == load() and found["validation"] != load("--seed", 1)["validation"]
    fewer = load("--max_train_samples", 20)
    assert fewer["validation"] == found["validation"] and set(fewer["train"]) < set(found["train"])
    limited = load("--max_eval_samples", 2, "--max_test_samples", 3)
    assert (limited["validation"], limited["test"]) == (found["validation"][:2], found["test"][:3])
    assert len(load("--eval_strategy", "no")["train"]) == 50


def test_the_best_checkpoint_is_chosen_on_held_out_training_examples(tiny, tmp_path):
    data = write_rows(tmp_path / "data", train=numbered(30), test=numbered(6, 30))
    more = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_best", "--method", "lora"]
    assert run(flags(tiny, data, tmp_path / "run", *more)) == 0
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny))
    held_out = loaded(parsed(flags(tiny, data, tmp_path / "other", *more)))["validation"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "run" / "peft").eval()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    best = min(line["loss"] for line in log if line["split"] == "validation")
    assert token_loss(stock, map(encoder, held_out)) == pytest.approx(best, rel=1e-5)


# -- errors ------------------------------------------------------------------------------------------------------------


def changed(**columns) -> list[dict]:
    return [row(0), {**row(1), **columns}]


BAD_FLAGS = [
    ("--task triviaqa", "--task triviaqa", "gsm8k, svamp"),
    "--max_steps 0",
    ("--lr_scheduler_kwargs {}", "--lr_scheduler_kwargs", "--lr_scheduler_type"),
    ("--output_dir /dev/null/run", "--output_dir /dev/null/run", "choose another"),
    ("--fp16", "--fp16", "needs a GPU"),
    ("--bf16 --use_cpu false", "--bf16", "add --use_cpu"),
    ("--push_to_hub", "--push_to_hub", "hf upload"),
    ("--deepspeed", "--deepspeed", "not installed"),
    ("--load_in_4bit", "--load_in_4bit", "not installed"),
    ("--model_name_or_path /no/such/folder", "--model_name_or_path /no/such/folder", "no such folder"),
    ("--data_dir /no/such/folder", "--data_dir /no/such/folder", "train.jsonl", "Body, Question"),
    ("--target_modules nothing", "--target_modules nothing", "q_proj"),
    ("--max_length 5", "--max_length 5", "give at least"),
    ("--max_new_tokens 250", "--max_new_tokens 250", "256 positions", "give at most"),
    "--resume_from_checkpoint /no/such/folder",
]


FOUND_OUT_LATE = ("--target_modules", "--max_new_tokens")
"""By the model, which is loaded once the settings are written."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("bad", BAD_FLAGS, ids=str)
def test_a_bad_flag_is_one_line_and_status_2(tiny, data, tmp_path, capsys, monkeypatch, bad):
    given, *words = (bad, bad) if isinstance(bad, str) else bad
    missing = {"deepspeed", "bitsandbytes"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name in missing else find_spec(name, *more)
    )
    assert_refused(flags(tiny, data, tmp_path / "run", *given.split()), capsys, words)
    assert not (tmp_path / "run" / "config.json").exists() or given.split()[0] in FOUND_OUT_LATE


def assert_refused(argv: list[str], capsys, words) -> None:
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


def swag(label: str) -> dict:
    return {"ctx": "He throws.", "endings": ["It flies.", "It sings."], "label": label}


BAD_DATA = {
    "missing column": (
        "svamp",
        {"train": [{"Body": "x", "Question": "y"}]},
        ["row 1", "no column Equation, Answer; its columns must be Body, "],
    ),
    "no number": (
        "svamp",
        {"train": changed(Answer="many"), "test": [row(0)]},
        ["train.jsonl row 2", "'many' is not a number; correct it"],
    ),
    "wrong type": ("svamp", {"train": changed(Body=5), "test": [row(0)]}, ["train.jsonl row 2", "Body is 5, not"]),
    "null": ("svamp", {"train": changed(Answer=None), "test": [row(0)]}, ["train.jsonl row 2", "Answer is null"]),
    "no list": (
        "hellaswag", {"train": [{"ctx": "a", "endings": "b", "label": 0}]}, ["row 1", "endings is 'b', not a list"]
    ),
    "not a row": ("svamp", {"train": [[1, 2]], "test": [row(0)]}, ["train.jsonl row 1", "Body"]),
    "no train": ("svamp", {"test": [row(0)]}, ["no train examples", "train.jsonl"]),
    "empty train": ("svamp", {"train": [], "test": [row(0)]}, ["no train examples"]),
    "no test": ("svamp", {"train": [row(0)]}, ["no test examples", "test.jsonl"]),
    "label": (
        "hellaswag",
        {"train": [{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "4"}]},
        ["row 1", "'4'", "outside 0 to 3; correct it"],
    ),
    "some labels": (
        "hellaswag", {"train": [swag("1")], "test": [swag("1"), swag("")]}, ["test.jsonl row 2", "''", "; correct it"]
    ),
    "no labels": ("hellaswag", {"train": [swag("1")], "test": [swag("")]}, ["no test examples and no validation"]),
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
    assert_refused(flags(tiny, data, tmp_path / "run", "--task", task), capsys, words)


def test_another_task_is_not_read_from_the_bundled_examples(tiny, tmp_path, capsys):
    command = ["--task", "gsm8k", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    words = ["--task gsm8k: the bundled examples are svamp's", "--data_dir DIR", "--model_name_or_path MODEL"]
    assert_refused(command, capsys, words)
    for named in (["--data_dir", str(tmp_path)], ["--model_name_or_path", str(tiny)]):
        assert parsed([*command, *named]).task.task == "gsm8k"


def test_two_runs_do_not_share_a_folder(tiny, data, tmp_path, capsys):
    with locked(tmp_path / "run"):
        assert_refused(flags(tiny, data, tmp_path / "run"), capsys, [f"process {os.getpid()} is training in it"])
    assert not (tmp_path / "run").exists()


def test_a_line_that_is_not_json_is_named(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "data", train=[row(0)], test=[row(0)])
    with (data / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    assert_refused(flags(tiny, data, tmp_path / "run"), capsys, ["train.jsonl line 2", "not JSON"])


def test_rows_from_the_hub_are_read_split_by_split(tiny, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(*args, split, **kwargs):
        asked.append((*args, split))
        return [{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    argv = flags(tiny, tmp_path, tmp_path / "run", "--task", "hellaswag")
    at = argv.index("--data_dir")
    examples = loaded(parsed(argv[:at] + argv[at + 2 :]))
    assert asked == [("Rowan/hellaswag", "train"), ("Rowan/hellaswag", "validation")]
    assert len(examples["test"]) == 1 and not examples["validation"]


def test_a_model_that_is_no_causal_one_is_refused(tiny, data, tmp_path, capsys):
    from core_models import tiny_bert

    tiny_bert().save_pretrained(tmp_path / "bert")
    bytes_tokenizer().save_pretrained(tmp_path / "bert")
    assert_refused(flags(tmp_path / "bert", data, tmp_path / "run"), capsys, ["--model_name_or_path", "not a causal"])


def test_a_four_bit_model_cannot_be_written_merged(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: object())
    with pytest.raises(InvalidArgument, match="--merge_and_save"):
        parsed(flags(tiny, data, tmp_path, "--load_in_4bit", "--merge_and_save"))


def test_a_four_bit_model_computes_in_the_given_type(monkeypatch):
    monkeypatch.setattr(llm, "BitsAndBytesConfig", lambda **settings: settings)
    found = llm.precision(LlmTaskOptions(load_in_4bit=True, dtype="auto"), TrainingOptions(), torch.device("cpu"))
    assert found["dtype"] == found["quantization_config"]["bnb_4bit_compute_dtype"] == torch.bfloat16


def test_a_loss_that_is_no_number_is_one_line_and_status_1(tiny, data, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    assert run(flags(tmp_path / "broken", data, tmp_path / "run")) == 1
    assert "train_llm.py: reslora: train loss nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_run_that_diverges_exports_its_best_adapter_and_records_the_steps_it_took(tiny, data, tmp_path, monkeypatch):
    take = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda learner, *given: take(learner, *given) / (learner.step != 3))
    more = ["--method", "lora", "--max_steps", 8, "--eval_steps", 1, "--save_best"]
    assert run(flags(tiny, data, tmp_path / "run", *more)) == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 3 > results["best_step"]


def test_the_results_of_an_average_name_its_checkpoints_and_no_best_step(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(study.TextStudy, "validation_loss", lambda *_: 0.0)
    more = ["--method", "lora", "--max_steps", 2, "--save_steps", 1, "--eval_steps", 1]
    assert run(flags(tiny, data, tmp_path / "run", *more, "--save_best", "--average_checkpoints", "last:2")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["average"], results["checkpoints"]) == ("last:2", [1, 2]) and "best_step" not in results


@pytest.mark.exhaustive
def test_a_run_that_diverges_at_its_last_step_exports_nothing(tiny, data, tmp_path, capsys):
    more = ["--max_steps", 1, "--learning_rate", 3e38, "--method", "reslora", "--save_strategy", "steps"]
    assert run(flags(tiny, data, tmp_path / "run", *more)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "train_llm.py:" in line]
    assert "lower --learning_rate" in line
    assert not (tmp_path / "run" / "results.json").exists() and not (tmp_path / "run" / "peft").exists()


def test_a_plan_counts_steps_and_memory_and_writes_nothing(tiny, data, tmp_path, capsys):
    argv = [
        *flags(tiny, data, tmp_path / "run", "--shortcut", "middle", "--gradient_checkpointing", "--eval_steps", 2),
        "--plan",
    ]
    assert run(argv) == 0
    steps, memory = capsys.readouterr().out.splitlines()[-2:]
    assert steps == "4 steps, 8 steps in an epoch of 32 examples; 2 evaluations, and a checkpoint every 2 steps"
    assert memory.startswith("about 0.00 GiB on each device: ")
    assert not (tmp_path / "run").exists()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny))
    found = saved_bytes(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long, device="meta")})
    logits = 2 * 4 * 2 * 8 * model.config.vocab_size
    assert found > logits + 3 * 2 * 8 * model.config.hidden_size * 4  # at least an input of each layer


def test_a_plan_counts_quantized_weights(tiny, data, tmp_path, monkeypatch):
    """All linear layers but the output, which is the embedding here; 0.516 bytes with the scales."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: object())
    asked = {more: parsed(flags(tiny, data, tmp_path, "--method", "lora", *more)) for more in ((), ("--load_in_4bit",))}
    monkeypatch.undo()
    found, texts = [], llm.LlmTexts()
    for options in asked.values():
        with torch.device("meta"):
            found.append(texts.frozen_bytes(options, attach(texts.empty(options), options.adapter, 4)))
    embedding, linear, norms = 257 * 32, 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48), 7 * 32
    assert found == [4 * (embedding + linear + norms), pytest.approx(4 * (embedding + norms) + 0.516 * linear)]


def test_a_run_may_start_from_a_lora_of_peft(tiny, data, tmp_path, capsys):
    """Until the first step, the model equals the exported one; it cannot be resumed with another LoRA."""
    assert run(flags(tiny, data, tmp_path / "first", "--method", "lora", "--lora_r", "2")) == 0
    before = json.loads((tmp_path / "first" / "results.json").read_text())["table"]["unmerged"]["loss"]
    start = ("--init_lora", tmp_path / "first" / "peft", "--max_steps", "1", "--learning_rate", "1e-12")
    argv = flags(tiny, data, tmp_path / "then", "--method", "lora", *start)
    assert run(argv) == 0
    results = json.loads((tmp_path / "then" / "results.json").read_text())
    assert results["lora_r"] == 2 and results["table"]["unmerged"]["loss"] == pytest.approx(before, rel=1e-5)
    (tmp_path / "then" / "exports.json").unlink()
    at = argv.index("--init_lora")
    rest = [*argv[:at], *argv[at + 2 :], "--lora_r", "2", "--target_modules", "q_proj", "v_proj"]
    assert_refused(
        [*rest, "--resume_from_checkpoint", "latest"], capsys, ["--init_lora", "was started from another LoRA"]
    )
    assert_refused(
        flags(tiny, data, tmp_path / "other", "--init_lora", data), capsys, ["--init_lora", "no LoRA in PEFT's"]
    )
    assert_refused(
        flags(tiny, data, tmp_path / "other", "--method", "loha", *start), capsys, ["--method loha has no plain LoRA"]
    )


@pytest.mark.exhaustive
def test_a_model_may_move_but_not_change_before_a_run_resumes(tiny, data, tmp_path, capsys):
    assert run(flags(tiny, data, tmp_path / "run", "--method", "lora", "--max_steps", "2")) == 0
    moved = shutil.copytree(tiny, tmp_path / "moved")
    again = ("--method", "lora", "--max_steps", "4", "--resume_from_checkpoint", "latest")
    assert run(flags(moved, shutil.copytree(data, tmp_path / "data"), tmp_path / "run", *again)) == 0
    model = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(moved)
    assert_refused(
        flags(moved, data, tmp_path / "run", *again, "--max_steps", "6"),
        capsys,
        [f"--model_name_or_path {moved}: ", "from a model with other content"],
    )
