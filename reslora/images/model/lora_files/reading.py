"""Read LoRA files and PEFT folders as plain factors of each layer; reject everything that is not a plain LoRA."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key

from ....checkpoint import PEFT_PREFIX, WEIGHTS_NAME
from ....checks import refuse_changed_base
from ....errors import InvalidArgument, first_line, refused_as
from ....export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, PEFT_CONFIG_FILE, PEFT_FILE, Factors
from ....io import read_object, read_tensors
from ....methods.adapters import ADAPTER_NAME
from ..families import FAMILIES, load_family
from ..families.base import Family
from .names import Names, Parts, names_of, shaped

GIVE_PLAIN = "give a LoRA without it; of a run, kohya.safetensors"
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
ENDING = re.compile(
    r"\.(?:(?P<down>lora_A(?:\.default)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight"
    r"|(?P<up>lora_B(?:\.default)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight"
    r"|(?P<alpha>alpha))$"
)
"""Names of the two factors in PEFT and diffusers, in kohya's scripts, and in two of diffusers' older formats."""
WITHOUT_PART = re.compile(rf"({re.escape(PEFT_PREFIX)})?(?P<layer>.+)\.lora_A(\.default)?\.weight")
"""PEFT's name of a layer's A, if names do not start with a part of the pipeline; PEFT's configuration has the scale."""
OLDEST = re.compile(r"_lora\d?\.(?:down|up)\.weight$")
"""Names in LoRA files of diffusers' first versions; diffusers' own converters read them."""
NUMBERED = re.compile(r"(?:unet|text_encoder):\d+:(?:up|down)")
"""Names in files of cloneofsimo's lora_diffusion, the oldest layout; see `numbered`."""
NOT_PLAIN = (
    "use_dora", "lora_bias", "modules_to_save", "use_qalora", "use_bdlora", "kasa_config", "arrow_config",
    "alora_invocation_tokens",
)  # fmt: skip
"""Fields of PEFT's configuration that change a layer's computation from `W x + s B A x`."""
EXPORTED = f"give what its run has exported, such as {DIFFUSERS_FILE}"
OF_THE_FORMAT = re.compile(r"format|lora_adapter_metadata|sshs_\w+|ss_network_\w+|modelspec\.hash_sha256")


@dataclass(frozen=True)
class Content:
    """The unchanged content of a LoRA file or a PEFT folder."""

    path: Path
    flag: str
    """The option or argument that names the file or folder, with its value, for messages."""
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    """The file's metadata, without fields that belong to the format."""
    configs: dict[str, dict]
    """diffusers' or PEFT's configuration, by prefix of the names of layers."""
    files: tuple[Path, ...] = ()
    """The files that were read."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its tensors."""
        found = [value.dtype for value in self.tensors.values() if value.dim() > 1]
        return max(dict.fromkeys(found), key=found.count, default=torch.float32)


def read_content(path: Path, flag: str, config: Path | None = None) -> Content:
    """Read a safetensors file, or a folder that PEFT, diffusers or a run has written.

    `config` is the adapter_config.json of a file that PEFT has written, if it is in another folder. 8-bit tensors
    become float16, which is exact, because torch has few operations for 8 bits. Raises `InvalidArgument` for pickles,
    and for anything that is not a finished plain LoRA.
    """
    known = (PEFT_FILE, DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE)
    file = next((path / name for name in known if (path / name).is_file()), path)
    below = {path: "*", path / PEFT_FILE: "text_encoder*"}.get(file)  # a denoiser's folder may contain checkpoints
    if parts := sorted(path.glob(f"{below}/{PEFT_FILE}")) if below else []:
        return _of_parts(path, flag, [part.parent for part in parts])
    refuse_pickles(file, flag)
    if not file.is_file():
        if any((path / name).is_file() for name in (ADAPTER_NAME, WEIGHTS_NAME)):
            raise InvalidArgument(flag, "a checkpoint, not a finished LoRA", EXPORTED)
        wanted = "a .safetensors file, or a folder with one of the names that PEFT and diffusers give it"
        raise InvalidArgument(flag, "no LoRA file there", f"give {wanted}")
    with refused_as(flag, "give a complete .safetensors file"):
        tensors, metadata = read_tensors(file)
    for name, value in tensors.items():
        if value.is_floating_point() and value.itemsize == 1:
            tensors[name] = value.half()
    if config is None and file.name == PEFT_FILE and any(name.startswith(PEFT_PREFIX) for name in tensors):
        config = file.with_name(PEFT_CONFIG_FILE)
    configs = {PEFT_PREFIX: found} if config and "peft_type" in (found := read_object(config)) else {}
    if "lora_adapter_metadata" in metadata:
        with refused_as(flag, "repair its lora_adapter_metadata"):
            of_parts: dict[str, dict] = {}
            for key, value in json.loads(metadata["lora_adapter_metadata"]).items():
                part, dot, name = key.rpartition(".")  # no part if a model wrote the file
                of_parts.setdefault(part + dot, {})[name] = value
            configs |= of_parts
    if config and not configs:
        raise InvalidArgument(
            flag,
            f"{PEFT_CONFIG_FILE}, which contains the scale of the LoRA, is missing or unreadable",
            "give a folder with both files",
        )
    for said in configs.values():
        _refuse_others(flag, said)
    metadata = {key: value for key, value in metadata.items() if not OF_THE_FORMAT.fullmatch(key)}
    return Content(path, flag, tensors, metadata, configs, (file, config) if config else (file,))


def refuse_pickles(path: Path, flag: str) -> None:
    """Raise `InvalidArgument` for a pickle, or for a folder with a pickle and without safetensors files."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    pickles = [file.name for file in found if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in found):
        raise InvalidArgument(flag, f"{pickles[0]} is a pickle, which may run code", "give safetensors files")


def _of_parts(path: Path, flag: str, folders: Sequence[Path]) -> Content:
    """Read PEFT's folders of several parts of a pipeline; the denoiser's folder may be `path` itself."""
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, dict] = {}
    files: tuple[Path, ...] = ()
    if (path / PEFT_FILE).is_file():
        denoiser = read_content(path / PEFT_FILE, flag)
        tensors, configs, files = denoiser.tensors, denoiser.configs, denoiser.files
    for folder in folders:
        part, prefix = read_content(folder, f"{flag}, {folder.name}"), f"{folder.name}."
        tensors |= {prefix + key.removeprefix(PEFT_PREFIX): value for key, value in part.tensors.items()}
        configs[prefix] = part.configs.get(PEFT_PREFIX, {})
        files += part.files
    return Content(path, flag, tensors, {}, configs, files)


def _refuse_others(flag: str, config: Mapping) -> None:
    """Raise `InvalidArgument` for PEFT methods other than plain LoRA, and for initializations that change the base."""
    if config.get("peft_type", "LORA") != "LORA":
        raise InvalidArgument(flag, f"{config['peft_type']}, which is not plain LoRA", "give a LoRA")
    refuse_changed_base(config.get("init_lora_weights"), flag)
    for name in NOT_PLAIN:
        if config.get(name):
            raise InvalidArgument(flag, f"it has {name}, so it is not a plain LoRA", "give a LoRA without that")


# -- the model family --------------------------------------------------------------------------------------------------


def family_of(content: Content) -> Family:
    """Return the family that the metadata names or, if that family is unknown, the only one that has all layers.

    If several families have all layers, the proportions of the layers' shapes decide, and a derived family is left
    out. Raises `InvalidArgument` if no single family remains.
    """
    if is_numbered(content):
        return load_family("StableDiffusionPipeline")
    said = [content.metadata.get(key, "").lower() for key in ("ss_base_model_version", "modelspec.architecture")]
    families = [family for family in map(load_family, FAMILIES) if not family.edits]  # they have the base's names
    marked = [family for family in families if any(text.startswith(family.marks) for text in said if family.marks)]
    if len(marked) == 1:
        return marked[0]
    pairs = pairs_of(content)
    fitting = [names for names in map(names_of, families) if all(name in names.known for name in pairs)]
    several = len(fitting) > 1
    # Z-Image's fused layers have the names of Lumina 2's, which is the only one of the two with these names here.
    fitting = [names for names in fitting if not (several or names.family.one_size) or _in_proportion(pairs, names)]
    fitting = [names for names in fitting if not (several and names.family.derived)]
    if len(fitting) == 1:
        return fitting[0].family
    problem = "fit several model families" if fitting else "do not show the model family"
    raise InvalidArgument(content.flag, f"the layer names {problem}", "add --base MODEL or --family NAME")


def is_numbered(content: Content) -> bool:
    """Return whether a file numbers its layers instead of naming them, as cloneofsimo's lora_diffusion does."""
    return any(map(NUMBERED.fullmatch, content.tensors))


def _in_proportion(pairs: Mapping[str, Factors], names: Names) -> bool:
    """Return whether the denoiser's layers have the same ratio of outputs to inputs as in the published model.

    If the family has only one size, the numbers of outputs and inputs must be equal.
    """
    for name, factors in pairs.items():
        fused = names.known[name]
        part, layer = fused.layers[0]
        if part == names.family.denoiser:
            inputs = names.shapes[layer][1]
            outputs = sum(fused.outputs) if len(fused.layers) > 1 else names.shapes[layer][0]
            sides = (factors.up.shape[0], factors.down.shape[1])
            if sides[0] * inputs != sides[1] * outputs or (names.family.one_size and sides != (outputs, inputs)):
                return False
    return True


# -- the layers --------------------------------------------------------------------------------------------------------


def pairs_of(content: Content) -> dict[str, Factors]:
    """Return A, B and scale of each layer by its name in the file, in float32 or float64.

    Raises `InvalidArgument` for anything that is not a plain LoRA.
    """
    if not content.tensors:
        raise InvalidArgument(content.flag, "has no LoRA layer", "give a LoRA that was trained")
    kinds: dict[str | None, dict[str, torch.Tensor]] = {"down": {}, "up": {}, "alpha": {}}
    for key, value in content.tensors.items():
        if match := ENDING.search(key):
            kind, name = kinds[match.lastgroup], key[: match.start()]
            if name in kind:
                raise InvalidArgument(content.flag, f"{name} is in the file twice", "remove one of the two")
            kind[name] = value
        elif key.startswith("reslora."):
            raise InvalidArgument(
                content.flag, "is an unmerged ResLoRA, whose shortcuts a LoRA file cannot contain", EXPORTED
            )
        elif not OLDEST.search(key):
            raise InvalidArgument(content.flag, f"{key} is not part of a plain LoRA", GIVE_PLAIN)
    down, up, alpha = kinds.values()
    if lonely := [*(down.keys() ^ up.keys()), *(alpha.keys() - down.keys())]:
        raise InvalidArgument(content.flag, f"{lonely[0]} lacks one of its two factors", "give a complete file")
    found = {}
    for name, a in down.items():
        b = up[name]
        fit = a.dim() in (2, 4) and b.shape[1:2] == a.shape[:1] and math.prod(b.shape[2:]) == 1
        if not (fit and a.numel() and b.numel()):
            raise InvalidArgument(
                content.flag, f"{name}: the shapes of its factors do not match", "give a file that is not damaged"
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            dtypes = f"{a.dtype} and {b.dtype}".replace("torch.", "")
            raise InvalidArgument(content.flag, f"{name} is {dtypes}", "give a LoRA in floating point")
        rank = len(a)
        try:
            scale = alpha[name].item() / rank if name in alpha else _scale(name, rank, content.configs)
        except Exception:  # a damaged configuration can raise many types
            fix = "repair its alpha, or lora_alpha and alpha_pattern of its configuration"
            raise InvalidArgument(content.flag, f"the scale of {name} is damaged", fix) from None
        if not (torch.isfinite(a).all() and torch.isfinite(b).all() and math.isfinite(scale)):
            raise InvalidArgument(content.flag, f"{name} is not finite", "give a LoRA that has not diverged")
        found[name] = Factors(wide(a), wide(b), scale)
    return found


def wide(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32; a float64 tensor is unchanged."""
    return value if value.dtype == torch.float64 else value.float()


def _scale(name: str, rank: int, configs: Mapping[str, Mapping]) -> float:
    """Return a layer's scale from PEFT's configuration, or 1 without one."""
    prefix = next(filter(name.startswith, configs), None)
    if prefix is None:
        return 1.0
    config, layer = configs[prefix], name.removeprefix(prefix)
    patterns = config.get("alpha_pattern") or {}
    spelt = (layer, layer.removeprefix("text_model."))
    keys = [key for each in spelt if (key := get_pattern_key(patterns.keys(), each)) in patterns]
    alpha = patterns[keys[0]] if keys else config.get("lora_alpha", rank)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_parts(content: Content, names: Names) -> Parts:
    """Return the file's layers by their names in diffusers; raises `InvalidArgument` for layers that the model lacks.

    Names that are not in the family's table go through diffusers' converters for the family's pipeline.
    """
    pairs = pairs_of(content)
    _refuse_unscaled(content, names)
    if any(name not in names.known for name in pairs) or any(OLDEST.search(key) for key in content.tensors):
        pairs = _through_diffusers(content, names)
    parts: Parts = {}
    for name, factors in pairs.items():
        if name not in names.known:
            raise InvalidArgument(content.flag, f"{name} is not a layer of {names.family.name}", _another(names))
        try:
            split = names.known[name].split(factors)
        except ValueError as error:
            raise InvalidArgument(content.flag, f"{name}: {first_line(error)}", _another(names)) from None
        for (part, layer), piece in split.items():
            if layer in parts.setdefault(part, {}):
                raise InvalidArgument(content.flag, f"{part}.{layer} is in the file twice", "remove one of the two")
            parts[part][layer] = _shaped(content.flag, layer, piece, names) if part == names.family.denoiser else piece
    if not parts:
        raise InvalidArgument(content.flag, "all of its layers are zero", "give a LoRA that was trained")
    return parts


def _another(names: Names) -> str:
    """Return the advice in a message about a layer that the model lacks: which model to give."""
    return "give the model that it was made for" + ("" if names.exact else " with --base or --family")


def _refuse_unscaled(content: Content, names: Names) -> None:
    """Raise `InvalidArgument` for layers with PEFT's names whose scale is in another file, such as a checkpoint's.

    Files of some other trainers have such names, too. Such files are accepted and read with scale 1, as in diffusers.
    """
    layers = [
        match["layer"]
        for key in content.tensors
        if (match := WITHOUT_PART.fullmatch(key)) and match["layer"] in names.shapes
        if f"{key[: match.end('layer')]}.alpha" not in content.tensors and not any(map(key.startswith, content.configs))
    ]
    if not layers:
        return
    found = _converted(content.tensors, names)
    unread = any(f"{names.family.denoiser}.{layer}.lora_A.weight" not in found for layer in layers)
    if content.path.name in (ADAPTER_NAME, WEIGHTS_NAME) or unread:
        problem = f"it does not contain the scale of {layers[0]}, like the weights of a checkpoint"
        raise InvalidArgument(content.flag, problem, f"give a finished LoRA, or PEFT's with its {PEFT_CONFIG_FILE}")


def _shaped(flag: str, layer: str, factors: Factors, names: Names) -> Factors:
    """Return factors in the shape of the layer's weight: a 1 x 1 convolution may be written as a linear layer."""
    if not names.exact:
        return factors
    outputs, inputs, wanted = len(factors.up), factors.down[0].numel(), names.shapes[layer]
    if (outputs, inputs) != (wanted[0], math.prod(wanted[1:])):
        problem = f"{layer} is {outputs} x {inputs} in it, {' x '.join(map(str, wanted))} in the model"
        raise InvalidArgument(flag, problem, "give the model that it was made for")
    return shaped(factors, wanted[1:])


def _through_diffusers(content: Content, names: Names) -> dict[str, Factors]:
    """Return A, B and scale of each layer, by the names that diffusers' converters give the layers.

    Raises `InvalidArgument` for layers that the converters drop.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in content.tensors.items():
        ending = next(filter(None, (ENDING.search(key), OLDEST.search(key))))
        layers.setdefault(key[: ending.start()], {})[key] = value
    # A converter may use one tensor as A of several layers, and safetensors refuses to write a tensor twice.
    whole = {key: value.clone() for key, value in _converted(content.tensors, names).items()}
    if unread := [name for name, tensors in layers.items() if not _converted(tensors, names).keys() & whole]:
        problem = (
            f"{min(unread, key=names.known.__contains__)} is not a layer of {names.family.name} that diffusers reads"
        )
        raise InvalidArgument(content.flag, problem, _another(names))
    return pairs_of(dataclasses.replace(content, tensors=whole))


def _converted(tensors: Mapping[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """Return tensors by the names that diffusers' converters give them; {} if a converter does not know a layer."""
    with contextlib.suppress(Exception):  # each converter raises other exceptions
        found = names.family.pipeline.lora_state_dict(dict(tensors), unet_config=names.config)
        state, alphas = found[:2] if isinstance(found, tuple) else (found, None)
        if alphas:  # other code reads names with separate alphas, unless diffusers does not know them either
            return {}
        denoiser = {key: value for key, value in state.items() if key.startswith(f"{names.family.denoiser}.")}
        text = {key: value for key, value in state.items() if key not in denoiser}
        if any(OLDEST.search(key) or "lora_linear_layer" in key for key in text):
            text = convert_state_dict_to_peft(text)
        return convert_unet_state_dict_to_peft(denoiser) | text
    return {}
