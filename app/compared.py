"""Render images, loss curves and numbers of a run at a training step as HTML. All names are escaped."""

import contextlib
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from reslora.formatting import enumerated, pluralize
from reslora.methods.registry import METHODS
from reslora.plots import figures
from reslora.plots.charts import Line, line_chart, swatch
from reslora.runtime.log import of_split

from .runs import NO_CONFIG, Run, RunError
from .views import escape, figure, notice, table, tile

MOST_ROWS = 16
FEW_COLUMNS = 5
"""Maximum number of image columns that leave room for the loss curves to the right of the images."""
TITLES = {"train": "Training loss (running mean)", "validation": "Loss on images not trained on"}
LARGEST_LOSS = 1e30
SWIPED = 512
"""Size in pixels up to which small images are enlarged, by a whole number, to compare two."""
TWO_LOSSES = (
    "Do not compare the two losses with each other. The training loss is of one batch at random noise levels; the "
    "validation loss is of images that are not trained on, always at the same noise levels."
)
Cell = tuple[int, int]
"""Prompt index and image index of a sample. The noise depends on them, so samples of the same cell are comparable."""


@dataclass(frozen=True)
class Column:
    """A column of the grid of samples: images generated with the same weights."""

    title: str
    subtitle: str
    images: dict[Cell, Path]


# -- images ------------------------------------------------------------------------------------------------------------


def columns(run: Run, step: int) -> list[Column]:
    """Return the columns: the base model, then the methods at `step` and ResLoRA's merged weights.

    An adapter adds nothing before its first step, so the samples of step 0 are the base model's, unless the run starts
    from a LoRA (`--init_lora`).
    """
    found = []
    if first := next(filter(None, (run.samples(method, 0) for method in run.methods)), None):
        found.append(Column("Initial LoRA" if run.config.get("init_lora") else "Base model", "before training", first))
    found += [Column(METHODS[method].title, f"step {step}", run.samples(method, step)) for method in run.methods]
    if merged := run.samples("reslora", None) if "reslora" in run.methods else {}:
        found.append(Column("ResLoRA merged", "plain LoRA, last step", merged))
    return found


def rows_of(shown: list[Column]) -> list[Cell]:
    """Return the cells with an image in any column."""
    return sorted({cell for column in shown for cell in column.images})


def prompt_of(run: Run, number: int) -> str:
    """Return the prompt with this index, or a placeholder if the run has fewer prompts."""
    prompts = run.prompts
    return prompts[number] if number < len(prompts) else f"prompt {number}"


def images(run: Run, step: int, status: str = "") -> str:
    """Return the grid of samples at a step: a row per prompt and image, a column per method.

    `status`: the run's status by `Jobs`, which also detects a trainer that has just started; empty: `run.status`.
    """
    shown = columns(run, step)
    rows = rows_of(shown)
    if not rows:
        if run.config and not run.prompts:
            return notice("This run generates no samples: it was started without sample prompts.")
        if run.unreadable:
            return notice(f"This run cannot be shown: {NO_CONFIG}.")
        if (status or run.status) == "failed":
            return notice("This run ended before its first samples; its log, under Train, says why.")
        methods = enumerated(run.titles) or "each method"
        return notice(
            f"No samples yet. Here appears an image of each prompt by the base model and by {methods}, first before "
            "training and then every few steps; the losses are drawn next to them."
        )
    absent = "not yet" if run.process or step in run.steps() else "not at this step"
    header = "".join(f"<th>{escape(one.title)}<small>{escape(one.subtitle)}</small></th>" for one in shown)
    body = ""
    for row, cell in enumerate(rows[:MOST_ROWS]):
        prompt, tiles = prompt_of(run, cell[0]), ""
        for place, column in enumerate(shown):
            tiles += f"<td>{tile(column.images.get(cell), f'{prompt}: {column.title}', (row, place), absent)}</td>"
        body += f'<tr><th><div class="prompt" title="{escape(prompt)}">{escape(prompt)}</div></th>{tiles}</tr>'
    mark = f'data-step="{step}" style="--columns:{len(shown)}"'
    kind = "samples wide" if len(shown) > FEW_COLUMNS else "samples"
    grid = table(kind, f"Samples at step {step}", f"<tr><th></th>{header}</tr>{body}", mark)
    if (more := len(rows) - MOST_ROWS) > 0:
        grid += notice(f"{pluralize(more, 'row')} of samples not shown: see the folders samples in the run's folder.")
    return grid


def choices(run: Run, step: int) -> tuple[dict[str, Column], dict[str, Cell]]:
    """Return the columns that have images at a step by title, and the rows of the grid by name."""
    shown = [column for column in columns(run, step) if column.images]
    rows = {}
    for number, image in rows_of(shown):
        prompt = prompt_of(run, number)
        rows[f"{prompt} ({image + 1})" if image else prompt] = number, image
    return {column.title: column for column in shown}, rows


def two_images(left: Column, right: Column, cell: Cell) -> tuple[Image.Image, Image.Image] | None:
    """Return the images of two columns in the same row and size, at least doubled if small; None if one is missing."""
    found = []
    for path in (left.images.get(cell), right.images.get(cell)):
        if path is None:
            return None
        with contextlib.suppress(OSError), Image.open(path) as image:
            found.append(image.convert("RGB"))
    if len(found) < 2:
        return None
    times = max(1, SWIPED // max(found[0].size))
    size = tuple(times * side for side in found[0].size)
    return tuple(image.resize(size, Image.Resampling.NEAREST) for image in found)


def difference(left: Image.Image, right: Image.Image) -> tuple[Image.Image, str]:
    """Return the absolute difference of two images, brightened so that its largest value is white, and a caption."""
    found = ImageChops.difference(left, right)
    largest = max(high for _, high in found.getextrema())
    mean = statistics.fmean(ImageStat.Stat(found).mean)
    times = 255 / largest if largest else 1
    caption = f"Difference: {mean:.1f} of 255 on average, shown {times:.1f} times as bright"
    return found.point(lambda value: round(value * times)), caption


def save_grid(run: Run, step: int, path: Path) -> None:
    """Save the grid of samples at a step as one image. Raises `RunError` if there are no samples."""
    shown = columns(run, step)
    if not (found := rows_of(shown)[:MOST_ROWS]):
        raise RunError(f"{run.name} has no samples yet.")
    rows = [(prompt_of(run, cell[0]), [("", [column.images.get(cell) for column in shown])]) for cell in found]
    figures.comparison(path, [f"{column.title}\n{column.subtitle}" for column in shown], rows)


# -- numbers -----------------------------------------------------------------------------------------------------------


def curves(run: Run, split: str, step: int | None) -> str:
    """Return the loss curves of all methods as a chart with a vertical line at `step`.

    `split`: `train` or `validation`.

    The training loss is a running mean over a tenth of the steps, because the loss of single batches is mostly noise.
    """
    lines = []
    for method in run.methods:
        log = of_split(run.log(method), split)
        if not log:
            continue
        losses = [max(-LARGEST_LOSS, min(LARGEST_LOSS, row["loss"])) for row in log]
        losses = figures.running_mean(losses) if split == "train" else losses
        # More points than pixels do not improve the chart.
        every = max(1, len(log) // 400)
        kept = [i for i in range(len(log)) if i % every == 0 or i == len(log) - 1]
        shown, points = METHODS[method], tuple((log[i]["step"], losses[i]) for i in kept)
        lines.append(Line(shown.title, shown.color, points))
    return line_chart(TITLES[split], "step", lines, step) if lines or split == "train" else ""


def numbers(run: Run, step: int) -> str:
    """Return training loss, validation loss, learning rate and seconds of each method at a step, as a table."""
    known = {method: numbers_of(run, method, step) for method in run.methods}
    steps = {reached for reached, _ in known.values()}
    forms, rows = ((".4f", ""), (".4f", ""), (".3g", ""), (".0f", " s")), []
    for method, (reached, values) in known.items():
        cells = "".join(f"<td>{figure(value, *form)}</td>" for value, form in zip(values, forms, strict=True))
        behind = f"<small>at step {reached[0]}</small>" if len(steps) > 1 and reached[0] is not None else ""
        named = f"{swatch(METHODS[method].color, '')}{escape(METHODS[method].title)}"
        rows.append(f"<tr><th>{named}{behind}</th>{cells}</tr>")
    header = (
        "<tr><th></th><th>training loss (last 20)</th><th>validation loss</th><th>learning rate</th><th>time</th></tr>"
    )
    both = any(values[0] is not None and values[1] is not None for _, values in known.values())
    shown = table("numbers", f"Numbers at step {step}", header + "".join(rows))
    return shown + (notice(TWO_LOSSES) if both else "")


def numbers_of(run: Run, method: str, step: int) -> tuple[tuple, tuple]:
    """Return two tuples: the last logged steps of a method up to `step`, and the values at these steps.

    The steps are the last with any loss and the last with a validation loss. The values are the mean of the last 20
    training losses, the last validation loss, the learning rate and the elapsed seconds. Missing values are None.
    """
    log = [row for row in run.log(method) if row["step"] <= step]
    recent = [row["loss"] for row in of_split(log, "train")[-20:]]
    last, measured = (next(reversed(rows), {}) for rows in (log, of_split(log, "validation")))
    loss = sum(recent) / len(recent) if recent else None
    values = loss, measured.get("loss"), last.get("lr"), last.get("seconds")
    return (last.get("step"), measured.get("step")), values
