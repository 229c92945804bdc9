"""Render runs as HTML: texts, tables and images. This module does not import Gradio, so tests can call it directly.

Every name, caption and number of a run is escaped: a prompt may be `<script>`. The files of a run may have any content;
what cannot be shown is left out.
"""

import base64
import contextlib
import html
import io
import json
from pathlib import Path

import PIL.Image

from reslora.formatting import pluralize
from reslora.images.data.images import data_uri
from reslora.options.prompts import clean

from .activity import activity_of, why_ended
from .runs import NO_CONFIG, Run, cached_by_stamp, number

LARGEST_TILE = 320
TILE, NARROW_TILE = 144, 72
"""Maximum width in pixels to which a small image is enlarged in a table or a card: on a wide page, on a narrow page."""


NOTHING = "&mdash;"
LOADING = '<div class="notice loading">Loading ...</div>'
"""What a component shows until its first value arrives."""


def escape(text: str) -> str:
    """Escape a text for HTML and for Gradio's templates, in which `${}` and `{{}}` are placeholders."""
    return html.escape(clean(str(text))).replace("{", "&#123;").replace("$", "&#36;")


# -- images ------------------------------------------------------------------------------------------------------------


@cached_by_stamp(512)
def embedded(path: Path) -> str:
    """Return the attributes of an HTML image with the content of a file: its data URI and `scaled`.

    The image is at most `LARGEST_TILE` pixels wide and high. Raises an exception, which differs by image format, for a
    damaged file."""
    content = path.read_bytes()
    with PIL.Image.open(io.BytesIO(content)) as image:
        image.load()  # raise for a damaged file, of which a browser would show nothing
        if max(image.size) > LARGEST_TILE:
            source = data_uri(image.convert("RGB"), LARGEST_TILE, quality=90)
        else:
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        return f'src="{source}" {scaled(image.width)}'


def scaled(width: int) -> str:
    """Return HTML attributes that show a small image at a whole multiple of its width, smaller on narrow pages.

    `width`: the image's width in pixels. The result is empty for larger images."""
    if not 0 < width <= TILE:
        return ""
    return f'class="small" style="--own:{width}px;--times:{TILE // width};--few:{max(1, NARROW_TILE // width)}"'


def table(kind: str, name: str, rows: str, mark: str = "") -> str:
    """Return an HTML table that scrolls horizontally if it is too wide.

    `kind`: CSS class. `name`: accessible name. `rows`: HTML of the rows. `mark`: further attributes."""
    name = escape(name)
    return f'<div class="scroll" tabindex="0"><table class="{kind}" aria-label="{name}" {mark}>{rows}</table></div>'


def tile(path: Path | None, alt: str, place: tuple[int, int], absent: str = "not yet") -> str:
    """Return as HTML an image that a click enlarges, or a placeholder if the image is missing or damaged.

    `place`: (row, column) in the table. `absent`: placeholder of a missing image."""
    if path is None:
        return f'<div class="empty">{absent}</div>'
    try:
        return enlargeable(embedded(path), alt, place)
    except Exception:  # exceptions differ by image format
        return '<div class="empty">damaged</div>'


def enlargeable(image: str, alt: str, place: tuple[int, int]) -> str:
    """Return as HTML an image that a click enlarges.

    `image`: further attributes of the image, such as its source. `place`: (row, column) in the table.
    """
    image = f'<img {image} alt="{escape(alt)}" title="{escape(alt)}">'
    return f'<button type="button" class="tile" data-row="{place[0]}" data-column="{place[1]}">{image}</button>'


# -- texts and numbers -------------------------------------------------------------------------------------------------


def figure(value, form: str, unit: str = "") -> str:
    """Return a number formatted by the format specification `form`, with its unit; a dash for other values."""
    value = number(value)
    return NOTHING if value is None else f"{value:{form}}{unit}"


def summary(run: Run, status: str, said: str = "") -> str:
    """Return a run's progress, current work and settings as HTML.

    `said`: the last line of the log, shown only if it explains why the run failed or stopped early.
    """
    config = run.config
    done, total = run.progress
    methods = run.methods
    facts = [", ".join(run.titles), f"{pluralize(total // len(methods), 'step')} each" if total and methods else ""]
    if done < total:
        facts.append(f"{done} of {total} done")
    if run.unreadable:
        facts.append(NO_CONFIG)
    elif "reslora" in methods:
        facts.append(f"shortcut {config.get('shortcut')}")
    facts += [f"rank {config.get('rank')}", f"learning rate {config.get('learning_rate')}"] if config else []
    text = " · ".join(escape(str(fact)[:80]) for fact in facts if fact)
    return status_line(run, status, text, why_ended(run, status, said))


def status_line(run: Run, status: str, text: str, why: str) -> str:
    """Return the status of a run or experiment as HTML; during training, also its current work and a progress bar.

    `text`: further facts, in HTML. `why`: the reason for an early end; may be empty.
    """
    done, total = run.progress
    if now := activity_of(run) or ("The trainer is starting" if status == "starting" else ""):
        text = f'<span class="now">{escape(now)}</span><small>{text}</small>'
    share = 100 * done / total if total else 0
    bar = f'<div class="bar"><div style="width:{share:.1f}%"></div></div>' if status in ("running", "starting") else ""
    return f'<div class="summary"><b class="{status}">{status}</b> {text}{bar}{bad(why)}</div>'


def bad(text: str) -> str:
    """Return an error as HTML, or an empty string for an empty text."""
    return f'<p class="bad">{escape(text)}</p>' if text else ""


def log(text: str, status: str) -> str:
    """Return the trainer's output as HTML that is scrolled to the end; without output, return why there is none."""
    none = "The trainer is starting." if status == "starting" else "The page shows logs of trainings that it started."
    return f'<div class="log"><pre>{escape(text or none)}</pre></div>'


def printed(text: str) -> str:
    """Return the output of a program as HTML."""
    return f'<div class="printed scroll" tabindex="0"><pre>{escape(text)}</pre></div>'


def thumbnails(paths: list[Path]) -> str:
    """Return small images in a row, as HTML; unreadable images are left out."""
    found = []
    for path in paths:
        with contextlib.suppress(Exception):  # exceptions of damaged files differ by image format
            found.append(f'<img {embedded(path)} alt="">')
    return f'<div class="thumbnails">{"".join(found)}</div>' if found else ""


def progress(text: str, share: float) -> str:
    """Return a text with a progress bar as HTML; `share`: completed fraction, from 0 to 1."""
    bar = f'<div class="bar"><div style="width:{100 * share:.0f}%"></div></div>'
    return f'<div class="summary">{escape(text)}{bar}</div>'


def search(index: list[dict[str, str]]) -> str:
    """Return the search box of the options; `index` is what `search.js` searches."""
    content = escape(json.dumps(index))
    return (
        f'<div data-options="{content}"><input type="search" placeholder="Search all options" '
        'aria-label="Search all options"><p role="status"></p></div>'
    )


def facts(values: dict[str, str]) -> str:
    """Return short facts with their names."""
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="facts" aria-live="polite">{"".join(cells)}</dl>'


def notice(text: str) -> str:
    """Return a text in a box as HTML."""
    return f'<div class="notice">{escape(text)}</div>'
