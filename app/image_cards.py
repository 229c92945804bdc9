"""Render a folder of images as HTML: a card with thumbnail, sizes and caption for each image, and a summary.

Every name and caption is escaped.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence

from reslora.formatting import pluralize
from reslora.images.data.size import Size

from .image_edits import ImageEdits, text_of
from .image_folders import OUTSIDE, Image, Images
from .views import escape, scaled

PER_PAGE = 24
MOST_NOTES = 8
SIZES = "width &times; height of the file &rarr; in training"


def pages(count: int) -> int:
    """Return how many pages `count` images need, at least 1."""
    return max(1, math.ceil(count / PER_PAGE))


def cards(edits: ImageEdits, images: Images, shown: Sequence[Image], page: int) -> str:
    """Return page number `page` of the cards of the images in `shown` as HTML.

    The attributes `data-folder` and `data-names` have the folder's name, and the names of all images in `shown`.

    The attribute `data-drawn` makes each result unique. Otherwise Gradio would not send an unchanged result, and the
    caption boxes would keep what the user has typed.
    """
    part = shown[(page - 1) * PER_PAGE : page * PER_PAGE]
    thumbnails = edits.looks.thumbnails(part)
    alike = edits.looks.alike(images)
    found = []
    for image, thumbnail in zip(part, thumbnails, strict=True):
        badges = edits.looks.problem(image), alike.get(image.name, ("", ""))[1]
        found.append(card(image, thumbnail, badges, images.folder.bundled or image.problem == OUTSIDE))
    names = escape(json.dumps([image.name for image in shown]))
    marks = f'data-folder="{escape(images.folder.name)}" data-names="{names}" data-last="{pages(len(shown))}"'
    return f'<div class="cards" {marks} data-drawn="{time.time_ns()}">{"".join(found)}</div>'


def card(image: Image, thumbnail: str, badges: tuple[str, str], fixed: bool) -> str:
    """Return an image's card as HTML; the caption is read-only if `fixed`.

    `badges`: why training skips the image, and which image it duplicates or is similar to; either may be empty.
    """
    name, text = escape(image.name), escape(text_of(image))
    enlarge = ""
    picture, scale = '<div class="empty">cannot be shown</div>', scaled(image.size[0] if image.size else 0)
    if thumbnail:
        picture = f'<img src="{thumbnail}" alt="{name}" {scale}>'
        what, mark = ("pair", "&#x2922; pair") if image.reference else ("image", "&#x2922;")
        enlarge = f'<button type="button" class="enlarge" aria-label="enlarge the {what} {name}">{mark}</button>'
    kinds = zip(("out", "alike"), badges, strict=True)
    lines = "".join(f'<p class="badge {kind}">{escape(line)}</p>' for kind, line in kinds if line)
    return (
        f'<div class="card{" bad" if badges[0] else ""}" role="group" aria-label="{name}" data-name="{name}">'
        f'<label class="pick"><input type="checkbox" aria-label="select {name}">{picture}</label>{enlarge}'
        f'<p class="name" title="{name}">{name}</p><p class="sizes" title="{SIZES}">{sizes(image)}</p>{lines}'
        f'<textarea rows="3" aria-label="caption of {name}" data-was="{text}" placeholder="no caption"'
        f'{" readonly" if fixed else ""}>\n{text}</textarea><p class="told" role="status"></p></div>'
    )


def sizes(image: Image) -> str:
    """Return an image's width and height in pixels, and its sizes in training, as HTML."""
    if image.size is None:
        return "&mdash;"
    own = in_words(Size(height=image.size[1], width=image.size[0]))
    return f"{own} &rarr; {', '.join(map(in_words, image.buckets))}" if image.buckets else own


def in_words(size: Size) -> str:
    """Return a size as `width x height` in HTML."""
    return f"{size.width} &times; {size.height}"


def summary(edits: ImageEdits, images: Images, shown: int) -> str:
    """Return a folder's summary as HTML.

    It has the number of images, how many training skips and why, duplicates, buckets, and the trainer's warnings.
    `shown`: number of images that the filter selects."""
    problems = Counter(filter(None, map(edits.looks.problem, images.images.values())))
    count, left_out = len(images.images), sum(problems.values())
    lines = [f"<b>{pluralize(count, 'image')}</b> in {escape(images.folder.name)}, {shown:,} shown"]
    if images.refused:
        lines.append(f'<b class="bad">Training would refuse this folder:</b> {escape(images.refused)}')
    elif left_out:
        reasons = ", ".join(f"{number:,} {escape(reason)}" for reason, number in problems.most_common(MOST_NOTES))
        lines.append(f'<b class="bad">Training would skip {pluralize(left_out, "image")}:</b> {reasons}')
    else:
        lines.append("Training would use all of them")
    alike = len(edits.looks.alike(images))
    if alike:
        lines.append(f"{pluralize(alike, 'image')} with duplicates: see the filter Duplicates")
    elif any(image.size and edits.looks.of(image) is None for image in images.images.values()):
        lines.append("<i>Check images</i> opens every image to find more damaged images and duplicates")
    buckets = Counter(size for image in images.images.values() if not image.problem for size in image.buckets)
    if len(buckets) > 1:
        found = (f"{in_words(size)}: {number:,}" for size, number in buckets.most_common())
        lines.append(f"{len(buckets)} buckets (width &times; height: images): {', '.join(found)}")
    lines += [f"Message of the trainer: {escape(note)}" for note in images.notes[:MOST_NOTES]]
    return f'<ul class="told-of">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'
