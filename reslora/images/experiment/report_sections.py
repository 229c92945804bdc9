"""Sections of an experiment's report that only images have: losses by timestep, samples, and similarities."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from ...experiment.choice import is_chosen
from ...experiment.record import Experiment, between_methods
from ...experiment.report import About, labels_of, start_in_words, titled
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from ...formatting import enumerated
from ...plots.charts import Axes, Series, chart
from ..output.exports import PEFT_FOLDER
from .gallery import gallery
from .losses_by_image import by_image
from .similarity import MEANINGS


def sections(experiment: Experiment, folder: Path) -> list[tuple[str, str]]:
    """Return the title and the HTML content of each section."""
    return [
        ("Loss on the test images by timestep", timestep_chart(experiment)),
        ("Loss by test image", by_image(experiment, folder)),
        ("Images", gallery(experiment, folder)),
    ]


def timestep_chart(experiment: Experiment) -> str:
    """Return a chart of how much each method's loss differs from its reference's, in percent, by timestep.

    Curves of the losses themselves would overlap.
    """
    measured = {
        (arm["label"], arm["seed"]): [math.nan if loss is None else loss for loss in arm["test"]["by_timestep"]]
        for arm in experiment["arms"]
        if arm["test"] and is_chosen(arm, experiment["chosen"])
    }
    places = {label: place for place, label in enumerate(labels_of(experiment))}
    found = []
    for verdict in between_methods(experiment):
        label, reference = verdict["label"], verdict["reference"]
        both = [seed for name, seed in measured if name == label and (reference, seed) in measured]
        series = Series(titled(label), places[label])
        for place, timestep in enumerate(experiment["timesteps"]):
            pairs = [(measured[label, seed][place], measured[reference, seed][place]) for seed in both]
            percent = [100 * (ours / theirs - 1) for ours, theirs in pairs if theirs]
            series.dots += [(timestep, value) for value in percent]
            series.line += [(timestep, statistics.fmean(percent))] if percent else []
        found.append(series)
    found += base_series(experiment, measured, len(places))
    references = enumerated(dict.fromkeys(titled(each["reference"]) for each in between_methods(experiment)))
    axes = Axes(f"Difference to {references}, in percent", "timestep (1 is pure noise)", "percent", zero=True)
    figure = chart(found, axes)
    note = "Below zero the method is better. A line is the mean over seeds, a dot is one seed (hollow: above the edge)."
    return f'<div class="charts">{figure}</div><p>{note}</p>' if figure else ""


def base_series(experiment: Experiment, measured: Mapping[tuple[str, int], list[float]], number: int) -> list[Series]:
    """Return a chart line: the difference in percent of the loss before training to the first reference, by timestep.

    `measured`: the losses by timestep of each (label, seed). `number`: the line's number, which sets its color. Empty
    if either loss is unknown.
    """
    base, verdicts = experiment.get("base"), between_methods(experiment)
    theirs = [losses for (name, _), losses in measured.items() if verdicts and name == verdicts[0]["reference"]]
    if not base or not theirs:
        return []
    places = zip(experiment["timesteps"], base["by_timestep"], zip(*theirs, strict=True), strict=True)
    points = [(timestep, 100 * (loss / statistics.fmean(losses) - 1)) for timestep, loss, losses in places if loss]
    return [Series(start_in_words(experiment["settings"]), number, points, points)]


COMFYUI = 'ComfyUI: put it into models/loras, and choose it in the node "Load LoRA", at strength 1 as it was compared.'
USES = {
    KOHYA_FILE: f"{COMFYUI} A1111 and Forge: models/Lora, at weight 1.",
    COMFYUI_FILE: COMFYUI,
    LYCORIS_FILE: f"{COMFYUI} Forge: models/Lora, at weight 1.",
    DIFFUSERS_FILE: "diffusers: pipeline.load_lora_weights('{folder}')",
    PEFT_FOLDER: "PEFT: PeftModel.from_pretrained(DENOISER, '{folder}/peft'), with the pipeline's denoiser; "
    "with --train_text_encoder, its text encoders too, each from '{folder}/peft/text_encoder*'",
}
LOSSES = (
    "Losses in this report are squared errors without weights, at eight fixed timesteps, of images that were not "
    "trained on. The trainer prints losses of the training images at random timesteps, with the weights of "
    "--snr_gamma: other numbers, and often much lower ones."
)
IMAGES = About("image", MEANINGS, USES, sections, LOSSES, "--max_train_steps", "train_sd.py")
