"""Load LoRA files and stacks (weighted sums of several LoRAs) into models. This module does not import Gradio."""

from collections.abc import Mapping
from pathlib import Path

from peft import inject_adapter_in_model
from torch import nn

from reslora.chains import lora_layers
from reslora.checkpoint import PEFT_PREFIX
from reslora.errors import InvalidArgument, RunFailed
from reslora.export import DIFFUSERS_FILE, Factors, lora_config
from reslora.formatting import pluralize
from reslora.images.model.families.base import Family
from reslora.images.model.lora_files.combining import summed
from reslora.images.model.lora_files.names import Names, Parts, names_of
from reslora.images.model.lora_files.reading import read_content, read_parts

from .bases import base_of
from .generation_request import within_limits
from .library import Library
from .runs import Run, RunError, Weights, pick
from .weight_files import check_adapter_file, in_names_of, refuse_misfits, without_folders

MOST = 8
"""Maximum number of LoRAs in a stack."""


def loras(library: Library, run: Run | None) -> dict[str, Weights]:
    """Return the LoRAs of all runs with the same base model as `run`.

    The keys name run and method; the page shows them."""
    return {name: weights for name, (owner, weights) in _all_loras(library).items() if same_base(owner, run)}


def _all_loras(library: Library) -> dict[str, tuple[Run, Weights]]:
    """Return the LoRA files in diffusers' format of all runs, each with its run; the keys are those of `loras`."""
    found = {}
    for run in library.runs().values():
        for weights in run.weights():
            if weights.kind == "file" and weights.path.name == DIFFUSERS_FILE:
                found[f"{run.name}: {weights.label.removesuffix(f': {DIFFUSERS_FILE}')}"] = run, weights
    return found


def same_base(one: Run | None, other: Run | None) -> bool:
    """Return whether two runs have the same base model."""
    if any(run and run.unreadable for run in (one, other)):
        return False
    mine, theirs = base_of(one), base_of(other)
    names = ("pretrained_model_name_or_path", "pretrained_transformer_file", "revision", "variant")
    return all(mine[name] == theirs[name] for name in names)


def stacked(library: Library, run: Run | None, names: object, strengths: str) -> Weights:
    """Return a stack of LoRAs for the base model of `run`.

    `names`: keys of `loras`. `strengths`: text with one number per LoRA. Raises `RunError` for an unknown name, a LoRA
    of another base model, and an invalid strength.
    """
    if not isinstance(names, list):
        raise RunError("The LoRAs are not a list: give a list of their names.")
    if len(names) > MOST:
        raise RunError(f"{len(names)} LoRAs: at most {MOST} can be stacked.")
    known, found = _all_loras(library), []
    for name in names:
        owner, weights = pick(known, name, "There is no LoRA with this name; choose from the list.")
        if not same_base(owner, run):
            mine, theirs = (Path(base_of(one).model.pretrained_model_name_or_path).name for one in (run, owner))
            raise RunError(
                f"{name} is a LoRA for {theirs}, but this run trains {mine}: choose LoRAs of one base model."
            )
        found.append(Weights(name, weights.kind, weights.method, weights.path))
    return stack(list(zip(found, numbers(strengths, names), strict=True)))


def stack(parts: list[tuple[Weights, float]]) -> Weights:
    """Return a stack of LoRA files; each part is a LoRA file and its strength."""
    return Weights(" + ".join(f"{part.label} x {s:g}" for part, s in parts), "stack", parts=tuple(parts))


def numbers(text: str, names: list[str]) -> list[float]:
    """Return one strength per LoRA from the text that the user typed; if the text is empty, all strengths are 1."""
    words = str(text or "").replace(",", " ").split() or ["1"] * len(names)
    if len(words) != len(names):
        raise RunError(
            f"{pluralize(len(words), 'strength')} for {pluralize(len(names), 'LoRA')}: give one each, such as 1 0.5."
        )
    return [within_limits("strength", word, f"Strength of {name}") for name, word in zip(names, words, strict=True)]


# -- loading into a model ----------------------------------------------------------------------------------------------


def put(models: Mapping[str, nn.Module], family: Family, weights: Weights, strength: float) -> None:
    """Add `strength * sum_i strength_i s_i B_i A_i` to the layers of the denoiser and text encoders in `models`.

    Raises `RunError` for a LoRA that does not fit.
    """
    for name, layers in factors_of(weights, family, models).items():
        add(models[name], layers, strength)


def factors_of(weights: Weights, family: Family, models: Mapping[str, nn.Module]) -> Parts:
    """Return the low-rank factors of a LoRA file or stack, by model (denoiser or text encoder) and layer.

    Raises `RunError` if the factors do not fit the models.
    """
    names, files = names_of(family, models[family.denoiser].config), weights.parts or ((weights, 1.0),)
    return summed([read(one, names, models) for one, _ in files], [strength for _, strength in files])


def read(file: Weights, names: Names, models: Mapping[str, nn.Module]) -> Parts:
    """Return the low-rank factors of a LoRA file in any supported format, by model and layer.

    Raises `RunError` if the file is invalid or does not fit the models."""
    try:
        check_adapter_file(file.path, file.label)
        content = read_content(file.path, file.label, file.config)
        parts = read_parts(content, names)
    except (InvalidArgument, RunFailed, OSError) as error:
        raise RunError(f"{without_folders(error, file.path)}.") from None
    for part, layers in parts.items():
        if part not in models:
            raise RunError(f"{file.label} also has weights for the {part}, which cannot have a LoRA on this page.")
        prefixes = [f"{part}."] + ["", PEFT_PREFIX] * (part == names.family.denoiser)
        said = next((content.configs[prefix] for prefix in prefixes if prefix in content.configs), {})
        refuse_misfits(f"{file.label}: {part}", models[part], in_names_of(models[part], layers), said)
    return parts


def add(model: nn.Module, layers: Mapping[str, Factors], strength: float) -> None:
    """Inject a plain LoRA into a model's layers, in the model's dtype.

    `layers`: factors by layer, of shapes (rank, in, *kernel) for `down` and (out, rank) for `up`. For a stack of LoRAs,
    the rank is the sum of their ranks. `strength` multiplies each layer's scale.
    """
    folded = {name: Factors(f.down, f.up * (f.scale * strength), 1.0) for name, f in layers.items()}
    folded = in_names_of(model, folded)
    inject_adapter_in_model(lora_config(folded), model)
    adapted = lora_layers(model, "default")
    for name, (down, up, _) in folded.items():
        layer = adapted[name]
        for matrix, value in ((layer.lora_A, down), (layer.lora_B, up)):
            matrix["default"].weight = nn.Parameter(value.to(layer.weight.device), requires_grad=False)
