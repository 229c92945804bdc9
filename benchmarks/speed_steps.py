"""Interleaved training steps: stock PEFT LoRA's, each shortcut's, and the frozen model's only.

The adapter-free step runs the frozen model forward, and backward to the first layer that PEFT would adapt. No method
that trains these layers can be faster, so the rows show how much of PEFT's own cost a shortcut could still save.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import speed_merge
import torch
from diffusers import UNet2DConditionModel
from measured import ROOT, Others, keep
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import reslora

FREE = "no adapter"
SHORTCUTS = {"input": 1, "block": 4, "middle": 4}
DEPTHS = (8, 32, 70)
PRE_NUMS = (1, 4, -1)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def steps(args: argparse.Namespace) -> None:
    """Measure all rows of each model, and write speed/steps-<model>-<device>-<dtype>.json."""
    for name in args.model:
        others = Others()
        base, batch, targets = MODELS[name](args.device)
        rank = args.rank or (4 if name == "llama" else 16)
        wanted = {f"{shortcut}({pre_num})": (shortcut, pre_num) for shortcut, pre_num in SHORTCUTS.items()}
        found = figures_of(base, batch, targets, rank, wanted, args)
        for row, figures in found.items():
            print(f"{name:8} {line(row, figures)}", flush=True)
        settings = {"rank": rank, "rounds": args.rounds, "device": args.device, "dtype": args.dtype}
        keep(f"speed/steps-{name}-{args.device}-{args.dtype}", {**others(), **settings, "shortcuts": found})


def depth(args: argparse.Namespace) -> None:
    """Measure rows by the length of a chain and by `pre_num`, and write speed/depth-<device>-<dtype>.json."""
    others, rank, rows = Others(), args.rank or 8, []
    for blocks in DEPTHS:
        base, batch, targets = llama(args.device, layers=blocks, width=256, batch=4)
        pairs = [("input", 1), *itertools.product(("block", "middle"), PRE_NUMS)]
        wanted = {f"{shortcut}({pre_num})": (shortcut, pre_num) for shortcut, pre_num in pairs}
        for row, figures in figures_of(base, batch, targets, rank, wanted, args).items():
            print(f"{blocks:3} blocks {line(row, figures)}", flush=True)
            rows.append({"blocks": blocks, "row": row, **figures})
    settings = {"rank": rank, "rounds": args.rounds, "device": args.device, "dtype": args.dtype}
    keep(f"speed/depth-{args.device}-{args.dtype}", {**others(), **settings, "depth": rows})


def line(row: str, figures: dict) -> str:
    """Format the figures of a row."""
    low, middle, high = figures["ratio_quartiles"]
    step = f"step {middle:.3f} of PEFT's (quartiles {low:.3f} {high:.3f}; PEFT {figures['peft_seconds'] * 1e3:.1f} ms)"
    return f"{row:11} {step}, {figures['memory_ratio']:.3f} of its memory"


def figures_of(base: nn.Module, batch: dict, targets: list[str], rank: int, wanted: dict, args) -> dict:
    """Return, by row, quartiles of the step's ratio to PEFT's, PEFT's own seconds, and the ratio of the memory."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    frozen = twin(base).requires_grad_(False)
    begin_gradients(frozen, targets)
    models = {"peft": get_peft_model(twin(base), config), FREE: frozen}
    for row, (shortcut, pre_num) in wanted.items():
        models[row] = get_peft_model(twin(base), config)
        reslora.connect(models[row], reslora.ResLoraConfig(shortcut, pre_num))
    taken = {row: Step(model, batch, args) for row, model in models.items()}
    memory = {row: measured_memory(step, args) for row, step in taken.items()}
    times = turn_about(taken, args.rounds)
    found = {}
    for row in (FREE, *wanted):
        ratios = [ours / theirs for ours, theirs in zip(times[row], times["peft"], strict=True)]
        found[row] = {
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
            "peft_seconds": statistics.median(times["peft"]),
            "memory_ratio": memory[row] / memory["peft"],
        }
    return found


def turn_about(taken: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of all steps, taken in turn, with the order reversed in every other round."""
    times: dict[str, list[float]] = {row: [] for row in taken}
    for number in range(rounds):
        for row in reversed(taken) if number % 2 else taken:
            times[row].append(taken[row]())
    return times


class Step:
    """One training step: forward, backward, fused AdamW."""

    def __init__(self, model: nn.Module, batch: dict, args: argparse.Namespace) -> None:
        self.model, self.batch, self.args = model.train(), batch, args
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def __call__(self) -> float:
        synchronize(self.args.device)
        began = time.perf_counter()
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        synchronize(self.args.device)
        return time.perf_counter() - began

    def loss(self) -> torch.Tensor:
        """Return the language model's own loss, or the mean square of a U-Net's output."""
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            output = self.model(**self.batch)
        return output.loss if "labels" in self.batch else output.sample.float().square().mean()


def measured_memory(step: Step, args: argparse.Namespace) -> int:
    """Return the peak bytes of a step on CUDA; on other devices, the bytes saved for the backward pass."""
    step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with saved_storages() as saved:
        step.loss().backward()
    if step.optimizer is not None:
        step.optimizer.zero_grad()
    return sum(saved.values())


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Record the bytes of all storages that are saved for the backward pass."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        """Record the storage of a tensor that is saved for the backward pass."""
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def twin(base: nn.Module) -> nn.Module:
    """Return a copy that shares the frozen weights, so that a large model is in memory once."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def begin_gradients(model: nn.Module, targets: list[str]) -> None:
    """Let gradients begin after the layers that PEFT would adapt."""

    def require_gradients(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output; gradients begin there, if not before."""
        return output if output.requires_grad else output.detach().requires_grad_()

    for name, module in model.named_modules():
        if name.endswith(tuple(targets)):
            module.register_forward_hook(require_gradients)


def synchronize(device: str) -> None:
    """Wait for the device, if it is CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- models ----------------------------------------------------------------------------------------------------------


def llama(device: str, layers: int = 8, width: int = 512, batch: int = 8):
    """Return a toy LLaMA, by default 8 layers of width 512, with a batch of 8 x 128 tokens, and its targets."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    ids = torch.randint(0, 1000, (batch, 128), device=device)
    return LlamaForCausalLM(config).to(device), {"input_ids": ids, "labels": ids}, ["q_proj", "v_proj"]


def bundled(device: str):
    """Return the bundled U-Net with a batch of 16, and its targets."""
    unet = UNet2DConditionModel.from_pretrained(ROOT / "assets" / "pipeline", subfolder="unet", dtype=torch.float32)
    return unet.to(device), unet_batch(unet, 16, 12, device), ATTENTION


def sd15(device: str):
    """Return a random U-Net of Stable Diffusion 1.5's size, batch 4 at 512 x 512 pixels, and its targets."""
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return unet, unet_batch(unet, 4, 77, device), ATTENTION


def sdxl(device: str):
    """Return a random U-Net of Stable Diffusion XL's size, one image of 1024 x 1024 pixels, and its targets."""
    with torch.device(device):
        unet, targets, inputs = speed_merge.sdxl()
    return unet, {name: fresh(value) for name, value in inputs.items()}, targets


def fresh(value: torch.Tensor | dict) -> torch.Tensor | dict:
    """Return random values in place of zeros."""
    if isinstance(value, dict):
        return {name: fresh(inner) for name, inner in value.items()}
    return torch.randn_like(value) if value.is_floating_point() else value


def unet_batch(unet, count: int, tokens: int, device: str) -> dict:
    """Return a random batch for a U-Net."""
    config = unet.config
    return {
        "sample": torch.randn(count, config.in_channels, config.sample_size, config.sample_size, device=device),
        "timestep": torch.randint(0, 1000, (count,), device=device),
        "encoder_hidden_states": torch.randn(count, tokens, config.cross_attention_dim, device=device),
    }


MODELS = {"llama": llama, "bundled": bundled, "sd15": sd15, "sdxl": sdxl}
