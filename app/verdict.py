"""Summarize a run in a sentence (HTML) that claims no more than a single run can show."""

from reslora.formatting import pluralize
from reslora.methods.registry import METHODS
from reslora.runtime.log import of_split

from .runs import Run, Weights, number
from .views import escape, notice

ONE_SEED = "One seed cannot show a difference; an experiment can: under Train, give the seeds <code>0 1 2</code>."
ALONE = "There is nothing to compare with: select LoRA and ResLoRA under Train to train both."
LOSS = "loss on images that were not trained on (lower is better)"
HIGH_ERROR = 0.2
"""Mean relative error of the merged blocks above which images of merged and unmerged weights are likely to differ."""
NOTHING_HELD_OUT = (
    "All images are trained on, so the methods' losses cannot be compared: give a validation split, such as 0.1, to "
    "leave some out."
)


def verdict(run: Run, step: int) -> str:
    """Return a sentence with the validation loss of each method, lowest first, as HTML.

    The losses are those at the last step up to `step` at which all methods have a validation loss.
    """
    losses = {method: held_out(run, method) for method in run.methods}
    without = [METHODS[method].title for method, found in losses.items() if not found]
    if len(without) == len(losses):
        told = run.config.get("validation_split")
        return notice(NOTHING_HELD_OUT) if run.config and not told and run.status != "running" else ""
    if without:
        return notice(f"No verdict yet: there is no validation loss of {', '.join(without)}.")
    common = set.intersection(*(set(found) for found in losses.values()))
    at = max((found for found in common if 0 < found <= step), default=None)
    if at is None:
        return notice("No verdict at this step: choose a later step at which all methods have a validation loss.")
    order = sorted(losses, key=lambda method: losses[method][at])
    named = ", ".join(f"{METHODS[method].title} {losses[method][at]:.4f}" for method in order)
    claim, steps = ONE_SEED if len(order) > 1 else ALONE, pluralize(at, "step")
    return f'<p class="verdict"><b>{escape(named)}</b>: {LOSS} after {steps}. {claim}</p>'


def held_out(run: Run, method: str) -> dict[int, float]:
    """Return a method's losses on held-out images (validation losses) by step."""
    return {row["step"]: row["loss"] for row in of_split(run.log(method), "validation")}


def merge_warning(report: object) -> str:
    """Return a warning if a merge report's mean error of the blocks exceeds `HIGH_ERROR`, else an empty string."""
    blocks = report.get("blocks") if isinstance(report, dict) else None
    rows = [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    errors = [error for block in rows if (error := number(block.get("error"))) is not None]
    if not errors or sum(errors) / len(errors) <= HIGH_ERROR:
        return ""
    text = f"This merge has a large error: its blocks differ by {sum(errors) / len(errors):.0%} on average. "
    advice = "Compare its images with those of the unmerged checkpoint."
    return f'<p class="warning" role="status">{escape(text + advice)}</p>'


def warning_for(run: Run, weights: Weights) -> str:
    """Return the warning of `merge_warning` about the merge that produced these weights, or an empty string."""
    if weights.kind not in ("merged", "file"):
        return ""
    return merge_warning(run.read_json(*weights.path.parent.relative_to(run.folder.resolve()).parts, "merge.json"))
