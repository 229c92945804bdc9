"""Report layers without shortcuts, and chains shorter than --pre_num."""

from collections.abc import Callable

from torch import nn

from ..config import ResLoraConfig
from ..formatting import is_or_are, pluralize
from ..linking import chains
from .registry import DEFAULT_PRE_NUM, METHODS


def print_links(
    model: nn.Module,
    method: str,
    shortcuts: ResLoraConfig,
    tell: Callable[[str], object],
    example_inputs: dict | None = None,
) -> None:
    """Report, by calling `tell`, the layers that stay plain LoRA and the chains that are too short for --pre_num.

    On a chain of n blocks, all values of --pre_num from n - 1 are equivalent. Nothing is reported for a method without
    chains. `model` must have the method's adapter; `example_inputs`: see `reslora.chains`.
    """
    if not METHODS[method].reads_shortcut or not shortcuts.wired:
        return
    plan = chains(model, example_inputs=example_inputs)
    if plan.unlinked:
        name, reason = plan.unlinked[0]
        tell(f"--shortcut: {pluralize(len(plan.unlinked), 'layer')} left as plain LoRA, such as {name} ({reason})")
    reach, longest = shortcuts.reach, max(map(len, plan), default=0)
    start = f"--pre_num {shortcuts.pre_num}:"
    if reach is not None and reach < shortcuts.pre_num:  # a shortcut that always uses one block
        if shortcuts.pre_num > max(longest - 1, DEFAULT_PRE_NUM):
            most = pluralize(longest, "block")
            tell(f"{start} the longest chain has {most}, and --shortcut {shortcuts.shortcut} uses only one")
    elif reach is not None and (short := [len(chain) for chain in plan.clipped(reach)]):
        linked = sum(len(chain) > 1 for chain in plan)
        most = f"; the longest has {longest}, so this equals --pre_num {longest - 1}" if longest <= reach else ""
        shorter = f"{len(short)} of {pluralize(linked, 'chain')} {is_or_are(len(short))} shorter"
        tell(f"{start} {shorter} (shortest: {pluralize(min(short), 'block')}){most}")
