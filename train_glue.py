"""Fine-tune RoBERTa or BERT on a task of GLUE with ResLoRA or a baseline, and compare the merges.

    accelerate launch train_glue.py
    accelerate launch train_glue.py --model_name_or_path FacebookAI/roberta-large --task_name rte \\
        --method reslora --shortcut middle --pre_num 4

The first form trains the bundled tiny RoBERTa on a bundled task in CoLA's format, in a few minutes on two CPU cores.
Data come from the Hub, or from --data_dir: train.jsonl, validation.jsonl and optionally test.jsonl with the columns of
GLUE on the Hub (MNLI: validation_matched.jsonl, validation_mismatched.jsonl ...). The options of transformers'
run_glue.py have the same meaning, except that this script always trains. The classification head is trained with every
method.
"""

import sys
from collections.abc import Sequence

from reslora.options.texts import GlueOptions
from reslora.runtime.script import run_script
from reslora.runtime.signals import StopRequest
from reslora.texts.arguments import read


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the options say, and return the exit status; user errors are one line on stderr."""
    return run_script("train_glue.py", start, argv)


def start(argv: Sequence[str] | None, stop: StopRequest) -> None:
    """Parse the options, and import heavy libraries only after they were checked."""
    asked = read(GlueOptions, "train_glue.py", argv, __doc__)
    from reslora.texts.experiment import start_texts
    from reslora.texts.glue import GlueTexts

    start_texts(GlueTexts(), asked, stop)


if __name__ == "__main__":
    sys.exit(main())
