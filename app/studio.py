"""Generate images: load the pipeline, change its weights, and run it, one request at a time.

The base weights never change. Other weights are loaded into copies of the denoiser and the text encoders that share
the base tensors. So other weights can be loaded without loading the base model again, and if they cannot be loaded, the
pipeline is unchanged.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from reslora.errors import InvalidArgument, RunFailed
from reslora.images.data.images import cropped, image_size, open_image
from reslora.images.data.size import Size
from reslora.images.initial_lora import targets_of
from reslora.images.model.families.base import Family
from reslora.images.model.loading import find_model
from reslora.images.refusals import check_model_name
from reslora.options.images import Options

from . import weight_files
from .bases import base_of
from .generation_request import SEEDS, Drawn, Request
from .runs import Run, RunError, Weights
from .weight_files import files_of, without_folders


class Cancelled(Exception):
    """Raised if the user has cancelled the request."""


@dataclass(frozen=True)
class Picture:
    """One image to generate."""

    weights: Weights
    request: Request
    title: str
    """Status line while the image is generated."""
    reference: Path | None = None
    """The reference image of an edit model."""


class Studio:
    """The pipeline that generates images, and its weights. Nothing is loaded before the first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while a request is generated."""
        self.stopped = threading.Event()
        self.now: tuple[str, float] | None = None
        """What the current request does, and its completed fraction; None without a request."""
        self.pipeline: DiffusionPipeline | None = None
        self.family: Family | None = None
        self.base: Options | None = None
        """The options with which the pipeline was loaded."""
        self.parts: dict[str, torch.nn.Module] = {}
        """The base denoiser, and the base text encoders that a run may have trained, by name."""
        self.current = None
        """Key of the weights in the pipeline: paths and stamps of their files, and strength."""
        self.loads = 0
        """Number of times that a pipeline was loaded."""

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self, run: Run | None, choices: list[Weights], request: Request, reference: Path | None = None
    ) -> Iterator[Drawn]:
        """Yield images as `draw` does; `reference` is the image that an edit model changes.

        Image i has the seed `request.seed + i`, whatever the number of images. Each image is generated once with each
        of the weights in `choices`.
        """
        pictures = []
        for number in range(request.images):
            one = replace(request, seed=(request.seed + number) % SEEDS, images=1)
            title = f"Image {number + 1} of {request.images}"
            pictures += [Picture(choice, one, f"{title}, {choice.label}", reference) for choice in choices]
        return self.draw(run, pictures)

    def draw(self, run: Run | None, pictures: list[Picture]) -> Iterator[Drawn]:
        """Yield the images in the order of `pictures`, and meanwhile say in `now` what is done.

        Raises `Cancelled` within one denoising step after a call of `cancel`, and `RunError` for weights that cannot be
        loaded.
        """
        with self.lock:
            self.stopped.clear()
            try:
                self.now = "Loading the model", 0.0
                if (base := base_of(run)) != self.base:
                    self._load(base)
                for number, picture in enumerate(pictures):
                    weights, share = picture.weights, number / len(pictures)
                    self.now = picture.title, share
                    self._use(run, weights, picture.request.strength)
                    image = self._image(picture, partial(self._step, picture.title, number, len(pictures)))
                    yield Drawn(image, picture.request, run.name if run else "", weights.label)
            finally:
                self.now = None

    def _step(self, title: str, number: int, total: int, done: float) -> None:
        """Note the completed fraction of image `number` of `total`. Raises `Cancelled` after a call of `cancel`."""
        self.now = title, (number + done) / total
        if self.stopped.is_set():
            raise Cancelled

    def cancel(self) -> bool:
        """Stop the current request within one denoising step; return whether there was one."""
        self.stopped.set()
        return self.now is not None

    def _image(self, picture: Picture, step: Callable[[float], None]):
        """Return one image from the loaded pipeline; `step` is called with the completed fraction after each step.

        Raises `RunError` if the latents become infinite or NaN.
        """
        request = picture.request

        def after_step(pipeline, index, timestep, tensors):
            """Report the progress; raises `RunError` if the latents became infinite or NaN."""
            if not tensors["latents"].isfinite().all():
                raise RunError(f"{picture.weights.label}: the latents became infinite or NaN at step {index + 1}.")
            step((index + 1) / request.steps)
            return tensors

        wanted = {
            "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "generator": torch.Generator().manual_seed(request.seed), "num_inference_steps": request.steps,
            self.family.guidance: request.guidance, "height": self._side(request.height),
            "width": self._side(request.width), "callback_on_step_end": after_step,
        }  # fmt: skip
        wanted |= self._reference_inputs(picture)
        taken = inspect.signature(self.pipeline.__call__).parameters  # some pipelines take no negative prompt
        return self.pipeline(**{name: value for name, value in wanted.items() if name in taken}).images[0]

    def _reference_inputs(self, picture: Picture) -> dict:
        """Return the pipeline's arguments for the reference image. Raises `RunError` for a wrong or missing image."""
        if (picture.reference is not None) != self.family.edits:
            wrong = "changes an image: give a reference image" if self.family.edits else "takes no reference image"
            raise RunError(f"This model {wrong}.")
        if picture.reference is None:
            return {}
        if isinstance(problem := image_size(picture.reference), str):
            raise RunError(f"The reference image cannot be used: {problem}.")
        size = Size(*self.family.reference_size(*map(self._side, (picture.request.height, picture.request.width))))
        image = cropped(open_image(picture.reference), (0.5, 0.5), size, "lanczos")
        return self.family.reference_inputs([[image]])

    def _side(self, pixels: int) -> int:
        """Round a width or height in pixels down to one that the model can generate; at least to the smallest."""
        multiple = self.family.pixel_multiple(self.pipeline)
        return max(multiple, pixels // multiple * multiple)

    # -- pipeline and weights ------------------------------------------------------------------------------------------

    def _load(self, base: Options) -> None:
        """Load the pipeline of `base`. Raises `RunError` if loading fails; then the previous pipeline remains."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = base.model.pretrained_model_name_or_path
        try:
            check_model_name(name)
            model = find_model(base.model, base.output, PartialState())
            half = torch.bfloat16 if model.family.objective == "flow" else torch.float16
            dtype = half if device.type == "cuda" else torch.float32
            pipeline, denoiser = model.load_pipeline(dtype, device, encoders=True), model.load_denoiser(dtype, device)
        except (InvalidArgument, RunFailed) as error:
            raise RunError(f"The model of this run cannot be loaded: {without_folders(error, Path(name))}.") from None
        except Exception as error:  # such as an unreachable hub or a damaged folder
            raise RunError(f"The model of this run could not be loaded ({type(error).__name__}).") from None
        setattr(pipeline, model.family.denoiser, denoiser)
        self.loads += 1
        self.pipeline, self.family, self.base = pipeline, model.family, base
        names = model.family.denoiser, *(part.name for part in model.family.trainable)
        self.parts = {name: getattr(pipeline, name).requires_grad_(False).eval() for name in names}
        self.current = None

    def _use(self, run: Run | None, weights: Weights, strength: float) -> None:
        """Load the weights into the pipeline. Raises `RunError` if loading fails; then the previous weights remain."""
        wanted = (*files_of(weights), 1.0 if weights.kind == "base" else strength)
        if self.current == wanted:
            return
        parts = {name: sharing(part) for name, part in self.parts.items()}
        try:
            self._put(parts, run, weights, strength)
        except RunError:
            raise
        except (ValueError, RuntimeError) as error:  # our loaders name the layer that does not fit
            raise RunError(f"{weights.label}: {without_folders(error, weights.path)}.") from None
        except Exception as error:  # such as a file that is damaged or has been removed
            raise RunError(f"{weights.label} does not fit this model or is damaged ({type(error).__name__}).") from None
        for name, part in parts.items():
            # Not `part.to`: the one of diffusers warns about every cast.
            part = torch.nn.Module.to(part, self.pipeline.device, self.pipeline.dtype).eval()
            setattr(self.pipeline, name, part)
        self.current = wanted

    def _put(self, parts: dict[str, torch.nn.Module], run: Run | None, weights: Weights, strength: float) -> None:
        """Load the weights into `parts`: a denoiser and text encoders, by name."""
        if weights.kind == "file":
            weight_files.put_file(parts, self.family, weights, strength)
        for name, path in ((self.family.denoiser, weights.path), *weights.encoders):
            one = replace(weights, path=path)
            if weights.kind == "merged" and name in parts:
                weight_files.put_merged(parts[name], one, strength)
            elif weights.kind == "adapter" and name in parts:
                if path == weights.path:
                    targets = targets_of(run.config["target_modules"])
                else:
                    (part,) = [part for part in self.family.trainable if part.name == name]
                    targets = part.targets_in(self.parts[name])
                weight_files.put_adapter(parts[name], run.config, targets, one, strength)


def sharing(part: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model that shares its tensors."""
    shared = (*part.parameters(), *part.buffers(), part.config)
    return copy.deepcopy(part, {id(one): one for one in shared})
