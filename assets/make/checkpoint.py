"""Checkpoints that survive being killed at any moment: written under another name, then renamed."""

from pathlib import Path

import torch


def save_checkpoint(path: Path, parts: dict, step: int) -> None:
    """Save the state_dict of each part, and the step to go on from."""
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, parts: dict) -> int:
    """Load each part's state, and return the step to go on from; 0 where there is no checkpoint yet."""
    if not path.is_file():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]
