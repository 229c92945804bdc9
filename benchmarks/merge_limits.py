"""Measure what limits the least-squares merge: too few examples, the ridge, or nonlinearity.

    python benchmarks/merge_limits.py --encoder FOLDER --text FOLDER    # names on the Hub, or local folders
    python benchmarks/paper.py report                                   # its table in RESULTS.md

The middle-shortcut on SST-2, where this merge retains least. The model is trained as in `paper.py`, then merged with
different numbers of training examples and different ridges. For each block, on examples that no merge has read, it
measures the fraction of the shortcut terms that the merged weights miss, which is 1 - R2 of the fitted map.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import paper
import torch
from measured import RESULTS
from paper_models import newest_checkpoint

import reslora
from reslora import regression
from reslora.io import read_object, write_json
from reslora.methods.adapters import load_adapter
from reslora.options.texts import GlueOptions
from reslora.texts import glue
from reslora.texts.arguments import read
from reslora.tracing import to_device

KEPT, SCRATCH = RESULTS / "merge_limits", paper.SCRATCH / "merge_limits"
VARIANT, RATE, SEEDS = "ms(4)", 2e-3, (0, 1, 2)
COUNTS, RIDGES = (16, 64, 256, 1024, 4096), (1e-4, 1e-2, 1.0)
UNREAD = 256
"""Number of validation examples on which blocks are measured."""


def main() -> None:
    """Measure every seed that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=paper.ENCODER, help="folder or name on the hub")
    parser.add_argument("--text", type=Path, required=True, metavar="FOLDER", help="holds sst2/train.jsonl and so on")
    args = parser.parse_args()
    for seed in SEEDS:
        path = KEPT / f"seed{seed}.json"
        if not read_object(path):
            write_json(path, {"variant": VARIANT, "rate": RATE, "seed": seed, "rows": list(rows_of(seed, args))})


def rows_of(seed: int, args: argparse.Namespace) -> Iterator[dict]:
    """Yield loss and missed fractions: unmerged, with `none`, and for each number of examples and each ridge."""
    texts, options, model = trained(seed, args)
    batches = glue.calibration_batches(texts.rows[: max(COUNTS)])
    unread = glue.calibration_batches(texts.sets["validation"][:UNREAD])
    blocks = seen(model, unread)

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        """Return the loss of a model on the validation split."""
        return texts.validation(options, model, lambda: None)["loss"]

    yield {"merge": "unmerged", "loss": loss(model)}
    merged = copy.deepcopy(model)
    reslora.merge(merged, "none")
    yield {"merge": "none", "loss": loss(merged)}
    for ridge, count in itertools.product(RIDGES, COUNTS):
        regression.RIDGE = ridge
        tokens = sum(batch["input_ids"].numel() for batch in batches[:count])
        merged = copy.deepcopy(model)
        reslora.merge(merged, "lstsq", batches[:count])
        figures = {"loss": loss(merged), "missed": missed(merged, blocks)}
        yield {"merge": "lstsq", "examples": count, "tokens": tokens, "ridge": ridge, **figures}


def trained(seed: int, args: argparse.Namespace):
    """Return the examples, the options, and the model that `train_glue.py` has trained."""
    experiment, folder = paper.EXPERIMENTS["sst2"], SCRATCH / f"seed{seed}"
    flags = [*paper.flags_of(experiment, VARIANT, seed, args, search=False), "--learning_rate", f"{RATE:g}"]
    flags += ["--output_dir", str(folder)]
    if not (folder / "results.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        paper.launch("train_glue.py", flags, folder.parent / f"seed{seed}.log")
    texts, options = glue.GlueTexts(), read(GlueOptions, glue.PROG, flags)
    texts.read(options)
    model = texts.adapted(options, torch.device("cpu"), steps=1)
    load_adapter(model, newest_checkpoint(folder))
    return texts, options, model.eval()


# -- blocks ------------------------------------------------------------------------------------------------------------


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the LoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def update(layer: torch.nn.Module) -> torch.Tensor:
    """Return the update `s B A` of a layer."""
    return layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)


@torch.no_grad()
def seen(model: torch.nn.Module, batches: Sequence[Mapping]) -> dict[str, tuple]:
    """Return, for each block with shortcut terms in the unmerged model, its input, its update, and the terms' norm.

    The update is what the block adds to the frozen layer's output. Input and update have one row per token; the norm is
    squared.
    """
    inputs, outputs, found = {}, {}, {}
    with watching(model, inputs, outputs):
        for batch in batches:
            model(**to_device(batch, next(model.parameters()).device))
    for name, layer in layers_of(model).items():
        x = torch.cat(inputs[name])
        added = torch.cat(outputs[name]) - layer.base_layer(x)
        handed = added - x @ update(layer).t()
        if handed.norm() > 1e-4 * added.norm():
            found[name] = x, added, handed.square().sum()
    return found


@contextmanager
def watching(model: torch.nn.Module, inputs: dict, outputs: dict) -> Iterator[None]:
    """Record the rows that enter and leave every block, by its name."""

    def hook(name: str):
        """Return a forward hook for a block."""

        def record(_module, args, output) -> None:
            """Record the rows of the block's input and output: tokens x features."""
            inputs.setdefault(name, []).append(args[0].flatten(0, -2))
            outputs.setdefault(name, []).append(output.flatten(0, -2))

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers_of(model).items()]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def missed(model: torch.nn.Module, blocks: Mapping[str, tuple]) -> dict[str, float]:
    """Return 1 - R2 of each block in the merged model: the missed fraction of its shortcut terms, in squared norms."""
    layers = layers_of(model)
    return {
        name: float((added - x @ update(layers[name]).t()).square().sum() / handed)
        for name, (x, added, handed) in blocks.items()
    }


if __name__ == "__main__":
    main()
