"""Sections of an experiment's report that only images have: losses by timestep, samples, and similarities."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from ...common.charts import Axes, Series, chart
from ...experiment.record import Experiment
from ...experiment.report import About, labels_of
from ...experiment.statistics import is_chosen
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from ..output.exports import PEFT_FOLDER
from .drawn import MEANINGS
from .gallery import gallery


def sections(experiment: Experiment, folder: Path) -> list[tuple[str, str]]:
    """Return titles and HTML contents."""
    return [
        ("Loss on the test images by timestep", timestep_chart(experiment)),
        ("Images", gallery(experiment, folder)),
    ]


def timestep_chart(experiment: Experiment) -> str:
    """Return a chart of each method's difference from its reference in percent; the losses themselves would overlap."""
    measured = {
        (arm["label"], arm["seed"]): [math.nan if loss is None else loss for loss in arm["test"]["by_timestep"]]
        for arm in experiment["arms"]
        if arm["test"] and is_chosen(arm, experiment["chosen"])
    }
    places = {label: place for place, label in enumerate(labels_of(experiment))}
    found = []
    for verdict in experiment["verdicts"]:
        label, reference = verdict["label"], verdict["reference"]
        both = [seed for name, seed in measured if name == label and (reference, seed) in measured]
        series = Series(label, places[label])
        for place, timestep in enumerate(experiment["timesteps"]):
            pairs = [(measured[label, seed][place], measured[reference, seed][place]) for seed in both]
            percent = [100 * (ours / theirs - 1) for ours, theirs in pairs if theirs]
            series.dots += [(timestep, value) for value in percent]
            series.line += [(timestep, statistics.fmean(percent))] if percent else []
        found.append(series)
    references = " and ".join(dict.fromkeys(verdict["reference"] for verdict in experiment["verdicts"]))
    axes = Axes(f"Difference to {references}, in percent", "timestep (1 is pure noise)", "percent", zero=True)
    figure = chart(found, axes)
    note = "<p>Below zero the method is better. A line is the mean over seeds, a dot is one seed.</p>"
    return f'<div class="charts">{figure}</div>{note}' if figure else ""


COMFYUI = 'ComfyUI: put it into models/loras, and choose it in the node "Load LoRA", at strength 1 as it was compared.'
USES = {
    KOHYA_FILE: f"{COMFYUI} A1111 and Forge: models/Lora, at weight 1.",
    COMFYUI_FILE: COMFYUI,
    DIFFUSERS_FILE: "diffusers: pipeline.load_lora_weights('{folder}')",
    PEFT_FOLDER: "PEFT: PeftModel.from_pretrained(DENOISER, '{folder}/peft'), with the pipeline's denoiser; "
    "with --train_text_encoder, its text encoders too, each from '{folder}/peft/text_encoder*'",
}
IMAGES = About("image", MEANINGS, USES, sections)
