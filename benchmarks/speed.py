"""Measure the cost of ResLoRA as ratios to stock PEFT LoRA, with interleaved steps in one process.

    python benchmarks/speed.py steps            # training step of each shortcut, toy LLaMA and the bundled U-Net
    python benchmarks/speed.py steps --model sd15 --device cuda --dtype bfloat16
    python benchmarks/speed.py depth            # the same by the length of a chain and by pre_num
    python benchmarks/speed.py merge            # a U-Net of Stable Diffusion 1.5's size; SDXL, Flux, LLaMA-7B by layers

A ratio is the median over rounds of (ResLoRA step / PEFT step). Steps alternate, so that the machine's state affects
both equally; the quartiles show the spread. The paper reports 1.07 (input), 1.79 (block, 4) and 1.36 (middle, 4). The
figures are printed and written to benchmarks/results/speed/; `paper.py report` creates tables from them.
"""

from __future__ import annotations

import argparse
import time

import speed_merge
import speed_steps
import torch
from measured import Others, keep
from peft import LoraConfig

import reslora


def main() -> None:
    """Run the chosen measurement."""
    args = build_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    {"steps": speed_steps.steps, "depth": speed_steps.depth, "merge": merge}[args.what](args)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "depth", "merge"))
    parser.add_argument("--model", choices=tuple(speed_steps.MODELS), nargs="+", default=["llama", "bundled"])
    parser.add_argument("--rounds", type=int, default=21, help="how often every step is taken in turn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--rank", type=int, default=None, help="default: 4 for llama, 16 for U-Nets")
    parser.add_argument("--samples", type=int, default=64, help="merge: calibration samples of full-size models")
    parser.add_argument("--threads", type=int, default=0)
    return parser


def merge(args: argparse.Namespace) -> None:
    """Measure the merges of Stable Diffusion 1.5's U-Net, and of full-size models by layers."""
    others, seconds = Others(), {}
    for shortcut, method in (("block", "auto"), ("input", "weights"), ("middle", "weights")):
        unet, _, targets = speed_steps.sd15("cpu")
        unet.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        reslora.connect(unet, reslora.ResLoraConfig(shortcut, 4))
        began = time.perf_counter()
        report = reslora.merge(unet, method)
        seconds[f"{shortcut}(4) by {report.method}"] = time.perf_counter() - began
        print(f"sd15     {shortcut}(4) by {report.method}: {time.perf_counter() - began:.2f} s", flush=True)
    keep("speed/merge", {**others(), "seconds": seconds})
    speed_merge.at_scale(args)


if __name__ == "__main__":
    main()
