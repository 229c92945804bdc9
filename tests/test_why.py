"""benchmarks/why.py: the trainers accept the command of every experiment."""

import sys
from pathlib import Path

import pytest

from reslora.images.settings import build_parser
from reslora.options.texts import GlueOptions, LlmOptions
from reslora.texts.arguments import read

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import why  # noqa: E402

TEXTS = {"train_llm.py": LlmOptions, "train_glue.py": GlueOptions}


@pytest.mark.exhaustive
def test_trainers_take_every_command_with_lora_and_several_seeds_and_rates(tmp_path):
    args = why.build_parser().parse_args(["run", "--text", str(tmp_path), "--depth", str(tmp_path)])
    for name, experiment in why.EXPERIMENTS.items():
        command = experiment.command(name, args)[1:]
        if experiment.script == "train_sd.py":
            found = vars(build_parser().parse_args(command))
        else:
            found = read(TEXTS[experiment.script], experiment.script, command).flat()
        assert "lora" in found["method"] and min(len(found["learning_rate"]), len(found["seed"])) >= 3
