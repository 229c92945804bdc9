"""LoRAs of tiny pipelines with known updates, for the tests of this folder and of the conversion."""

import functools
import tempfile
from pathlib import Path

import pipelines
import torch

from reslora.export import Factors
from reslora.images.model.families import FAMILIES, load_family
from reslora.images.model.lora_files.names import Names, Parts, names_of
from reslora.images.model.lora_files.reading import read_content, read_parts

PIPELINE_OF = {family: pipeline for pipeline, family in FAMILIES.items()}


@functools.cache
def tiny(family: str) -> Path:
    """Return a family's tiny pipeline, made when it is first requested."""
    place = tempfile.TemporaryDirectory()
    tiny.places.append(place)  # it goes when the tests are over
    return pipelines.FAMILIES[family](Path(place.name) / family)


tiny.places = []


@functools.cache
def names(family: str) -> Names:
    """Return the names of the tiny pipeline's layers."""
    found = load_family(PIPELINE_OF[family])
    return names_of(found, found.denoiser_class.load_config(tiny(family) / found.denoiser))


def random_factors(shape, rank: int, scale: float, seed: int) -> Factors:
    """Return float64 factors for a layer with a weight of this shape."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator, dtype=torch.float64)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)
    return Factors(down, up, scale)


def random_lora(family: str, keep=lambda name: True) -> Parts:
    """Return a LoRA of all layers that have a name in kohya's files, with two ranks and two scales."""
    known = names(family)
    layers = [layer for fused in known.kohya.values() for _, layer in fused.layers if keep(layer)]
    return {
        known.family.denoiser: {
            layer: random_factors(known.shapes[layer], 2 + number % 2, [0.5, 1.25][number % 3 == 0], number)
            for number, layer in enumerate(layers)
        }
    }


def update(factors: Factors) -> torch.Tensor:
    """Return the update of a layer's weight as a matrix, by the formula."""
    return factors.scale * factors.up.flatten(1).double() @ factors.down.flatten(1).double()


def updates(parts: Parts) -> dict[str, torch.Tensor]:
    return {f"{part}.{layer}": update(f) for part, layers in parts.items() for layer, f in layers.items()}


def read(path: Path, known: Names) -> dict[str, torch.Tensor]:
    """Return the updates that a file contains."""
    return updates(read_parts(read_content(path, f"IN {path}"), known))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)
