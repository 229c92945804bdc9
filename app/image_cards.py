"""Render a folder of images as HTML: a card with thumbnail, size and caption for each image, and a summary.

Every name and caption is escaped.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence

from reslora.formatting import pluralize

from .image_edits import ImageEdits, text_of
from .image_folders import NO_CAPTION, Image, Images
from .looks import Looks
from .views import escape, scaled

PER_PAGE = 24
MOST = 8
"""Number of reasons, and of messages of the trainer, in the summary."""


def pages(count: int) -> int:
    """Return how many pages `count` images need, at least 1."""
    return max(1, math.ceil(count / PER_PAGE))


def cards(edits: ImageEdits, images: Images, shown: Sequence[Image], page: int) -> str:
    """Return page number `page` of the cards of the images in `shown` as HTML.

    The attributes `data-folder` and `data-names` have the folder's name, and the names of all images in `shown`. The
    attribute `data-time` makes each result unique: Gradio does not send an unchanged result, and the caption boxes
    would keep what the user has typed.
    """
    part = shown[(page - 1) * PER_PAGE : page * PER_PAGE]
    for _ in edits.looks.check(part):
        pass
    alike = edits.looks.alike(images)
    found = [card(edits.looks, image, alike.get(image.name, ("", ""))[1], images.folder.bundled) for image in part]
    names = escape(json.dumps([image.name for image in shown]))
    marks = f'data-folder="{escape(images.folder.name)}" data-names="{names}" data-last="{pages(len(shown))}"'
    return f'<div class="cards" {marks} data-time="{time.time_ns()}">{"".join(found)}</div>'


def card(looks: Looks, image: Image, alike: str, fixed: bool) -> str:
    """Return an image's card as HTML; the caption is read-only if `fixed`.

    `alike`: which image it duplicates or is similar to; empty if there is none.
    """
    name, text, look, problem = escape(image.name), escape(text_of(image)), looks.of(image), looks.problem(image)
    enlarge, picture = "", '<div class="empty">cannot be shown</div>'
    if look and look.thumbnail:
        picture = f'<img src="{look.thumbnail}" alt="{name}" {scaled(image.size[0] if image.size else 0)}>'
        what, mark = ("pair", "&#x2922; pair") if image.reference else ("image", "&#x2922;")
        enlarge = f'<button type="button" class="enlarge" aria-label="enlarge the {what} {name}">{mark}</button>'
    badges = {"out": problem, "alike": alike}
    lines = "".join(f'<p class="badge {kind}">{escape(line)}</p>' for kind, line in badges.items() if line)
    return (
        f'<div class="card{" bad" if problem else ""}" role="group" aria-label="{name}" data-name="{name}">'
        f'<label class="pick"><input type="checkbox" aria-label="select {name}">{picture}</label>{enlarge}'
        f'<p class="name" title="{name}">{name}</p>'
        f'<p class="sizes" title="width &times; height">{" &times; ".join(map(str, image.size or ())) or "&mdash;"}</p>'
        f'{lines}<textarea rows="3" aria-label="caption of {name}" data-was="{text}" placeholder="no caption"'
        f'{" readonly" if fixed else ""}>\n{text}</textarea><p class="told" role="status"></p></div>'
    )


def summary(edits: ImageEdits, images: Images, shown: int) -> str:
    """Return a folder's summary as HTML: how many images it has, how many training skips and why, and the next step.

    `shown`: number of images that the filter selects."""
    every = images.images.values()
    problems = Counter(filter(None, map(edits.looks.problem, every)))
    lines = [f"<b>{pluralize(len(every), 'image')}</b> in {escape(images.folder.name)}, {shown:,} shown"]
    if without := problems.pop(NO_CAPTION, 0):
        have, them = ("has", "it") if without == 1 else ("have", "them")
        line = f"{pluralize(without, 'image')} {have} no caption:"
        lines.append(f'<b class="bad">{line}</b> write {them} below, or let a model write {them}')
    if problems:
        reasons = ", ".join(f"{number:,} {escape(reason)}" for reason, number in problems.most_common(MOST))
        lines.append(f'<b class="bad">Training skips {pluralize(problems.total(), "image")}:</b> {reasons}')
    if images.refused and not without:
        lines.append(f'<b class="bad">Training cannot use this folder:</b> {escape(images.refused)}')
    if every and not (without or problems or images.refused):
        lines.append("Training uses all of them")
    if alike := len(edits.looks.alike(images)):
        lines.append(f"{pluralize(alike, 'image')} with duplicates: see the filter Duplicates")
    elif any(image.size and edits.looks.of(image) is None for image in every):
        lines.append("<i>Check images</i> opens every image to find damaged images and duplicates")
    lines += [f"Message of the trainer: {escape(note)}" for note in images.notes[:MOST]]
    return f'<ul class="told-of">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'
