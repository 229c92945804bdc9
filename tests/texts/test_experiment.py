"""Experiments with language models: arms equal single runs, are trained once, survive a kill, and are compared."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from experiment.documented import unlike
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_glue
import train_llm
from reslora.bundled import ASSETS
from reslora.errors import Stopped
from reslora.experiment.report import with_titles
from reslora.experiment.schedule import ArmSchedule
from reslora.io import write_checksums, write_json
from reslora.options.texts import ExperimentOptions, GlueOptions, LlmOptions, LlmValidationOptions
from reslora.runtime.folder_lock import locked
from reslora.runtime.script import run_script
from reslora.runtime.signals import StopRequest
from reslora.texts import experiment, glue, llm
from reslora.texts.arguments import read
from reslora.texts.llm_tasks import TASKS, examples_of
from reslora.texts.llm_tokens import Encoder
from reslora.texts.split import Parts
from reslora.texts.study import TextStudy
from reslora.training.context import Context

from .helpers import bytes_tokenizer, token_loss, write_rows
from .test_glue import make_rows, write_model
from .test_glue import write_rows as write_file

MODEL = ASSETS / "tiny-llama"
RATES = ("1e-3", "5e-3")
EXPERIMENT = ("--method", "lora", "reslora", "--learning_rate", *RATES, "--racing", "False")
SPLITS = {"train": 12, "validation": 3, "test": 4}


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    """Two steps, each with a checkpoint that may be chosen."""
    rows = {
        split: [json.loads(line) for line in (MODEL / "task" / f"{split}.jsonl").read_text().splitlines()[:count]]
        for split, count in SPLITS.items()
    }
    data = write_rows(tmp_path_factory.mktemp("data"), **rows)
    words = "--per_device_train_batch_size 4 --max_steps 2 --eval_strategy steps --eval_steps 1 --save_steps 1"
    words += f" --max_new_tokens 2 --report_to none --use_cpu --lora_dropout 0.1 --data_dir {data}"
    return ["--model_name_or_path", str(MODEL), *words.split()]


def run(*flags) -> int:
    try:
        return run_script("train_llm.py", train_llm.start, list(map(str, flags)))
    except SystemExit as end:  # argparse's own
        return end.code


def record(output: Path) -> dict:
    """Return the record, whose keys and types are those of the documents."""
    found = json.loads((output / "experiment.json").read_text())
    assert unlike(found) == []
    return found


def times(output: Path) -> dict[str, int]:
    """Return when each file of an ended arm was written, without test losses and the record of exports."""
    folders = [path.parent for path in output.rglob("arm.json")]
    return {
        str(path): path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*.*")
        if path.name not in ("test.json", "exports.json")
    }


@pytest.fixture(scope="module")
def killed(common, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """An experiment killed in the second arm, after its first checkpoint; and its files."""
    output, kept = tmp_path_factory.mktemp("whole") / "out", []

    class Killed(Exception):
        pass

    def keep(self, learner, loss):
        kept.append(learner.step)
        if len(kept) == 4:
            raise Killed
        KEEP(self, learner, loss)

    KEEP = TextStudy.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStudy, "keep", keep)
        with pytest.raises(Killed):
            run(*common, *EXPERIMENT, "--output_dir", output)
    return output, times(output)


@pytest.fixture(scope="module")
def whole(common, killed) -> tuple[Path, dict[str, int]]:
    """The experiment resumed by the same command, and then with one more seed; and its files before that."""
    output, _ = killed
    assert run(*common, *EXPERIMENT, "--output_dir", output) == 0
    assert (record(output)["verdicts"], record(output)["readings"]) == ([], 0)  # one seed tells nothing
    before = times(output)
    assert run(*common, *EXPERIMENT, "--seed", "42", "7", "--merge_and_save", "--output_dir", output) == 0
    return output, before


@pytest.mark.exhaustive
def test_what_an_experiment_leaves(whole):
    output, _ = whole
    found = record(output)
    arms = [(arm["label"], arm["learning_rate"], arm["seed"]) for arm in found["arms"]]
    rates = {label: choice["learning_rate"] for label, choice in found["chosen"].items()}
    choosing = [(label, rate, 42) for label in ("lora", "reslora") for rate in (1e-3, 5e-3)]
    assert arms == [*choosing, *((label, rate, 7) for label, rate in rates.items())]
    assert len(found["base"]["losses"]) == 4 and found["base"]["figures"].keys() == {"accuracy"}
    assert {arm["status"] for arm in found["arms"]} == {"finished"}
    assert found["split"] == {"train": 12, "select": 3, "test": 4, "duplicates": 0} and found["readings"] == 1
    assert all(sorted(arm["select_by_step"]) == ["1", "2"] for arm in found["arms"])
    (verdict,) = found["verdicts"]
    assert (verdict["label"], verdict["seeds"], verdict["images"]) == ("reslora", 2, 4) and verdict["interval"]
    text = (output / "report.html").read_text()
    compared = {arm["folder"] for arm in found["arms"] if arm["test"]}
    assert {path.parent.relative_to(output).as_posix() for path in output.rglob("peft")} - {"."} == compared
    assert {path.parent.parent.parent.name for path in output.rglob("merge.json")} == {"reslora"}
    assert found["best"]["files"] == ["peft", "merged"] and "out/merged" in text.partition("What to use")[2]
    assert with_titles(found, verdict["sentence"]) in text and "Accuracy" in text and "the selection split" in text
    assert "image" not in text.partition("<body>")[2].partition("<script>")[0]


@pytest.mark.exhaustive
def test_no_arm_is_trained_again(killed, whole):
    output, before = whole
    for earlier in (killed[1], before):
        assert earlier and earlier == {path: time for path, time in times(output).items() if path in earlier}
    assert len(killed[1]) < len(before) < len(times(output))


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.exhaustive
def test_an_arm_equals_a_plain_run_bit_for_bit(common, whole, tmp_path):
    """That of reslora was killed during training."""
    output, _ = whole
    own = output / "reslora" / "lr-0.005" / "seed-42"
    plain = ("--method", "reslora", "--learning_rate", "5e-3", "--output_dir", tmp_path)
    assert run(*common, *plain) == 0
    for name in ("checkpoint-2", "peft"):
        assert weights(own / name) == weights(tmp_path / name) != []
    assert weights(own / "adapters" / "step-000001") == weights(tmp_path / "checkpoint-1")
    logs = [[json.loads(line) | {"seconds": 0} for line in (place / "log.jsonl").open()] for place in (own, tmp_path)]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.exhaustive
def test_test_losses_are_those_of_a_loop_by_hand(common, whole):
    """Of the merged adapter at the last step, which is the chosen one here, computed with stock libraries."""
    output, _ = whole
    found, encoder = record(output), Encoder(AutoTokenizer.from_pretrained(MODEL))
    rows = [json.loads(line) for line in (MODEL / "task" / "test.jsonl").read_text().splitlines()[: SPLITS["test"]]]
    judged = [arm for arm in found["arms"] if arm["test"]]
    assert len(judged) == 4 and all(choice["step"] == 2 for choice in found["chosen"].values())
    for arm in (judged[0], judged[-1]):
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, output / arm["folder"] / "peft").eval()
        for example, loss in zip(examples_of(TASKS["svamp"], "test", rows), arm["test"]["losses"], strict=True):
            assert loss == pytest.approx(token_loss(model, [encoder(example)]), rel=1e-5)
        assert arm["test"]["figures"] == {"accuracy": 0.0}
    best = min(judged, key=lambda arm: (found["chosen"][arm["label"]]["loss"], arm["select_by_step"]["2"]))
    assert weights(output / "peft") == weights(output / best["folder"] / "peft")


@pytest.mark.exhaustive
def test_the_best_arm_alone_is_merged_for_stock_transformers(whole):
    output, _ = whole
    assert list(output.rglob("merged")) == [output / "merged"]
    inputs = AutoTokenizer.from_pretrained(output / "merged")("Tom has 5 pens.", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (merged, PeftModel.from_pretrained(base, output / "peft"))]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_an_arm_whose_adapters_are_gone_is_named_and_trained_anew_once_it_is_removed(common, whole, tmp_path, capsys):
    """The comparison needs them: the arm has its method's chosen rate."""
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)
    command = [*common, *EXPERIMENT, "--seed", "42", "7", "--output_dir", output]
    found = next(arm for arm in record(output)["arms"] if arm["test"] and arm["method"] == "reslora")
    folder = output / found["folder"]
    (folder / "test.json").unlink()
    shutil.rmtree(folder / "adapters")
    assert run(*command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"error: {folder}: " in line and line.endswith(f"; remove {folder}, then the run is trained again")
    shutil.rmtree(folder)
    before = times(output)
    assert run(*command) == 0 and {path: time for path, time in times(output).items() if path in before} == before
    assert (output / "peft").is_dir() and not (output / "merged").exists()  # which may be of another choice
    assert weights(folder / "adapters" / "step-000002") == weights(whole[0] / found["folder"] / "adapters/step-000002")
    assert [arm["test"] for arm in record(output)["arms"]] == [arm["test"] for arm in record(whole[0])["arms"]]


@pytest.mark.exhaustive
def test_averages_are_means_of_the_runs_adapters(common, whole, tmp_path):
    """Added to a finished experiment, of which no arm is trained again."""
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)
    before, own = times(output), ("--seed", "42", "7", "--merge_and_save", "--average_checkpoints", "last:2")
    assert run(*common, *EXPERIMENT, *own, "--output_dir", output) == 0
    found, after = record(output), times(output)
    assert before.items() <= after.items() and len(found["arms"]) == 6 + 4
    for label in ("lora", "reslora"):
        average, chosen = f"{label} last:2", found["chosen"]
        assert (chosen[average]["learning_rate"], chosen[average]["step"]) == (chosen[label]["learning_rate"], 2)
        place = f"lr-{chosen[label]['learning_rate']:g}/seed-42/adapters"
        mean, *saved = (
            load_file(next((output / label / folder).glob("*.safetensors")))
            for folder in (
                f"average_checkpoints-last-2/{place}/step-000002",
                *(f"{place}/step-{n:06d}" for n in (1, 2)),
            )
        )
        for key in [key for key in mean if "lora_" in key]:
            assert torch.equal(mean[key], ((saved[0][key].double() + saved[1][key].double()) / 2).float())


def test_an_experiment_goes_on_with_as_many_examples_a_step_as_before(common, whole, tmp_path, capsys):
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)  # with less than was added to it
    command, found = [*common, *EXPERIMENT, "--merge_and_save", "--output_dir", output], record(output)
    assert run(*command) == 0 and record(output)["identity"] == found["identity"]
    assert run(*command, "--per_device_train_batch_size", "2") == 2
    assert f"batch size x accumulation x processes = 2: {output} was trained with 4" in capsys.readouterr().err


def test_a_plain_run_refuses_other_examples_before_it_loads_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llm, "load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "checkpoint-1").mkdir()
    write_json(tmp_path / "checkpoint-1" / "trainer.json", {"method": "reslora", "images": "others"})
    write_checksums(tmp_path / "checkpoint-1")
    resume = ["--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path), "--use_cpu"]
    assert run_script("script", train_llm.start, resume) == 2
    line = capsys.readouterr().err
    assert "error: --data_dir " in line and f"{tmp_path / 'checkpoint-1'} was trained on others, these are " in line


def test_a_folder_that_is_trained_in_is_refused_before_anything_is_encoded(common, tmp_path, capsys, monkeypatch):
    """Encoding may take minutes. With other rates, with the same ones, and by a single run too."""
    monkeypatch.setattr(llm, "load_tokenizer", lambda *_: pytest.fail("encoded"))
    output = tmp_path / "out"
    with locked(output):
        for flags in (EXPERIMENT, ["--learning_rate", "1e-4", "2e-4"], ["--method", "lora"]):
            assert run(*common, *flags, "--output_dir", output) == 2
            assert f"--output_dir {output}: process {os.getpid()} is training in it" in capsys.readouterr().err
    assert not output.exists()


def test_a_plan_times_the_first_steps_and_writes_nothing(common, tmp_path, capsys):
    """With --eval_strategy no, an experiment evaluates its runs nevertheless."""
    flags = ("--method", "lora", "reslora", "--learning_rate", "1e-3", "--seed", "0", "1", "--eval_strategy", "no")
    assert run(*common, *flags, "--save_steps", "3", "--output_dir", tmp_path / "out", "--plan") == 0
    runs, difference, steps, memory, estimate = capsys.readouterr().out.splitlines()[-5:]
    assert difference.startswith("detectable difference: not known, as no experiment on this model in ")
    assert runs == "4 runs" and memory.startswith("about 0.")
    start = "2 steps, 3 steps in an epoch of 12 examples; 2 evaluations, and a checkpoint at the last step"
    assert steps.startswith(start) and estimate.startswith("estimate: ") and " for 4 runs (" in estimate
    assert not (tmp_path / "out").exists()


def test_the_select_loss_is_measured_when_it_is_asked_for_or_ten_times():
    def looks(strategy: str, every: float | None) -> dict:
        return experiment.evaluations_of(LlmValidationOptions(eval_strategy=strategy, eval_steps=every), 95)

    assert looks("no", None)["eval_steps"] == 10 and looks("no", 7)["eval_steps"] == 7 and looks("steps", 7) == {}


def test_the_compiler_forgets_earlier_arms(tmp_path, monkeypatch):
    """Each ResLoRA is a new model, and after the eighth, torch would stop compiling."""
    heard = []

    def train(*_):
        heard.append("trained")
        raise Stopped("enough is seen")

    monkeypatch.setattr(torch.compiler, "reset", lambda: heard.append("forgotten"))
    monkeypatch.setattr("reslora.experiment.study.train_method", train)
    words = [*EXPERIMENT, f"--output_dir={tmp_path}", "--use_cpu", *["--torch_compile"] * True]
    runner = runner_of(read(LlmOptions, "x", words))
    with pytest.raises(Stopped):
        runner.train(runner.schedule.arms()[0])
    assert heard == ["forgotten"] * True + ["trained"]


def runner_of(grid, stop: StopRequest | None = None) -> experiment.TextExperiment:
    """Return an experiment with a few examples, without loading anything."""
    texts, stop = llm.LlmTexts(), stop or StopRequest()
    texts.rows, texts.encoder = [{"input_ids": [1], "labels": [1]}] * 4, Encoder(bytes_tokenizer())
    context = Context(grid.base, None, Accelerator(cpu=True), stop)
    return experiment.TextExperiment(ArmSchedule(grid, 0.0), texts, Parts([], [], [], 0, []), context)


@pytest.mark.parametrize(("rank", "alpha"), [(["16"], 32), (["4", "16"], None)])
def test_what_an_experiment_goes_on_with_has_twice_the_rank_as_alpha(tmp_path, rank, alpha):
    """None stands for twice each of several ranks."""
    words = ["--seed", "0", "1", "--use_cpu", f"--output_dir={tmp_path}", "--lora_r", *rank]
    runner = runner_of(read(LlmOptions, "x", words))
    found = {runner.study_of(arm).method.lora_alpha for arm in runner.schedule.arms()}
    assert found == ({8, 32} if alpha is None else {alpha})
    assert runner.identity["settings"]["lora_alpha"] == alpha


def test_limits_hold_for_what_is_cut_out_of_the_training_examples_too(tmp_path):
    """The only other file is the test split."""
    kind, study, flags, limit = {
        "llm": (LlmOptions, llm.LlmTexts, "", "--max_test_samples"),
        "glue": (GlueOptions, glue.GlueTexts, "--task_name rte", "--max_predict_samples"),
    }["llm"]
    rest = {"Question": "", "Equation": "1", "Answer": 1, "sentence2": "", "label": 0}
    rows = [{"Body": a + b, "sentence1": a + b} | rest for a in "abcdef" for b in "ghijkl"]
    data = write_rows(tmp_path, train=rows[:30], validation=rows[30:])

    def parts(*limits):
        words = f"{flags} --data_dir {data} --output_dir {tmp_path / 'out'} --use_cpu".split()
        return study().parts(read(kind, "x", [*words, *limits]), ExperimentOptions(select_split=0.3))

    whole, fewer, tested = parts(), parts("--max_eval_samples", "2"), parts(limit, "2")
    assert len(whole.select) > 2 and len(whole.test) == 6
    assert len(fewer.select) == 2 and set(fewer.select) < set(whole.select)
    assert (fewer.train, fewer.test) == (whole.train, whole.test)
    assert (tested.train, tested.select, tested.test) == (whole.train, whole.select, whole.test[:2])


# -- GLUE --------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_glue_arms_equal_plain_runs_and_are_judged_by_its_metrics(tmp_path, capsys):
    model, data = write_model(tmp_path / "model"), tmp_path / "data"
    for seed, (split, count) in enumerate({"train": 24, "validation": 6, "test": 8}.items()):
        write_file(data / f"{split}.jsonl", make_rows("rte", count, seed))
    words = f"--task_name rte --data_dir {data} --model_name_or_path {model} --max_steps 2 --eval_strategy steps"
    words += " --eval_steps 2 --save_strategy no --use_cpu --report_to none --lora_r 2"

    def trained(*more) -> int:
        return run_script("train_glue.py", train_glue.start, [*words.split(), *map(str, more)])

    rates, output = ("--method", "lora", "reslora", "--shortcut", "middle"), tmp_path / "out"
    assert trained(*rates, "--do_predict", "--output_dir", output) == 2
    assert "--do_predict: this is an experiment" in capsys.readouterr().err
    assert trained(*rates, "--merge_and_save", "--seed", "42", "7", "--output_dir", output) == 0
    assert list(output.rglob("merged")) == [output / "merged"] and AutoTokenizer.from_pretrained(output / "merged")
    assert trained("--method", "reslora", "--shortcut", "middle", "--output_dir", tmp_path / "plain") == 0
    own = output / "reslora" / "lr-0.0004" / "seed-42"
    assert weights(own / "peft") == weights(tmp_path / "plain" / "peft") != []
    (arm,) = [arm for arm in record(output)["arms"] if arm["label"] == "reslora" and arm["seed"] == 42]
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    stock, losses, right = PeftModel.from_pretrained(base, own / "peft").eval(), [], 0
    for row in map(json.loads, (data / "test.jsonl").read_text().splitlines()):
        with torch.no_grad():
            logits = stock(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits[0].double()
        losses.append(-logits.log_softmax(-1)[row["label"]].item())
        right += int(logits.argmax()) == row["label"]
    assert arm["test"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert arm["test"]["figures"] == {"accuracy": right / len(losses)}


@pytest.mark.exhaustive
def test_initializations_are_compared(common, tmp_path, capsys):
    """Measured at the last step, as the interval is longer than a run."""
    words = ["--learning_rate", "1e-3", "--seed", "0", "1", "--racing", "False", "--method", "lora", "reslora"]
    words += ["--eval_steps", "50"]
    assert run(*common, *words, "--vary", "init_lora_weights=true,pissa", "--output_dir", tmp_path) == 0
    assert "6 runs; 2 steps, measured at the last step; " in capsys.readouterr().out
    arms = record(tmp_path)["arms"]
    assert {entry["status"] for entry in arms} == {"finished"} and len(arms) == 6
    assert {entry["label"] for entry in arms} == {
        *("lora init_lora_weights=true", "lora init_lora_weights=pissa", "reslora"),
    }
