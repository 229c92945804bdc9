"""Which settings matter when one trains a LoRA? Run the experiments of knobs.md, and draw what they have found.

    python benchmarks/knobs.py list                      # the values, and which have run
    python benchmarks/knobs.py run --minutes 60          # in the order of knobs.md; the same command resumes
    python benchmarks/knobs.py run unet/rank=4           # only these

Each value of a setting is one experiment of `train_sd.py` or `train_llm.py`. What the figure needs of its
experiment.json is written to benchmarks/results/knobs/MODEL/KNOB=VALUE.json. Text needs --llm FOLDER and --text FOLDER.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from measured import RESULTS, ROOT, check_names, machine

from reslora.io import read_object, write_json

SCRATCH, KEPT = ROOT / "runs" / "knobs", RESULTS / "knobs"
SEEDS, NEW_SEEDS = "0 1 2 3", "10 11 12 13"

IMAGES = {
    "--method": "lora",
    "--learning_rate": "8e-4 1.6e-3 3.2e-3",
    "--test_split": "0.3",
    "--max_train_steps": "100",
    "--train_batch_size": "4",
    "--num_validation_images": "0",
    "--report_to": "none",
}
TEXT = {
    "--method": "lora",
    "--learning_rate": "1e-3 2e-3 4e-3",
    "--max_steps": "60",
    "--per_device_train_batch_size": "8",
    "--per_device_eval_batch_size": "50",
    "--max_test_samples": "150",
    "--max_new_tokens": "4",  # only the loss is compared
    "--dtype": "float32",
    "--report_to": "none",
    "--use_cpu": "",
}
FACTORS = {"x0.25": 0.25, "x0.5": 0.5, "x2": 2, "x4": 4}


@dataclass(frozen=True, eq=False)
class Value:
    """One value of a knob on a model: an experiment with a few options that differ from the reference's."""

    model: str
    knob: str
    value: str
    options: Mapping[str, str] = field(default_factory=dict)
    factor: float = 0
    """The learning rate as a multiple of the reference's chosen one; 0: chosen anew."""
    new_seeds: bool = False

    @property
    def name(self) -> str:
        """The name of its experiment and of its file."""
        again, value = "again/" * self.new_seeds, f"={self.value}" * bool(self.value)
        return f"{self.model}/{again}{self.knob}{value}".replace(" ", "_")

    def command(self, args: argparse.Namespace) -> list[str]:
        """Return the trainer's command; its folder is added by `run`."""
        if self.model == "text":
            script, shared = "train_llm.py", {"--model_name_or_path": args.llm, "--task": "svamp"} | TEXT
            shared["--data_dir"] = f"{args.text}/svamp"
        else:
            pipeline = {"unet": "pipeline", "transformer": "pipeline-flow"}[self.model]
            script, shared = "train_sd.py", {"--pretrained_model_name_or_path": f"assets/{pipeline}"} | IMAGES
        options = {**shared, "--seed": NEW_SEEDS if self.new_seeds else SEEDS, **self.options}
        if self.new_seeds:  # the rate that the first seeds have chosen
            options["--learning_rate"] = f"{chosen(self.name.replace('again/', '')):g}"
        elif self.factor:
            options["--learning_rate"] = f"{self.factor * chosen(f'{self.model}/reference'):g}"
        elif " " in options["--learning_rate"]:
            options["--extend_rates"] = ""
        return [script, *(word for name, text in options.items() for word in (name, *text.split()))]


def chosen(name: str) -> float:
    """Return the learning rate that an experiment has chosen."""
    record = read_object(KEPT / f"{name}.json")
    if not record:
        raise SystemExit(f"{name}: run it first, for its learning rate")
    return record["chosen"]["learning_rate"]


def first_table(model: str) -> list[Value]:
    """Return the values that run first on a model, and on text."""
    text = model == "text"
    steps, rank = ("--max_steps", "--lora_r") if text else ("--max_train_steps", "--rank")
    lion = {"--learning_rate": "2.5e-4 5e-4 1e-3" if text else "2e-4 4e-4 8e-4"}
    settings: list[tuple] = [
        *(("learning rate", name, {}, factor) for name, factor in FACTORS.items()),
        *(("steps", number, {steps: number}) for number in (("30", "120") if text else ("50", "200"))),
        *(("rank", number, {rank: number}) for number in (("1", "16") if text else ("4", "64"))),
        ("optimizer", "Lion", {"--optimizer": "lion"} | lion),
        ("optimizer", "schedule-free", {"--optimizer": "schedulefree"}),
        ("optimizer", "Prodigy", {"--optimizer": "prodigy", "--learning_rate": "1"}),
    ]
    if not text:
        all_rank, mlp_rank = ("6", "18") if model == "unet" else ("5", "12")
        settings += [
            ("batch size", "2 x 200", {"--train_batch_size": "2", "--max_train_steps": "200"}),
            ("batch size", "16 x 25", {"--train_batch_size": "16", "--max_train_steps": "25"}),
            ("layers", "all", {"--layers": "all", "--rank": all_rank}),
            ("layers", "MLP", {"--layers": "mlp", "--rank": mlp_rank}),
        ]
    return [Value(model, "reference", ""), *(Value(model, *setting) for setting in settings)]


def second_table(model: str) -> list[Value]:
    """Return the values that run later on an image model."""
    settings: list[tuple] = [
        *(("alpha", number, {"--lora_alpha": number}) for number in ("16", "64")),
        ("alpha", "rsLoRA", {"--method": "rslora"}),
        *(("method", name, {"--method": name.lower()}) for name in ("DoRA", "LoHa", "LoKr", "OFT", "ResLoRA")),
    ]
    if model == "unet":
        settings += [("min-SNR gamma", number, {"--snr_gamma": number}) for number in ("0", "5")]
    else:
        settings += [("timesteps", name, {"--timestep_sampling": name}) for name in ("logit_normal", "mode")]
    settings += [
        ("schedule", "cosine", {"--lr_scheduler": "cosine", "--lr_warmup_steps": "0"}),
        ("schedule", "linear with warm-up", {"--lr_scheduler": "linear"}),
        ("noise offset", "0.05", {"--noise_offset": "0.05"}),
        ("caption dropout", "0.1", {"--caption_dropout": "0.1"}),
    ]
    if model == "unet":
        settings.append(("text encoder", "trained", {"--train_text_encoder": ""}))
    settings += [
        ("mirrored images", "yes", {"--random_flip": ""}),
        ("LoRA+ ratio", "16", {"--loraplus_lr_ratio": "16"}),
    ]
    return [Value(model, *setting) for setting in settings]


def repetition() -> list[Value]:
    """Return the reference and three values on the U-Net with new seeds."""
    again = {"reference", "learning_rate=x4", "steps=200", "rank=4"}
    values = [value for value in first_table("unet") if value.name.removeprefix("unet/") in again]
    return [replace(value, new_seeds=True) for value in values]


VALUES = {
    value.name: value
    for value in (
        *first_table("unet"),
        *first_table("transformer"),
        *second_table("unet"),
        *second_table("transformer"),
        *first_table("text"),
        *repetition(),
    )
}


def main() -> None:
    """List or run the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "run"])
    parser.add_argument("values", nargs="*", metavar="VALUE", help="such as unet/rank=4 (default: all)")
    parser.add_argument("--minutes", type=float, help="start no experiment after so long")
    parser.add_argument("--llm", metavar="FOLDER", help="SmolLM2-135M-Instruct")
    parser.add_argument("--text", metavar="FOLDER", help="holds svamp/{train,validation,test}.jsonl")
    args = parser.parse_args()
    check_names(parser, args.values, VALUES)
    end = time.monotonic() + 60 * (args.minutes or 1e9)
    for name in args.values or VALUES:
        has_run = (KEPT / f"{name}.json").is_file()
        if args.what == "list":
            print(f"{name:<36} {'has run' if has_run else 'planned'}")
        elif VALUES[name].model == "text" and not (args.llm and args.text):
            print(f"{name}: left out, needs --llm FOLDER and --text FOLDER")
        elif not has_run and time.monotonic() < end:
            run(VALUES[name], args)


def run(value: Value, args: argparse.Namespace) -> None:
    """Run one experiment to its end, and write what the figure needs."""
    command = value.command(args)
    print(f"{value.name}: {shlex.join(command)}", flush=True)
    folder = SCRATCH / value.name
    ended = subprocess.run([sys.executable, *command, "--output_dir", str(folder)], cwd=ROOT, check=False).returncode
    if ended:
        print(f"{value.name}: ended with status {ended}; the same command tries again", flush=True)
    else:
        keep(value, read_object(folder / "experiment.json"))


def keep(value: Value, record: Mapping) -> None:
    """Write the losses of an experiment's only label, without this machine's folders."""
    (label, choice), arms = next(iter(record["chosen"].items())), record["arms"]
    tests = {str(arm["seed"]): arm["test"]["losses"] for arm in arms if arm["test"]}
    runs = [
        {key: arm[key] for key in ("learning_rate", "seed", "status", "steps", "seconds", "select_by_step")}
        for arm in arms
    ]
    write_json(
        KEPT / f"{value.name}.json",
        {
            "machine": machine(),
            "label": label,
            "data": {key: record["identity"].get(key) for key in ("model", "images", "parts", "data")},
            "split": record["split"],
            "chosen": choice,
            "runs": runs,
            "base": record["base"]["losses"],
            "tests": tests,
        },
    )
    print(f"{value.name}: kept", flush=True)


if __name__ == "__main__":
    main()
