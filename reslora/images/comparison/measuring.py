"""Measure the losses of LoRA files, one after the other, on the same images, timesteps and noise."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from ...experiment.study import COMPARING
from ...formatting import printable
from ...io import read_object, write_json
from ...methods.adapters import remove_adapters
from ...runtime.sample_folders import shows
from ...seeds import derive
from ...tracing import evaluating
from ..denoising import DenoisingLoss
from ..experiment.arm_study import ImageArmStudy
from ..experiment.similarity import similarities
from ..experiment.split import Image
from ..model.lora_files.adding import add_lora
from ..output.exports import as_image, base_parts, in_float32
from ..output.reports import save_images
from ..prompts import prompts_of
from .files import Entry
from .loras import LoraFile

MEASURED = "measured"
"""Directory with the losses of each file, so that an interrupted command does not measure a file again."""
SAMPLES = "samples"
BASE = "base"
"""Name of the base model."""


@dataclass(frozen=True)
class Task:
    """One measurement to make: of a file at a strength."""

    label: str
    """Name of the file or group, with the strength if there are several."""
    seed: int
    """Index of the file in its group."""
    path: Path | None = None
    """The LoRA file; None for the base model."""
    strength: float = 1.0


@dataclass(frozen=True)
class Measured:
    """The losses of a file at a strength."""

    task: Task
    losses: list[float | None]
    """Loss of each image, mean over timesteps; None if it is not finite."""
    by_timestep: list[float | None]
    similarities: dict[str, float] = field(default_factory=dict)
    samples: Path = Path()
    """Directory of the sample images."""

    @property
    def mean(self) -> float:
        """The mean loss; NaN if a loss is not finite."""
        return float(np.array(self.losses, float).mean())


def tasks_of(entries: Sequence[Entry], strengths: Sequence[float]) -> list[Task]:
    """Return all measurements: of the base model, and of each file of each entry at each strength."""
    found = [Task(BASE, 0)]
    for entry in entries:
        for strength in strengths:
            label = entry.name if list(strengths) == [1.0] else f"{entry.name} at {strength:g}"
            found += [Task(label, seed, path, strength) for seed, path in enumerate(entry.files)]
    return found


@dataclass(frozen=True)
class Measuring:
    """Measures files on the images of a study."""

    study: ImageArmStudy
    images: Sequence[Image]
    loras: Mapping[Path, LoraFile]

    def each(self, tasks: Sequence[Task]) -> list[Measured]:
        """Measure every task, and print its loss; raises `Stopped` if a stop was requested."""
        found = []
        status = self.study.context.status
        with in_float32(self.study.pipeline):
            for number, task in enumerate(tasks, 1):
                status.count("measuring file", number - 1, len(tasks), task.label)
                measured = self.measured(task)
                file = f" ({'/'.join(task.path.parts[-3:])})" if task.path and task.path.stem != task.label else ""
                line = f"{number} of {len(tasks)}: {task.label}{file}: loss {measured.mean:.6f}"
                print(printable(line), flush=True)
                found.append(measured)
        return found

    def measured(self, task: Task) -> Measured:
        """Return a task's losses, if possible from an earlier command's output, and write the task's sample images."""
        context, key = self.study.context, self.key_of(task)
        path = context.folder / MEASURED / f"{key}.json"
        name = re.sub(r"[^-\w.]+", "_", task.label)
        samples = context.folder / SAMPLES / f"{name}-{key[:6]}"
        found, prompts = read_object(path), context.options.validation.validation_prompt
        if found and all(shows(samples, *each) and samples.is_dir() for each in enumerate(prompts)):
            return Measured(task, samples=samples, **found)
        loss, parts = self.models
        try:
            for part, layers in self.loras[task.path].read().items() if task.path else ():
                add_lora(parts[part], layers, task.strength)
            with evaluating(*parts.values()):
                found = self.study.losses_of(parts, loss, self.images)
                if context.options.validation.metric_model:
                    found["similarities"] = similarities(parts, self.images, self.study)
            if prompts:
                denoiser, wanted = next(iter(parts.values())), prompts_of(context.options.validation)
                drawn = self.study.sampler.draw(denoiser, wanted, 1, lambda: context.stop.check(COMPARING))
                samples.parent.mkdir(exist_ok=True)
                save_images(samples, list(map(as_image, drawn)), prompts)
        finally:
            for part in parts.values():
                if hasattr(part, "peft_config"):
                    remove_adapters(part)
        path.parent.mkdir(exist_ok=True)
        write_json(path, found)
        return Measured(task, samples=samples, **found)

    @functools.cached_property
    def models(self) -> tuple[DenoisingLoss, dict[str, nn.Module]]:
        """The loss function, and the models that the LoRA files change, in float32. They are loaded on first use."""
        loss = self.study.new_loss()
        return loss, base_parts(loss, self.study.context)

    def key_of(self, task: Task) -> str:
        """Return a hash of everything that a task's losses and samples depend on."""
        context, options = self.study.context, self.study.context.options
        groups = (options.model, options.data, options.training, options.validation, options.adapter)
        mark = self.loras[task.path].mark if task.path else ""
        ids = [self.study.training_data.sources[source].images.marks[number] for source, number in self.images]
        return f"{derive(self.study.identity, groups, context.dtype, mark, task.strength, ids):016x}"
