"""Experiments with language models: arms equal single runs, are trained once, survive a kill, and are compared."""

import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from launching import forked
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train_glue
import train_llm
from reslora.bundled import ASSETS
from reslora.errors import InvalidArgument, Stopped
from reslora.experiment import runner as experiment_run
from reslora.experiment.arms import Arm, labels_of, place_of
from reslora.experiment.arms import options_of as options_of_arm
from reslora.experiment.schedule import ArmSchedule
from reslora.io import write_checksums, write_json
from reslora.options.texts import ExperimentOptions, GlueOptions, LlmOptions, LlmValidationOptions
from reslora.runtime.folder_lock import locked
from reslora.runtime.script import run_script
from reslora.runtime.signals import StopRequest
from reslora.texts import experiment, glue, llm
from reslora.texts.arguments import read
from reslora.texts.experiment import options_of
from reslora.texts.llm_tasks import TASKS, examples_of
from reslora.texts.llm_tokens import Encoder
from reslora.texts.split import Parts, parts_of
from reslora.texts.study import TextStudy
from reslora.training import loop
from reslora.training.context import Context

from .helpers import SCRIPT, bytes_tokenizer, token_loss, write_rows
from .test_glue import make_rows, write_model
from .test_glue import write_rows as write_file

MODEL = ASSETS / "tiny-llama"
RATES = ("1e-3", "5e-3")
EXPERIMENT = ("--method", "lora", "reslora", "--learning_rate", *RATES, "--racing", "False")
ARM = Arm("any", 1e-3, 0)
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
    return json.loads((output / "experiment.json").read_text())


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
    assert verdict["sentence"] in text and "Accuracy" in text and "the selection split" in text
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
@pytest.mark.parametrize("method", ["lora", "reslora"])
def test_an_arm_equals_a_plain_run_bit_for_bit(common, whole, tmp_path, method):
    """That of reslora was killed during training."""
    output, _ = whole
    own = output / method / "lr-0.005" / "seed-42"
    plain = ("--method", method, "--learning_rate", "5e-3", "--output_dir", tmp_path)
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
@pytest.mark.parametrize("moment", ["measured", "restored"])
def test_an_experiment_whose_folder_is_moved_writes_nothing_more(common, whole, tmp_path, monkeypatch, capsys, moment):
    """During the test of an arm, or before its adapter is exported."""
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)
    found = next(arm for arm in record(output)["arms"] if arm["test"])
    (output / found["folder"] / ("test.json" if moment == "measured" else "exports.json")).unlink()
    owner = llm.LlmTexts if moment == "measured" else experiment.TextExperiment
    original = getattr(owner, moment)

    def moves(self, *given, **more):
        value = original(self, *given, **more)
        output.rename(tmp_path / "moved")
        return value

    monkeypatch.setattr(owner, moment, moves)
    assert run(*common, *EXPERIMENT, "--seed", "42", "7", "--output_dir", output) == 1
    assert f"--output_dir {output} was moved or removed" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.exhaustive
def test_an_arm_that_was_killed_before_its_last_adapter_was_kept_keeps_it_when_it_goes_on(
    common, tmp_path, monkeypatch
):
    """Its checkpoint exists: by this alone it would count as ended, but could not be chosen."""

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    command = [*common, "--method", "lora", "--seed", "0", "1", "--max_steps", "1", "--output_dir", tmp_path]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TextStudy, "keep", kill)
        run(*command)
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-1"]
    assert run(*command) == 0 and {arm["status"] for arm in record(tmp_path)["arms"]} == {"finished"}


@pytest.mark.exhaustive
def test_an_arm_ends_before_weights_are_saved_that_are_not_finite(common, tmp_path):
    """Of anything that is saved, although no training loss has been read by then."""
    command = [*common, "--method", "lora", "--learning_rate", "1e-3", "1e30", "--logging_steps", "50"]
    assert run(*command, "--max_steps", "4", "--eval_steps", "2", "--output_dir", tmp_path) == 0
    well, failed = record(tmp_path)["arms"]
    assert (well["status"], well["select_by_step"].keys()) == ("finished", {"2", "4"})
    assert (failed["status"], failed["select_by_step"]) == ("failed", {})
    assert failed["reason"].endswith(" is not finite")
    assert not (tmp_path / failed["folder"] / "adapters").exists()


def test_nothing_but_methods_rates_and_seeds_may_change(common, whole, tmp_path, capsys):
    output, _ = whole
    for flags, words in (
        ("--lora_r 2", f"--lora_r 2: {output} was trained with 4; use that, or choose another --output_dir"),
        ("--lora_alpha 0", "--lora_alpha 0"),
        ("--shortcut input block", f"--shortcut input block: {output} was trained with input; "),
        ("--max_steps 3", "--max_steps 3"),
        ("--per_device_eval_batch_size 3", "--per_device_eval_batch_size 3"),
        ("--max_test_samples 3", f"--max_test_samples 3: {output} was begun with none; leave it out, or choose"),
        ("--select_split 0.2", "the task has a file for this split"),
        ("--save_best", "--save_best: this is an experiment"),
        ("--extend_rates --learning_rate 1e-3", "one learning rate does not determine the next one"),
        ("--extend_rates --learning_rate 0 1e-3", "--learning_rate 0: is not a finite number above 0"),
        ("--extend_rates --learning_rate 1e-3 1.001e-3", "give rates further apart"),
        ("--seed 3 3", "one value is given twice"),
        (
            "--method lora --shortcut input block",
            "input block: no method of --method lora uses",
        ),
        ("--lora_r 2 999", "999"),
    ):
        status = run(*common, *EXPERIMENT, *flags.split(), "--output_dir", output if "999" not in flags else tmp_path)
        assert (status, words in capsys.readouterr().err) == (2, True), words
    assert run(*common, "--output_dir", output) == 2
    assert "contains an experiment" in capsys.readouterr().err
    assert run(*common, "--experiment_minutes", "3", "--output_dir", tmp_path) == 2
    assert "this is not an experiment" in capsys.readouterr().err
    (tmp_path / "checkpoint-2").mkdir()
    write_json(tmp_path / "checkpoint-2" / "trainer.json", {})
    assert run(*common, *EXPERIMENT, "--output_dir", tmp_path) == 2
    assert "not an experiment" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_arms_at_once_are_those_of_one_after_the_other(common, whole, tmp_path, monkeypatch):
    output, threads = tmp_path / "out", torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)  # of which each process has half
    assert run(*common, "--learning_rate", *RATES, "--arms_at_once", "2", "--output_dir", output) == 0
    found = [
        [arm for arm in record(place)["arms"] if arm["label"] == "reslora" and arm["seed"] == 42]
        for place in (whole[0], output)
    ]
    one, two = [[(arm["status"], arm["select_by_step"]) for arm in arms] for arms in found]
    assert one == two and len(two) == 2


@pytest.mark.exhaustive
def test_a_race_stops_a_run_early_and_says_so(common, tmp_path, capsys):
    """In few steps, a low learning rate learns nothing. The estimate is printed after six steps."""
    own = (*common, "--max_steps", "8", "--eval_steps", "2", "--output_dir", tmp_path / "out")
    own += ("--method", "lora", "--learning_rate", "1e-6", "5e-3")
    assert run(*own) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("2 runs, 2 to choose learning rates, measured every 2 steps; " in line for line in lines)
    assert any(line.startswith("estimate: at most ") and " for 2 runs (" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("lora/lr-1e-06/seed-42: stopped early at step 4: ")]
    low, _ = record(tmp_path / "out")["arms"]
    assert (low["status"], low["steps"]) == ("stopped", 4) and line.endswith(low["reason"])
    before = times(tmp_path / "out")
    assert run(*own) == 0 and times(tmp_path / "out").items() >= before.items()
    assert run(*own, "--racing", "False") == 2 and "was begun with racing" in capsys.readouterr().err


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


@pytest.mark.exhaustive
def test_two_processes_end_well(common, tmp_path):
    """The other process waits while the main process compares and exports."""
    words = ["--seed", "0", "1", "--learning_rate", "5e-3", "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    printed = forked(SCRIPT, *common, *words, folder=tmp_path)
    assert "error" not in printed and printed.count("peft/ is that of") == 1, printed
    for seed in (0, 1):
        assert len(re.findall(rf"run .* of 2.*: reslora/lr-0.005/seed-{seed}\n", printed)) == 1, printed
    assert [arm["status"] for arm in record(tmp_path / "out")["arms"]] == ["finished"] * 2


@pytest.mark.exhaustive
def test_averages_are_means_of_the_runs_adapters_also_of_two_processes(common, tmp_path):
    """By the formula; two processes with half the batch each have the losses of one, but for rounding."""
    words = [*common, "--method", "reslora", "--learning_rate", "5e-3", "--seed", "0", "1", "--lora_dropout", "0"]
    words += ["--average_checkpoints", "ema:0.5", "--output_dir"]
    assert run(*words, tmp_path / "one") == 0
    half = [*words, str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    printed = forked(SCRIPT, *half, folder=tmp_path)
    assert "4 runs, 2 averages without training, measured every 1 step; " in printed, printed
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert [arm["label"] for arm in one["arms"]] == ["reslora"] * 2 + ["reslora ema:0.5"] * 2
    for mine, other in zip(one["arms"], two["arms"], strict=True):
        assert mine["select_by_step"] == pytest.approx(other["select_by_step"], rel=1e-4)
        assert mine["test"]["losses"] == pytest.approx(other["test"]["losses"], rel=1e-4)
    for output, seed in itertools.product((tmp_path / "one", tmp_path / "two"), (0, 1)):
        first, second, mean = (
            load_file(output / "reslora" / place / f"seed-{seed}/adapters/step-00000{step}/reslora_model.safetensors")
            for place, step in (("lr-0.005", 1), ("lr-0.005", 2), ("average_checkpoints-ema-0.5/lr-0.005", 2))
        )
        for name in [name for name in mean if "lora_" in name]:
            assert torch.equal(mean[name], (1 / 3 * first[name].double() + 2 / 3 * second[name].double()).float())


def test_averages_that_the_runs_of_one_batch_size_cannot_have_are_refused(common, tmp_path, capsys):
    """Of 12 examples, an epoch is three steps or one."""
    words = " ".join(common).replace("--per_device_train_batch_size 4", "--vary per_device_train_batch_size=4,12")
    more = "--method lora --learning_rate 5e-3 --seed 0 1 --max_steps -1 --num_train_epochs 2"
    more += " --average_checkpoints last:3"
    assert run(*words.split(), *more.split(), "--output_dir", tmp_path / "out") == 2
    problem = "averages 3 or more evaluated checkpoints, and a run of 2 steps is evaluated 2 times"
    assert f"--average_checkpoints last:3: {problem}" in capsys.readouterr().err


def test_an_experiment_goes_on_with_as_many_examples_a_step_as_before(common, whole, tmp_path, capsys):
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)  # with less than was added to it
    command, found = [*common, *EXPERIMENT, "--merge_and_save", "--output_dir", output], record(output)
    assert run(*command) == 0 and record(output)["identity"] == found["identity"]
    assert run(*command, "--per_device_train_batch_size", "2") == 2
    assert f"batch size x accumulation x processes = 2: {output} was trained with 4" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "script"), [(llm, train_llm), (glue, train_glue)])
def test_a_plain_run_refuses_other_examples_before_it_loads_the_model(tmp_path, capsys, monkeypatch, module, script):
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "checkpoint-1").mkdir()
    write_json(tmp_path / "checkpoint-1" / "trainer.json", {"method": "reslora", "images": "others"})
    write_checksums(tmp_path / "checkpoint-1")
    resume = ["--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path), "--use_cpu"]
    assert run_script("script", script.start, resume) == 2
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


def test_the_examples_that_are_trained_on_are_counted(common, tmp_path, capsys, monkeypatch):
    """Without those that --max_train_samples leaves out."""
    experiments: list[experiment.TextExperiment] = []
    monkeypatch.setattr(experiment_run, "train_and_conclude", lambda experiment, pool: experiments.append(experiment))
    assert run(*common, *EXPERIMENT, "--max_train_samples", "5", "--output_dir", tmp_path) == 0
    assert experiments[0].facts()["split"] == {"train": 5, "select": 3, "test": 4, "duplicates": 0}
    assert "; examples: 5 for training, 3 in the selection split" in capsys.readouterr().out


def test_a_plan_times_the_first_steps_and_writes_nothing(common, tmp_path, capsys):
    """With --eval_strategy no, an experiment evaluates its runs nevertheless."""
    flags = ("--method", "lora", "reslora", "--learning_rate", "1e-3", "--seed", "0", "1", "--eval_strategy", "no")
    assert run(*common, *flags, "--output_dir", tmp_path / "out", "--plan") == 0
    runs, steps, memory, estimate = capsys.readouterr().out.splitlines()[-4:]
    assert runs == "4 runs" and memory.startswith("about 0.")
    start = "2 steps, 3 steps in an epoch of 12 examples; 2 evaluations, and a checkpoint every "
    assert steps.startswith(start) and estimate.startswith("estimate: ") and " for 4 runs (" in estimate
    assert not (tmp_path / "out").exists()


def test_too_few_to_compare_by_are_said_with_the_share_that_takes_enough():
    """If a fraction determines the part: a file of the task or a limit determines its size instead."""

    def told(files, split=None, limit=None) -> list[str]:
        parts = parts_of(files, str, ExperimentOptions(test_split=split)).limited(None, limit)
        return experiment.TextExperiment(None, None, parts, None).too_few()

    texts = [one + other for one in "abcdef" for other in "ghijk"]
    (line,) = told({"train": texts}, 0.01)
    start, _, share = line.partition(", or with --test_split ")
    assert start == told({"train": texts}, 0.01, limit=2)[0] and start.startswith("only 2 examples compare")
    assert told({"train": texts, "test": ["x", "y"]}) == [start] and told({"train": texts}, float(share)) == []


def test_the_select_loss_is_measured_when_it_is_asked_for_or_ten_times():
    def looks(strategy: str, every: float | None) -> dict:
        return experiment.evaluations_of(LlmValidationOptions(eval_strategy=strategy, eval_steps=every), 95)

    assert looks("no", None)["eval_steps"] == 10 and looks("no", 7)["eval_steps"] == 7 and looks("steps", 7) == {}


@pytest.mark.parametrize("kind", [LlmOptions, GlueOptions])
def test_an_experiment_at_home_is_where_its_arms_are(tmp_path, monkeypatch, kind):
    """transformers expands `~` where the shell has not, as in `--output_dir=~/out`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    schedule = ArmSchedule(read(kind, "x", [*EXPERIMENT, "--output_dir=~/out", "--use_cpu"]), 0.0)
    assert schedule.folder == tmp_path / "out"
    for arm in schedule.arms():
        assert options_of(arm, schedule).output.output_dir == str(schedule.folder_of(arm))


@pytest.mark.parametrize("compiled", [True, False])
def test_the_compiler_forgets_earlier_arms(tmp_path, monkeypatch, compiled):
    """Each ResLoRA is a new model, and after the eighth, torch would stop compiling."""
    heard = []

    def train(*_):
        heard.append("trained")
        raise Stopped("enough is seen")

    monkeypatch.setattr(torch.compiler, "reset", lambda: heard.append("forgotten"))
    monkeypatch.setattr("reslora.experiment.study.train_method", train)
    words = [*EXPERIMENT, f"--output_dir={tmp_path}", "--use_cpu", *["--torch_compile"] * compiled]
    runner = runner_of(read(LlmOptions, "x", words))
    with pytest.raises(Stopped):
        runner.train(runner.schedule.arms()[0])
    assert heard == ["forgotten"] * compiled + ["trained"]


def runner_of(grid, stop: StopRequest | None = None) -> experiment.TextExperiment:
    """Return an experiment with a few examples, without loading anything."""
    texts, stop = llm.LlmTexts(), stop or StopRequest()
    texts.rows, texts.encoder = [{"input_ids": [1], "labels": [1]}] * 4, Encoder(bytes_tokenizer())
    context = Context(grid.base, None, Accelerator(cpu=True), stop)
    return experiment.TextExperiment(ArmSchedule(grid, 0.0), texts, Parts([], [], [], 0, []), context)


def test_a_stop_is_heeded_before_an_arm_is_tested(tmp_path):
    stop, grid = StopRequest(), read(LlmOptions, "x", [*EXPERIMENT, f"--output_dir={tmp_path}", "--use_cpu"])
    runner = runner_of(grid, stop)
    arm, *_ = runner.schedule.arms()
    runner.start_phase("testing (1 of 4)", arm)
    stop.signal = signal.SIGTERM
    with pytest.raises(Stopped, match="run the same command to resume"):
        runner.start_phase("testing (2 of 4)", arm)


def test_what_nothing_of_an_experiment_reads_is_told_once(tmp_path, capsys, monkeypatch):
    """Before anything is loaded; options that one of the methods uses are not reported."""
    ends = InvalidArgument("--data_dir", "is not asked for", "go on")
    monkeypatch.setattr(llm.LlmTexts, "parts", lambda *_: (_ for _ in ()).throw(ends))

    def told(*flags) -> str:
        assert run("--use_cpu", "--output_dir", tmp_path, *flags) == 2
        return capsys.readouterr().out

    flags = ["--learning_rate", *RATES, "--merge", "weights", "--head", "none", "--lora_alpha", "3"]
    unread = [f"--{flag}: it has no effect with --method lora oft" for flag in ("head none", "merge weights")]
    assert told("--method", "lora", "oft", *flags).splitlines() == unread
    assert told("--method", "oft", "reslora", *flags) == told("--method", "lora", "oft", "--seed", "0", "1") == ""


@pytest.mark.exhaustive
def test_numbers_of_blocks_that_mean_the_same_are_told_once(common, tmp_path, capsys, monkeypatch):
    """The chains have five blocks, one per layer; a single run prints it too."""
    same = "--pre_num 7: 2 of 2 chains are shorter (shortest: 5 blocks); the longest has 5, so this equals --pre_num 4"
    monkeypatch.setattr(experiment_run, "train_and_conclude", lambda *_: None)
    monkeypatch.setattr(loop, "train_and_export", lambda *_: (_ for _ in ()).throw(Stopped("enough is seen")))
    shortcut = ["--shortcut", "block", "--pre_num", "7"]
    several = ["--method", "reslora", "lora_matched", *shortcut, "4", "--output_dir", tmp_path / "several"]
    assert run(*common, *several) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "--pre_num" in line] == [same]
    assert run(*common, *shortcut, "--output_dir", tmp_path / "plain") > 128
    assert [line for line in capsys.readouterr().out.splitlines() if "--pre_num" in line] == [same]


def test_ranks_shortcuts_and_numbers_of_blocks_are_compared():
    words = "--method lora reslora ms_placebo --shortcut input block --pre_num 2 -1 --lora_r 2 4"
    grid = read(LlmOptions, "x", words.split())
    assert [label.name for label in labels_of(grid) if label.rank == 4] == [
        *("lora rank 4", "reslora input rank 4", "reslora block(2) rank 4", "reslora block(-1) rank 4"),
        *("ms_placebo middle(2) rank 4", "ms_placebo middle(-1) rank 4"),
    ]
    assert grid.flat()["lora_alpha"] is None
    found = {
        label.name: (place_of(label, ARM), options_of_arm(grid, label, 1e-3, 0).adapter) for label in labels_of(grid)
    }
    place, own = found["reslora block(-1) rank 4"]
    assert place == "block/pre_num--1/rank-4/lr-0.001/seed-0"
    assert (own.shortcut, own.pre_num, own.rank, own.lora_alpha) == ("block", -1, 4, 8)
    assert [found[name][1].pre_num for name in ("lora rank 2", "ms_placebo middle(-1) rank 2")] == [2, -1]


@pytest.mark.parametrize(
    ("rank", "alpha"), [(["4"], 8), (["16"], 32), (["4", "16"], None), (["16", "--lora_alpha=5"], 5)]
)
def test_what_an_experiment_goes_on_with_has_twice_the_rank_as_alpha(tmp_path, rank, alpha):
    """None stands for twice each of several ranks."""
    words = ["--seed", "0", "1", "--use_cpu", f"--output_dir={tmp_path}", "--lora_r", *rank]
    runner = runner_of(read(LlmOptions, "x", words))
    found = {runner.study_of(arm).method.lora_alpha for arm in runner.schedule.arms()}
    assert found == ({8, 32} if alpha is None else {alpha})
    assert runner.identity["settings"]["lora_alpha"] == alpha


@pytest.mark.parametrize("script", ["llm", "glue"])
def test_limits_hold_for_what_is_cut_out_of_the_training_examples_too(tmp_path, script):
    """The only other file is the test split."""
    kind, study, flags, limit = {
        "llm": (LlmOptions, llm.LlmTexts, "", "--max_test_samples"),
        "glue": (GlueOptions, glue.GlueTexts, "--task_name rte", "--max_predict_samples"),
    }[script]
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


def test_a_damaged_record_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "experiment.json").write_text('{"format": 1, "readings"')
    with pytest.raises(InvalidArgument, match=rf"^--output_dir {tmp_path}: experiment.json is damaged; "):
        experiment.prepare_folder(SimpleNamespace(schedule=SimpleNamespace(folder=tmp_path)))


@pytest.mark.exhaustive
def test_pissa_is_an_arm_next_to_lora(common, tmp_path):
    words = ["--learning_rate", "1e-3", "--seed", "0", "1", "--racing", "False"]
    methods = ["--method", "pissa", "lora"]
    assert run(*common, *words, *methods, "--output_dir", tmp_path) == 0
    arms = record(tmp_path)["arms"]
    assert {entry["status"] for entry in arms} == {"finished"} and len(arms) == 4
    assert {entry["label"] for entry in arms} == {"pissa", "lora"}
