"""The model that a run trains. No gradio."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reslora.bundled import ASSETS
from reslora.images.content_hash import folder_mark
from reslora.images.model.loading import Model
from reslora.options.images import Options

from .runs import NO_CONFIG, Run, RunError

BUNDLED = ASSETS / "pipeline"
PIPELINES = {f"{ASSETS.name}/{path.name}": path for path in (BUNDLED, ASSETS / "pipeline-flow")}
"""The bundled pipelines, by the words that a page may name them with."""
OF_MODEL = ("pretrained_vae_model_name_or_path", "revision")
"""Options that make another model of the one that is named."""


@dataclass(frozen=True)
class Base:
    """The pipeline that a run trains: path or hub name, and how the trainer loaded it."""

    name: str = str(BUNDLED)
    vae: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    prediction_type: str | None = None
    folder: str = ""
    """The run's, where the trainer keeps what it made of a single file."""

    def options(self) -> Options:
        """The options of the trainer that say the same."""
        return Options.of(
            pretrained_model_name_or_path=self.name, pretrained_vae_model_name_or_path=self.vae,
            revision=self.revision, variant=self.variant, cache_dir=self.cache_dir, output_dir=self.folder,
            prediction_type=self.prediction_type,
        )  # fmt: skip


def bundled(named: str, known: Mapping[str, Path] = PIPELINES) -> str | None:
    """The word for what is bundled that a path names: here, in a copy, on another machine, or as in the example."""
    word = "/".join(Path(named).parts[-2:])
    if word not in known:
        return None
    there, here = Path("/", named), known[word]
    return word if not there.is_dir() or there.samefile(here) or mark_of(there) == mark_of(here) else None


def mark_of(folder: Path) -> str:
    """What is in a folder, in short; read again when a file has changed."""
    return _mark(folder, max((changed(path) for path in folder.rglob("*")), default=0))


@functools.lru_cache(maxsize=16)
def _mark(folder: Path, last: int) -> str:
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir()]  # what is written of a model is not the model
    return " ".join(map(folder_mark, parts or [folder]))


def base_of(run: Run | None) -> Base:
    """The pipeline of a run; the bundled one without a run. Raises `RunError` where its config.json is damaged."""
    if run is None:
        return Base()
    if run.unreadable:
        raise RunError(f"{run.name}: {NO_CONFIG}, so its model is not known; restore that file.")
    named = run.word("pretrained_model_name_or_path")
    settings = {name: run.word(name) for name in ("revision", "variant", "cache_dir", "prediction_type")}
    if not named:
        return Base(prediction_type=settings["prediction_type"])
    if word := bundled(named):
        named = str(PIPELINES[word])
    is_file = named.endswith(".safetensors")
    vae = run.word("pretrained_vae_model_name_or_path")
    return Base(named, vae, **settings, folder=str(run.folder) if is_file else "")


def times_of(base: Base, model: Model) -> dict[Path, int]:
    """When each file changed that a model is loaded from."""
    parts = [model.folder / part for part in model.index] + ([Path(base.vae)] if base.vae else [])
    files = [path for part in parts for path in part.glob("*")]
    single = [Path(base.name)] if base.folder else []
    return {path: changed(path) for path in (*single, model.folder / "model_index.json", *files)}


def changed(path: Path | None) -> int:
    """When a file changed; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return 0


def model_of(word: str, images: Path | None) -> str:
    """The model that a page names: a bundled pipeline, or one on the hub, which needs images."""
    if word in PIPELINES:
        return str(PIPELINES[word])
    # A name on the hub and nothing else: a path would let the page read other folders of this machine.
    if not is_hub_name(word):
        raise RunError(f"Give the model by its name on the hub, such as owner/model, or one of {', '.join(PIPELINES)}.")
    if images is None:
        raise RunError("Another model needs images: upload some, or choose a folder.")
    return word


def word_of_model(run: str, settings: dict) -> str:
    """The word by which a page names the model of a run's settings; `RunError` where it has none."""
    named = settings.get("pretrained_model_name_or_path") or ""
    word = (bundled(named) or named) if isinstance(named, str) else "/"
    path = [] if word in ("", *PIPELINES) or is_hub_name(word) else ["a model in a folder"]
    unnamed = [*path, *(f"--{flag}" for flag in OF_MODEL if settings.get(flag))]
    if unnamed:
        raise RunError(
            f"{run} was trained with {' and '.join(unnamed)}, which a page cannot name: begin with another "
            "one, or give its config.json to train_sd.py --config."
        )
    return word


def is_hub_name(model: str) -> bool:
    """Whether it is `owner/name`, which cannot be a path of this machine that the page was not given."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model))
