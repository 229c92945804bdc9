"""Which method is ahead: one sentence that claims no more than one run can show. HTML, as in `views`."""

from __future__ import annotations

from reslora.common.log import of_split

from .runs import Run
from .views import NAMES, escape, notice

ONE_SEED = "One seed: no difference shown. Run an experiment, which can show one: <code>--seed 0 1 2</code>."
ALONE = "There is nothing to compare it with: <code>--method lora reslora</code> trains both."
NOTHING_HELD_OUT = "No image is held out, so no number compares the methods; --validation_split 0.1 holds out a tenth."


def verdict(run: Run, step: int) -> str:
    """The loss on held-out images of each method, the lowest first, at the last step up to this that all have."""
    losses = {method: held_out(run, method) for method in run.methods}
    without = [NAMES[method] for method, found in losses.items() if not found]
    if len(without) == len(losses):
        told = run.config.get("validation_split")
        return notice(NOTHING_HELD_OUT) if run.config and not told and run.status != "running" else ""
    if without:
        return notice(f"No verdict yet: {', '.join(without)} has not been measured on the held-out images.")
    common = set.intersection(*(set(found) for found in losses.values()))
    at = max((found for found in common if 0 < found <= step), default=None)
    if at is None:
        return notice("No verdict yet: before training all methods draw what the base model draws.")
    order = sorted(losses, key=lambda method: losses[method][at])
    named = ", ".join(f"{NAMES[method]} {losses[method][at]:.4f}" for method in order)
    claim = ONE_SEED if len(order) > 1 else ALONE
    return f'<p class="verdict"><b>{escape(named)}</b> on held-out images after {at} steps. {claim}</p>'


def held_out(run: Run, method: str) -> dict[int, float]:
    """The loss on held-out images by step."""
    return {row["step"]: row["loss"] for row in of_split(run.log(method), "validation")}
