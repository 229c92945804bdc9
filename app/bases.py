"""Find the base model of a run. This module does not import Gradio."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from diffusers import DiffusionPipeline

from reslora.bundled import ASSETS
from reslora.images.memory.components import outline
from reslora.images.model.loading import Model, find_model
from reslora.images.model_checks import check_pipeline
from reslora.options.images import Options

from .runs import NO_CONFIG, Run, RunError

BUNDLED = ASSETS / "pipeline"
PIPELINES = {f"{ASSETS.name}/{path.name}": path for path in (BUNDLED, ASSETS / "pipeline-flow")}
"""Paths of the bundled pipelines by the names that the page offers."""
DEFAULT = next(iter(PIPELINES))
"""The model that is trained if none is given."""
OF_MODEL = ("pretrained_vae_model_name_or_path", "pretrained_transformer_file", "revision")
"""Options that change which weights are loaded for a model name; the page does not offer them."""


def bundled(named: str, known: Mapping[str, Path] = PIPELINES) -> str | None:
    """Return the name (key in `known`) of the bundled asset that the path `named` refers to, or None.

    The path may be from another machine. A path that exists on this machine must be that of the bundled asset itself.
    """
    word = "/".join(Path(named).parts[-2:])
    if word not in known:
        return None
    there, here = Path("/", named), known[word]
    return word if not there.is_dir() or there.samefile(here) else None


def base_of(run: Run | None) -> Options:
    """Return the options that say which base model a run has, or those of the bundled pipeline if `run` is None.

    `output_dir` is only set for a single file: the trainer stores the file, converted to a folder, in the run's folder.
    Raises `RunError` if the run's config.json is damaged.
    """
    if run is None:
        return Options.of(pretrained_model_name_or_path=str(BUNDLED), output_dir="")
    if run.unreadable:
        raise RunError(f"{run.name}: {NO_CONFIG}, so the run's base model is not known; restore config.json.")
    named = run.word("pretrained_model_name_or_path") or DEFAULT
    if word := bundled(named):
        named = str(PIPELINES[word])
    others = {name: run.word(name) for name in (*OF_MODEL, "variant", "cache_dir", "prediction_type")}
    is_file = others["pretrained_transformer_file"] or named.endswith(".safetensors")
    folder = str(run.folder) if is_file else ""
    return Options.of(pretrained_model_name_or_path=named, output_dir=folder, **others)


def check_sizes(options: Options) -> None:
    """Raise `InvalidArgument` for sizes of images that the model does not support; only for a model in a folder."""
    folder = Path(options.model.pretrained_model_name_or_path or BUNDLED)
    if folder.is_dir():
        model, pipeline = outline_of(folder)
        check_pipeline(options.data, options.validation, pipeline, model.family)


@functools.lru_cache(4)
def outline_of(folder: Path) -> tuple[Model, DiffusionPipeline]:
    """Return a model with its pipeline without weights."""
    base = Options.of(pretrained_model_name_or_path=str(folder), output_dir="")
    model = find_model(base.model, base.output, PartialState())
    return model, outline(model)


def model_of(word: str, images: Path | None) -> str:
    """Return the path or hub name of the model whose name on the page is `word`.

    Raises `RunError` if `word` is neither a bundled pipeline nor a hub name, and for a hub model without images.
    """
    if word in PIPELINES:
        return str(PIPELINES[word])
    # Accept hub names only: a path would let the page read other folders of this machine.
    if not is_hub_name(word):
        raise RunError(f"Give the model by its name on the hub, such as owner/model, or one of {', '.join(PIPELINES)}.")
    if images is None:
        raise RunError("A model from the hub needs training images: choose a folder, or upload one under Images.")
    return word


def word_of_model(run: str, settings: dict) -> str:
    """Return the name that selects, on the page, the base model in a run's settings.

    Raises `RunError` if the page cannot select this model. `run`: the run's name, for the error message.
    """
    named = settings.get("pretrained_model_name_or_path") or ""
    word = (bundled(named) or named) if isinstance(named, str) else "/"
    path = [] if word in ("", *PIPELINES) or is_hub_name(word) else ["a model in a folder"]
    unnamed = [*path, *(f"--{flag}" for flag in OF_MODEL if settings.get(flag))]
    if unnamed:
        raise RunError(
            f"{run} was trained with {' and '.join(unnamed)}, which this page cannot set: choose another "
            "run, or pass its config.json to train_sd.py --config."
        )
    return word


def is_hub_name(model: str) -> bool:
    """Return whether `model` has the form `owner/name`, which excludes paths of this machine."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model))
