"""Fine-tune a language model with ResLoRA or a baseline on the paper's tasks, and compare the merges.

    accelerate launch train_llm.py
    accelerate launch train_llm.py --model_name_or_path meta-llama/Llama-2-7b-hf --task svamp \\
        --method reslora --shortcut block --pre_num 4

The first form trains a tiny bundled LLaMA on a small generated task, in a few minutes on two CPU cores; the second any
causal model. Options of transformers' `TrainingArguments` have the same meaning; some defaults differ.
"""

import sys
from collections.abc import Sequence

from reslora.options.texts import LlmOptions
from reslora.runtime.script import run_script
from reslora.runtime.signals import StopRequest
from reslora.texts.arguments import read


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the options say, and return the exit status; user errors are one line on stderr."""
    return run_script("train_llm.py", start, argv)


def start(argv: Sequence[str] | None, stop: StopRequest) -> None:
    """Parse the options, and import heavy libraries only after they were checked."""
    asked = read(LlmOptions, "train_llm.py", argv, __doc__)
    from reslora.texts.experiment import start_texts
    from reslora.texts.llm import LlmTexts

    start_texts(LlmTexts(), asked, stop)


if __name__ == "__main__":
    sys.exit(main())
