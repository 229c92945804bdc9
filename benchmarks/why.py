"""When do shortcuts help, and why? The deciding experiments, run by the trainers' own experiment command.

    python benchmarks/why.py list                          # the experiments and their progress
    python benchmarks/why.py run transformer unet          # only these, smallest first; all by default
    python benchmarks/why.py run unet --minutes 60         # stops after an hour; the same command resumes
    python benchmarks/paper.py report                      # their tables in RESULTS.md

RESULTS.md has the hypotheses, written before any experiment ran. Each experiment is one command of `train_sd.py`,
`train_llm.py` or `train_glue.py` with several methods, learning rates and seeds, and resumes where it was stopped. Its
`experiment.json`, without this machine's paths, is written to benchmarks/results/why/NAME.json, even if it is not
finished.

The tasks of GLUE and SVAMP need a model and the data set, from the Hub or from local folders: --llm FOLDER, --encoder
FOLDER, --text FOLDER (it holds svamp/train.jsonl and so on). The transformers of 6 and 24 layers come from
assets/make/train_flow.py: --depth FOLDER holds 6/pipeline and 24/pipeline.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measured import RESULTS, ROOT, check_names, machine

from reslora.experiment.record import ENDED_AS
from reslora.io import read_object, write_json

SCRATCH = ROOT / "runs" / "why"
KEPT, AGAIN = RESULTS / "why", RESULTS / "again"
LLM, ENCODER = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
SEEDS = ("0", "1", "2", "3", "4")
CONTROLS = ("lora", "lora_x2", "lora_matched")
METHODS = (*CONTROLS, "reslora")
BASELINES = ("lora", "loha", "lokr", "dora", "oft")
"""In a separate experiment, because their best learning rates are far higher, and all methods try equally many."""
UNDERTRAINED = ("lora", "lora_x2")
"""The controls that hypothesis 5 requires; `ms(4)` converges fastest, and one run of SVAMP takes over five minutes."""
SHORTCUTS = ("input", "block", "middle")


@dataclass(frozen=True)
class Experiment:
    """One experiment command."""

    script: str
    shows: str
    rates: tuple[str, ...]
    flags: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    shortcuts: tuple[str, ...] = SHORTCUTS
    pre_nums: tuple[str, ...] = ("4",)
    seeds: tuple[str, ...] = SEEDS
    needs: str = ""
    """The option of this command line that the experiment requires."""

    def command(self, name: str, args: argparse.Namespace) -> list[str]:
        """Return the command of an experiment; {llm}, {encoder}, {text} and {depth} in its flags are replaced by
        options.
        """
        flags = [flag.format(**vars(args)) for flag in self.flags]
        several = ["--method", *self.methods, "--learning_rate", *self.rates, "--seed", *self.seeds]
        if "reslora" in self.methods:
            several += ["--shortcut", *self.shortcuts, *(["--pre_num", *self.pre_nums] if self.pre_nums else [])]
        if self.script != "train_sd.py" and not torch.cuda.is_available():
            several.append("--use_cpu")
        if args.at_once > 1:
            several += ["--arms_at_once", str(args.at_once)]
        if args.minutes:
            several += ["--experiment_minutes", f"{args.minutes:g}"]
        return [str(ROOT / self.script), *flags, *several, "--extend_rates", "--output_dir", str(SCRATCH / name)]


# Steps of few images: a run takes half a minute of one core, and there are hundreds.
IMAGE_FLAGS = (
    *("--train_batch_size", "4", "--validation_steps", "100", "--max_validation_images", "16", "--test_split", "0.2"),
    *("--num_validation_images", "0", "--report_to", "none", "--train_data_dir", "assets/openmoji"),
    *("--snr_gamma", "0"),  # train on what is measured: all timesteps have the same weight in the held-out loss
)
IMAGE_RATES = ("2e-4", "4e-4", "8e-4", "1.6e-3", "3.2e-3")
PRE_NUM = {
    "methods": ("lora", "reslora"), "shortcuts": SHORTCUTS[1:], "pre_nums": ("1", "2", "5", "-1"),
    "rates": IMAGE_RATES[1:4], "seeds": SEEDS[:3],
}  # fmt: skip
"""4 is in the experiment of all methods, which has LoRA's runs as well and shows which learning rates to try."""
DEPTH = {
    "methods": ("lora", "lora_x2", "lora_matched", "reslora"), "rates": IMAGE_RATES[1:4], "seeds": SEEDS[:3],
    "needs": "depth",
}  # fmt: skip
"""The methods that hypothesis 4 requires: a step of 24 layers takes four times as long as one of 6."""
# The defaults of train_sd.py for the bundled pipelines.
BUNDLED = ("--resolution", "64", "--max_train_steps", "200")
TEXT_RATES = ("1e-3", "2e-3", "4e-3")


def images(pipeline: str, shows: str, *flags: str, rates: tuple[str, ...] = IMAGE_RATES, **more) -> Experiment:
    """Return an experiment of train_sd.py."""
    flags = ("--pretrained_model_name_or_path", pipeline, *IMAGE_FLAGS, *flags)
    return Experiment("train_sd.py", shows, rates, flags, **more)


def glue(task: str, title: str, steps: int, **more) -> Experiment:
    """Return an experiment on a task of GLUE."""
    every = str(steps // 4)
    flags = ("--model_name_or_path", "{encoder}", "--task_name", task, "--data_dir", f"{{text}}/{task}")
    flags += ("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64", "--max_seq_length", "128")
    flags += ("--max_steps", str(steps), "--eval_strategy", "steps", "--eval_steps", every, "--save_steps", every)
    flags += ("--max_eval_samples", "600", "--bf16", "--report_to", "none")
    shows = f"{title}, a text encoder of 6 layers, rank 4"
    return Experiment("train_glue.py", shows, TEXT_RATES, flags, **({"seeds": SEEDS[:3], "needs": "text"} | more))


def llm(task: str, shows: str, steps: int, *flags: str, **more) -> Experiment:
    """Return an experiment on a task of `train_llm.py`."""
    every = str(steps // 4)
    flags = ("--model_name_or_path", "{llm}", "--task", task, "--data_dir", f"{{text}}/{task}", *flags)
    flags += ("--max_steps", str(steps), "--eval_strategy", "steps", "--eval_steps", every, "--save_steps", every)
    flags += ("--dtype", "float32", "--report_to", "none")
    return Experiment("train_llm.py", shows, TEXT_RATES, flags, **({"seeds": SEEDS[:3], "needs": "text"} | more))


SVAMP_FLAGS = (
    *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "50", "--max_new_tokens", "32"),
    *("--max_test_samples", "150"),
)


def svamp(steps: int, rank: int) -> Experiment:
    """Return an experiment on SVAMP with fewer methods than on images."""
    # On processors without bf16 instructions, bf16 is slower than float32.
    bf16 = ("--bf16",) if steps > 60 else ()
    shows = f"SVAMP, {steps} steps, rank {rank} (reslora is ms(4))"
    methods = {"methods": (*UNDERTRAINED, "reslora"), "shortcuts": SHORTCUTS[2:]}
    return llm("svamp", shows, steps, *SVAMP_FLAGS, "--lora_r", str(rank), *bf16, **methods)


def paper_task(task: str, title: str) -> Experiment:
    """Return a short experiment on a task of the paper's Table 1, whose examples are longer than those of SVAMP.

    Answers are cut after a few tokens: a model this small solves next to none, and only the loss is compared.
    """
    flags = ("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "25", "--bf16")
    flags += ("--max_eval_samples", "50", "--max_test_samples", "100", "--max_new_tokens", "4")
    return llm(task, f"{title}, 40 steps, rank 4", 40, *flags, methods=("lora", "lora_x2", "reslora"))


# In the order in which they run, the smallest first.
EXPERIMENTS = {
    "transformer": images("assets/pipeline-flow", "the bundled transformer, rank 16"),
    "unet": images("assets/pipeline", "the bundled U-Net, rank 16"),
    "transformer-baselines": images("assets/pipeline-flow", "other methods on the transformer", methods=BASELINES),
    "unet-baselines": images("assets/pipeline", "other methods on the U-Net", methods=BASELINES),
    "transformer-pre_num": images("assets/pipeline-flow", "the transformer by pre_num", **PRE_NUM),
    "unet-pre_num": images("assets/pipeline", "the U-Net by pre_num", **PRE_NUM),
    "transformer-r1": images("assets/pipeline-flow", "the bundled transformer, rank 1", "--rank", "1"),
    "unet-r1": images("assets/pipeline", "the bundled U-Net, rank 1", "--rank", "1"),
    "transformer-r4": images("assets/pipeline-flow", "the bundled transformer, rank 4", "--rank", "4"),
    "unet-r4": images("assets/pipeline", "the bundled U-Net, rank 4", "--rank", "4"),
    "depth-6": images("{depth}/6/pipeline", "a transformer of 6 layers", *BUNDLED, **DEPTH),
    "depth-24": images("{depth}/24/pipeline", "a transformer of 24 layers", *BUNDLED, **DEPTH),
    "sst2": glue("sst2", "SST-2", 160, shortcuts=("input", "middle")),
    "cola": glue("cola", "CoLA", 320, methods=("lora", "lora_x2", "reslora")),
    **{
        task: glue(task, title, 160, methods=("lora", "lora_x2", "reslora"))
        for task, title in (("stsb", "STS-B"), ("mrpc", "MRPC"))
    },
    # in 160 steps, only block-shortcuts learned STS-B with every seed; in 480 steps, three seeds gave an MDE above 100%
    "stsb-480": glue("stsb", "STS-B with 480 steps", 480, methods=("lora", "lora_x2", "reslora"), seeds=SEEDS),
    "qnli": glue("qnli", "QNLI", 400, methods=("lora", "lora_x2", "reslora")),
    "hellaswag": paper_task("hellaswag", "HellaSwag"),
    "gsm8k": paper_task("gsm8k", "GSM8K"),
    **{f"svamp-60-r{rank}": svamp(60, rank) for rank in (4, 1, 16)},
    **{f"svamp-200-r{rank}": svamp(200, rank) for rank in (4, 1, 16)},
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "run", "keep"], help="keep: of what has run, without running more")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--minutes", type=float, help="end each experiment after so long")
    parser.add_argument("--at_once", type=int, default=1, help="arms at a time, each by a process of its own")
    parser.add_argument("--llm", default=LLM, help="causal model, folder or name on the hub")
    parser.add_argument("--encoder", default=ENCODER, help="text encoder for GLUE, folder or name on the hub")
    parser.add_argument("--text", metavar="FOLDER", help="holds TASK/{train,validation,test}.jsonl")
    parser.add_argument("--depth", metavar="FOLDER", help="holds 6/pipeline and 24/pipeline")
    return parser


def main() -> None:
    """List or run the experiments, or write their records."""
    parser = build_parser()
    args = parser.parse_args()
    check_names(parser, args.experiments, EXPERIMENTS)
    for name in args.experiments or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        if args.what == "list":
            print(f"{name:<16} {experiment.shows}: {progress(read_object(KEPT / f'{name}.json'))}")
        elif args.what == "keep":
            keep(name)
        elif experiment.needs and not getattr(args, experiment.needs):
            print(f"{name}: left out, needs --{experiment.needs} FOLDER")
        else:
            run(name, experiment.command(name, args))


def progress(record: dict) -> str:
    """Format how many of an experiment's runs have ended."""
    arms = record.get("arms", [])
    ended = sum(arm["status"] in ENDED_AS for arm in arms)
    return f"{ended} of {len(arms)} arms" if arms else "not run"


def run(name: str, command: list[str]) -> None:
    """Run one experiment to its end or its time limit, and write its record in any case."""
    print(f"{name}: {shlex.join(command)}", flush=True)
    try:
        ended = subprocess.run([sys.executable, *command], check=False).returncode
    finally:
        keep(name)
    if ended:
        raise SystemExit(f"{name}: ended with status {ended}")


def keep(name: str) -> None:
    """Write the record of an experiment without this machine's folders and process."""
    record = read_object(SCRATCH / name / "experiment.json")
    if not record:
        return
    record.pop("process", None)
    write_json(KEPT / f"{name}.json", {"machine": machine(), **without_folders(record)})
    print(f"{name}: {progress(record)}, kept in {(KEPT / name).relative_to(ROOT)}.json", flush=True)


def without_folders(value):
    """Return a value with only the last component of absolute paths."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


if __name__ == "__main__":
    main()
