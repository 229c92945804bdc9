"""Measure the cost of merging at full size: merge every distinct layer with random weights, and add up the layers.

The plan comes from the model on the meta device: how many blocks of each shape, and which of them read the same tensor.
On a CPU, seconds are processor time. The costs of `lstsq` do not contain the forward passes, one per pass and sample.
Bytes are the peak of live tensors in addition to the model, its activations and the samples; for `exact` merges, those
of the new factors.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from measured import ROOT, Others, keep
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaModel

import reslora
from reslora import calibration, merging
from reslora.images.model.families.flux import FAMILY
from reslora.linking import before_each
from reslora.regression import Inputs
from reslora.shortcuts import CLASSES

sys.path.append(str(ROOT / "tests"))
from live_tensors import LiveTensors

ROWS = 2048  # added at a time
REACH = 4  # of the block-shortcuts


@dataclasses.dataclass(frozen=True)
class Layer:
    """A block with earlier blocks in its chain."""

    width: int
    out: int
    before: int
    """The number of earlier blocks in the block's chain."""
    rows: int
    """The number of tokens per sample that the block reads."""
    source: int
    """The identity of the tensor that the block reads."""


# -- models on the meta device ---------------------------------------------------------------------------------------


def sdxl():
    """Return the U-Net at 1024 x 1024, the default targets, and inputs."""
    unet = UNet2DConditionModel(
        sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    inputs = {"sample": torch.zeros(1, 4, 128, 128), "timestep": torch.zeros(1, dtype=torch.long)}
    inputs |= {"encoder_hidden_states": torch.zeros(1, 77, 2048), "added_cond_kwargs": added}
    return unet, ["to_q", "to_k", "to_v", "to_out.0"], inputs


def flux():
    """Return Flux.1 dev at 1024 x 1024, the default targets (attention and both streams' feed-forward), and inputs."""
    inputs = {
        "hidden_states": torch.zeros(1, 4096, 64), "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768), "timestep": torch.zeros(1), "guidance": torch.zeros(1),
        "img_ids": torch.zeros(4096, 3), "txt_ids": torch.zeros(512, 3),
    }  # fmt: skip
    return FluxTransformer2DModel(guidance_embeds=True), FAMILY.defaults["target_modules"], inputs


def llama():
    """Return LLaMA-7B, all its linear layers as targets, and 512 tokens as inputs."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LlamaModel(LlamaConfig()), targets, {"input_ids": torch.zeros(1, 512, dtype=torch.long)}


MODELS = {"sdxl": sdxl, "flux": flux, "llama-7b": llama}


def layers_of(build: Callable) -> list[Layer]:
    """Return the linked blocks of a model in execution order."""
    with torch.device("meta"):
        model, targets, inputs = build()
        inject_adapter_in_model(LoraConfig(r=1, target_modules=targets), model)
    before = {block.name: n for chain in reslora.chains(model, example_inputs=inputs) for n, block in enumerate(chain)}
    modules = {name: model.get_submodule(name) for name in before}
    read: list[tuple[str, torch.Tensor]] = []
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, args, name=name: read.append((name, args[0])))
    with torch.no_grad():
        model(**inputs)
    return [
        Layer(modules[name].in_features, modules[name].out_features, before[name], x.numel() // x.shape[-1], id(x))
        for name, x in read
        if before[name]
    ]


# -- costs of single layers ------------------------------------------------------------------------------------------


def seconds(work: Callable, device: str) -> float:
    """Return the seconds of `work`: processor time on a CPU, so that other processes do not count, else wall time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def least_squares(width: int, rank: int, device: str) -> dict[str, float]:
    """Return the costs of one tensor that is read, and of one block that reads it.

    `bytes` exclude the regression's own tensors.
    """
    x, own = torch.randn(ROWS, width, device=device), torch.randn(ROWS, rank, device=device)
    moments, norm = merging.Moments(torch.randn(rank, width, device=device)), torch.ones((), device=device)
    moments.inputs = inputs = Inputs(x)
    with LiveTensors() as live:
        while inputs.dual:
            inputs.add(x)
            moments.add(x, own, own, norm)
        found = {
            "row": seconds(lambda: inputs.add(x), device) / ROWS,
            "row_of_block": seconds(lambda: moments.add(x, own, own, norm), device) / ROWS,
            "solve": seconds(inputs.factorise, device),
            "solve_of_block": seconds(moments.fit, device),
        }
    return found | {"bytes": live.peak - sum(inputs.nbytes())}


def closed_form(width: int, out: int, rank: int, device: str) -> dict[str, dict[str, float]]:
    """Return the cost of one block of the input-shortcut merged by weights, and of one block of the block-shortcut."""
    weight = torch.randn(out, width, device=device)
    found = {}
    for method, shortcut in (("weights", "input"), ("exact", "block")):
        cls = CLASSES[shortcut]
        down = [torch.randn(rank, width, device=device) for _ in range(REACH + 1)]
        chain = [
            merging.Factors(
                name=str(n), a=down[n], b=torch.randn(out, rank, device=device), scaling=1.0, weight=lambda: weight,
                before=before, parts=cls.parts(down, n, before), alpha_of_head=1.0,
            )
            for n, before in enumerate(before_each(len(down), reslora.ResLoraConfig(shortcut, REACH).reach))
        ]  # fmt: skip
        with LiveTensors() as live:
            taken = seconds(lambda cls=cls, method=method, chain=chain: cls.merges[method](chain), device)
        found[method] = {"seconds": taken / len(chain), "bytes": live.peak}
    return found


# -- added up --------------------------------------------------------------------------------------------------------


def passes(sizes: Iterable[tuple[int, int]], budget: int) -> list[int]:
    """Return the bytes of each pass, with the same schedule as `reslora.calibration`."""
    found, sizes = [], list(sizes)
    while sizes:
        held, solving, later = 0, 0, []
        for size in sizes:
            if held and held + size[0] + max(solving, size[1]) > budget:
                later.append(size)
            else:
                held, solving = held + size[0], max(solving, size[1])
        found.append(held + solving)
        sizes = later
    return found


def regression(layer: Layer, samples: int) -> tuple[int, int]:
    """Return the bytes of the least squares on a layer's input of all samples: accumulated, and while solving."""
    return Inputs(torch.empty(0, layer.width)).nbytes(samples * layer.rows)


def add_up(layers: list[Layer], squares: dict, closed: dict, samples: int, rank: int) -> dict:
    """Return seconds and bytes of a complete model by each method; `squares` by width, `closed` by width and output."""
    sources = list({layer.source: layer for layer in layers}.values())
    sizes = [regression(layer, samples) for layer in sources]
    held = passes(sizes, calibration.BUDGET)
    taken = sum(samples * x.rows * squares[x.width]["row"] + squares[x.width]["solve"] for x in sources)
    taken += sum(
        samples * x.rows * squares[x.width]["row_of_block"] + squares[x.width]["solve_of_block"] for x in layers
    )
    shapes = [closed[layer.width, layer.out] for layer in layers]
    weights = [shape["weights"] for shape in shapes]
    new = [4 * (min(x.before, REACH) + 1) * rank * (x.width + x.out) for x in layers]
    return {
        "blocks": len(layers),
        "shapes": {f"{width} -> {out}": n for (width, out), n in Counter((x.width, x.out) for x in layers).items()},
        "read": {str(width): n for width, n in Counter(layer.width for layer in sources).items()},
        "lstsq": {
            "seconds": taken,
            "bytes": max(held) + max(squares[layer.width]["bytes"] for layer in layers),
            "passes": len(held),
            "bytes_in_one_pass": sum(size for size, _ in sizes) + max(solving for _, solving in sizes),
        },
        "weights": {"seconds": sum(x["seconds"] for x in weights), "bytes": max(x["bytes"] for x in weights)},
        "exact": {"seconds": sum(shape["exact"]["seconds"] for shape in shapes), "bytes": sum(new)},
    }


def at_scale(args: argparse.Namespace) -> None:
    """Measure, print and write the part of `speed.py merge` about full-size models."""
    rank, others = args.rank or 16, Others()
    squares: dict[int, dict] = {}
    closed: dict[tuple[int, int], dict] = {}
    found = {}
    for name, build in MODELS.items():
        layers = layers_of(build)
        for width, out in sorted({(layer.width, layer.out) for layer in layers}):
            squares[width] = squares.get(width) or least_squares(width, rank, args.device)
            closed[width, out] = closed.get((width, out)) or closed_form(width, out, rank, args.device)
        found[name] = add_up(layers, squares, closed, args.samples, rank)
        for method in ("lstsq", "weights", "exact"):
            figures = found[name][method]
            several = f", passes: {figures['passes']}" if "passes" in figures else ""
            line = f"{name:9} {method:8} {figures['seconds']:10.1f} s {figures['bytes'] / 2**20:8.0f} MiB{several}"
            print(line, flush=True)
    settings = {"rank": rank, "samples": args.samples, "device": args.device, "budget": calibration.BUDGET}
    keep("speed/merge-scale", {**others(), **settings, "merging": found})
