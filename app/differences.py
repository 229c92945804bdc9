"""What the settings of runs say of whether their images and losses compare. HTML, as in `views`."""

from __future__ import annotations

import json
from collections.abc import Collection

from reslora.options.images import Options

from .bases import PIPELINES, bundled
from .folders import IMAGES as IMAGES_BUNDLED
from .runs import Run
from .verdict import held_out
from .views import enumerated, escape

MATTERS = {
    label: tuple(name for name, option in Options.table().items() if option.compared_as == label)
    for label in (
        "seed", "base model", "prompts", "how samples are generated", "resolution", "held-out images",
        "how losses are measured",
    )
}  # fmt: skip
"""The options by which runs may differ in what matters, by what these are called here."""
IMAGES = ("seed", "base model", "how samples are generated", "resolution")
"""What images of one prompt must have in common to compare."""
LOSSES = ("seed", "base model", "resolution", "held-out images", "how losses are measured")
"""What losses must: the seed chooses the images to hold out, and their noise."""
FIRST = "losses before training, so that images or model have changed since"
TOLERANCE = 1e-3
"""Relative, of losses before training: of the same images and model they differ by rounding alone."""
LONGEST = 48


def setting(config: dict, flag: str) -> str:
    """The value of a flag as JSON; empty for one that was not given, or switched off."""
    value = config.get(flag)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, str):  # another copy of what is bundled is the same
        value = bundled(value, PIPELINES | IMAGES_BUNDLED) or value
    return json.dumps(value) if value else ""


def same_sampling(run: Run) -> tuple[str, ...]:
    """Runs in which this is the same draw the same image of a prompt and number before they train."""
    config = run.config
    return tuple(
        setting(config, flag) for flag in ("init_lora", *(flag for label in IMAGES for flag in MATTERS[label]))
    )


def differing(run: Run, labels: Collection[str]) -> dict[str, list[str]]:
    """In which of these the runs beside a run differ from it or among themselves, and by which flags."""
    runs, found = (run, *run.beside), {}
    configs = [one.config for one in runs]
    for label in labels:
        flags = [flag for flag in MATTERS[label] if len({setting(config, flag) for config in configs}) > 1]
        found |= {label: flags} if flags else {}
    if "held-out images" in labels and not found.keys() & set(LOSSES) and not begin_alike(runs):
        found[FIRST] = []
    return found


def begin_alike(runs: Collection[Run]) -> bool:
    """Whether losses on held-out images were the same before training, as far as that is known.

    A folder may have got other images between two runs, which no flag tells.
    """
    starting = [run for run in runs if not run.config.get("init_lora")]
    first = [held_out(run, method).get(0) for run in starting for method in run.methods[:1]]
    known = [loss for loss in first if loss is not None]
    return not known or max(known) - min(known) <= TOLERANCE * max(map(abs, known))


def differences(run: Run) -> str:
    """In what runs differ that matters, and what follows for their images and losses; empty for a run alone."""
    if not run.beside:
        return ""
    found = "; ".join(label + in_words(run, flags) for label, flags in differing(run, MATTERS).items())
    line = f"These runs differ in {found}." if found else "These runs have in common all that matters here."
    return f'<p class="verdict"><b>{escape(line)}</b> {of_images(run)} {of_losses(run)}</p>'


def in_words(run: Run, names: list[str]) -> str:
    """The value of the flag in each run, where they differ by one that can be told in short."""
    if len(names) != 1:
        return ""
    given = [(one.name, one.config, one.config.get(names[0])) for one in (run, *run.beside)]
    values = [
        f"{name}: {setting(config, names[0]) or ('none' if value is None else value)}" for name, config, value in given
    ]
    return f" ({', '.join(values)})" if max(map(len, values)) <= LONGEST else ""


def of_images(run: Run) -> str:
    """Whether images compare."""
    if found := differing(run, IMAGES):
        return f"Do not compare their images one to one: {enumerated(found)} would change them without any training."
    return "Images in one row have the same prompt and seed, so they can be compared."


def of_losses(run: Run) -> str:
    """Whether losses on held-out images compare."""
    if not any(setting(one.config, "validation_split") for one in (run, *run.beside)):
        return "No image is held out, so no number compares them."
    if differing(run, LOSSES):
        return "Their losses do not compare: they are not known to be of the same held-out images, model and noise."
    return "Their losses are of the same held-out images; between runs, too, one seed shows no difference."
