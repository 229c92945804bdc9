"""Load the trained models of `paper.py` with the project's modules, merge them by every method, and evaluate them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import measured  # noqa: F401 - it puts this checkout before an installed one
import torch

from reslora.images.accelerator import start_accelerator
from reslora.images.data.folders import load_folders
from reslora.images.data.training_data import load_training_data
from reslora.images.denoising import DenoisingLoss
from reslora.images.initial_lora import add_adapter, config_of
from reslora.images.output.exports import calibration_batches as image_batches
from reslora.images.output.reports import Validation
from reslora.images.run import load_and_check, resolve_context
from reslora.images.settings import parse_args
from reslora.methods.adapters import load_adapter
from reslora.options.texts import LlmOptions
from reslora.runtime.signals import StopRequest
from reslora.texts import llm
from reslora.texts.arguments import read
from reslora.texts.llm_tasks import TASKS, examples_of
from reslora.texts.llm_tokens import calibration_batches
from reslora.texts.results import merge_table


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the last step."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def image_table(flags: list[str], method: Path) -> dict[str, dict]:
    """Return the loss on held-out images of a method's last checkpoint, unmerged and merged by every method."""
    flags = parse_args([*flags, "--output_dir", str(method.parent)])
    context = resolve_context(
        flags,
        start_accelerator(flags),
        StopRequest(),
    )
    flags, accelerator = context.options, context.accelerator
    pipeline, objective = load_and_check(context)
    training_data = load_training_data(
        load_folders(flags.model, flags.data, flags.training, flags.output), pipeline, objective, context
    )
    denoiser = context.model.load_denoiser(context.dtype, accelerator.device)
    add_adapter(
        denoiser,
        method.name,
        flags.adapter,
        flags.training,
        config_of(method.name, flags.adapter, flags.training.max_train_steps),
    )
    load_adapter(denoiser, newest_checkpoint(method))
    loss = DenoisingLoss(context, objective, pipeline, denoiser.config)
    validation = Validation(loss, training_data, None, accelerator, context.stop)
    calibration = image_batches(loss, training_data) if method.name == "reslora" else None
    return merge_table(denoiser, lambda model: {"loss": validation.losses(model).mean().item()}, calibration)


def calibration_losses(flags: list[str], counts: Sequence[int], other: str, rows: list[dict]) -> dict[str, float]:
    """Return the test loss of a train_llm.py run's last checkpoint after `lstsq` merges.

    The merges read so many of its training examples and, with the largest count, examples of another task.
    """
    texts, options = llm.LlmTexts(), read(LlmOptions, llm.PROG, flags)
    texts.read(options)
    model = texts.adapted(options, torch.device("cpu"), steps=1)
    load_adapter(model, newest_checkpoint(Path(options.output.output_dir)))
    foreign = [texts.encoder(example) for example in examples_of(TASKS[other], other, rows)]
    sources = {str(count): (texts.rows, count) for count in counts} | {
        f"{max(counts)} of {other}": (foreign, max(counts))
    }
    found = {}
    for name, (examples, count) in sources.items():
        batches = calibration_batches(examples, count, options.training.eval_batch_size)
        with torch.no_grad():
            table = merge_table(model.eval(), lambda one: texts.figures(options, one, lambda: None), batches, ["lstsq"])
            found[name] = table["lstsq"]["loss"]
    return found
