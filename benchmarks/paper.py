"""Measure the paper's claims with the project's trainers, store all figures, and create tables and plots.

    python benchmarks/paper.py list                 # the experiments, and which have run
    python benchmarks/paper.py run                  # all experiments, the quickest first
    python benchmarks/paper.py run sst2 svamp       # only these
    python benchmarks/paper.py report               # tables and plots in RESULTS.md from the results

`run` resumes where it was stopped: each finished training is one file in benchmarks/results/<experiment>/. A training
is one run of a trainer (train_sd.py, train_llm.py, train_glue.py) in a separate process, and can also be started by
hand.

The learning rate is chosen for each method in the same way: the best of at most three on a validation split with seed
0. Then the method is trained with three seeds, and evaluated on data that neither the training nor that choice has seen
(the bundled pipeline: on held-out images). `lora_x2`, LoRA with doubled alpha, is the control everywhere; the pipeline
and SVAMP also have `lora_x4`.

Real models and data come from the Hub, or from local folders:

    python benchmarks/paper.py run --llm FOLDER --encoder FOLDER --text FOLDER    # FOLDER/<task>/{train,test,...}.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import paper_models
import paper_report
import torch
from measured import RESULTS, ROOT, check_names

from reslora.io import write_json

SCRATCH = ROOT / "runs" / "paper"
LLM, ENCODER = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
CALIBRATION_SIZES = (8, 32, 128)

VARIANTS = {
    "lora": ["--method", "lora"],
    "lora_x2": ["--method", "lora_x2"],
    "lora_x4": ["--method", "lora"],  # with four times the trainers' default alpha
    "is": ["--method", "reslora", "--shortcut", "input"],
    "bs(4)": ["--method", "reslora", "--shortcut", "block", "--pre_num", "4"],
    "ms(4)": ["--method", "reslora", "--shortcut", "middle", "--pre_num", "4"],
}
QUADRUPLE_ALPHA = {"train_sd.py": 128, "train_llm.py": 32, "train_glue.py": 32}
MAIN = ("lora", "lora_x2", "is", "bs(4)", "ms(4)")
APPROXIMATE = ("lora", "lora_x2", "is", "ms(4)")  # without bs, whose merge is exact


@dataclass(frozen=True)
class Experiment:
    """Methods that are trained on one task, with the fields that their trainings have in common."""

    script: str
    task: str
    shows: str
    """The figures and tables of the paper that it reproduces."""
    variants: tuple[str, ...]
    rates: tuple[float, ...]
    flags: tuple[str, ...]
    score: str
    """The figure of validation rows that selects the learning rate; a loss is better lower, all others higher."""
    seeds: tuple[int, ...] = (0, 1, 2)


def glue(task: str, score: str, steps: int, variants=APPROXIMATE, rates=(1e-3, 3e-3), **more) -> Experiment:
    """Return an experiment on a task of GLUE."""
    flags = ("--max_steps", steps, "--eval_strategy", "steps", "--eval_steps", steps // 6, "--save_steps", steps)
    flags += ("--per_device_train_batch_size", 16, "--per_device_eval_batch_size", 64)
    flags += ("--max_seq_length", 128, "--bf16")
    return Experiment("train_glue.py", task, "Table 2", variants, rates, flags, score, **more)


def svamp(shows: str, variants: tuple[str, ...], **more) -> Experiment:
    """Return an experiment on SVAMP, with one learning rate for all methods.

    At ten minutes and more on a CPU core for each training, a search would take most of a day.
    """
    flags = ("--max_steps", 60, "--eval_strategy", "steps", "--eval_steps", 15, "--save_steps", 60)
    flags += ("--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 50, "--max_new_tokens", 32)
    flags += ("--max_test_samples", 150, "--bf16", "--dtype", "float32")
    return Experiment("train_llm.py", "svamp", shows, variants, (1e-3,), flags, "loss", **more)


IMAGES = (
    *("--train_data_dir", ROOT / "assets" / "openmoji"),
    *("--max_train_steps", 200, "--checkpointing_steps", 200, "--validation_steps", 20, "--validation_split", 0.2),
    *("--validation_prompt", "sailboat", "--num_inference_steps", 4, "--report_to", "none", "--snr_gamma", 0),
)

# In the order in which they run, the quickest first.
EXPERIMENTS = {
    "cost": Experiment("", "", "Table 8", MAIN, (), (), ""),
    "pipeline": Experiment(
        "train_sd.py", "", "Figure 3", (*MAIN, "lora_x4"), (2e-4, 5e-4, 1e-3), IMAGES, "loss"
    ),
    "sst2": glue("sst2", "accuracy", 240, rates=(2e-3,)),
    "svamp": svamp("Figure 1, Tables 1, 3, 6, 7 and 9", (*MAIN, "lora_x4")),
}  # fmt: skip


# -- command line ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "run", "report"])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--llm", default=LLM, help="causal model, folder or name on the hub")
    parser.add_argument("--encoder", default=ENCODER, help="encoder for GLUE, folder or name on the hub")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="holds <task>/{train,validation,test}.jsonl")
    return parser


def main() -> None:
    """List or run the experiments, or write the report."""
    parser = build_parser()
    args = parser.parse_args()
    check_names(parser, args.experiments, EXPERIMENTS)
    chosen = args.experiments or list(EXPERIMENTS)
    if args.what == "list":
        print_list()
    elif args.what == "run":
        for name in chosen:
            cost(args) if name == "cost" else run_experiment(name, args)
        print("all of it has run; `report` draws it")
    else:
        paper_report.write(EXPERIMENTS)


def print_list() -> None:
    """Print each experiment and its number of results."""
    for name, experiment in EXPERIMENTS.items():
        done = len(list((RESULTS / name).glob("*.json")))
        print(f"{name:<10} {experiment.shows}: {done} results")


# -- trainings ---------------------------------------------------------------------------------------------------------


def run_experiment(name: str, args: argparse.Namespace) -> None:
    """Choose a learning rate for each variant, then train it with every seed."""
    experiment = EXPERIMENTS[name]
    rates = {variant: chosen_rate(name, variant, args) for variant in experiment.variants}
    for seed in experiment.seeds:
        for variant, rate in rates.items():
            training(name, variant, rate, seed, args)


def chosen_rate(name: str, variant: str, args: argparse.Namespace) -> float:
    """Return the learning rate with the best validation score for seed 0, or the only one of the experiment."""
    experiment = EXPERIMENTS[name]
    if len(experiment.rates) == 1:
        return experiment.rates[0]
    scores = {}
    for rate in experiment.rates:
        rows = [row for row in training(name, variant, rate, 0, args)["log"] if experiment.score in row]
        score = [row for row in rows if row["split"] == "validation"][-1][experiment.score]
        scores[rate] = score if experiment.score == "loss" else -score
    return min(scores, key=scores.get)


def training(name: str, variant: str, rate: float, seed: int, args: argparse.Namespace) -> dict:
    """Return the result of one training, from its file or by training."""
    experiment = EXPERIMENTS[name]
    key = f"{variant}-lr{rate:g}-seed{seed}"
    path = RESULTS / name / f"{key}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    folder = SCRATCH / name / key
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*flags_of(experiment, variant, seed, args), "--learning_rate", f"{rate:g}"]
    print(f"{name}: {key}", flush=True)
    launch(experiment.script, [*flags, "--output_dir", str(folder)], folder.parent / f"{key}.log")
    method = folder / variant_method(variant) if experiment.script == "train_sd.py" else folder
    result = {"experiment": name, "variant": variant, "rate": rate, "seed": seed, "log": read_log(method / "log.jsonl")}
    if experiment.script == "train_sd.py":
        table = condensed_table(paper_models.image_table(flags, method))
        result |= {"table": table, "norms": norms(method / "pytorch_lora_weights.safetensors")}
    else:
        result |= condensed(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        result["norms"] = norms(folder / "peft" / "adapter_model.safetensors", scale_of(folder / "peft"))
        if experiment.script == "train_llm.py" and variant in ("is", "ms(4)"):
            result["calibration"] = calibration_study([*flags, "--output_dir", str(folder)], experiment.task, args)
    write_json(path, result)
    shutil.rmtree(folder)
    return result


def flags_of(experiment: Experiment, variant: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Return the options of one training."""
    flags = [*map(str, experiment.flags), *VARIANTS[variant], "--seed", str(seed)]
    if variant == "lora_x4":
        flags += ["--lora_alpha", str(QUADRUPLE_ALPHA[experiment.script])]
    if experiment.script == "train_sd.py":
        return flags
    if not torch.cuda.is_available():
        flags.append("--use_cpu")
    model, task = (args.llm, "--task") if experiment.script == "train_llm.py" else (args.encoder, "--task_name")
    flags += ["--model_name_or_path", model, task, experiment.task, "--report_to", "none"]
    return [*flags, "--data_dir", str(split_data(experiment, args))]


def variant_method(variant: str) -> str:
    """Return the value of --method of a variant."""
    return VARIANTS[variant][1]


def launch(script: str, flags: list[str], log: Path) -> None:
    """Run a trainer to its end with its output in a file; if it fails, exit with the last lines of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *flags], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        tail = log.read_text(errors="replace")[-1500:]
        raise SystemExit(f"{script} {' '.join(flags)} ended with status {done.returncode}:\n{tail}")
    log.unlink()


# -- data --------------------------------------------------------------------------------------------------------------


def split_data(experiment: Experiment, args: argparse.Namespace) -> Path:
    """Write a folder of the task's files in which a tenth of the training examples is held out for selection.

    The task's own test or validation file is the test split. Both text trainers read such folders.
    """
    if args.text is None:
        raise SystemExit("--text: missing; give a folder that holds <task>/train.jsonl and so on")
    source = args.text / experiment.task
    rows = read_lines(source / "train.jsonl")
    random.Random(0).shuffle(rows)
    held_out = min(1000, len(rows) // 10) if experiment.script == "train_glue.py" else min(100, len(rows) // 7)
    chosen, rows = rows[:held_out], rows[held_out:]
    own = source / ("test.jsonl" if (source / "test.jsonl").is_file() else "validation.jsonl")
    judged = read_lines(own)[:1000]
    folder = SCRATCH / "data" / experiment.task
    files = {"train": rows, "validation": chosen, "test": judged}
    if experiment.script == "train_glue.py":
        files = {"train": rows, "validation": read_lines(source / "validation.jsonl")}
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in files.items():
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; exits with an error if it is missing."""
    try:
        return path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        raise SystemExit(f"--text: no {path.name} in {path.parent}") from None


# -- results of a training ---------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict]:
    """Return the validation rows, and training losses averaged over ten steps."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept, recent = [], []
    for row in rows:
        if row["split"] == "validation":
            kept.append({name: value for name, value in row.items() if name != "lr"})
            continue
        recent.append(row["loss"])
        if row["step"] % 10 == 0:
            kept.append({"step": row["step"], "split": "train", "loss": sum(recent) / len(recent)})
            recent = []
    return kept


def condensed(results: dict) -> dict:
    """Return the figures of results.json."""
    table = condensed_table(results["table"])
    return {"table": table, "seconds": results["train_seconds"], "parameters": results["trainable_parameters"]}


def condensed_table(table: dict[str, dict]) -> dict[str, dict]:
    """Return a table of merges with the mean error of a block in place of each report."""
    return {
        row: {name: value for name, value in figures.items() if name != "report"} | mean_error(figures.get("report"))
        for row, figures in table.items()
    }


def mean_error(report: dict | None) -> dict:
    """Return the mean error of a merge's blocks, or {} if none is known."""
    errors = [block["error"] for block in (report or {}).get("blocks", ()) if block["error"] is not None]
    return {"block_error": sum(errors) / len(errors)} if errors else {}


def scale_of(peft: Path) -> float:
    """Return alpha / r of a PEFT folder."""
    config = json.loads((peft / "adapter_config.json").read_text(encoding="utf-8"))
    return config["lora_alpha"] / config["r"] if "lora_alpha" in config else 1.0


def norms(path: Path, scale: float = 1.0) -> dict[str, float]:
    """Return the Frobenius norm of each layer's merged update s B A; empty for other adapters than LoRA."""
    from safetensors.torch import load_file  # imports torch, which `list` and `report` do not need

    found, tensors = {}, load_file(path)
    for key, down in tensors.items():
        up = tensors.get(key.replace("lora_A", "lora_B"))
        if "lora_A" in key and up is not None:
            name = key.removeprefix("base_model.model.").removeprefix("unet.").removesuffix(".lora_A.weight")
            found[name] = scale * (up.float() @ down.float()).norm().item()
    return found


def calibration_study(flags: list[str], task: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the test loss after `lstsq` merges with 8, 32 and 128 training examples, and 128 of another task."""
    other, most = "gsm8k" if task != "gsm8k" else "svamp", max(CALIBRATION_SIZES)
    lines = read_lines(args.text / other / "train.jsonl")[:most]
    return paper_models.calibration_losses(flags, CALIBRATION_SIZES, other, [json.loads(line) for line in lines])


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(args: argparse.Namespace, rounds: int = 3) -> None:
    """Measure peak memory and step time of each method and of stock PEFT LoRA on the language model, in turn."""
    path = RESULTS / "cost" / "llm.json"
    if path.is_file():
        return
    measured = {variant: [] for variant in ("peft", *MAIN)}
    for number in range(rounds):
        for variant, figures in measured.items():
            print(f"cost: {variant}, round {number + 1} of {rounds}", flush=True)
            script = str(Path(__file__).with_name("paper_cost.py"))
            words = [sys.executable, script, args.llm, *(VARIANTS[variant] if variant != "peft" else [])]
            figures.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    write_json(path, measured)


if __name__ == "__main__":
    main()
