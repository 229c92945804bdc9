"""Find out from which prompts a directory of samples was generated: a resumed run may have other prompts."""

from pathlib import Path

from ..io import read_object

MERGED = "merged"
"""Directory of the merged model's samples."""
PROMPTS = "prompts.json"
"""File next to the samples with their prompts, as `{"prompts": [...]}`."""


def is_of(record: object, number: int, prompt: str | None) -> bool:
    """Return whether prompt number `number` of a record is `prompt`; True without a record.

    `record`: the content of the file `PROMPTS`.
    """
    drawn = record.get("prompts") if isinstance(record, dict) else None
    return not isinstance(drawn, list) or drawn[number : number + 1] == [prompt]


def shows(samples: Path, number: int, prompt: str) -> bool:
    """Return whether the samples of prompt number `number` in a directory were generated from `prompt`."""
    return is_of(read_object(samples / PROMPTS), number, prompt)


def by_step(samples: Path) -> dict[int, Path]:
    """Return the directories in `samples` by their training step."""
    return {int(path.name[5:]): path for path in samples.glob("step-*") if path.name[5:].isdigit()}
