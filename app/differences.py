"""Report as HTML which settings of runs differ, and whether their images and losses are comparable."""

import json
from collections.abc import Collection

from reslora.formatting import enumerated
from reslora.options.images import Options

from .bases import PIPELINES, bundled
from .folders import IMAGES as IMAGES_BUNDLED
from .runs import Run
from .verdict import held_out
from .views import escape

MATTERS = {
    label: tuple(name for name, option in Options.table().items() if option.compared_as == label)
    for label in (
        "seed", "base model", "prompts", "how samples are generated", "resolution", "held-out images",
        "how losses are measured",
    )
}  # fmt: skip
"""Names of the options that determine each property in which runs may differ."""
IMAGES = ("seed", "base model", "how samples are generated", "resolution")
"""Properties that must be equal in all runs for their images of the same prompt to be comparable."""
LOSSES = ("seed", "base model", "resolution", "held-out images", "how losses are measured")
"""Properties that must be equal in all runs for their losses to be comparable. The seed selects the held-out images and
their noise."""
FIRST = "losses before training (images or model have changed)"
TOLERANCE = 1e-3
"""Maximum relative difference between validation losses before training that rounding errors can explain. A larger
difference means that the images or the model differ."""
LONGEST = 48


def setting(config: dict, flag: str) -> str:
    """Return the value of an option as JSON, or an empty string if it was not given or is off."""
    value = config.get(flag)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, str):  # a path to another copy of a bundled asset is the same setting
        value = bundled(value, PIPELINES | IMAGES_BUNDLED) or value
    return json.dumps(value) if value else ""


def same_sampling(run: Run) -> tuple[str, ...]:
    """Return the settings that determine a run's samples before training, as a key to compare runs by."""
    config = run.config
    return tuple(
        setting(config, flag) for flag in ("init_lora", *(flag for label in IMAGES for flag in MATTERS[label]))
    )


def differing(run: Run, labels: Collection[str]) -> dict[str, list[str]]:
    """Return the properties among `labels` that differ between the compared runs, each with the options that differ."""
    configs, found = [one.config for one in run.compared], {}
    for label in labels:
        flags = [flag for flag in MATTERS[label] if len({setting(config, flag) for config in configs}) > 1]
        found |= {label: flags} if flags else {}
    if "held-out images" in labels and not found.keys() & set(LOSSES) and not begin_alike(run.compared):
        found[FIRST] = []
    return found


def begin_alike(runs: Collection[Run]) -> bool:
    """Return whether the known validation losses before training agree within `TOLERANCE`.

    If these losses differ although all options agree, the images or the model were changed between two runs.
    """
    starting = [run for run in runs if not run.config.get("init_lora")]
    first = [held_out(run, method).get(0) for run in starting for method in run.methods[:1]]
    known = [loss for loss in first if loss is not None]
    return not known or max(known) - min(known) <= TOLERANCE * max(map(abs, known))


def differences(run: Run) -> str:
    """Return as HTML which properties of the compared runs differ, and whether their images and losses are comparable.

    The result is empty for a single run."""
    if not run.beside:
        return ""
    found = "; ".join(label + in_words(run, flags) for label, flags in differing(run, MATTERS).items())
    found = found.replace("held-out images", "images not trained on")
    line = f"These runs differ in {found}." if found else "All settings that affect images and losses agree."
    return f'<p class="verdict"><b>{escape(line)}</b> {of_images(run)} {of_losses(run)}</p>'


def in_words(run: Run, names: list[str]) -> str:
    """Return each run's value of the option in `names`, as text.

    The text is empty if `names` has not exactly one option, or if a value is too long."""
    if len(names) != 1:
        return ""
    given = [(one.name, one.config, one.config.get(names[0])) for one in run.compared]
    values = [
        f"{name}: {setting(config, names[0]) or ('none' if value is None else value)}" for name, config, value in given
    ]
    return f" ({', '.join(values)})" if max(map(len, values)) <= LONGEST else ""


def of_images(run: Run) -> str:
    """Return a sentence on whether the compared runs' images are comparable."""
    if found := differing(run, IMAGES):
        return f"Do not compare their images one to one: {enumerated(found)} changes them even without training."
    return "Images in one row have the same prompt and seed, so they can be compared."


def of_losses(run: Run) -> str:
    """Return a sentence on whether the compared runs' validation losses are comparable."""
    if not any(setting(one.config, "validation_split") for one in run.compared):
        return "All images are trained on, so their losses cannot be compared."
    if differing(run, LOSSES):
        return "Their losses are not comparable: the images not trained on, model or noise may differ."
    return (
        "Their losses are of the same images, which were not trained on; one seed is not enough to show a difference "
        "between runs."
    )
