"""train_glue.py from options to files: metrics, data, every method and merge, resuming, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from core_models import assert_equal
from peft import PeftModel
from safetensors.torch import load_file
from suites import quick
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import train_glue
from reslora.runtime.folder_lock import locked
from reslora.runtime.script import run_script
from reslora.texts import glue
from reslora.texts.glue_tasks import TASKS, scores
from texts.helpers import parsed_glue, run_glue

WORDS = ["good", "bad", "fine", "poor", "the", "a", "film", "book", "song", "is", "was", "not", "very", "plot"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def write_model(folder: Path, **overrides) -> Path:
    """Write a tiny encoder with random weights, and a tokenizer of complete words."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=30, model_input_names=["input_ids", "attention_mask"], **names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        **{
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 34,
            "pad_token_id": 1,
            **SMALL,
            **NO_DROPOUT,
            **overrides,
        }
    )
    model = RobertaForSequenceClassification(config)
    # no head unless one is asked for
    (model if "num_labels" in overrides else model.base_model).save_pretrained(folder)
    return folder


def make_rows(task: str, count: int, seed: int = 0, labelled: bool = True) -> list[dict]:
    """Return rows in the task's columns, whose label follows from the words."""
    columns, labels = TASKS[task].columns, TASKS[task].labels
    rng, rows = np.random.default_rng(seed), []
    for index in range(count):
        row = {name: " ".join(rng.choice(WORDS, size=rng.integers(2, 7))) for name in columns}
        good = sum(text.split().count("good") + text.split().count("fine") for text in row.values())
        row["label"] = int(good) % len(labels) if labels else float(min(good, 5))
        row["idx"] = index
        if not labelled:
            row["label"] = -1
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path, task: str, train: int = 24, validation: int = 10) -> Path:
    write_rows(folder / "train.jsonl", make_rows(task, train))
    for part in TASKS[task].parts:
        write_rows(folder / f"validation{part}.jsonl", make_rows(task, validation, seed=len(part)))
    return folder


@pytest.fixture(scope="session")
def roberta(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="session")
def rte(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("rte"), "rte")


def flags(model: Path, data: Path, output: Path, task: str = "rte", *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--output_dir", str(output)),
        *("--task_name", task, "--max_steps", "4", "--per_device_train_batch_size", "4", "--learning_rate", "0.01"),
        *("--report_to", "none", "--use_cpu", "--lora_r", "2", "--calibration_examples", "6"),
        *more,
    ]


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# -- metrics -----------------------------------------------------------------------------------------------------------


def scored(task: str, predictions: list, labels: list) -> dict[str, float]:
    return scores(TASKS[task], np.array(predictions), np.array(labels))


def test_metrics_by_hand():
    # three true positives, one false, one missed, one true negative
    predictions, labels = [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]
    for task in ("mrpc", "qqp"):
        assert scored(task, predictions, labels) == pytest.approx({"f1": 2 * 3 / (2 * 3 + 1 + 1), "accuracy": 4 / 6})
    matthews = (3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5
    assert scored("cola", predictions, labels) == pytest.approx({"matthews": matthews})
    for task in ("sst2", "qnli", "rte", "wnli", "mnli"):
        assert scored(task, predictions, labels) == pytest.approx({"accuracy": 4 / 6})
    # deviations (-1, 0, 1) and (-1, 1, 0): 1 / 2; the ranks are the same numbers
    assert scored("stsb", [1.0, 2.0, 3.0], [0.0, 4.0, 2.0]) == pytest.approx({"pearson": 0.5, "spearmanr": 0.5})
    skewed = scored("stsb", [1.0, 2.0, 9.0], [0.0, 1.0, 2.0])
    assert skewed["spearmanr"] == pytest.approx(1.0) and skewed["pearson"] == pytest.approx(8 / (38 * 2) ** 0.5)


def test_the_first_metric_is_the_papers():
    first = {name: task.metrics[0] for name, task in TASKS.items()}
    assert len(first) == 9
    expected = {"mrpc": "f1", "cola": "matthews", "stsb": "pearson"}
    assert first == {name: expected.get(name, "accuracy") for name in first}


def test_both_parts_of_mnli_are_scored_each_by_itself():
    """All examples are predicted as class 0, whose probability is e^3 / (e^3 + 2)."""
    parts = {"validation_matched": [0, 1], "validation_mismatched": [2, 2, 0, 1], "test_matched": [None]}
    texts = texts_of("mnli", [[3.0, 0.0, 0.0]] * 4)
    texts.sets = {
        name: [{"input_ids": [0]} | ({} if label is None else {"labels": label}) for label in labels]
        for name, labels in parts.items()
    }
    wrong = np.log(np.exp(3) + 2)
    expected = {"loss": wrong - 3 / 2, "accuracy": 1 / 2, "loss_mm": wrong - 3 / 4, "accuracy_mm": 1 / 4}
    assert texts.figures(None, None, None) == pytest.approx(expected)
    assert texts.figures(None, None, None, "test") == {}


def texts_of(task: str, logits: list) -> glue.GlueTexts:
    """Return examples of a task for which a model returns these logits."""
    texts = glue.GlueTexts()
    texts.task = TASKS[task]
    texts.logits = lambda options, model, rows, check: torch.tensor(logits, dtype=torch.float64)[: len(rows)]
    return texts


# -- tasks, methods and merges -----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["cola", "mnli", "stsb"])
def test_a_task_is_trained_and_scored(task, roberta, tmp_path):
    data, output = write_data(tmp_path / "data", task), tmp_path / "run"
    run_glue(flags(roberta, data, output, task, "--max_steps", "1", "--method", "lora"))
    expected = ["loss", *TASKS[task].metrics]
    expected += [f"{name}_mm" for name in expected] if task == "mnli" else []
    assert list(results_of(output)["table"]["unmerged"]) == expected
    assert results_of(output)["validation_examples"] == (20 if task == "mnli" else 10)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("shortcut", "merges"),
    [("middle", ["unmerged", "none", "input", "weights", "lstsq"]), ("block", ["unmerged", "none", "exact"])],
)
def test_every_merge_is_measured(shortcut, merges, roberta, rte, tmp_path):
    run_glue(flags(roberta, rte, tmp_path, "rte", "--shortcut", shortcut))
    results = results_of(tmp_path)
    assert list(results["table"]) == merges
    for name, row in results["table"].items():
        assert row["accuracy"] * 10 in range(11) and row["loss"] > 0
        assert name == "unmerged" or [block["name"] for block in row["report"]["blocks"]]
    exported = results["table"].get(results["merge"], results["table"]["unmerged"])
    assert (exported["accuracy"], exported["loss"]) == reached(roberta, rte, tmp_path)
    losses = [results["table"][name]["loss"] for name in merges]
    if shortcut == "block":
        assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    else:
        assert len(set(losses[1:])) == 4
    assert results["merge"] == merges[-1]


def reached(model: Path, data: Path, output: Path) -> tuple:
    """Return accuracy and loss of the exported adapter on the ten validation examples, by stock PEFT, one by one."""
    options = parsed_glue(flags(model, data, output))
    config, tokenizer = glue.load_tokenizer(options)
    base, _ = glue.load_model(options, config)
    stock = PeftModel.from_pretrained(base, output / "peft").eval()
    losses, right = [], 0
    for row in glue.encode(options, tokenizer, glue.read_splits(options)["validation"]):
        with torch.no_grad():
            found = stock(**{name: torch.tensor([value]) for name, value in row.items()})
        losses.append(found.loss.item())
        right += int(found.logits.argmax()) == row["labels"]
    assert len(losses) == 10
    return right / 10, pytest.approx(np.mean(losses), rel=1e-4)


OWN = ["peft.VeraConfig", "examples.my_method.shared_a"]


@pytest.mark.parametrize("method", quick(["lora_x2", "reslora", "adalora", "loha", *OWN], "reslora"))
def test_what_is_saved_loads_in_stock_libraries(method, roberta, rte, tmp_path):
    run_glue(flags(roberta, rte, tmp_path, "rte", "--method", method, "--merge_and_save"))
    tokens = {"input_ids": torch.tensor([[0, 5, 6, 7, 2, 2, 8, 9, 2]])}
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").double().eval()
    base = AutoModelForSequenceClassification.from_pretrained(roberta)
    untrained = base(**tokens).logits.detach().double()
    stock = PeftModel.from_pretrained(base, tmp_path / "peft").double().eval()
    with torch.no_grad():
        expected, actual = stock(**tokens).logits, merged(**tokens).logits
    converted = tmp_path / "plain_lora"
    assert converted.is_dir() == (method == "peft.VeraConfig")  # PEFT does not have the other one: peft/ is converted
    assert (tmp_path / "conversion.json").is_file() == (method in OWN)
    if converted.is_dir():
        base = AutoModelForSequenceClassification.from_pretrained(roberta)
        lora = PeftModel.from_pretrained(base, converted).double().eval()
        assert_equal(lora(**tokens).logits.detach(), expected, rtol=1e-4, atol=1e-5)
    assert_equal(actual, expected, rtol=1e-4, atol=1e-5)  # the merged weights were rounded to float32
    assert (expected - untrained).abs().max() > 0.01
    assert merged.config.id2label == {0: "entailment", 1: "not_entailment"}
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert "base_model.model.classifier.out_proj.weight" in saved


@pytest.mark.exhaustive
def test_without_a_model_the_bundled_one_is_trained(tmp_path, capsys):
    more = ("--max_steps", "40", "--save_strategy", "no", "--report_to", "none")
    more += ("--calibration_examples", "16", "--eval_strategy", "no", "--use_cpu")
    run_glue(["--output_dir", str(tmp_path), *more])
    results, shown = results_of(tmp_path), capsys.readouterr().out
    assert results["task"] == "cola" and results["table"]["lstsq"]["matthews"] > 0.4
    assert "results.json" in shown and "--model FacebookAI/roberta-large" in shown


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_predictions_for_a_test_split(roberta, tmp_path, capsys):
    data = write_data(tmp_path / "data", "mnli")
    write_rows(data / "test_matched.jsonl", make_rows("mnli", 5, labelled=False))
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in make_rows("mnli", 3)]
    write_rows(data / "test_mismatched.jsonl", unlabelled)
    run_glue(flags(roberta, data, tmp_path / "run", "mnli", "--max_steps", "1"))
    for name, count in (("matched", 5), ("mismatched", 3)):
        lines = (tmp_path / "run" / f"predict_results_mnli_{name}.txt").read_text().splitlines()
        assert len(lines) == count + 1
    assert results_of(tmp_path / "run")["test"] is None
    shown = capsys.readouterr().out
    assert "; on 20 validation examples:" in shown
    assert "  predict_results_mnli_mismatched.txt  predictions for" in shown


@pytest.mark.parametrize(
    ("task", "outputs", "rows"),
    [
        (
            "mnli",
            [[0, 1, 2], [3, 1, 2], [0, 5, 2], [1, 0, 0]],
            ["contradiction", "entailment", "neutral", "entailment"],
        ),
        ("stsb", [[0.5], [4.2504]], ["0.500", "4.250"]),
    ],
)
def test_predictions_are_in_the_order_of_the_examples_numbered_from_zero(roberta, tmp_path, task, outputs, rows):
    options = parsed_glue(flags(roberta, tmp_path, tmp_path / "run", task))
    texts = texts_of(task, outputs)
    texts.sets = {"test": [{"input_ids": [0]}] * len(rows)}
    expected = ["index\tprediction", *(f"{number}\t{row}" for number, row in enumerate(rows))]
    assert texts.predict(options, None, None) == {f"predict_results_{task}.txt": expected}
    assert texts.files(options) == [f"predict_results_{task}.txt"]


@pytest.mark.exhaustive
def test_a_labelled_test_split_is_scored(roberta, tmp_path):
    data = write_data(tmp_path / "data", "mrpc")
    write_rows(data / "test.jsonl", make_rows("mrpc", 6, seed=5))
    run_glue(flags(roberta, data, tmp_path / "run", "mrpc", "--max_steps", "1"))
    assert list(results_of(tmp_path / "run")["test"]) == ["loss", "f1", "accuracy"]


def test_samples_and_lengths_are_cut(roberta, tmp_path):
    data = write_data(tmp_path / "data", "rte")
    write_rows(data / "test.jsonl", make_rows("rte", 7))
    more = ("--max_train_samples", "8", "--max_eval_samples", "3", "--max_predict_samples", "5")
    more += ("--max_seq_length", "12")
    options = parsed_glue(flags(roberta, data, tmp_path, "rte", *more))
    splits = glue.read_splits(options)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "validation": 3, "test": 5}
    encoded = glue.encode(options, glue.load_tokenizer(options)[1], splits["train"])
    lengths = [sum(row["attention_mask"]) for row in encoded]
    assert min(lengths[:6]) < max(lengths[:6]) == 12
    batches = glue.calibration_batches(encoded[:6])
    assert len(batches) == 6 and all("labels" not in batch for batch in batches)
    for batch, length in zip(batches, lengths, strict=False):
        assert batch["input_ids"].shape == (1, length) and batch["attention_mask"].all()


# -- log, resume, processes --------------------------------------------------------------------------------------------


def test_log_and_configuration(roberta, rte, tmp_path):
    run_glue(flags(roberta, rte, tmp_path, "rte", "--eval_strategy", "steps", "--eval_steps", "2"))
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [2, 4]
    assert all({"step", "split", "loss", "lr", "seconds"} <= set(row) for row in rows)
    assert all("accuracy" in row for row in rows if row["split"] == "validation")
    last = [row for row in rows if row["split"] == "validation"][-1]
    assert last["loss"] == pytest.approx(results_of(tmp_path)["table"]["unmerged"]["loss"])
    assert json.loads((tmp_path / "config.json").read_text())["task_name"] == "rte"
    assert not list(tmp_path.glob("**/*.bin")) and not list(tmp_path.glob("checkpoint-*/model.safetensors"))


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one(roberta, rte, tmp_path):
    more = ("--save_strategy", "steps", "--save_steps", "2", "--method", "reslora", "--lora_dropout", "0.1")
    run_glue(flags(roberta, rte, tmp_path / "whole", "rte", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for name in ("results.json", "exports.json", "checkpoint-4/trainer.json"):
        (tmp_path / "broken" / name).unlink()  # as if killed while the last checkpoint was written
    run_glue(flags(roberta, rte, tmp_path / "broken", "rte", *more, "--resume_from_checkpoint", "latest"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    weights = "peft/adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (broken / weights).read_bytes()
    assert results_of(whole) | {"train_seconds": 0} == results_of(broken) | {"train_seconds": 0}
    without_time = [[row | {"seconds": 0} for row in log_of(folder)] for folder in (whole, broken)]
    assert without_time[0] == without_time[1]


# -- bad input ---------------------------------------------------------------------------------------------------------


def assert_refused(capfd, argv: list[str], *words: str) -> None:
    """The script's own error: status 2, one line on stderr that has the words."""
    capfd.readouterr()
    try:
        status = run_script("train_glue.py", train_glue.start, argv)
    except SystemExit as exit:
        status = exit.code
    line = capfd.readouterr().err
    assert status == 2 and line.count("\n") == 1 and line.startswith("train_glue.py: error: "), line
    for word in words:
        assert word in line, line


def test_bad_flags(capfd, roberta, rte, tmp_path):
    out = tmp_path / "run"
    assert_refused(capfd, flags(roberta, rte, out, "squad"), "--task_name", "squad", "rte")
    assert_refused(capfd, flags(roberta, rte, out, "rte", "--max_seq_length", "0"), "--max_seq_length 0")
    assert_refused(capfd, flags(roberta, rte, out, "rte", "--max_train_samples", "0"), "--max_train_samples 0")
    assert_refused(capfd, flags(roberta, rte, out, "rte", "--frobnicate"), "--frobnicate")
    assert_refused(capfd, flags(tmp_path / "nowhere", rte, out), "--model_name_or_path", "no such folder")
    assert_refused(capfd, flags(rte, rte, out), "--model_name_or_path", "check name and files")
    argv = flags(roberta, rte, out)
    assert_refused(
        capfd, argv[: argv.index("--task_name")] + argv[argv.index("--task_name") + 2 :], "--task_name", "missing"
    )
    assert_refused(capfd, flags(roberta, rte, out, "rte", "--target_modules", "q_proj"), "q_proj", "query")
    assert_refused(capfd, flags(roberta, rte, out, "rte", "--label_smoothing_factor", "0.1"), "--lora_dropout")
    assert not (out / "results.json").exists() and not (out / "log.jsonl").exists()


def test_bad_data(capfd, roberta, rte, tmp_path):
    out, data = tmp_path / "run", tmp_path / "data"
    assert_refused(
        capfd, flags(roberta, data, out), f"--data_dir {data}", "no such folder", "sentence1, sentence2, label"
    )
    write_data(data, "rte")
    assert_refused(capfd, flags(roberta, data, out, "qqp"), "question1, question2", "sentence1, sentence2")
    (data / "validation.jsonl").unlink()
    assert_refused(capfd, flags(roberta, data, out), "validation.jsonl")
    write_rows(data / "validation.jsonl", [])
    assert_refused(capfd, flags(roberta, data, out), "validation.jsonl", "no rows")
    for label in (2, -1, None, 0.5, "entailment", True):
        rows = make_rows("rte", 3)
        rows[1]["label"] = label
        write_rows(data / "validation.jsonl", rows)
        assert_refused(capfd, flags(roberta, data, out), "validation.jsonl, row 2", repr(label), "1 (not_entailment)")
    rows[1] |= {"label": 0, "sentence2": None}
    write_rows(data / "validation.jsonl", rows)
    assert_refused(capfd, flags(roberta, data, out), "row 2", "sentence2 is None")
    (data / "validation.jsonl").write_text('{"sentence1": "a"\n')
    assert_refused(capfd, flags(roberta, data, out), "validation.jsonl line 1", "JSON")
    assert not out.exists()


def test_a_score_outside_its_range(capfd, roberta, tmp_path):
    """Its ends are valid: the third row is the first that is refused."""
    rows = [row | {"label": label} for row, label in zip(make_rows("stsb", 3), (0, 5.0, 5.5), strict=True)]
    write_data(tmp_path / "data", "stsb")
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    assert_refused(capfd, flags(roberta, tmp_path / "data", tmp_path / "run", "stsb"), "row 3", "5.5", "from 0 to 5")


def test_remote_code_is_refused(capfd, roberta, tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    argv = flags(roberta, tmp_path, tmp_path / "run", "cola")
    at = argv.index("--data_dir")
    assert_refused(
        capfd, argv[:at] + argv[at + 2 :], "nyu-mll/glue", "code from the hub", "--data_dir", "train.jsonl", "sentence"
    )


@pytest.mark.exhaustive
def test_runs_are_not_mixed(capfd, roberta, rte, tmp_path):
    with locked(tmp_path):
        assert_refused(capfd, flags(roberta, rte, tmp_path), "--output_dir", "is training in it")
    run_glue(flags(roberta, rte, tmp_path, "rte", "--max_steps", "1", "--method", "lora"))
    assert_refused(capfd, flags(roberta, rte, tmp_path, "rte", "--method", "lora"), "--output_dir", "unfinished run")
    more = ("--resume_from_checkpoint", "latest", "--method", "loha")
    assert_refused(capfd, flags(roberta, rte, tmp_path, "rte", *more), "--method loha", "lora")


def test_inputs_are_no_longer_than_the_model_takes(roberta, rte, tmp_path, capsys):
    model = write_model(tmp_path / "model", max_position_embeddings=12)
    options = parsed_glue(flags(model, rte, tmp_path / "run", "rte", "--max_seq_length", "500"))
    config, tokenizer = glue.load_tokenizer(options)
    loaded, _ = glue.load_model(options, config)
    rows = glue.read_splits(options)["train"]
    encoded = glue.encode(options, tokenizer, rows, "train")
    assert max(len(row["input_ids"]) for row in encoded) == 10
    long = sum(len(tokenizer(*row[:-1])["input_ids"]) > 10 for row in rows)
    line = f"train: {long} of {len(rows)} examples are longer than 10 tokens and truncated\n"
    assert 1 < long < len(rows) and capsys.readouterr().out == line
    loaded(input_ids=torch.tensor([max((row["input_ids"] for row in encoded), key=len)]))


def test_a_head_of_another_size_needs_a_flag(capfd, rte, tmp_path):
    model = write_model(tmp_path / "model", num_labels=3)
    assert_refused(capfd, flags(model, rte, tmp_path / "run"), "--ignore_mismatched_sizes")
    run_glue(flags(model, rte, tmp_path / "run", "rte", "--ignore_mismatched_sizes", "--max_steps", "1"))
    assert "unmerged" in results_of(tmp_path / "run")["table"]


def test_a_model_with_the_labels_in_another_order_keeps_it_and_has_the_same_losses(rte, tmp_path):
    folder = write_model(tmp_path / "model", num_labels=2, id2label={0: "entailment", 1: "not_entailment"})
    options, found = parsed_glue(flags(folder, rte, tmp_path / "run")), []
    for names in ({0: "entailment", 1: "not_entailment"}, {0: "NOT_ENTAILMENT", 1: "ENTAILMENT"}):
        texts = glue.GlueTexts()
        texts.read(options)
        model = texts.load(options, torch.device("cpu")).eval()
        assert model.config.id2label == {number: name.lower() for number, name in names.items()}
        with torch.no_grad():
            logits = texts.logits(options, model, texts.rows, lambda: None)
            found.append((texts.losses(model, texts.collate(texts.rows)).double(), logits))
            for value in model.classifier.out_proj.parameters():
                value.copy_(value.flip(0))
        model.config.id2label = {0: "NOT_ENTAILMENT", 1: "ENTAILMENT"}
        model.save_pretrained(folder)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
