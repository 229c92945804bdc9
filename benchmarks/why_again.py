"""Train the chosen runs of an experiment on text again with other seeds, and merge them by every method.

    python benchmarks/why_again.py svamp-60-r4 sst2 --text FOLDER          # lora and reslora, two new seeds each
    python benchmarks/why_again.py qnli --merge_only --text FOLDER         # merge the runs of `why.py run qnli`
    python benchmarks/paper.py report                                      # their tables in RESULTS.md

The learning rates and steps are those that the experiment has chosen. The test losses, unmerged and merged by
every method, are written to benchmarks/results/again/NAME.json. Running the same command again resumes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

import why
from measured import check_names, machine
from peft import PeftModel

from reslora.io import read_object, write_json
from reslora.methods.adapters import load_adapter
from reslora.options.texts import GlueOptions, LlmOptions
from reslora.runtime.checkpoint_folders import adapter_folder
from reslora.runtime.signals import StopRequest
from reslora.texts import glue, llm
from reslora.texts.arguments import read
from reslora.texts.experiment import TextArmStudy, opened
from reslora.texts.results import merge_table

SCRIPTS = {"train_llm.py": (llm.LlmTexts, LlmOptions), "train_glue.py": (glue.GlueTexts, GlueOptions)}
NOT_EXACT = re.compile("reslora(?! block)")  # the shortcuts whose merges are approximate
ON_TEXT = [name for name, experiment in why.EXPERIMENTS.items() if experiment.needs == "text"]


def main() -> None:
    """Repeat and merge the chosen runs of the named experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help=f"of {', '.join(ON_TEXT)}")
    parser.add_argument("--seeds", nargs="+", help="seeds that the experiment does not have (default: 5 6)")
    parser.add_argument("--merge_only", action="store_true", help="merge runs of `why.py run`, of --seeds if given")
    parser.add_argument("--llm", default=why.LLM, help="causal model, folder or name on the hub")
    parser.add_argument("--encoder", default=why.ENCODER, help="text encoder for GLUE, folder or name on the hub")
    parser.add_argument("--text", metavar="FOLDER", required=True, help="holds TASK/{train,validation,test}.jsonl")
    args = parser.parse_args()
    args.depth, args.at_once, args.minutes = None, 1, None
    check_names(parser, args.experiments, ON_TEXT)
    for name in args.experiments:
        chosen = read_object(why.KEPT / f"{name}.json").get("chosen")
        if not chosen:
            parser.error(f"{name} has not run: run `python benchmarks/why.py run {name}` first")
        runs = merge_only(name, chosen, args) if args.merge_only else again(name, chosen, args)
        write_json(why.AGAIN / f"{name}.json", {"machine": machine(), "runs": runs})
        print(f"{name}: {len(runs)} runs, kept in {(why.AGAIN / name).relative_to(why.ROOT)}.json", flush=True)


def again(name: str, chosen: Mapping[str, Mapping], args: argparse.Namespace) -> list[dict]:
    """Train LoRA and every shortcut without an exact merge at its chosen learning rate, and return their losses."""
    experiment, runs = why.EXPERIMENTS[name], []
    for label in ("lora", *filter(NOT_EXACT.match, chosen)):
        kind = re.search("input|middle", label)
        one = dataclasses.replace(
            experiment, methods=tuple(label.split()[:1]), rates=(f"{chosen[label]['learning_rate']:g}",),
            shortcuts=(kind[0],) if kind else experiment.shortcuts, seeds=tuple(args.seeds or ("5", "6")),
        )  # fmt: skip
        command = [word for word in one.command(f"{name}-again/{label}", args) if word != "--extend_rates"]
        subprocess.run([sys.executable, *command], check=True)
        found = losses_of_runs(experiment.script, command[1:], {label.split()[0]: chosen[label]}, one.seeds)
        runs += [run | {"label": label} for run in found]
    return runs


def merge_only(name: str, chosen: Mapping[str, Mapping], args: argparse.Namespace) -> list[dict]:
    """Return the losses of the runs of `why.py run NAME` without an exact merge; their folder must still exist."""
    experiment = why.EXPERIMENTS[name]
    shortcuts = {label: choice for label, choice in chosen.items() if NOT_EXACT.match(label)}
    seeds = args.seeds or experiment.seeds
    return losses_of_runs(experiment.script, experiment.command(name, args)[1:], shortcuts, seeds)


def losses_of_runs(script: str, flags: list[str], chosen: Mapping[str, Mapping], seeds: Sequence[str]) -> list[dict]:
    """Return the test loss of each run at its label's chosen learning rate and step, unmerged and after every merge."""
    new, options = SCRIPTS[script]
    texts, runs = new(), []
    with opened(texts, read(options, script, flags), StopRequest()) as experiment:
        for arm in experiment.schedule.arms():
            choice = chosen.get(arm.label, {})
            if arm.rate != choice.get("learning_rate") or str(arm.seed) not in seeds:
                continue
            study, folder = experiment.study_of(arm), experiment.schedule.folder_of(arm)
            model = study.adapted()
            load_adapter(model, adapter_folder(folder, choice["step"]))

            def loss(merged: PeftModel, study: TextArmStudy = study) -> dict[str, float]:
                return {"loss": statistics.fmean(experiment.losses_of(merged, study)["losses"])}

            table = merge_table(model.eval(), loss, texts.calibration(study.options))
            run = {"label": arm.label, "learning_rate": arm.rate, "step": choice["step"], "seed": arm.seed}
            runs.append(run | {"table": {merge: {"loss": row["loss"]} for merge, row in table.items()}})
            print(runs[-1], flush=True)
    return runs


if __name__ == "__main__":
    main()
