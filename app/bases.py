"""The model that a run trains. No gradio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reslora.common.assets import ASSETS
from reslora.diffusion.arguments import Flags

from .runs import Run

BUNDLED = ASSETS / "pipeline"
PIPELINES = {f"{ASSETS.name}/{path.name}": path for path in (BUNDLED, ASSETS / "pipeline-flow")}
"""The bundled pipelines, by the words that a page may name them with."""


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

    def flags(self) -> Flags:
        """The trainer's flags that say the same."""
        return Flags(
            pretrained_model_name_or_path=self.name, pretrained_vae_model_name_or_path=self.vae,
            revision=self.revision, variant=self.variant, cache_dir=self.cache_dir, output_dir=self.folder,
            prediction_type=self.prediction_type,
        )  # fmt: skip


def bundled(named: str) -> str | None:
    """The word for the bundled pipeline that a path names: here, on another machine, or relative as in the example."""
    word = "/".join(Path(named).parts[-2:])
    if word not in PIPELINES:
        return None
    there = Path("/", named)
    return word if not there.is_dir() or there.samefile(PIPELINES[word]) else None


def base_of(run: Run | None) -> Base:
    """The pipeline of a run; the bundled one without a run."""
    if run is None:
        return Base()
    named = run.word("pretrained_model_name_or_path")
    settings = {name: run.word(name) for name in ("revision", "variant", "cache_dir", "prediction_type")}
    if not named:
        return Base(prediction_type=settings["prediction_type"])
    if (word := bundled(named)) and not Path("/", named).is_dir():
        return Base(str(PIPELINES[word]), prediction_type=settings["prediction_type"])
    is_file = named.endswith(".safetensors")
    vae = run.word("pretrained_vae_model_name_or_path")
    return Base(named, vae, **settings, folder=str(run.folder) if is_file else "")
