"""List a run's linked layers, with the errors of their merge and the norms of their updates."""

import re

from reslora.formatting import pluralize

from .runs import Run, number
from .verdict import merge_warning
from .views import notice

COLUMNS = ["layer", "place", "shortcut from", "merge error", "alpha*"]
ABOUT = """
Each row is a layer that ResLoRA trains.

- *shortcut from*: the layer before it whose update it also receives; without one, the reason. A layer without a
  shortcut is plain LoRA: to give it one, choose other target modules.
- *merge error*: relative difference of the merged layer from the trained one, on samples of the run; 0 is exact. Where
  it is large, compare the images of several merge methods: the axis *merge* of the X/Y grid under *Generate*.
- *alpha\\**: how much the merge adds to the layer in place of its neighbors; 1 is as much as the layer itself. The
  least-squares merge (lstsq) fits a matrix instead.
"""


def place(name: str) -> str:
    """Return a short name of a block's place in the network.

    Examples: down 0.1 for `down_blocks.0.attentions.1...`, single 3 for `single_blocks.3...`."""
    match = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)(?:\.transformer_blocks\.(\d+))?", name)
    if match:
        inner = f"/{match[4]}" if match[4] not in (None, "0") else ""
        return f"{match[1]} {f'{match[2]}.' if match[2] else ''}{match[3]}{inner}"
    match = re.match(r"([a-z]+)\w*\.(\d+)\.", name)
    return f"{match[1]} {match[2]}" if match else name


def role_of(name: str) -> str:
    """Return a block's name relative to the repeated module that contains it, such as `attn1.to_q`."""
    return re.sub(r"^(.*transformer_blocks|\w+)\.\d+\.", "", name)


def linked_layers(run: Run) -> tuple[str, list[list[object]]]:
    """Return a summary as HTML, and the rows of the table `COLUMNS`."""
    if "reslora" not in run.methods:
        return notice("Only ResLoRA links layers, and this run does not train it."), []
    plan, report = run.read_json("reslora", "chains.json"), run.read_json("reslora", "merge.json")
    try:
        rows = rows_of(plan, report)
        errors = [row[3] for row in rows if row[3] is not None]
        links = int(plan.get("links", 0))
    except (LookupError, TypeError, ValueError, AttributeError):
        return notice("This cannot be shown, because a file in the run's folder is damaged."), []
    if not rows:
        return notice("The linked layers are not known yet: ResLoRA writes them when it is merged after training."), []
    told = f"{pluralize(links, 'shortcut')} between {pluralize(len(rows), 'layer')}"
    if errors:
        told += f"; merged by {report.get('method')}, error {sum(errors) / len(errors):.1%} on average, "
        told += f"{max(errors):.1%} at most"
    notes = [str(note) for note in report.get("notes") or []]
    return merge_warning(report) + notice(". ".join([told, *notes])), rows


def rows_of(plan: dict, report: dict) -> list[list[object]]:
    """Return the rows of the table from the contents of chains.json and merge.json."""
    merged = {block["name"]: block for block in report.get("blocks", ())}
    rows = []
    for chain in plan.get("chains", ()):
        before = ""
        for block in chain["blocks"]:
            name = str(block["name"])
            found = merged.get(name, {})
            alpha = found.get("alpha")
            values = found.get("error"), sum(alpha) if isinstance(alpha, list) else alpha
            numbers = [None if number(value) is None else round(value, 3) for value in values]
            rows.append([role_of(name), place(name), before or f"none: {block.get('cut') or 'unknown'}", *numbers])
            before = place(name)
    return rows
