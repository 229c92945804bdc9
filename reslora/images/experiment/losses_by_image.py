"""The test images of an experiment with the loss of each: where the best method differs most from its reference."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL.Image

from ...experiment.record import Experiment, Verdict, between_methods
from ...experiment.report import titled
from ...experiment.verdicts import tested
from ...io import replacing
from ...plots.charts import MINUS, escape
from .gallery import tile

FOLDER = "test_images"
"""Directory of thumbnails in an experiment's directory; a file is named after the hash of its image's content."""
SIDE = 160
"""Longest edge of a thumbnail, in pixels."""
SHOWN = 6
"""Number of images at each end of the order that are always visible; a collapsed section contains all images."""


def write_thumbnails(folder: Path, images: Iterable[tuple[str, Callable[[], PIL.Image.Image]]]) -> None:
    """Write thumbnails into an experiment's directory; leave out images that cannot be read at present.

    `images`: for each image the hash of its content, and a function that opens it.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    for name, opened in images:
        with contextlib.suppress(Exception):  # thumbnails are optional, and each format's reader raises its own types
            image = opened()
            image.thumbnail((SIDE, SIDE))
            with replacing(folder / FOLDER / f"{name}.png") as temporary:
                image.save(temporary, "PNG")


def best_verdict(experiment: Experiment) -> Verdict | None:
    """Return the verdict with the largest improvement over its reference; None without verdicts."""
    return min(between_methods(experiment), key=lambda verdict: verdict["relative"], default=None)


def differences(experiment: Experiment) -> list[tuple[str, float]]:
    """Return the hash of each test image and its difference in percent, in ascending order.

    The difference is the loss of the method of `best_verdict` minus the loss of its reference, in percent of the
    reference's loss of this image. Losses are means over the seeds for which all losses of both methods are finite.
    """
    if (verdict := best_verdict(experiment)) is None:
        return []
    losses = tested(experiment["arms"], experiment["chosen"])
    ours, theirs = losses[verdict["label"]], losses[verdict["reference"]]
    both = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    percent = 100 * (ours[both].mean(0) / theirs[both].mean(0) - 1)
    names = next(arm["test"]["images"] for arm in experiment["arms"] if arm["test"])
    return sorted(zip(names, percent.tolist(), strict=True), key=lambda pair: pair[1])


def by_image(experiment: Experiment, folder: Path) -> str:
    """Return HTML with the images of the largest differences in each direction, and a collapsed section with all.

    Empty without verdicts.
    """
    found, verdict = differences(experiment), best_verdict(experiment)
    if not found or verdict is None:
        return ""
    label, reference = escape(titled(verdict["label"])), escape(titled(verdict["reference"]))
    ends = found if len(found) <= 2 * SHOWN else [*found[:SHOWN], *found[-SHOWN:]]
    better = sum(percent < 0 for _, percent in found)
    note = (
        f"<p>Test loss of {label} compared with {reference} on each image, mean over seeds, from the lowest to the "
        f"highest. It is lower on {better} of {len(found)} images. A single image decides nothing: the verdict is "
        "about all of them.</p>"
    )
    whole = f"<details><summary>All {len(found)} test images</summary>{figures(found, folder)}</details>"
    return note + figures(ends, folder) + (whole if len(found) > len(ends) else "")


def figures(found: Iterable[tuple[str, float]], folder: Path) -> str:
    """Return HTML with a captioned thumbnail for each image and difference in percent."""
    cells = []
    for name, percent in found:
        text = f"{MINUS if percent < 0 else '+'}{abs(percent):.1f}%"
        image = tile(folder / FOLDER / f"{name}.png", f"test image {name}: {text}", "")
        cells.append(f"<figure>{image or escape(name[:12])}<figcaption>{text}</figcaption></figure>")
    return f'<div class="by-image">{"".join(cells)}</div>'
