"""benchmarks/paper.py: one training is stored with its merges, and RESULTS.md has the stored figures."""

import argparse
import json
import re
import sys
from pathlib import Path

import pipelines
import pytest
import torch

import train_llm
import train_sd
from reslora.regression import RIDGE
from reslora.runtime.signals import StopRequest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import paper  # noqa: E402
import paper_report  # noqa: E402

pytestmark = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(paper_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper_report, "REPORTS", [tmp_path / "RESULTS.md"])
    monkeypatch.setattr(paper_report, "ROOT", tmp_path)


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
    # The fit divides the rounding of float32 by its ridge, and examples may be summed in other batches.
    rounding = 10 * torch.finfo(torch.float32).eps / RIDGE
    assert losses == pytest.approx([found["table"]["lstsq"]["loss"]] * 2, rel=rounding)
    assert len(found["norms"]) == 10 and paper.training("svamp", "ms(4)", 1e-2, 0, None) == found


def test_tables_in_results_are_those_of_the_kept_figures(monkeypatch):
    monkeypatch.setattr(paper_report, "RESULTS", BENCHMARKS / "results")
    monkeypatch.setattr(paper_report, "saved", lambda figure, name: f"benchmarks/results/{name}")
    for report in [ROOT / "RESULTS.md", *(BENCHMARKS / "reports").glob("*.md")]:
        shipped = report.read_text().replace("](../../", "](")
        for name in re.findall(r"<!-- ([a-z0-9_-]+) -->", shipped):
            part = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", shipped, flags=re.DOTALL)[1]
            assert part == paper_report.part(name, paper.EXPERIMENTS), f"`benchmarks/paper.py report` changes {name}"
