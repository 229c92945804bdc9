"""Exact steps of several methods, one after the other, in each process of a run: `sharded_steps.py MODEL FOLDER`."""

import gc
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (2, 3)]

from images import exact_steps

RUNS = {
    "lora": ["--method", "lora"],
    "input": ["--shortcut", "input", "--gradient_checkpointing"],
    "block": ["--shortcut", "block", "--pre_num", "2"],
    "middle": ["--shortcut", "middle", "--pre_num", "2"],
    "dora": ["--method", "dora"],  # reads the base's weights in its forward
    "packed": ["--base_precision", "nf4"],
    "preserved": ["--output_preservation_weight", "1", "--output_preservation_prompt", "blue box"],
}


def main(model: Path, folder: Path) -> None:
    """Train with two samples per process and step; once, with the same sample twice."""
    for name, flags in RUNS.items():
        batch = 1 if name == "middle" else 2
        found = exact_steps.trained(model, batch, 2 // batch, *flags)
        save_file(found, folder / f"{name}-{os.environ['RANK']}.safetensors")
    gc.collect()  # see `exact_steps.main`
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
