"""The measurements of benchmarks/ with made-up figures: what is chosen, stored and reported."""

import argparse
import json
import re
import sys
from pathlib import Path

import pipelines
import pytest
import torch
from safetensors.torch import save_file

import train_llm
import train_sd
from reslora.images import settings
from reslora.options.texts import GlueOptions, LlmOptions
from reslora.runtime.signals import StopRequest
from reslora.texts.arguments import read

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import paper  # noqa: E402
import paper_models  # noqa: E402
import paper_report  # noqa: E402

pytestmark = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(paper_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper_report, "REPORT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(paper_report, "ROOT", tmp_path)


def result(variant: str, seed: int, losses: list[float], table: dict | None = None, rate: float = 1e-3) -> dict:
    log = [{"step": 10 * i, "split": "validation", "loss": loss, "accuracy": 0.5} for i, loss in enumerate(losses)]
    table = table or {"unmerged": {"loss": losses[-1]}}
    return {"experiment": "svamp", "variant": variant, "rate": rate, "seed": seed, "log": log, "table": table}


def kept(*results: dict, name: str = "svamp", search: bool = False) -> None:
    folder = paper.RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for r in results:
        key = f"{'search-' if search else ''}{r['variant']}-lr{r['rate']:g}-seed{r['seed']}"
        (folder / f"{key}.json").write_text(json.dumps(r))


def test_rate_with_the_best_validation_score_is_chosen(monkeypatch):
    for rate, loss in zip(paper.EXPERIMENTS["pipeline"].rates, (0.5, 0.2, 0.3), strict=True):
        kept(result("is", 0, [1.0, loss], rate=rate), name="pipeline")
    assert paper.chosen_rate("pipeline", "is", None) == paper.EXPERIMENTS["pipeline"].rates[1]
    monkeypatch.setitem(paper.EXPERIMENTS, "mrpc", paper.glue("mrpc", "f1", 240))
    for rate, f1 in zip(paper.EXPERIMENTS["mrpc"].rates, (0.2, 0.8), strict=True):
        found = result("is", 0, [1.0, 0.1], rate=rate)
        found["log"][-1]["f1"] = f1
        kept(found, name="mrpc", search=True)
    assert paper.chosen_rate("mrpc", "is", None) == paper.EXPERIMENTS["mrpc"].rates[1]
    assert paper.chosen_rate("svamp", "is", None) == paper.EXPERIMENTS["svamp"].rates[0]  # the only one


def test_every_experiment_has_the_control_and_three_seeds_where_it_is_required():
    for name, experiment in paper.EXPERIMENTS.items():
        assert len(experiment.rates) <= 3 and set(experiment.variants) <= set(paper.VARIANTS)
        if experiment.required:
            assert {"lora", "lora_x2", "is", "ms(4)"} <= set(experiment.variants), name
            # GLUE tasks are there for the merges, of which bs's is exact.
            assert "bs(4)" in experiment.variants or experiment.script == "train_glue.py", name
            assert len(experiment.seeds) >= 3


@pytest.mark.parametrize("script", ["train_llm.py", "train_glue.py"])
def test_examples_that_rates_are_chosen_by_are_neither_trained_on_nor_judged_by(tmp_path, script):
    source = tmp_path / "text" / "svamp"
    source.mkdir(parents=True)
    for split, count in (("train", 70), ("validation", 20), ("test", 20)):
        lines = [json.dumps({"row": f"{split}{i}"}) + "\n" for i in range(count)]
        (source / f"{split}.jsonl").write_text("".join(lines))
    args = argparse.Namespace(text=tmp_path / "text")
    experiment = paper.Experiment(script, "svamp", "", (), (), (), "loss")
    search, final = (paper.split_data(experiment, args, search) for search in (True, False))

    def rows(folder: Path, split: str) -> set:
        path = folder / f"{split}.jsonl"
        return set(path.read_text().splitlines()) if path.is_file() else set()

    chosen_by = rows(search, "validation")
    judged_by = rows(final, "test") or rows(final, "validation")
    assert rows(search, "train") == rows(final, "train") and chosen_by
    assert not chosen_by & rows(final, "train") and not judged_by & (chosen_by | rows(final, "train"))
    assert rows(search, "train") | chosen_by == {line.strip() for line in (source / "train.jsonl").open()}


def test_losses_of_steps_are_averaged_by_tens(tmp_path):
    rows = [{"step": i, "split": "train", "loss": float(i), "lr": 1.0, "seconds": 1.0} for i in range(1, 21)]
    rows.append({"step": 20, "split": "validation", "loss": 3.0, "lr": 1.0, "seconds": 2.0, "accuracy": 0.5})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second, last = paper.read_log(tmp_path / "log.jsonl")
    assert (first["step"], first["loss"], second["loss"]) == (10, 5.5, 15.5)
    assert last == {"step": 20, "split": "validation", "loss": 3.0, "seconds": 2.0, "accuracy": 0.5}


def test_norms_are_those_of_the_scaled_product(tmp_path):
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    key = "base_model.model.model.layers.0.q_proj"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "a.safetensors")
    (norm,) = paper.norms(tmp_path / "a.safetensors", 2.0).values()
    assert norm == pytest.approx((2.0 * up @ down).norm().item(), rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[str], Path]:
    """A short training of a tiny pipeline as `paper.training` starts it: its flags and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    model, images = pipelines.stable_diffusion(folder / "model"), pipelines.image_folder(folder / "images", 6)
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--resolution", "32"]
    flags += ["--max_train_steps", "3", "--validation_split", "0.4", "--validation_steps", "3", "--rank", "2"]
    flags += ["--train_batch_size", "2", "--learning_rate", "1e-2", "--merge_calibration_samples", "4"]
    flags += ["--num_validation_images", "0", "--report_to", "none", "--checkpointing_steps", "3"]
    flags += ["--method", "reslora", "--shortcut", "middle", "--pre_num", "4"]
    assert train_sd.main([*flags, "--output_dir", str(folder / "run")]) == 0
    return flags, folder / "run"


def test_merges_of_a_training_are_judged_by_its_own_validation_loss(trained):
    flags, run = trained
    rows = [json.loads(line) for line in (run / "reslora" / "log.jsonl").read_text().splitlines()]
    table = paper.condensed_table(paper_models.image_table(flags, run / "reslora"))
    assert table["unmerged"]["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5) and rows[-1]["split"] == "validation"
    assert list(table) == ["unmerged", "none", "input", "weights", "lstsq"]
    merged = json.loads((run / "reslora" / "merge.json").read_text())
    assert table["lstsq"] == {"loss": table["lstsq"]["loss"], **paper.mean_error(merged)}
    assert table["none"]["loss"] != table["unmerged"]["loss"] and "block_error" in table["none"]


def text_folder(folder: Path) -> Path:
    """The bundled word problems as SVAMP, and a few made-up ones in GSM8K's format."""
    (folder / "gsm8k").mkdir(parents=True)
    (folder / "svamp").mkdir()
    for split in ("train", "test"):
        rows = (ROOT / "assets" / "tiny-llama" / "task" / f"{split}.jsonl").read_text().splitlines()[:20]
        (folder / "svamp" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    rows = [{"question": f"Mia has {i} pens.", "answer": f"She has {i}.\n#### {i}"} for i in range(10)]
    (folder / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_language_training_is_kept_with_its_merges_and_calibrations(tmp_path, monkeypatch):
    flags = ("--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 2, "--max_new_tokens", 2)
    flags += ("--per_device_train_batch_size", 2, "--max_test_samples", 4, "--learning_rate", "1e-2")
    experiment = paper.Experiment("train_llm.py", "svamp", "", ("ms(4)",), (1e-2,), flags, "loss")
    monkeypatch.setitem(paper.EXPERIMENTS, "svamp", experiment)
    monkeypatch.setattr(paper, "launch", lambda script, flags, log: train_llm.start(flags, StopRequest()))
    args = argparse.Namespace(llm=str(ROOT / "assets" / "tiny-llama"), text=text_folder(tmp_path / "text"))
    found = paper.training("svamp", "ms(4)", 1e-2, 0, args)
    (path,) = (paper.RESULTS / "svamp").glob("*.json")
    assert path.name == "ms(4)-lr0.01-seed0.json" and json.loads(path.read_text()) == found
    assert [row["step"] for row in found["log"]] == [1, 2] and not (paper.SCRATCH / "svamp" / path.stem).exists()
    assert list(found["table"]) == ["unmerged", "none", "input", "weights", "lstsq"]
    assert list(found["calibration"]) == ["8", "32", "128", "128 of gsm8k"]
    # The run's own merge read all of the 18 examples as well, which is what 32 and 128 come to here.
    losses = [found["calibration"][count] for count in ("32", "128")]
    assert losses == pytest.approx([found["table"]["lstsq"]["loss"]] * 2, rel=1e-5)
    assert len(found["norms"]) == 10 and paper.training("svamp", "ms(4)", 1e-2, 0, None) == found


def test_trainers_take_the_flags_of_every_training(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "split_data", lambda experiment, args, search: tmp_path)
    args = argparse.Namespace(llm="someone/model", encoder="someone/encoder", text=tmp_path)
    parsers = {
        "train_sd.py": settings.parse_args,
        "train_llm.py": lambda argv: read(LlmOptions, "train_llm.py", argv),
        "train_glue.py": lambda argv: read(GlueOptions, "train_glue.py", argv),
    }
    for experiment in (e for e in paper.EXPERIMENTS.values() if e.script):
        for variant in experiment.variants:
            flags = paper.flags_of(experiment, variant, 1, args, search=False)
            found = parsers[experiment.script]([*flags, "--output_dir", str(tmp_path / "run")])
            assert (found["seed"], found["output_dir"]) == (1, str(tmp_path / "run")), (experiment, variant)


def test_steps_to_a_loss_lie_on_the_line_between_rows():
    found = result("is", 0, [1.0, 0.8, 0.4])
    assert paper_report.steps_to(found, 0.6) == pytest.approx(15)
    assert paper_report.steps_to(found, 1.0) == 0 and paper_report.steps_to(found, 0.3) is None


def test_what_lstsq_keeps_of_what_none_loses():
    tables = [
        {"unmerged": {"loss": 0.2}, "none": {"loss": 0.4}, "lstsq": {"loss": 0.21}},
        {"unmerged": {"loss": 0.2}, "none": {"loss": 0.3}, "lstsq": {"loss": 0.19}},
    ]
    found = [result("is", seed, [1.0, 0.2], table) for seed, table in enumerate(tables)]
    assert paper_report.kept(found, "loss", "lstsq") == "102.5 ± 10.6%"
    assert paper_report.kept(found, "loss", "weights") == "—"
    assert "| is | 102.5 ± 10.6% |" in paper_report.merges({"is": found})


def test_report_fills_the_marked_parts_and_nothing_else():
    merged = {"unmerged": {"loss": 0.2}, "none": {"loss": 0.4}, "lstsq": {"loss": 0.2, "block_error": 0.1}}
    for seed in range(3):
        kept(result("lora", seed, [1.0, 0.6, 0.5]), result("is", seed, [1.0, 0.5, 0.2], merged))
    parts = ["before", "<!-- svamp -->", "old", "<!-- /svamp -->", "<!-- sst2-more --><!-- /sst2-more -->"]
    paper_report.REPORT.write_text("\n".join([*parts, "<!-- not-run --><!-- /not-run -->", "after"]))
    paper_report.write(paper.EXPERIMENTS)
    report = paper_report.REPORT.read_text()
    assert report.startswith("before\n") and report.endswith("after") and "old" not in report
    assert "| is | 0.001 | 0.2000 ± 0.0000 | -0.3000 ± 0.0000 | 0.500 ± 0.000 | 10 ± 0 |" in report
    assert "*Not run yet.*" in report and "`svamp`" not in report
    assert "These experiments have not run; of `paper.py`: `cost`, `pipeline`," in report
    assert (paper_report.RESULTS / "svamp.png").stat().st_size > 1000


def test_tables_in_results_are_those_of_the_kept_figures(monkeypatch):
    monkeypatch.setattr(paper_report, "RESULTS", BENCHMARKS / "results")
    monkeypatch.setattr(paper_report, "saved", lambda figure, name: f"benchmarks/results/{name}")
    shipped = (ROOT / "RESULTS.md").read_text()
    for name in re.findall(r"<!-- ([a-z0-9_-]+) -->", shipped):
        part = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", shipped, flags=re.DOTALL)[1]
        assert part == paper_report.part(name, paper.EXPERIMENTS), f"`python benchmarks/paper.py report` changes {name}"


def test_learning_rates_are_compared_for_equal_rates_too():
    low, middle, high = paper.EXPERIMENTS["pipeline"].rates
    for rate, losses in ((low, [1.0, 0.9]), (middle, [1.0, 0.5]), (high, [1.0, 0.6])):
        kept(result("lora", 0, losses, rate=rate), name="pipeline")
    kept(result("lora", 1, [1.0, 0.5], rate=middle), result("is", 0, [1.0, 0.4], rate=high), name="pipeline")
    report = paper_report.rates("pipeline", paper.EXPERIMENTS["pipeline"])
    losses, same, chosen = report.split("\n\n")
    assert "| lora | 0.9000 | 0.5000 | 0.6000 |" in losses and "| is | — | — | 0.4000 |" in losses
    assert "| lora | 10 | 10 | 10 |" in same and "| is | — | — | 7 |" in same  # down to 0.6 in ten steps of 0.06
    assert "to 0.5000, LoRA's final loss at its chosen learning rate" in chosen
    assert "| lora | never | 10 | never |" in chosen and "| is | — | — | 8 |" in chosen


def test_speed_is_reported_with_its_machine():
    machine = {"cpu": "a processor", "gpu": None, "threads": 2, "torch": "2.0"}
    steps = {"ratio_quartiles": [0.9, 1.0, 1.1], "memory_ratio": 1.25}
    files = {
        "speed/steps-llama": {"rank": 4, "rounds": 9, "device": "cpu", "quiet": True, "shortcuts": {"input(1)": steps}},
        "speed/start": {"seconds": {"import peft": 1.5}},
        "trainer/loader": {"scan_seconds": 0.7, "workers": {"2": {"cached, samples/s": 831.0}}},
        "trainer/memory": {"rounds": {"step time": [1.0, 3.0, 2.0]}},
        "trainer/diffusers-bundled": {"ratios": {"samples per second": [2.0], "made up for": []}, "runs": {}},
    }
    assert paper_report.speed_tables() == "*Not run yet.*"
    for name, figures in files.items():
        path = paper_report.RESULTS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, **figures}))
    report = paper_report.speed_tables()
    assert report.count("a processor, 2 threads, torch 2.0") == len(files)
    for row in (
        "a processor, 2 threads, torch 2.0; r = 4, 9 pairs of steps |",
        "| 1.000 (0.900-1.100) of stock PEFT's time, 1.25 of its memory for the backward pass |",
        "| import peft | 1.50 s |",
        "| 2 processes, cached, samples/s | 831 |",
    ):
        assert row in report
    for row in ("| step time | 2.00 (1.00-3.00) |", "| samples per second | 2.00 (2.00-2.00) |", "| never |"):
        assert row in report


def test_unknown_experiment_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper.py", "run", "nothing"])
    with pytest.raises(SystemExit) as end:
        paper.main()
    assert end.value.code == 2 and "unknown experiment nothing" in capsys.readouterr().err
