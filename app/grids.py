"""Make X/Y grids: one image for each pair of values of two settings. This module does not import Gradio."""

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from reslora.formatting import pluralize
from reslora.methods.registry import METHODS
from reslora.plots import figures

from . import views
from .generation_request import Drawn, Request, checked_number
from .runs import BASE, Run, RunError, Weights
from .studio import Picture

NONE = "none"
NUMBERS = ("strength", "seed", "guidance", "steps")
OF_WEIGHTS = ("checkpoint", "method")
AXES = (*OF_WEIGHTS, *NUMBERS, "prompt")
SUGGESTED = {"strength": "0 0.5 1", "seed": "0 1 2", "guidance": "1 4 8", "steps": "5 10 20"}
MOST = 64
"""Maximum number of cells in a grid."""
LARGEST_CELL = 512
"""Maximum width and height in pixels of a cell in the image of the complete grid."""
BY_TITLE = {method.title: name for name, method in METHODS.items()}
"""Names of the methods by their titles, which the form shows."""
Place = tuple[int, int]
"""Row and column of a cell."""


@dataclass(frozen=True)
class Axis:
    """A setting that varies along the rows or columns, and its values."""

    name: str
    values: tuple[str | int | float, ...]

    @property
    def labels(self) -> list[str]:
        """Headings of the rows or columns."""
        if self.name == "method":
            return [METHODS[value].title if value in METHODS else str(value) for value in self.values]
        if self.name in (NONE, "prompt"):
            return [str(value) for value in self.values]
        return [
            f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}" for value in self.values
        ]


@dataclass(frozen=True)
class Grid:
    """The images of an X/Y grid."""

    x: Axis
    y: Axis
    cells: dict[Place, Picture]
    """The image to generate for each cell, ordered by weights, so that weights are loaded as rarely as possible."""
    heading: str
    """Text with the settings that are the same in all cells."""


# -- axes --------------------------------------------------------------------------------------------------------------


def suggestion(run: Run | None, name: str) -> str:
    """Return suggested values of an axis's setting, as text for the form."""
    name = str(name)  # a program may send something else
    if run is None or name in SUGGESTED:
        return SUGGESTED.get(name, "")
    checkpoints = {weights.step for method in run.methods for weights in run.checkpoints(method)}
    known = {"checkpoint": " ".join(map(str, sorted(checkpoints))), "method": ", ".join(run.titles)}
    return (known | {"prompt": "\n".join(run.prompts)}).get(name, "")


def axis(which: str, name: object, text: object) -> Axis:
    """Return the axis `which` (X or Y) for the setting `name`, with the values in the typed `text`.

    Prompts are typed one per line, methods by their titles with commas between them, and other values with spaces.

    Raises `RunError` for an unknown setting, missing values, and numbers that are invalid or outside the limits.
    """
    if which == "Y" and name in (NONE, "", None):
        return Axis(NONE, ("",))
    if name not in AXES:
        raise RunError(f"{which}: no setting has this name; choose one of {', '.join(AXES)}.")
    typed = str(text or "").replace("\0", "")
    if name == "method":
        words = [BY_TITLE.get(word.strip(), word.strip()) for word in typed.replace(",", "\n").splitlines()]
    else:
        words = list(map(str.strip, typed.splitlines())) if name == "prompt" else typed.replace(",", " ").split()
    words = list(dict.fromkeys(word for word in words if word))
    if not words:
        example = SUGGESTED.get(name, "a line each" if name == "prompt" else "words")
        raise RunError(f"{which} ({name}): give the values, such as {example}.")
    if len(words) > MOST:
        raise RunError(f"{which} ({name}): {len(words)} values are more than the {MOST} cells that a grid may have.")
    if name in NUMBERS:
        return Axis(name, tuple(dict.fromkeys(checked_number(name, word, f"{which} ({name})") for word in words)))
    return Axis(name, tuple(words))


# -- cells -------------------------------------------------------------------------------------------------------------


def grid(run: Run | None, start: Weights, request: Request, x: Axis, y: Axis) -> Grid:
    """Return the grid of two axes; `start` and `request` give the weights and settings that do not vary.

    Raises `RunError` for two equal axes, too many cells, and weights that the run does not have.
    """
    if x.name == y.name:
        raise RunError(f"X and Y are both {x.name}: choose two settings.")
    count = len(x.values) * len(y.values)
    if count > MOST:
        raise RunError(f"{len(x.values)} x {len(y.values)} values are {count} cells: at most {MOST} are generated.")
    groups: dict[tuple, dict[Place, Picture]] = {}  # by weights and strength, in order of first occurrence
    for row, down in enumerate(y.values):
        for column, across in enumerate(x.values):
            chosen = {x.name: across, y.name: down}
            weights = weights_of(run, start, chosen)
            asked = {name: value for name, value in chosen.items() if name in (*NUMBERS, "prompt")}
            title = f"Row {row + 1} of {len(y.values)}, column {column + 1} of {len(x.values)}: {weights.label}"
            picture = Picture(weights, replace(request, **asked).checked(), title)
            groups.setdefault((weights.label, picture.request.strength), {})[row, column] = picture
    cells = {place: picture for group in groups.values() for place, picture in group.items()}
    return Grid(x, y, cells, heading(start, request, (x.name, y.name)))


def weights_of(run: Run | None, start: Weights, chosen: dict) -> Weights:
    """Return the weights of a cell.

    `start`: the weights selected in the form. `chosen`: the cell's values by setting."""
    named = {name: value for name, value in chosen.items() if name in OF_WEIGHTS}
    if not named:
        return start
    if run is None or (start.kind == "file" and not start.method):
        raise RunError(f"An uploaded LoRA file has no {next(iter(named))}: choose weights of a run.")
    if named.get("method") in ("base", BASE.label):
        return BASE
    method = named.get("method", start.method)
    if not method:
        raise RunError("The base model has no checkpoints: choose weights of a trained method.")
    if method not in run.methods:
        raise RunError(f"This run has no method {method[:40]}; it has {', '.join(run.titles)}.")
    if "checkpoint" in named:
        return checkpoint_of(run, method, named["checkpoint"])
    return same_form(run, start, method)


def checkpoint_of(run: Run, method: str, word: str) -> Weights:
    """Return a method's checkpoint at the step `word`. Raises `RunError` if there is none."""
    known = {str(weights.step): weights for weights in run.checkpoints(method)}
    if not known:
        raise RunError(f"{METHODS[method].title} has no checkpoints in this run.")
    if word not in known:
        have = ", ".join(sorted(known, key=int))
        raise RunError(f"{METHODS[method].title} has no checkpoint at step {word[:20]}; it has checkpoints at {have}.")
    return known[word]


def same_form(run: Run, start: Weights, method: str) -> Weights:
    """Return the weights of `method` that are of the same kind as the weights `start`.

    The kinds are merged weights, an exported file by name, and a checkpoint at a step. Raises `RunError` if there are
    no such weights."""
    of_method = {weights.label: weights for weights in run.weights() if weights.method == method}
    form = start.label.partition(": ")[2] if start.method else "merged weights"
    title = METHODS[method].title
    if (label := f"{title}: {form}") not in of_method:
        have = ", ".join(label.partition(": ")[2] for label in of_method) or "nothing yet"
        raise RunError(f"{title} has no {form} in this run; it has {have}.")
    return of_method[label]


def heading(start: Weights, request: Request, axes: tuple[str, str]) -> str:
    """Return the settings that are the same in all cells, as text."""
    parts = {"prompt": request.prompt, "seed": f"seed {request.seed}", "steps": pluralize(request.steps, "step")}
    parts |= {"guidance": f"guidance {request.guidance:g}", "strength": f"strength {request.strength:g}"}
    parts["weights"] = "" if set(axes) & set(OF_WEIGHTS) else start.label
    return " · ".join(text for name, text in parts.items() if name not in axes and text)


# -- rendering ---------------------------------------------------------------------------------------------------------


def table(grid: Grid, sources: dict[Place, str]) -> str:
    """Return the grid as an HTML table of the images generated so far; a click enlarges an image.

    `sources`: the images' URLs by (row, column).
    """
    header = "".join(f'<th><div class="prompt">{views.escape(label)}</div></th>' for label in grid.x.labels)
    rows, scale = [], views.scaled(grid.cells[0, 0].request.width)
    for row, label in enumerate(grid.y.labels):
        tiles = ""
        for column, above in enumerate(grid.x.labels):
            shown = '<div class="empty">not yet</div>'
            if source := sources.get((row, column)):
                alt = " · ".join(filter(None, (label, above)))
                shown = views.enlargeable(f'src="{views.escape(source)}" {scale}', alt, (row, column))
            tiles += f"<td>{shown}</td>"
        rows.append(f'<tr><th><div class="prompt">{views.escape(label)}</div></th>{tiles}</tr>')
    mark = f'style="--columns:{len(grid.x.values)}"'
    return views.table("samples", "X/Y grid", f"<tr><th></th>{header}</tr>{''.join(rows)}", mark)


def save_sheet(grid: Grid, drawn: dict[Place, Drawn], path: Path) -> Path:
    """Save the grid, with labels of its rows and columns, as one image; return the path.

    `drawn`: the generated images by (row, column); other cells are empty."""
    images = {place: one.image for place, one in drawn.items()}
    side = max(figures.SMALL, min(max(next(iter(images.values())).size), LARGEST_CELL))
    columns = [textwrap.fill(label, 24, max_lines=4, placeholder=" ...") for label in grid.x.labels]
    rows = [
        (label, [images.get((row, column)) for column in range(len(columns))])
        for row, label in enumerate(grid.y.labels)
    ]
    # A prompt on the Y axis gets a full-width line above its row.
    blocks = [(label, [("", row)]) for label, row in rows] if grid.y.name == "prompt" else [(grid.heading, rows)]
    figures.comparison(path, columns, blocks, side)
    return path
