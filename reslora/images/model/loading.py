"""Find the model as a local diffusers folder, and load its parts when they are needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub import constants
from safetensors import safe_open
from torch import nn

from ...content_hash import folder_mark
from ...errors import InvalidArgument, first_line, refused_as
from ...io import read_object
from ...options.images import ModelOptions, OutputOptions
from ...runtime.processes import on_all
from ..generators import derive
from .families import load_family
from .families.base import Family, Part
from .kinds import read_index
from .quantising import pack
from .single_files import unpacked, with_transformer
from .stored import Stored, load_exact, stored_weights


@dataclass(frozen=True)
class Model:
    """A pipeline in a local folder, with methods that load its parts."""

    folder: Path
    family: Family
    flag: str
    """The option that names the model, with its value, for messages."""
    variant: str | None = None
    vae: str | None = None
    """Folder or Hub name of another autoencoder."""
    cache_dir: str | None = None
    index: dict = field(default_factory=dict)
    prediction_type: str | None = None
    """The denoiser's prediction type; None for the type in the scheduler's configuration."""

    @property
    def vae_flag(self) -> str:
        """The option that names the autoencoder, with its value, for messages."""
        return f"--pretrained_vae_model_name_or_path {self.vae}" if self.vae else self.flag

    def fingerprint(self, *parts: str) -> str:
        """Return a hash of the names and contents of the files of `parts`; without arguments, of all parts."""
        family, marks = self.family, []
        for part in parts or (family.denoiser, "vae", "scheduler", *family.text_parts):
            other = self.vae if part == "vae" else None
            folder = Path(other) if other else self.folder / part
            marks.append((part, folder_mark(folder) if folder.is_dir() else other))
        return f"content {derive(*marks):x}"

    def load_pipeline(
        self, dtype: torch.dtype, device: torch.device, encoders: bool, vae: bool = True, trainable: bool = False
    ) -> DiffusionPipeline:
        """Load the pipeline in `dtype`, without its denoiser.

        `encoders`: load all text encoders, and put an object that has only the denoiser's configuration in the
        denoiser's place. `trainable`: without `encoders`, load the text encoders that can be trained. `vae`: load the
        autoencoder. Tokenizers are always loaded, to count tokens.
        """
        given = self.without(*([] if vae else ["vae"]))
        if not encoders:
            parts = self.family.frozen_text_parts if trainable else self.family.text_parts
            given |= {part: None for part in parts if not part.startswith("tokenizer")}
        if vae and self.vae:
            own = getattr(diffusers, self.index["vae"][1])  # some pipelines have their own class of autoencoder
            with refused_as(self.vae_flag, "check the name and the files"):
                given["vae"] = own.from_pretrained(
                    self.vae, cache_dir=self.cache_dir, torch_dtype=dtype, use_safetensors=True
                )
        with refused_as(self.flag, "repair the folder"):
            pipeline = self.family.pipeline.from_pretrained(
                self.folder, **given, variant=self.variant, torch_dtype=dtype, use_safetensors=True
            )
        self.complete(pipeline, encoders)
        pipeline.set_progress_bar_config(disable=True)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        return pipeline.to(device)

    def without(self, *parts: str) -> dict[str, Any]:
        """Return arguments of `from_pretrained` that leave out the denoiser, the unused parts and `parts`."""
        # Some pipelines, such as Stable Diffusion 3 without T5, list a part as missing and still require the argument.
        missing = [part for part, kind in self.index.items() if kind == [None, None]]
        given: dict[str, Any] = dict.fromkeys((self.family.denoiser, *self.family.unused_parts, *missing, *parts))
        return given | ({"requires_safety_checker": False} if "requires_safety_checker" in self.index else {})

    def complete(self, pipeline: DiffusionPipeline, encoders: bool = True) -> None:
        """Set the scheduler's prediction type, if the options give one.

        With `encoders`, also put an object that has only the denoiser's configuration in the denoiser's place.
        """
        if encoders:
            # Without T5, Stable Diffusion 3's pipeline reads the width of the text states from the denoiser's
            # configuration.
            setattr(pipeline, self.family.denoiser, SimpleNamespace(config=self.denoiser_config()))
        if self.prediction_type:
            pipeline.scheduler.register_to_config(prediction_type=self.prediction_type)

    def denoiser_config(self) -> FrozenDict:
        """Return the configuration in the denoiser's folder."""
        with refused_as(self.flag, "repair the folder"):
            return FrozenDict(self.family.denoiser_class.load_config(self.denoiser_folder))

    def load_denoiser(
        self, dtype: torch.dtype, device: torch.device, base_precision: str = "no", blocks_to_swap: int = 0
    ) -> nn.Module:
        """Load the frozen denoiser in `dtype`; `base_precision` quantizes the weights of its blocks.

        The weights of the first `blocks_to_swap` blocks stay in CPU memory.
        """
        with refused_as(self.flag, "repair the folder"):
            denoiser = self.family.denoiser_class.from_pretrained(
                self.folder, subfolder=self.family.denoiser, variant=self.variant, torch_dtype=dtype,
                use_safetensors=True,
            )  # fmt: skip
        denoiser.requires_grad_(False)
        pack(denoiser, base_precision, device, blocks_to_swap)
        return denoiser.to(device)

    def load_exact_denoiser(self, device: torch.device) -> nn.Module:
        """Load the frozen denoiser in float32; if it is large, the weights of its blocks stay on disk."""
        with refused_as(self.flag, "repair the folder"):
            denoiser = load_exact(self.family.denoiser_class, self.denoiser_folder, device, self.variant)
            denoiser.register_to_config(_name_or_path=str(self.folder))  # as `from_pretrained` of a pipeline does
            return denoiser.requires_grad_(False)

    @property
    def denoiser_folder(self) -> Path:
        """The denoiser's folder."""
        return self.folder / self.family.denoiser

    def stored_denoiser(self) -> dict[str, Stored]:
        """Return the location of each weight of the denoiser on disk."""
        return stored_weights(self.denoiser_folder, self.variant)

    def load_encoders(self, parts: Sequence[Part], pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
        """Reload text encoders from disk, frozen; set them in the pipeline, and return them by name."""
        found = {}
        for part in parts:
            before = getattr(pipeline, part.name)
            with refused_as(self.flag, "repair the folder"):
                encoder = type(before).from_pretrained(
                    self.folder / part.name, variant=self.variant, dtype=before.dtype, use_safetensors=True
                )
            found[part.name] = encoder.requires_grad_(False).to(before.device)
            setattr(pipeline, part.name, found[part.name])
        return found

    def empty_denoiser(self) -> nn.Module:
        """Return the denoiser on the meta device, after checking that its files are complete."""
        with refused_as(self.flag, "repair the folder"), torch.device("meta"):
            denoiser = self.family.denoiser_class.from_config(self.denoiser_config())
        check_weights(self.denoiser_folder, self.variant, denoiser, self.flag)
        return denoiser


def find_model(model_options: ModelOptions, output: OutputOptions, accelerator: Accelerator) -> Model:
    """Return the model that the options name; download it, or convert a single file, unless it is a local folder.

    Raises `InvalidArgument` if the model cannot be trained.
    """
    name = model_options.pretrained_model_name_or_path
    flag, path = f"--pretrained_model_name_or_path {name}", Path(name)
    if path.is_file():
        folder = on_each_machine(lambda: unpacked(path, model_options, output), accelerator)
    elif path.is_dir():
        folder = path
    else:
        folder = downloaded(model_options, flag)
    index = read_index(folder, flag)
    family = load_family(index["_class_name"])
    if model_options.pretrained_transformer_file:
        base = folder
        folder = on_each_machine(lambda: with_transformer(base, family, model_options, output), accelerator)
    configs = {}
    for part, kind in index.items():
        # A part is a pair of library and class; other lists are settings of the pipeline.
        wanted = isinstance(kind, list) and isinstance(kind[0], str) and part not in family.unused_parts
        if wanted and not (folder / part).is_dir():
            raise InvalidArgument(
                flag, f"no {part} folder in {folder}, which model_index.json lists", "repair the folder"
            )
        if wanted and (config := folder / part / "config.json").is_file():
            configs[part] = read_object(config)
            if not configs[part]:
                raise InvalidArgument(flag, f"{config} cannot be read", "repair the folder")
    if problem := family.unfit(configs):
        raise InvalidArgument(flag, problem, "give a base model's folder")
    check_prediction(model_options, folder)
    model = Model(
        folder, family, flag, model_options.variant, model_options.pretrained_vae_model_name_or_path,
        model_options.cache_dir, index, model_options.prediction_type,
    )  # fmt: skip
    check_vae(model)
    return model


def on_each_machine(make: Callable[[], Path], accelerator: Accelerator) -> Path:
    """Call `make` in the main process, then in the first process of each machine; return the folder in all processes.

    `make` creates the folder unless it exists, because machines may share a disk.
    """
    on_all(lambda: make() if accelerator.is_main_process else None)
    on_all(lambda: make() if accelerator.is_local_main_process else None)
    return make()


def check_vae(model: Model) -> None:
    """Raise `InvalidArgument` if the given autoencoder's class differs from the pipeline's."""
    if not model.vae:
        return
    wanted = model.index["vae"][1]
    found = read_object(Path(model.vae) / "config.json").get("_class_name", wanted)
    if found != wanted:
        problem = f"its class is {found}, and the pipeline has {wanted}"
        raise InvalidArgument(model.vae_flag, problem, "give an autoencoder of that class, or leave it out")


def check_prediction(options: ModelOptions, folder: Path) -> None:
    """Raise `InvalidArgument` for epsilon prediction with zero terminal SNR: generation would divide by zero."""
    scheduler = read_object(folder / "scheduler" / SCHEDULER_CONFIG_NAME)
    if options.prediction_type == "epsilon" and scheduler.get("rescale_betas_zero_snr"):
        problem = "the model's scheduler has zero terminal SNR (rescale_betas_zero_snr), and its samples would be NaN"
        raise InvalidArgument("--prediction_type epsilon", problem, "leave it out, or give v_prediction")


def downloaded(options: ModelOptions, flag: str) -> Path:
    """Download a model from the Hub, and return its folder in the Hub's cache."""
    check_hub(options, flag)
    where: dict[str, Any] = {"revision": options.revision, "cache_dir": options.cache_dir}
    given: dict[str, Any] = {"transformer": None} if options.pretrained_transformer_file else {}
    with refused_as(flag, "check the name and the connection"):
        for part in given:  # its weights come from the given file, not from the Hub
            huggingface_hub.hf_hub_download(options.pretrained_model_name_or_path, f"{part}/config.json", **where)
        return Path(
            DiffusionPipeline.download(
                options.pretrained_model_name_or_path, variant=options.variant, use_safetensors=True, **where, **given
            )
        )


def check_hub(options: ModelOptions, flag: str) -> None:
    """Raise `InvalidArgument` if a model must be downloaded, but the Hub does not answer within 15 seconds.

    The library huggingface_hub would retry for most of a minute.
    """
    name, file = options.pretrained_model_name_or_path, "model_index.json"
    if constants.HF_HUB_OFFLINE:
        return
    cached = huggingface_hub.try_to_load_from_cache(name, file, cache_dir=options.cache_dir, revision=options.revision)
    if isinstance(cached, str):
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=15)
    except Exception as error:  # requests' or httpx's, depending on the version of huggingface_hub
        problem = f"no such folder, and {constants.ENDPOINT} cannot be reached ({first_line(error)})"
        raise InvalidArgument(flag, problem, "give a folder in diffusers format, or check the connection") from None


def check_weights(folder: Path, variant: str | None, denoiser: nn.Module, flag: str) -> None:
    """Raise `InvalidArgument` if weights are missing or truncated, or if their shapes differ from the configuration."""
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    files = [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*.safetensors")]
    if not files and not variant:
        raise InvalidArgument(flag, f"no {stem}.safetensors in {folder}", "give a pipeline with safetensors weights")
    shapes = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    for path in files:
        with refused_as(f"{flag}, {path}", "repair the folder"), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                found = tuple(file.get_slice(name).get_shape())
                if shapes.get(name, found) != found:
                    problem = f"{name} is {found} in {path}, {shapes[name]} by its config.json"
                    raise InvalidArgument(flag, problem, "repair the folder")


def overflows(family: Family, vae: nn.Module) -> bool:
    """Return whether the autoencoder is in float16 and would overflow there."""
    return family.encodes_in_float32 and vae.config.force_upcast and vae.dtype == torch.float16


@contextmanager
def wide_enough(family: Family, vae: nn.Module) -> Iterator[None]:
    """Run the body with the autoencoder in float32 if it would overflow in float16."""
    if not overflows(family, vae):
        yield
        return
    try:
        yield vae.to(torch.float32)
    finally:
        vae.to(torch.float16)
