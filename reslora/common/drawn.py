"""What a folder of samples says that it was drawn of: prompts may be others when a run goes on."""

from __future__ import annotations

PROMPTS = "prompts.json"
"""The file beside samples that has their prompts, as `{"prompts": [...]}`."""


def is_of(record: object, number: int, prompt: str | None) -> bool:
    """Whether samples with a prompt's number are of that prompt, by that file's content; earlier versions kept none."""
    drawn = record.get("prompts") if isinstance(record, dict) else None
    return not isinstance(drawn, list) or drawn[number : number + 1] == [prompt]
