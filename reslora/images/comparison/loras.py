"""Read the LoRA files of a comparison, and the training images that their metadata list."""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...content_hash import files_mark
from ...errors import InvalidArgument
from ...formatting import enumerated, pluralize
from ..memory.components import empty_part
from ..model.loading import Model
from ..model.lora_files.adding import check_fit
from ..model.lora_files.names import Names, Parts, names_of
from ..model.lora_files.reading import read_content, read_parts
from ..output.exports import TRAINED_IMAGES, short_marks

SEED = "ss_seed"
FOLDERS = ("ss_dataset_dirs", "ss_tag_frequency")
"""kohya's metadata: JSON objects whose keys are the names of the training folders."""
USUAL = ("data", "dataset", "images", "img", "train", "train_images")
"""Names of folders that say nothing about the folder's content."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that fits the model. Its tensors are not held in memory: `read` reads them again."""

    path: Path
    names: Names
    mark: str
    """Hash of the file's content."""
    parts: tuple[str, ...]
    """The parts of the pipeline whose layers the file changes."""
    ranks: tuple[int, ...]
    """The ranks of the file's layers."""
    metadata: Mapping[str, str] = field(repr=False)

    @property
    def seed(self) -> str | None:
        """The training seed in the file's metadata; None if the metadata have no seed."""
        return self.metadata.get(SEED)

    def read(self) -> Parts:
        """Return the layers of the file by their names in diffusers."""
        return parts_of(self.path, self.names)[0]


def flag_of(path: Path) -> str:
    """Return a file's name for messages."""
    return f"FILE {path}"


def parts_of(path: Path, names: Names) -> tuple[Parts, dict[str, str], str]:
    """Return a file's layers, its metadata, and a hash of its content; raises `InvalidArgument` for other models."""
    content = read_content(path, flag_of(path))
    return read_parts(content, names), content.metadata, files_mark(content.files)


def read_loras(paths: Sequence[Path], model: Model) -> dict[Path, LoraFile]:
    """Read every file once, and check that it is complete, finite and fits the model.

    Raises `InvalidArgument` for the first file that fails a check, or that has layers of a text encoder that cannot be
    trained here.
    """
    names, able = names_of(model.family, model.denoiser_config()), [part.name for part in model.family.trainable]
    found: dict[Path, LoraFile] = {}
    for path in paths:
        parts, metadata, mark = parts_of(path, names)
        for part, layers in parts.items():
            if part == model.family.denoiser:
                continue
            if part not in able:
                problem = f"it has layers of {part}, whose LoRA is not supported for {model.family.name}"
                raise InvalidArgument(flag_of(path), problem, "leave it out")
            if encoder := empty_part(model, part, torch.float32):
                check_fit(flag_of(path), part, encoder, layers)
        ranks = {factors.rank for layers in parts.values() for factors in layers.values()}
        found[path] = LoraFile(path, names, mark, tuple(parts), tuple(sorted(ranks)), metadata)
    return found


def in_order_of_seeds(groups: Mapping[str, Sequence[LoraFile]]) -> dict[str, list[LoraFile]] | None:
    """Return the files of each group by their training seeds; None unless all groups have the same,
    different seeds.
    """
    seeds = [[file.seed for file in files] for files in groups.values()]
    wanted = set(seeds[0])
    if None in wanted or any(set(each) != wanted or len(set(each)) < len(each) for each in seeds):
        return None
    return {name: sorted(files, key=lambda file: str(file.seed)) for name, files in groups.items()}


def trained_on(file: LoraFile, marks: Collection[str], folders: Collection[str]) -> str:
    """Return the evidence in a file's metadata that the file was trained on the compared images; empty if none.

    `marks`: hashes of the images' content, compared with the hashes in files of this trainer. `folders`: names of the
    image folders, compared with the names in files of kohya's scripts.
    """
    if (trained := file.metadata.get(TRAINED_IMAGES)) is not None:
        known = set(trained.split())
        count = sum(mark in known for mark in short_marks(marks))
        return f"its metadata list {count} of the {pluralize(len(marks), 'image')} as training images" if count else ""
    names: set[str] = set()
    for key in FOLDERS:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            names |= set(json.loads(file.metadata[key])) if key in file.metadata else set()
    same = sorted(name for name in names & set(folders) if name.lower() not in USUAL)
    return f"its metadata name a training folder {enumerated(same)}, like that of the images" if same else ""
