"""The cache directory of an image run."""

from pathlib import Path

from ..options.images import ModelOptions, OutputOptions


def cache_folder(model: ModelOptions, output: OutputOptions) -> Path:
    """Return the directory of encoded images and captions, and of models unpacked from single files."""
    return Path(model.cache_dir) / "encoded" if model.cache_dir else Path(output.output_dir) / "cache"
