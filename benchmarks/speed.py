"""Measures what ResLoRA costs as ratios against stock PEFT LoRA, each pair interleaved in one run.

    python benchmarks/speed.py steps            # training step of each shortcut, toy LLaMA and the bundled U-Net
    python benchmarks/speed.py steps --model sd15 --device cuda --dtype bfloat16
    python benchmarks/speed.py merge            # a U-Net of Stable Diffusion 1.5's size; SDXL, Flux, LLaMA-7B by layers
    python benchmarks/speed.py start            # import time, and the time to `train_sd.py --help`

A ratio is the median over rounds of (ResLoRA step / PEFT step), the two taken alternately so that both meet the same
machine; the quartiles tell how far to trust it. The paper reports 1.07 (input), 1.79 (block, 4) and 1.36 (middle, 4).
The figures are printed and kept in benchmarks/results/speed/; `paper.py report` draws tables of them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time

import speed_merge
import torch
from measured import ROOT, keep
from peft import LoraConfig, get_peft_model

import reslora

SHORTCUTS = {"input": 1, "block": 4, "middle": 4}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    args = build_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    {"steps": steps, "merge": merge, "start": start}[args.what](args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "merge", "start"))
    parser.add_argument("--model", choices=("llama", "bundled", "sd15"), nargs="+", default=["llama", "bundled"])
    parser.add_argument("--rounds", type=int, default=25, help="interleaved pairs for each shortcut")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--rank", type=int, default=None, help="default: 4 for llama, 16 for U-Nets")
    parser.add_argument("--samples", type=int, default=64, help="merge: calibration samples of full-size models")
    parser.add_argument("--threads", type=int, default=0)
    return parser


# -- training steps --------------------------------------------------------------------------------------------------


def steps(args: argparse.Namespace) -> None:
    for name in args.model:
        base, batch, targets = MODELS[name](args.device)
        rank = args.rank or (4 if name == "llama" else 16)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        found = {}
        for shortcut, pre_num in SHORTCUTS.items():
            stock = get_peft_model(copy.deepcopy(base), config)
            ours = get_peft_model(copy.deepcopy(base), config)
            reslora.connect(ours, reslora.ResLoraConfig(shortcut, pre_num))
            figures = compared([Step(stock, batch, args), Step(ours, batch, args)], args)
            found[f"{shortcut}({pre_num})"] = figures
            low, middle, high = figures["ratio_quartiles"]
            line = f"{name:8} {shortcut}({pre_num})  step {middle:.3f} of PEFT's  (quartiles {low:.3f} {high:.3f}"
            print(f"{line}; PEFT {figures['peft_seconds'] * 1e3:.1f} ms)", figures.get("peak_ratio", ""), flush=True)
        settings = {"rank": rank, "rounds": args.rounds, "device": args.device, "dtype": args.dtype}
        keep(f"speed/steps-{name}-{args.device}-{args.dtype}", {**settings, "shortcuts": found})


class Step:
    """One training step: forward, backward, fused AdamW."""

    def __init__(self, model: torch.nn.Module, batch: dict, args: argparse.Namespace) -> None:
        self.model, self.batch, self.args = model.train(), batch, args
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self) -> float:
        synchronize(self.args.device)
        began = time.perf_counter()
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            output = self.model(**self.batch)
        loss = output.loss if "labels" in self.batch else output.sample.float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.args.device)
        return time.perf_counter() - began


def compared(pair: list[Step], args: argparse.Namespace) -> dict:
    """Step times of PEFT and of ResLoRA, taken alternately, the order swapped each time; on CUDA peak memory too."""
    cuda, peaks = args.device == "cuda", []
    for step in pair:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        peaks.append(torch.cuda.max_memory_allocated() if cuda else 0)
    times: list[list[float]] = [[], []]
    for number in range(args.rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            times[index].append(pair[index]())
    ratios = [ours / theirs for theirs, ours in zip(*times, strict=True)]
    figures = {"ratio_quartiles": statistics.quantiles(ratios, n=4), "peft_seconds": statistics.median(times[0])}
    return {**figures, "peak_ratio": peaks[1] / peaks[0]} if cuda else figures


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def llama(device: str):
    """A toy LLaMA, 8 layers of width 512, batch 8 x 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    ids = torch.randint(0, 1000, (8, 128), device=device)
    return LlamaForCausalLM(config).to(device), {"input_ids": ids, "labels": ids}, ["q_proj", "v_proj"]


def bundled(device: str):
    """The bundled U-Net, batch 16."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(ROOT / "assets" / "pipeline", subfolder="unet", dtype=torch.float32)
    return unet.to(device), unet_batch(unet, 16, 12, device), ATTENTION


def sd15(device: str):
    """A U-Net of Stable Diffusion 1.5's size with random weights, batch 4 at 512 x 512 pixels."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return unet, unet_batch(unet, 4, 77, device), ATTENTION


def unet_batch(unet, count: int, tokens: int, device: str) -> dict:
    config = unet.config
    return {
        "sample": torch.randn(count, config.in_channels, config.sample_size, config.sample_size, device=device),
        "timestep": torch.randint(0, 1000, (count,), device=device),
        "encoder_hidden_states": torch.randn(count, tokens, config.cross_attention_dim, device=device),
    }


MODELS = {"llama": llama, "bundled": bundled, "sd15": sd15}


# -- merging and starting --------------------------------------------------------------------------------------------


def merge(args: argparse.Namespace) -> None:
    seconds = {}
    for shortcut, method in (("block", "auto"), ("input", "weights"), ("middle", "weights")):
        unet, _, targets = MODELS["sd15"]("cpu")
        unet.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        reslora.connect(unet, reslora.ResLoraConfig(shortcut, 4))
        began = time.perf_counter()
        report = reslora.merge(unet, method)
        seconds[f"{shortcut}(4) by {report.method}"] = time.perf_counter() - began
        print(f"sd15     {shortcut}(4) by {report.method}: {time.perf_counter() - began:.2f} s", flush=True)
    keep("speed/merge", {"seconds": seconds})
    speed_merge.at_scale(args)


def start(args: argparse.Namespace) -> None:
    trainer = [str(ROOT / "train_sd.py"), "--help"]
    commands = {
        "import peft": ["-c", "import peft"],
        "import peft, transformers.pytorch_utils": ["-c", "import peft, transformers.pytorch_utils"],
        "from reslora import connect": ["-c", "from reslora import connect"],
        "train_sd.py --help": trainer,
    }
    seconds = {what: command_time(words) for what, words in commands.items()}
    for what, time_taken in seconds.items():
        print(f"{what:<42} {time_taken:.2f} s", flush=True)
    keep("speed/start", {"seconds": seconds})


def command_time(words: list[str]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
