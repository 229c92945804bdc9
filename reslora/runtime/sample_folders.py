"""Find out from which prompts a directory of samples was generated: a resumed run may have other prompts."""

from pathlib import Path

from ..io import read_object

MERGED = "merged"
"""Directory of the merged model's samples."""
REQUESTED = "requested"
"""Directory of the samples of prompts that were requested while training."""
PROMPTS = "prompts.json"
"""Name of the file in a samples directory that stores their prompts, as `{"prompts": [...]}`."""


def is_of(record: object, number: int, prompt: str | None) -> bool:
    """Return whether prompt number `number` (from 0) in `record` is `prompt`; True if `record` has no prompts.

    `record`: the content of the file `PROMPTS`.
    """
    drawn = record.get("prompts") if isinstance(record, dict) else None
    return not isinstance(drawn, list) or drawn[number : number + 1] == [prompt]


def shows(samples: Path, number: int, prompt: str) -> bool:
    """Return whether the samples of prompt number `number` (from 0) in a directory were generated from `prompt`."""
    return is_of(read_object(samples / PROMPTS), number, prompt)


def by_step(samples: Path) -> dict[int, Path]:
    """Return training step -> directory, for the directories `step-<number>` in `samples`."""
    return {int(path.name[5:]): path for path in samples.glob("step-*") if path.name[5:].isdigit()}
