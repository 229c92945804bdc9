"""The file with a run's new tokens (--new_tokens) in a checkpoint: their embeddings, by text encoder."""

from pathlib import Path

from ..io import read_tensors, write_tensors
from .trained import Trained

FILE = "new_tokens.safetensors"


def save_embeddings(trained: Trained, folder: Path) -> None:
    """Write the embeddings of new tokens to a checkpoint's folder; nothing if there are none."""
    if len(trained.embeddings):
        write_tensors(folder / FILE, trained.embeddings.state_dict(), {"format": "pt"})


def load_embeddings(trained: Trained, folder: Path) -> None:
    """Load the embeddings of new tokens from a checkpoint's folder; nothing if there are none."""
    if len(trained.embeddings):
        trained.embeddings.load_state_dict(read_tensors(folder / FILE)[0])
