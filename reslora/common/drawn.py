"""What a folder of samples says that it was drawn of: prompts may be others when a run goes on."""

from __future__ import annotations

from pathlib import Path

from ..files import read_object

PROMPTS = "prompts.json"
"""The file beside samples that has their prompts, as `{"prompts": [...]}`."""


def is_of(record: object, number: int, prompt: str | None) -> bool:
    """Return whether samples with a prompt's number are of that prompt, by that file's content, if there is one."""
    drawn = record.get("prompts") if isinstance(record, dict) else None
    return not isinstance(drawn, list) or drawn[number : number + 1] == [prompt]


def shows(samples: Path, number: int, prompt: str) -> bool:
    """Return whether the samples in a folder with a prompt's number are of that prompt."""
    return is_of(read_object(samples / PROMPTS), number, prompt)


def by_step(samples: Path) -> dict[int, Path]:
    """Return the folders in `samples`, by the step at which they were drawn."""
    return {int(path.name[5:]): path for path in samples.glob("step-*") if path.name[5:].isdigit()}
