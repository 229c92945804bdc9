"""Base models in single files: complete checkpoints, and transformers in the layouts of several tools."""

from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from safetensors import safe_open

from ...content_hash import content_mark
from ...errors import InvalidArgument, first_line, refused_as
from ...io import replacing
from ...options.images import ModelOptions, OutputOptions
from ..cache_folder import cache_folder
from ..generators import derive
from .families import load_family
from .families.base import Family

COMPLETE = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""The kinds of complete checkpoints that can be loaded, as diffusers names them, with their pipelines."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""Prefixes of the transformer's tensors in files with other parts, and in some without."""


def unpacked(path: Path, model: ModelOptions, output: OutputOptions) -> Path:
    """Convert a complete checkpoint to a diffusers folder in the cache, once; return the folder."""
    flag = f"--pretrained_model_name_or_path {path}"
    folder = cache_folder(model, output) / f"model-{path.stem}-{content_mark(path).replace(':', '-')}"
    if (folder / "model_index.json").is_file():
        return folder
    with refused_as(flag, "give a complete checkpoint of Stable Diffusion, SDXL or Flux.1"):
        kind = infer_diffusers_model_type(load_single_file_checkpoint(str(path), disable_mmap=False))
    if kind not in COMPLETE:
        fix = "give a pipeline's folder in diffusers format, and a transformer with --pretrained_transformer_file"
        raise InvalidArgument(flag, f"a single file of kind {kind!r}", fix)
    family, settings = load_family(COMPLETE[kind]), scheduler_settings(path)
    fix = f"convert it to a folder where the hub can be reached: {family.pipeline.__name__}.from_single_file"
    fix += f"({str(path)!r}).save_pretrained('folder')"
    if family.denoiser == "transformer":
        fix += "; if it has no text encoders, give a pipeline's folder, and this file as --pretrained_transformer_file"
    with refused_as(flag, fix):
        pipeline = family.pipeline.from_single_file(str(path), cache_dir=model.cache_dir)
        pipeline.scheduler.register_to_config(**settings)
        with replacing(folder) as temporary:
            pipeline.save_pretrained(temporary)
    return folder


def scheduler_settings(path: Path) -> dict[str, object]:
    """Return the scheduler's settings that a checkpoint declares; diffusers uses only those of its own configuration.

    The tensors `v_pred` and `ztsnr` declare v prediction and zero terminal SNR, as ComfyUI reads them. ModelSpec's
    header declares the prediction type. Raises `InvalidArgument` for EDM's noise levels, as in CosXL.
    """
    with safe_open(path, "pt") as file:
        names, header = set(file.keys()), file.metadata() or {}
    if edm := min((name for name in names if name.startswith("edm_")), default=None):
        problem = f"its tensor {edm} declares EDM's noise levels, which cannot be trained"
        raise InvalidArgument(f"--pretrained_model_name_or_path {path}", problem, "give another model")
    predicted = "v" if "v_pred" in names else header.get("modelspec.prediction_type")
    types = {"v": "v_prediction", "epsilon": "epsilon"}
    found: dict[str, object] = {"prediction_type": types[predicted]} if predicted in types else {}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found | (zero if "ztsnr" in names else {})


def with_transformer(base: Path, family: Family, model: ModelOptions, output: OutputOptions) -> Path:
    """Return a folder in the cache with the transformer of --pretrained_transformer_file; create it on first use.

    All other parts are links to the parts of the pipeline in `base`. Raises `InvalidArgument` if diffusers cannot
    convert the file, or if its weights do not match the configuration in `base`.
    """
    path, kind = Path(model.pretrained_transformer_file or ""), family.denoiser_class
    flag, config = f"--pretrained_transformer_file {path}", base / family.denoiser / "config.json"
    if family.denoiser != "transformer":
        fix = "give a complete checkpoint with --pretrained_model_name_or_path"
        raise InvalidArgument(flag, f"the denoiser of {family.name} is no transformer", fix)
    if kind.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        problem = f"this version of diffusers cannot read a file of {kind.__name__}"
        raise InvalidArgument(flag, problem, "install a newer version")
    with refused_as(flag, f"repair {config}"):
        mark = derive(content_mark(path), content_mark(config), str(base.resolve()), model.variant or "")
    folder = cache_folder(model, output) / f"model-{path.stem}-{mark:x}"
    if (folder / "model_index.json").is_file():
        return folder
    with refused_as(flag, "give a complete file, and check that the cache can be written"):
        transformer = read_transformer(path, kind, config.parent, flag)
        with replacing(folder) as temporary:
            transformer.save_pretrained(temporary / family.denoiser, variant=model.variant)
            for part in base.iterdir():
                if part.name != family.denoiser:
                    (temporary / part.name).symlink_to(part.resolve())
    return folder


def read_transformer(path: Path, kind: type[ModelMixin], config: Path, flag: str) -> ModelMixin:
    """Return a transformer with the weights of a single file, in their dtypes.

    `config`: folder with the transformer's configuration. Unlike diffusers' `from_single_file`, this raises
    `InvalidArgument` if the file lacks a weight, or has a weight that the transformer lacks.
    """
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(config))
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        prefix = next((each for each in PREFIXES if any(name.startswith(each) for name in names)), "")
        weights = {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}
    wanted, fix = model.state_dict(), "give a file and a pipeline of the same model"
    if weights.keys() != wanted.keys():
        convert = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
        try:
            weights = convert(checkpoint=weights, config=dict(model.config))
        except (LookupError, ValueError, RuntimeError, AttributeError) as error:  # such as a missing name
            problem = f"diffusers cannot convert it to a {kind.__name__} ({first_line(error)})"
            raise InvalidArgument(flag, problem, fix) from None
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            whose = "the pipeline's transformer" if name in wanted else "the file"
            raise InvalidArgument(flag, f"only {whose} has {name}", fix)
        if weights[name].shape != wanted[name].shape:
            shapes = f"{tuple(weights[name].shape)} in it, {tuple(wanted[name].shape)} in the pipeline"
            raise InvalidArgument(flag, f"{name} is {shapes}", fix)
    # A converter may return views of one tensor, which safetensors does not write.
    whole = {n: v if v.untyped_storage().nbytes() == v.nbytes else v.clone() for n, v in weights.items()}
    model.load_state_dict(whole, assign=True)
    return model
