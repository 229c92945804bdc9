"""Render images, loss curves and numbers of one or several runs at a training step as HTML. All names are escaped.

Image columns and curves are named by method, or by run and method if several runs are compared.
"""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from reslora.formatting import enumerated, pluralize
from reslora.plots import figures
from reslora.plots.charts import Line, line_chart, swatch
from reslora.runtime.log import of_split

from .differences import LOSSES, differing, same_sampling
from .runs import NO_CONFIG, Run, RunError, number
from .views import COLORS, NAMES, escape, figure, notice, table, tile

MOST_ROWS = 16
LONGEST_NAME = 24
"""Maximum number of characters of a run's name in a column heading."""
FEW_COLUMNS = 5
"""Maximum number of image columns that leave room for the loss curves to the right of the images."""
TITLES = {"train": "Training loss (running mean)", "validation": "Loss on images not trained on"}
DASHES = ("", "7 4", "2 3", "10 3 2 3")
"""SVG dash patterns of the curves, one per run; the color of a curve shows the method."""
LARGEST_LOSS = 1e30
SWIPED = 512
"""Size in pixels up to which small images are enlarged, by a whole number, to compare two."""
TWO_LOSSES = (
    "Do not compare the two losses with each other. The training loss is of one batch at random noise levels; the "
    "validation loss is of images that are not trained on, always at the same noise levels."
)
Cell = tuple[int, int, str]
"""Prompt index, image index and prompt of a sample. The noise depends on the indices, so samples of the same
cell are comparable."""


@dataclass(frozen=True)
class Column:
    """A column of the grid of samples: images generated with the same weights."""

    title: str
    subtitle: str
    run: Run
    images: dict[Cell, Path]
    absent: str = "not yet"
    """Text shown for a missing image."""


def named(run: Run, one: Run, name: str) -> str:
    """Return `name`, prefixed with the name of the run `one` if several runs are compared."""
    return f"{one.name}: {name}" if run.beside else name


# -- images ------------------------------------------------------------------------------------------------------------


def columns(run: Run, step: int) -> list[Column]:
    """Return the columns: the base model, then for each run its methods at `step` and ResLoRA's merged weights."""
    found = base_columns(run)
    for one in run.compared:
        absent = "not yet" if one.process or step in one.steps() else "not at this step"
        for method in one.methods:
            title = named(run, one, NAMES[method])
            found.append(Column(title, f"step {step}", one, cells(one, one.samples(method, step)), absent))
        merged = one.samples("reslora", None) if "reslora" in one.methods else {}
        if merged:
            title = named(run, one, "ResLoRA merged")
            found.append(Column(title, "plain LoRA, last step", one, cells(one, merged)))
    return found


def base_columns(run: Run) -> list[Column]:
    """Return the columns of samples from before training; runs with the same sampling options share a column.

    An adapter adds nothing before its first step, so the samples of step 0 are the base model's, unless the run starts
    from a LoRA (`--init_lora`).
    """
    alike: dict[tuple, list[Run]] = {}
    for one in run.compared:
        alike.setdefault(same_sampling(one) if run.beside else (), []).append(one)
    found = []
    for group in alike.values():
        images: dict[Cell, Path] = {}
        for one in group:
            drawn = next((cells(one, at) for method in one.methods if (at := one.samples(method, 0))), {})
            images |= {cell: path for cell, path in drawn.items() if cell not in images}
        if images:
            title = "Initial LoRA" if group[0].config.get("init_lora") else "Base model"
            title = title if len(alike) == 1 else named(run, group[0], title)
            found.append(Column(title, "before training", group[0], images))
    return found


def cells(run: Run, images: dict[tuple[int, int], Path]) -> dict[Cell, Path]:
    """Return the same images by `Cell` instead of by (prompt index, image index)."""
    return {(prompt, image, prompt_of(run, prompt)): path for (prompt, image), path in images.items()}


def rows_of(shown: list[Column]) -> list[Cell]:
    """Return the cells with an image in any column, by prompt index, then by the order of the runs."""
    found = list(dict.fromkeys(cell for column in shown for cell in column.images))
    prompts = list(dict.fromkeys(cell[2] for cell in found))
    return sorted(found, key=lambda cell: (cell[0], prompts.index(cell[2]), cell[1]))


def prompt_of(run: Run, number: int) -> str:
    """Return the prompt with this index, or a placeholder if the run has fewer prompts."""
    prompts = run.prompts
    return prompts[number] if number < len(prompts) else f"prompt {number}"


def images(run: Run, step: int, status: str = "") -> str:
    """Return the grid of samples at a step: a row per prompt and image, a column per run and method.

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
        methods = enumerated(NAMES[method] for method in run.methods) or "each method"
        return notice(
            f"No samples yet. Here appears an image of each prompt by the base model and by {methods}, first before "
            "training and then every few steps; the losses are drawn next to them."
        )
    header, body = "".join(map(heading, shown)), ""
    for row, cell in enumerate(rows[:MOST_ROWS]):
        prompt, tiles = cell[2], ""
        for place, column in enumerate(shown):
            absent = column.absent if prompt_of(column.run, cell[0]) == prompt else "other prompt"
            tiles += f"<td>{tile(column.images.get(cell), f'{prompt}: {column.title}', (row, place), absent)}</td>"
        body += f'<tr><th><div class="prompt" title="{escape(prompt)}">{escape(prompt)}</div></th>{tiles}</tr>'
    mark = f'data-step="{step}" style="--columns:{len(shown)}"'
    kind = "samples wide" if len(shown) > FEW_COLUMNS else "samples"
    grid = table(kind, f"Samples at step {step}", f"<tr><th></th>{header}</tr>{body}", mark)
    if (more := len(rows) - MOST_ROWS) > 0:
        grid += notice(f"{pluralize(more, 'row')} of samples not shown: see the folders samples in the run's folder.")
    return grid


def heading(column: Column) -> str:
    """Return a column heading; run and method are on two lines, and a long run name is shortened."""
    run, colon, name = column.title.rpartition(": ")
    run = run if len(run) <= LONGEST_NAME else f"{run[: LONGEST_NAME - 1]}…"
    title = f"{escape(run)}:<br>{escape(name)}" if colon else escape(name)
    return f'<th title="{escape(column.title)}">{title}<small>{escape(column.subtitle)}</small></th>'


def choices(run: Run, step: int) -> tuple[dict[str, Column], dict[str, Cell]]:
    """Return the columns that have images at a step by title, and the rows of the grid by name."""
    shown = [column for column in columns(run, step) if column.images]
    rows = {f"{cell[2]} ({cell[1] + 1})" if cell[1] else cell[2]: cell for cell in rows_of(shown)}
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
    rows = [(cell[2], [("", [column.images.get(cell) for column in shown])]) for cell in found]
    figures.comparison(path, [f"{column.title}\n{column.subtitle}" for column in shown], rows)


# -- numbers -----------------------------------------------------------------------------------------------------------


def arms(run: Run) -> Iterator[tuple[Run, str, str, str]]:
    """Yield the run, method, name and dash pattern of each curve."""
    for one, dash in zip(run.compared, DASHES, strict=False):
        for method in one.methods:
            yield one, method, named(run, one, NAMES[method]), dash


def curves(run: Run, split: str, step: int | None) -> str:
    """Return the loss curves of all methods as a chart with a vertical line at `step`.

    `split`: `train` or `validation`.

    The training loss is a running mean over a tenth of the steps, because the loss of single batches is mostly noise.
    """
    lines = []
    for one, method, name, dash in arms(run):
        log = of_split(one.log(method), split)
        if not log:
            continue
        losses = [max(-LARGEST_LOSS, min(LARGEST_LOSS, row["loss"])) for row in log]
        losses = figures.running_mean(losses) if split == "train" else losses
        # More points than pixels do not improve the chart.
        every = max(1, len(log) // 400)
        kept = [i for i in range(len(log)) if i % every == 0 or i == len(log) - 1]
        lines.append(Line(name, COLORS[method], tuple((log[i]["step"], losses[i]) for i in kept), dash))
    return line_chart(TITLES[split], "step", lines, step) if lines or split == "train" else ""


def numbers(run: Run, step: int) -> str:
    """Return training loss, validation loss, learning rate and seconds of each method at a step, as a table.

    The lowest loss of a column is marked if all methods have reached the same step and their losses are comparable.
    Within a run, training and validation losses are comparable. Between runs, only validation losses are, and only if
    the runs agree in all `LOSSES`.
    """
    shown = list(arms(run))
    known = [numbers_of(one, method, step) for one, method, *_ in shown]
    at = {reached for reached, _ in known}
    best = lowest([values for _, values in known]) if len(at) == 1 else {}
    if run.beside:
        best = {} if differing(run, LOSSES) else {column: best[column] for column in best if column == 1}
    forms, rows = ((".4f", ""), (".4f", ""), (".3g", ""), (".0f", " s")), []
    for (_, method, name, dash), (reached, values) in zip(shown, known, strict=True):
        cells = ""
        for column, (value, form) in enumerate(zip(values, forms, strict=True)):
            is_best, cell = column in best and value == best[column], figure(value, *form)
            cells += f'<td class="best">{cell}<small>lowest</small></td>' if is_best else f"<td>{cell}</td>"
        behind = f"<small>at step {reached[0]}</small>" if len(at) > 1 and reached[0] is not None else ""
        rows.append(f"<tr><th>{swatch(COLORS[method], dash)}{escape(name)}{behind}</th>{cells}</tr>")
    header = (
        "<tr><th></th><th>training loss (last 20)</th><th>validation loss</th><th>learning rate</th><th>time</th></tr>"
    )
    both = any(values[0] is not None and values[1] is not None for _, values in known)
    kind = "numbers several" if run.beside else "numbers"
    shown = table(kind, f"Numbers at step {step}", header + "".join(rows))
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


def lowest(rows: list[tuple]) -> dict[int, float]:
    """Return the lowest value of each loss column (0: training, 1: validation), by column index.

    Columns without two different values are omitted."""
    found = {}
    for column in (0, 1):
        values = [value for row in rows if (value := number(row[column])) is not None]
        if len(values) > 1 and min(values) < max(values):
            found[column] = min(values)
    return found
