"""Generate images: load the pipeline, change its weights, and let users take turns after each image.

Requests are stopped here, not by Gradio's `cancels`: a handler that Gradio cancels could not return the finished cells
of a stopped grid, and would not stop while it waits for its turn.

The base weights never change. Other weights are loaded into a *skeleton*: a second denoiser that shares the base
tensors and is made on the meta device in a fraction of a second. So other weights can be loaded without loading the
base model again, and if they cannot be loaded, the pipeline is unchanged.
"""

import contextlib
import copy
import inspect
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

import reslora
from reslora.errors import InvalidArgument, RunFailed
from reslora.images.data.images import cropped, image_size, open_image
from reslora.images.data.size import Size
from reslora.images.initial_lora import targets_of
from reslora.images.model.families.base import Family
from reslora.images.model.loading import Model, find_model
from reslora.images.output.calibration_file import read_calibration
from reslora.images.output.exports import write_lora
from reslora.images.refusals import check_model_name
from reslora.io import replacing, write_json
from reslora.merges import MERGES
from reslora.options.images import Options

from . import weight_files
from .bases import base_of, stamps_of
from .generation_request import SEEDS, Drawn, Request
from .runs import IN_PLACE, Run, RunError, Weights, merged_by
from .turns import Turns
from .weight_files import files_of, refuse_gone, refuse_replaced, without_folders

MERGE_CHOICES = sorted(MERGES, key=lambda name: (not MERGES[name].needs_moments, name == "none"))
"""Names of the merge methods: those that need calibration samples come first, and `none` comes last."""
PATIENCE = 15.0
"""Seconds after which a request is stopped if its client does not read its messages."""
LONGEST = 5.0
"""Seconds that the time between two checks counts at most: a machine that was suspended has read no messages either."""
PAUSE = 0.2
"""Minimum seconds between two step messages. A small model may take steps faster than a page shows messages, and the
page shows all of its queued messages before it handles a click on *Stop*."""


class Cancelled(Exception):
    """Raised if the user cancelled a request, or if its client has stopped reading messages."""


@dataclass(frozen=True)
class Status:
    """A message for the client: a line about the current work, and the completed fraction of the request."""

    text: str
    share: float = 0.0


@dataclass(frozen=True)
class Picture:
    """One image to generate."""

    weights: Weights
    request: Request
    title: str
    """Status line while the image is generated."""
    reference: Path | None = None
    """The reference image of an edit model."""


class Visitor:
    """A client's request, for which messages are sent until it is cancelled or the client stops reading them."""

    def __init__(self, session: str, kind: str, listening: Callable[[], bool]) -> None:
        self.session, self.kind, self.listening = session, kind, listening
        self.stopped = threading.Event()
        self.unheard: float | None = 0.0
        """Seconds for which the client has not read messages; None while it reads them."""
        self.checked = time.monotonic()
        """Time of the last check."""
        self.events: queue.Queue = queue.Queue(maxsize=1)
        self.total, self.share = 1, 0.0
        """Number of images of the request, and its completed fraction."""
        self.told = 0.0
        """Time at which the last step message was sent."""

    def check(self) -> None:
        """Raise `Cancelled` if the request was cancelled, or its client has not read for `PATIENCE` seconds."""
        now, last, before = time.monotonic(), self.checked, self.unheard
        self.checked = now
        self.unheard = None if self.listening() else 0.0 if before is None else before + min(now - last, LONGEST)
        if self.unheard is not None and self.unheard > PATIENCE:
            print("Stopped generating images: the client did not read its messages.", file=sys.stderr, flush=True)
            raise Cancelled
        if self.stopped.is_set():
            raise Cancelled

    def wait(self) -> None:
        """Wait until the client reads its messages, so that an abandoned request does not block other requests."""
        while not self.listening():
            self.check()
            time.sleep(0.1)
        self.check()

    def put(self, event: object) -> None:
        """Send a message as soon as the previous message was taken. Raises `Cancelled` as `check` does."""
        while True:
            self.check()
            with contextlib.suppress(queue.Full):
                return self.events.put(event, timeout=0.1)

    def report(self, text: str) -> None:
        """Send a line about the current work. Raises `Cancelled` as `check` does."""
        self.put(Status(text, self.share))

    def step(self, text: str, share: float) -> None:
        """Send the completed fraction if the last one was sent at least `PAUSE` seconds ago; else only `check`."""
        self.share = share
        if time.monotonic() - self.told < PAUSE:
            self.check()
        else:
            self.report(text)
            self.told = time.monotonic()


class Studio:
    """The pipeline that generates images, and its weights. Nothing is loaded before the first use."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.pipeline: DiffusionPipeline | None = None
        self.family: Family | None = None
        self.model: Model | None = None
        """The model from whose files the pipeline was loaded."""
        self.base: Options | None = None
        """The options with which the pipeline was loaded."""
        self.stamps: dict[Path, tuple[int, ...]] = {}
        """The files that the pipeline was loaded from, each with the result of `stamp_of` at that time."""
        self.state = {}
        """The base denoiser's tensors, shared by every skeleton."""
        self.encoders: dict[str, torch.nn.Module] = {}
        """The base text encoders that a run may have trained, by name."""
        self.current = None
        """Key of the weights in the pipeline: paths and stamps of their files, and strength."""
        self.loads = 0
        """Number of times that a pipeline was loaded."""
        self.running: set[Visitor] = set()
        """The active and waiting requests."""

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        run: Run | None,
        choices: list[Weights],
        request: Request,
        session: str = "",
        listening: Callable[[], bool] = lambda: True,
        reference: Path | None = None,
    ) -> Iterator[Status | Drawn]:
        """Yield status messages and images; `reference` is the image that an edit model changes.

        Image i has the seed `request.seed + i`, whatever the number of images. It is generated once with each of the
        weights in `choices`.

        The generation stops within one denoising step
        - if the iterator is closed;
        - if `cancel(session)` is called: `Cancelled` is raised;
        - if `listening` has returned False for `PATIENCE` seconds: `Cancelled` is raised.

        Raises `RunError` for weights that cannot be loaded.
        """
        pictures = []
        for number in range(request.images):
            one = replace(request, seed=(request.seed + number) % SEEDS, images=1)
            title = f"Image {number + 1} of {request.images}"
            pictures += [Picture(choice, one, f"{title}, {choice.label}", reference) for choice in choices]
        return self.draw(run, pictures, "images", session, listening)

    def draw(
        self, run: Run | None, pictures: list[Picture], kind: str, session: str = "", listening=lambda: True
    ) -> Iterator[Status | Drawn]:
        """Yield status messages, and the images in the order of `pictures`. Stops as `generate` does.

        `kind`: `images` or `grid`, as in `cancel`."""
        return self._progress(Visitor(session, kind, listening), self._draw_all, run, pictures)

    def _progress(self, visitor: Visitor, *work) -> Iterator:
        """Run `work`, a method and its arguments, in a thread, and yield its messages; reraise its exception.

        `visitor` is passed to the method as its first argument."""
        self.running.add(visitor)
        threading.Thread(target=self._work, args=(visitor, *work), daemon=True).start()
        try:
            while (event := visitor.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            visitor.stopped.set()
            self.running.remove(visitor)

    def cancel(self, session: str | None = None, kind: str | None = None) -> bool:
        """Stop a session's requests (None: those of all sessions) within one denoising step; return whether any ran.

        `kind`: `images` or `grid` stops only requests of this kind; None stops all.
        """
        running = list(self.running)
        found = [one for one in running if session in (None, one.session) and kind in (None, one.kind)]
        for visitor in found:
            visitor.stopped.set()
        return bool(found)

    def _work(self, visitor: Visitor, work: Callable, *given) -> None:
        """Do the work of a request in its thread; at the end, send None or the exception that `work` raised."""
        outcome: Exception | None = None
        try:
            work(visitor, *given)
        except (Cancelled, RunError) as error:
            outcome = error
        except Exception as error:  # anything that a model or a device raises; the page gets one sentence
            traceback.print_exception(error)
            outcome = RunError(f"The request could not be completed ({type(error).__name__}); see the terminal.")
        if visitor.stopped.is_set():
            with contextlib.suppress(queue.Empty):
                visitor.events.get_nowait()  # make room: the outcome matters more than an unread step
        while visitor in self.running:  # until the last message is read, or nobody waits for one
            with contextlib.suppress(queue.Full):
                return visitor.events.put(outcome, timeout=1)

    @contextlib.contextmanager
    def _turn(self, run: Run | None, visitor: Visitor) -> Iterator[None]:
        """Wait for a turn, load the run's pipeline if it is not loaded, and hold the turn during the `with` block."""
        visitor.wait()
        if self.turns.waiting:
            visitor.report("Waiting until another request's image is finished")
        with self.turns.turn(visitor.check):
            if not self._is_loaded(base := base_of(run)):
                visitor.report("Loading the model: this happens once")
                self._load(base)
            yield

    def _draw_all(self, visitor: Visitor, run: Run | None, pictures: list[Picture]) -> None:
        """Generate the images in order, each in its own turn, and send them."""
        visitor.total = len(pictures)
        for number, picture in enumerate(pictures):
            visitor.share = number / len(pictures)
            with self._turn(run, visitor):
                if picture.weights.made_of and not picture.weights.path.is_file():
                    visitor.report(f"Merging: {picture.weights.label}")
                    self._merge(run, *picture.weights.made_of)
                visitor.report(picture.title)
                self._use(run, picture.weights, picture.request.strength)
                image = self._draw(picture, number, visitor)
            source = {"run": run.name if run else "", "weights": picture.weights.label}
            visitor.put(Drawn(image, picture.request, source))

    def _draw(self, picture: Picture, number: int, visitor: Visitor):
        """Return one image from the loaded pipeline. Raises `RunError` if the latents become infinite or NaN."""
        request = picture.request

        def after_step(pipeline, index, timestep, tensors):
            """Report the progress; raises `RunError` if the latents became infinite or NaN."""
            if not tensors["latents"].isfinite().all():
                raise RunError(f"{picture.weights.label}: the latents became infinite or NaN at step {index + 1}.")
            visitor.step(picture.title, (number + (index + 1) / request.steps) / visitor.total)
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
        return self.family.reference_inputs([image])

    def _side(self, pixels: int) -> int:
        """Round a width or height in pixels down to one that the model can generate; at least to the smallest."""
        multiple = self.family.pixel_multiple(self.pipeline)
        return max(multiple, pixels // multiple * multiple)

    # -- pipeline and weights ------------------------------------------------------------------------------------------

    def _is_loaded(self, base: Options) -> bool:
        """Return whether the pipeline of `base` is loaded, and none of its files has changed since it was loaded."""
        return base == self.base and stamps_of(base, self.model) == self.stamps

    def _load(self, base: Options) -> None:
        """Load the pipeline of `base`. Raises `RunError` if this fails; then the previous pipeline remains."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = base.model.pretrained_model_name_or_path
        try:
            check_model_name(name)
            model = find_model(base.model, base.output, PartialState())
            stamps = stamps_of(base, model)  # read first: a file written during the load is found by the next check
            half = torch.bfloat16 if model.family.objective == "flow" else torch.float16
            dtype = half if device.type == "cuda" else torch.float32
            pipeline, denoiser = model.load_pipeline(dtype, device, encoders=True), model.load_denoiser(dtype, device)
        except (InvalidArgument, RunFailed) as error:
            raise RunError(f"The model of this run cannot be loaded: {without_folders(error, Path(name))}.") from None
        except Exception as error:  # such as an unreachable hub or a damaged folder
            raise RunError(f"The model of this run could not be loaded ({type(error).__name__}).") from None
        setattr(pipeline, model.family.denoiser, denoiser)
        self.loads += 1
        self.pipeline, self.family, self.base, self.state = pipeline, model.family, base, denoiser.state_dict()
        self.model, self.stamps = model, stamps
        self.encoders = {part.name: getattr(pipeline, part.name) for part in model.family.trainable}
        self.current = None

    def _use(self, run: Run | None, weights: Weights, strength: float) -> None:
        """Load the weights into the pipeline. Raises `RunError` if this fails; then the previous weights remain."""
        files = files_of(weights)
        wanted = (*files, 1.0 if weights.kind == "base" else strength)
        if self.current == wanted:
            return
        parts = self._parts()
        try:
            refuse_replaced(run, weights, files)
            self._put(parts, run, weights, strength)
            refuse_replaced(run, weights, files)
        except RunError:
            raise
        except (ValueError, RuntimeError) as error:  # our loaders name the layer that does not fit
            refuse_gone(run, weights)
            raise RunError(f"{weights.label}: {without_folders(error, weights.path)}.") from None
        except Exception as error:  # such as a damaged file
            refuse_gone(run, weights)
            raise RunError(f"{weights.label} does not fit this model or is damaged ({type(error).__name__}).") from None
        for name, part in parts.items():
            # Not `part.to`: the one of diffusers warns about every cast.
            part = torch.nn.Module.to(part, self.pipeline.device, self.pipeline.dtype).eval()
            setattr(self.pipeline, name, part)
        self.current = wanted

    def _put(self, parts: dict[str, torch.nn.Module], run: Run | None, weights: Weights, strength: float) -> None:
        """Load the weights into `parts`: a denoiser and text encoders, by name, from `_parts`."""
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
                    targets = part.targets_in(self.encoders[name])
                weight_files.put_adapter(parts[name], run.config, targets, one, strength)

    def _parts(self) -> dict[str, torch.nn.Module]:
        """Return a new denoiser and new text encoders, by name; they share the tensors of the base model."""
        return {self.family.denoiser: self._skeleton()} | {
            name: copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
            for name, encoder in self.encoders.items()
        }

    def _skeleton(self) -> torch.nn.Module:
        """Return a new denoiser that shares the tensors of the base denoiser."""
        present = getattr(self.pipeline, self.family.denoiser)
        with torch.device("meta"):
            denoiser = type(present).from_config(present.config)
        denoiser.load_state_dict(self.state, assign=True)
        for name, module in denoiser.named_modules():
            own = present.get_submodule(name)
            # plain tensor attributes, such as Qwen-Image's frequencies
            vars(module).update({key: vars(own)[key] for key, value in vars(module).items() if torch.is_tensor(value)})
            for key, value in list(module.named_buffers(recurse=False)):
                if value.is_meta:  # not in the state, such as Chroma's positions of modulations
                    setattr(module, key, getattr(own, key))
        return denoiser.requires_grad_(False).eval()

    # -- merging -------------------------------------------------------------------------------------------------------

    def _merge(self, run: Run, checkpoint: Weights, method: str) -> dict:
        """Merge a checkpoint in float32, write the LoRA files and the merge report, and return the report."""
        report, parts = {}, {}
        try:
            if not run.allows(method):
                raise RunError(
                    f"{method} needs calibration samples, and this run has none; choose another merge method"
                )
            made = self._parts()
            for name, path in ((self.family.denoiser, checkpoint.path), *checkpoint.encoders):
                parts[name] = torch.nn.Module.to(made[name], dtype=torch.float32)
                reslora.load(parts[name], path)
                encoder = name if path != checkpoint.path else None
                found = reslora.merge(parts[name], method=method, calibration=calibration_of(run, encoder)).to_dict()
                report |= {encoder: found} if encoder else found
            with IN_PLACE:
                refuse_gone(run, checkpoint)  # otherwise writing would create the folder of a deleted run again
                with replacing(merged_by(checkpoint, method).path.parent) as temporary:
                    temporary.mkdir()
                    write_lora(parts, temporary, self.family, {})
                    write_json(temporary / "merge.json", report)
        except OSError as error:
            refuse_gone(run, checkpoint)
            reason = error.strerror or without_folders(error, run.folder)
            raise RunError(f"The merged weights cannot be written into the run's folder ({reason}).") from None
        except (ValueError, RuntimeError) as error:
            refuse_gone(run, checkpoint)
            raise RunError(f"The checkpoint cannot be merged: {without_folders(error, run.folder)}.") from None
        return report


def calibration_of(run: Run, encoder: str | None = None) -> list[dict] | None:
    """Return a run's batches of calibration samples, or None if the run has none.

    `encoder`: name of the text encoder whose samples to return; None means the denoiser."""
    path = run.inside("reslora", f"calibration{f'-{encoder}' if encoder else ''}.safetensors")
    return None if path is None else read_calibration(path)
