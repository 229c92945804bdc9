"""Render runs as HTML: texts, tables and images. This module does not import Gradio, so tests can call it directly.

Every name, caption and number of a run is escaped: a prompt may be `<script>`. The files of a run may have any content;
what cannot be shown is left out.
"""

import base64
import contextlib
import functools
import html
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import PIL.Image

from reslora.formatting import pluralize
from reslora.images.data.images import data_uri
from reslora.methods.registry import METHODS
from reslora.options.prompts import clean

from .activity import activity_of, why_ended
from .generation_request import Drawn
from .runs import BASE, NO_CONFIG, Run, cached_by_stamp, number

T = TypeVar("T")
LARGEST_TILE = 320
TILE, NARROW_TILE = 144, 72
"""Maximum width in pixels to which a small image is enlarged in a table or a card: on a wide page, on a narrow page."""
NAMES = {name: method.title for name, method in METHODS.items()}
COLORS = {name: method.color for name, method in METHODS.items()}
NOTHING = "&mdash;"
LINKS = (
    "An arrow is a shortcut from a layer to the next one of its kind. Scissors mark a missing shortcut; the reason is "
    "below. A row without arrows has trained plain LoRA: to give it shortcuts, choose other layers with "
    "--target_modules."
)
ERRORS = (
    "Relative difference of each merged block from the trained one, on samples of the run; 0 is exact. Where much is "
    "orange, compare images of several merge methods: the axis merge of the X/Y grid under Generate."
)
ALPHAS = (
    "How much the merge adds to each block in place of its neighbors; 1 is as much as the block itself. Where values "
    "are far above 1, compare the images with those of the merge by lstsq."
)
NORMS = (
    "Orange blocks were changed more by ResLoRA than by LoRA, blue ones less. Where nearly all are orange, also train "
    "lora_x2: larger steps alone have the same effect."
)
"""Explanation of the heat map of norms, with advice."""


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


def table_rows(names: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return the rows of a table as HTML: a row with the names of the columns, then the rows of values.

    On a narrow page, the style sheet shows each value below the last one, with the name of its column."""
    titles = [escape(name) for name in names]
    header = "".join(f"<th>{title}</th>" for title in titles)
    lines = (
        "".join(f'<td data-label="{title}">{escape(cell)}</td>' for title, cell in zip(titles, row, strict=True))
        for row in rows
    )
    return "".join(f"<tr>{cells}</tr>" for cells in (header, *lines))


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
    names = ", ".join(NAMES[method] for method in methods)
    facts = [names, f"{pluralize(total // len(methods), 'step')} each" if total and methods else ""]
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
    starting = status in ("starting", "running")
    text = text or (
        "The trainer is starting." if starting else "The log of a training appears here if it was started on this page."
    )
    return f'<div class="log"><pre>{escape(text)}</pre></div>'


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


def skeleton(kind: str = "") -> str:
    """Return a placeholder for a value that is being computed; `kind` is `tall` for images and lists."""
    return f'<span class="skeleton {kind}" role="img" aria-label="computing"></span>'


def notice(text: str) -> str:
    """Return a text in a box as HTML."""
    return f'<div class="notice">{escape(text)}</div>'


def settings_table(images: list[Drawn]) -> str:
    """Return the weights, seed and settings of each generated image as an HTML table."""
    names, rows = ("weights", "seed", "steps", "guidance", "strength", "size", "prompt", "negative"), []
    for drawn in images:
        request = drawn.request
        cells = [drawn.source["weights"], request.seed, request.steps, f"{request.guidance:g}"]
        cells.append("—" if cells[0] == BASE.label else f"{request.strength:g}")  # no effect on the base model
        cells += [f"{request.width} x {request.height}", request.prompt[:100], request.negative_prompt[:100]]
        rows.append(cells)
    return table("made", "Settings of each image", table_rows(names, rows))


# -- chains and merge --------------------------------------------------------------------------------------------------


def place(name: str) -> str:
    """Return a short name of a block's place in the network.

    Examples: d0.1 for `down_blocks.0.attentions.1...`, s3 for `single_blocks.3...`."""
    match = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)(?:\.transformer_blocks\.(\d+))?", name)
    if match:
        inner = f"/{match[4]}" if match[4] not in (None, "0") else ""
        return f"{match[1][0]}{match[2] or ''}.{match[3]}{inner}"
    match = re.match(r"(\w)\w*\.(\d+)\.", name)
    return f"{match[1]}{match[2]}" if match else name


def role_of(name: str) -> str:
    """Return a block's name relative to the repeated module that contains it, such as `attn1.to_q`."""
    return re.sub(r"^(.*transformer_blocks|\w+)\.\d+\.", "", name)


def unless_damaged(view: Callable[[T], str]) -> Callable[[T], str]:
    """Wrap a function that renders the content of a JSON file, so that it returns a notice for invalid content."""

    @functools.wraps(view)
    def guarded(content: T) -> str:
        """Return the HTML of `view`, or a notice."""
        try:
            return view(content)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            return notice("This cannot be shown, because the file in the run's folder is damaged.")

    return guarded


@unless_damaged
def chain_plan(plan: dict | None) -> str:
    """Return the chain plan, which links blocks by shortcuts, as an HTML table with a row per role (see `role_of`).

    An arrow is a shortcut between two blocks. Scissors mark a missing shortcut, with the reason.
    """
    if not plan or not plan.get("chains"):
        return notice("The linked layers are not known yet: ResLoRA writes them when it is merged after training.")
    roles: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for chain in plan["chains"]:
        parts = roles.setdefault(str(chain["role"]), [])
        for position, block in enumerate(chain["blocks"]):
            cut = str(block.get("cut") or "")
            if position:
                parts.append('<span class="link">→</span>')
            elif parts:
                mark = reasons.setdefault(cut, chr(ord("a") + len(reasons) % 26))
                parts.append(f'<span class="cut" title="{escape(cut)}">✂<sup>{mark}</sup></span>')
            shape = f"{block['in_features']}→{block['out_features']}, rank {block['rank']}, tokens {block['tokens']}"
            title = escape(f"{block['name']}\n{shape}")
            parts.append(f'<span class="member" title="{title}">{escape(place(block["name"]))}</span>')
    rows = "".join(f"<tr><th>{escape(role)}</th><td>{''.join(parts)}</td></tr>" for role, parts in roles.items())
    notes = "".join(f"<li>✂<sup>{mark}</sup> {escape(reason)}</li>" for reason, mark in reasons.items())
    in_unet = any(block["name"].startswith("down_blocks.") for chain in plan["chains"] for block in chain["blocks"])
    legend = " (d: down, m: middle, u: up)" if in_unet else ""
    links = (
        f"<p>{pluralize(int(plan.get('links', 0)), 'link')} in {pluralize(len(plan['chains']), 'chain')}{legend}</p>"
    )
    return f'{what(LINKS)}{links}{table("chains", "Chains", rows)}<ul class="reasons">{notes}</ul>'


def what(sentence: str) -> str:
    """Return the explanation of a table or heat map as HTML."""
    return f'<p class="what">{escape(sentence)}</p>'


def heat_map(title: str, sentence: str, values: dict[str, float | None], signed: bool = False) -> str:
    """Return a heat map as an HTML table: roles as rows, places in the network as columns.

    `sentence`: an explanation. `values`: by block name. `signed`: whether values may be negative, as in differences."""
    known = [abs(value) for value in values.values() if value is not None]
    if not known:
        return ""
    largest = max(known) or 1.0
    places = sorted({place(name) for name in values}, key=in_order)
    roles: dict[str, dict[str, str]] = {}
    for name, value in values.items():
        role = role_of(name)
        text = figure(value, f"{'+' if signed else ''}.2f")
        style = shade(value, largest, signed)
        roles.setdefault(role, {})[place(name)] = f'<td title="{escape(name)}: {text}" style="{style}">{text}</td>'
    header = "".join(f"<th>{escape(p)}</th>" for p in places)
    rows = "".join(
        f"<tr><th>{escape(role)}</th>{''.join(cells.get(p, '<td></td>') for p in places)}</tr>"
        for role, cells in sorted(roles.items(), key=lambda item: order_of(item[0]))
    )
    return f"<h4>{escape(title)}</h4>{what(sentence)}{table('heat', title, f'<tr><th></th>{header}</tr>{rows}')}"


def in_order(text: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in texts by value, such as l2 before l10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)]


def order_of(role: str) -> tuple:
    """Return a sort key that orders roles by attention module, then as computed (q, k, v, out)."""
    kind = role.rpartition("to_")[2]
    return role.partition(".")[0], "qkvo".find(kind[:1]), role


def shade(value: float | None, largest: float, signed: bool) -> str:
    """Return the CSS of a heat map's cell: orange for positive, blue for negative, transparent for zero.

    `largest`: the absolute value with full color. `signed`: as in `heat_map`."""
    if value is None:
        return "color:#aaa"
    strength = min(1.0, abs(value) / largest)
    red, green, blue = (25, 113, 194) if signed and value < 0 else (232, 89, 12)
    return f"background:rgba({red},{green},{blue},{0.7 * strength:.2f})"


@unless_damaged
def merge_report(report: dict | None) -> str:
    """Return a merge report as HTML: relative error on the calibration samples and alpha* of each block."""
    if not report or not report.get("blocks"):
        return notice("This run has no merge report yet: it is written when ResLoRA is merged after training.")
    blocks = report["blocks"]
    errors = {block["name"]: number(block["error"]) for block in blocks}
    alphas = {block["name"]: total(block["alpha"]) for block in blocks}
    known = [error for error in errors.values() if error is not None]
    text = f"Merged by {escape(str(report.get('method')))}"
    if known:
        text += f"; relative error {sum(known) / len(known):.1%} on average, {max(known):.1%} at most"
    maps = heat_map("Relative error of the merged block: |merged - unmerged| / |unmerged|", ERRORS, errors)
    if None not in alphas.values():
        maps += heat_map("alpha*: how much of a block its neighbors add", ALPHAS, alphas)
    else:
        maps += "<p>The least-squares merge fits a matrix instead of one alpha* for each block. "
        maps += "Merge by <i>input</i> or <i>weights</i> to see the paper's alpha*.</p>"
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in report.get("notes") or [])
    return f"<p><b>{text}.</b></p>{maps}<ul>{notes}</ul>"


def total(alpha) -> float | None:
    """Return a block's total alpha*: the sum, if `alpha` is a list with a value per neighbor."""
    return number(sum(alpha) if isinstance(alpha, list) else alpha)


def norm_difference(run: Run) -> str:
    """Return a heat map of the Frobenius norm of ResLoRA's merged update minus that of LoRA's update, by block.

    The paper shows the same in Figures 5 and 7.
    """
    ours, theirs = run.lora_norms("reslora"), run.lora_norms("lora")
    difference = {name: ours[name] - theirs[name] for name in ours if name in theirs}
    if not difference:
        return notice("The comparison of norms needs a finished run with both methods: --method lora reslora.")
    title = "Frobenius norm of ResLoRA's merged update minus LoRA's, block by block"
    return heat_map(title, NORMS, difference, signed=True)
