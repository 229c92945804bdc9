"""The samples of the chosen runs side by side: a slider between any two, and a table of all."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ...errors import first_line
from ...experiment.record import Arm, Experiment
from ...experiment.report import start_in_words, titled
from ...io import read_object
from ...plots.charts import escape
from ...runtime.checkpoint_folders import EXPORTED, EXPORTS
from ...runtime.sample_folders import MERGED, by_step, shows
from ..data.images import data_uri

LARGEST = 512
"""Length of the longer edge of an image in the page, in pixels."""
MOST_PROMPTS = 12
BASE = "before training"


def gallery(experiment: Experiment, folder: Path) -> str:
    """Return HTML with the first sample of each prompt for each chosen run, side by side; empty without samples."""
    prompts = [str(prompt) for prompt in experiment["settings"].get("validation_prompt") or ()][:MOST_PROMPTS]
    return gallery_of(columns_of(experiment, folder, prompts), prompts, best_of(experiment))


def gallery_of(columns: list[tuple[str, str, Path]], prompts: list[str], best: str | None) -> str:
    """Return HTML with the first sample of each prompt in each column, side by side; empty without samples.

    `columns`: name, description and directory of samples. `best`: name of the column to show first.
    """
    cells = {
        (row, column): tile(place / f"{row}-0.png", f"{prompt}: {name}", f"{row}-{column}")
        if shows(place, row, prompt)
        else ""
        for row, prompt in enumerate(prompts)
        for column, (name, _, place) in enumerate(columns)
    }
    if not any(cells.values()):
        return ""
    head = "".join(f'<th scope="col">{escape(name)}<br>{escape(what)}</th>' for name, what, _ in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(prompt)}</th>'
        + "".join(f"<td>{cells[row, column] or 'no image'}</td>" for column in range(len(columns)))
        + "</tr>"
        for row, prompt in enumerate(prompts)
    )
    return (
        f"{slider(columns, prompts, best)}<details><summary>All images</summary>"
        '<div class="scroll" role="region" aria-label="All images" tabindex="0"><table class="gallery">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def columns_of(experiment: Experiment, folder: Path, prompts: Sequence[str]) -> list[tuple[str, str, Path]]:
    """Return the columns of the gallery: label, seed and step, and folder of samples.

    The first column shows the base model, or the LoRA of --init_lora: the samples of any run before its first step.
    Folders without samples of these prompts are skipped: runs that were added later may have other prompts.
    """
    found = []
    for label in experiment["chosen"]:
        for arm, step, place in chosen_samples(experiment, folder, label, prompts):
            found.append((titled(label), f"seed {arm['seed']}, step {step}", place))
            break
    bases = (samples_of(arm, folder, prompts).get(0) for arm in experiment["arms"])
    base = next(filter(None, bases), None)
    return [*([(BASE, start_in_words(experiment["settings"]), base)] if base else []), *found]


def chosen_samples(
    experiment: Experiment, folder: Path, label: str, prompts: Sequence[str]
) -> Iterator[tuple[Arm, int, Path]]:
    """Yield a method's finished runs at the chosen learning rate, by seed.

    Each run comes with a step and the folder of its samples. The step is the one nearest to the chosen step that has
    samples of these prompts. Runs without such samples are skipped.
    """
    choice = experiment["chosen"][label]
    arms = [arm for arm in experiment["arms"] if arm["label"] == label and arm["status"] == "finished"]
    arms = [arm for arm in arms if arm["learning_rate"] == choice["learning_rate"]]
    for arm in sorted(arms, key=lambda arm: arm["seed"]):
        places = samples_of(arm, folder, prompts)
        if later := [step for step in places if step]:
            step = min(later, key=lambda step: (abs(step - choice["step"]), step))
            yield arm, step, places[step]


def samples_of(arm: Arm, folder: Path, prompts: Sequence[str]) -> dict[int, Path]:
    """Return, by step, the run's folders with samples that were generated from any of these prompts.

    If the run is exported, samples of the merged model are included.
    """
    own = folder / arm["folder"]
    found = by_step(own / "samples")
    if (step := read_object(own / EXPORTS).get(EXPORTED)) and (own / MERGED).is_dir():
        found[step] = own / MERGED
    return {step: place for step, place in found.items() if any(shows(place, *prompt) for prompt in enumerate(prompts))}


def best_of(experiment: Experiment) -> str | None:
    """Return the title of the method with the lowest loss on the selection split; None if there is none."""
    chosen = experiment["chosen"]
    best = min(chosen, key=lambda label: chosen[label]["loss"], default=None)
    return None if best is None else titled(best)


def slider(columns: list[tuple[str, str, Path]], prompts: list[str], best: str | None) -> str:
    """Return HTML with two stacked images and a slider that sets how much of the left image is visible."""
    names = [name for name, *_ in columns]
    labels = [(str(number), name) for number, name in enumerate(names)]
    first = 1 if names[0] == BASE and len(names) > 2 else 0
    second = names.index(best) if best in names and best != names[first] else min(first + 1, len(names) - 1)
    choices = (
        select("left", "Left", labels, first)
        + select("right", "Right", labels, second)
        + select("prompt", "Prompt", [(str(number), prompt) for number, prompt in enumerate(prompts)], 0)
    )
    return (
        f'<div id="comparing" hidden><div class="choices">{choices}</div>'
        '<div class="pair" style="--at: 50%"><img class="under" alt=""><img class="over" alt="">'
        '<span class="left"></span><span class="right"></span></div>'
        '<label for="slider">How much of the left image is seen</label>'
        '<input type="range" id="slider" min="0" max="100" value="50"></div>'
    )


def select(name: str, title: str, options: list[tuple[str, str]], chosen: int) -> str:
    """Return an HTML select element; `options` are pairs of a value and its text."""
    entries = "".join(
        f'<option value="{value}"{" selected" * (number == chosen)}>{escape(text)}</option>'
        for number, (value, text) in enumerate(options)
    )
    return f'<label>{title}<select id="{name}" autocomplete="off">{entries}</select></label>'


def tile(path: Path, alt: str, cell: str) -> str:
    """Return an HTML image element with the image as a data URI, scaled down to LARGEST.

    `cell`: the image's row and column, such as `0-1`, by which the slider finds it; empty if it is not for the slider.
    Returns an empty string if the file is missing, and a text if it is damaged.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        return ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return escape(f"damaged: {first_line(error)}")
    source = data_uri(image, LARGEST, quality=88)
    mark = f' data-cell="{cell}"' if cell else ""
    return f'<img src="{source}" alt="{escape(alt)}"{mark} width="{image.width}" height="{image.height}">'
