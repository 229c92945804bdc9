"""The pipeline, the weights that are in it, and images from it; people take turns, an image at a time.

The base weights are never changed: other weights go into another denoiser, a *skeleton* that shares the base tensors,
made on the meta device in a fraction of a second. So switching reloads nothing, and a load that fails changes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

import reslora
from reslora import files
from reslora.common.assets import ASSETS
from reslora.common.errors import InvalidArgument, first_line
from reslora.diffusion.arguments import Flags
from reslora.diffusion.model.families.base import Family
from reslora.diffusion.model.loading import find_model
from reslora.diffusion.output.calibration_file import read_calibration
from reslora.diffusion.output.exports import write_lora
from reslora.diffusion.settings import check_model_name
from reslora.diffusion.training.state import targets_of
from reslora.merges import MERGES

from . import weight_files
from .recipe import SEEDS, Drawn, Request
from .runs import Run, RunError, Weights

BUNDLED = ASSETS / "pipeline"
MERGE_CHOICES = sorted(MERGES, key=lambda name: (not MERGES[name].needs_moments, name == "none"))
"""What keeps most comes first."""
PATIENCE = 15.0
"""Seconds without anybody listening after which a generation counts as abandoned."""


class Cancelled(Exception):
    """Somebody pressed cancel, or nobody is there any more to see the images."""


@dataclass(frozen=True)
class Step:
    """A denoising step of an image is done."""

    image: int
    done: int
    total: int


@dataclass(frozen=True)
class Status:
    """One line on what is going on."""

    text: str


class Turns:
    """One at a time, in the order of asking: who asks for eight images lets others have theirs in between."""

    def __init__(self) -> None:
        self.waiting: deque[object] = deque()
        self.moved = threading.Condition()

    @contextlib.contextmanager
    def turn(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Waits for its turn and holds it; `check` is called meanwhile, and may raise to give up."""
        ticket = object()
        with self.moved:
            self.waiting.append(ticket)
        try:
            with self.moved:
                while self.waiting[0] is not ticket:
                    check()
                    self.moved.wait(0.2)
            yield
        finally:
            with self.moved:
                self.waiting.remove(ticket)
                self.moved.notify_all()


class Audience:
    """Whether a generation is still wanted: not cancelled, and somebody listens."""

    def __init__(self, listening: Callable[[], bool]) -> None:
        self.listening = listening
        self.stopped = threading.Event()
        self.heard = time.monotonic()

    def check(self) -> None:
        """Raises `Cancelled` once nobody wants it any more."""
        if self.listening():
            self.heard = time.monotonic()
        elif time.monotonic() - self.heard > PATIENCE:
            print("Gave up a generation that nobody listened to.", file=sys.stderr, flush=True)
            raise Cancelled
        if self.stopped.is_set():
            raise Cancelled

    def wait(self) -> None:
        """Returns when somebody listens: what nobody listens to must not keep others waiting."""
        while not self.listening():
            self.check()
            time.sleep(0.1)
        self.check()


class Studio:
    """The pipeline and what is in it. Nothing is loaded before the first use."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.pipeline: DiffusionPipeline | None = None
        self.family: Family | None = None
        self.base: Base | None = None
        """From where the pipeline was loaded."""
        self.state = {}
        """The base denoiser's tensors, shared by every skeleton."""
        self.encoders: dict[str, torch.nn.Module] = {}
        """The base text encoders that runs may have trained, by name."""
        self.current = None
        """What is in the pipeline's denoiser: path and configuration, their times of change, strength."""
        self.loads = 0
        """How many times a pipeline was loaded from its files."""
        self.running: dict[str, Audience] = {}

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        run: Run | None,
        choices: list[Weights],
        request: Request,
        session: str = "",
        listening: Callable[[], bool] = lambda: True,
    ) -> Iterator[Status | Step | Drawn]:
        """Yields what happens, and the images: for each number one per choice, with the same seed.

        Each image is drawn on its own with its own seed, so it doesn't depend on how many were asked for. Closing the
        iterator, `cancel(session)`, or a while in which `listening` says no, stops within one denoising step; the
        latter two raise `Cancelled`. Raises `RunError` for weights that cannot be loaded.
        """
        events: queue.Queue = queue.Queue(maxsize=1)
        audience = self.running[session] = Audience(listening)
        work = (run, choices, request.clamped(), audience, events)
        threading.Thread(target=self._work, args=work, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            audience.stopped.set()
            if self.running.get(session) is audience:
                del self.running[session]

    def cancel(self, session: str) -> bool:
        """Stops the generation of a session within one step; False if there is none."""
        audience = self.running.get(session)
        if audience is not None:
            audience.stopped.set()
        return audience is not None

    def close(self) -> None:
        """Stops whatever is being generated."""
        for session in list(self.running):
            self.cancel(session)

    def _work(self, run, choices, request, audience: Audience, events: queue.Queue) -> None:
        outcome: Exception | None = RunError("This could not be generated.")

        def put(event) -> None:
            while True:
                audience.check()
                with contextlib.suppress(queue.Full):
                    return events.put(event, timeout=0.1)

        try:
            self._draw_all(run, choices, request, audience, put)
            outcome = None
        except (Cancelled, RunError) as error:
            outcome = error
        except Exception as error:  # whatever a model or a device can raise; the page gets one sentence
            traceback.print_exception(error)
            outcome = RunError(f"This could not be generated ({type(error).__name__}).")
        finally:
            if audience.stopped.is_set():
                with contextlib.suppress(queue.Empty):
                    events.get_nowait()  # a step that nobody will look at must not keep the outcome out
            with contextlib.suppress(queue.Full):
                events.put(outcome, timeout=PATIENCE)

    def _draw_all(self, run, choices, request: Request, audience: Audience, put) -> None:
        for number in range(request.images):
            one = replace(request, seed=(request.seed + number) % SEEDS, images=1)
            for choice in choices:
                audience.wait()
                if self.turns.waiting:
                    put(Status("Waiting for another image to be finished"))
                with self.turns.turn(audience.check):
                    if self.base != base_of(run):
                        put(Status("Loading the model: this happens once"))
                        self._load(base_of(run))
                    put(Status(f"Image {number + 1} of {request.images}, {choice.label}"))
                    self._use(run, choice, request.strength)
                    image = self._draw(one, choice, number, audience, put)
                put(Drawn(image, one, {"run": run.name if run else "", "weights": choice.label}))

    def _draw(self, request: Request, weights: Weights, number: int, audience: Audience, put):
        def after_step(pipeline, index, timestep, tensors):
            audience.check()
            if not tensors["latents"].isfinite().all():
                raise RunError(f"{weights.label}: step {index + 1} gave values that are not finite.")
            put(Step(number, index + 1, request.steps))
            return tensors

        wanted = {
            "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "generator": torch.Generator().manual_seed(request.seed), "num_inference_steps": request.steps,
            self.family.guidance: request.guidance, "height": self._side(request.height),
            "width": self._side(request.width), "callback_on_step_end": after_step,
        }  # fmt: skip
        taken = inspect.signature(self.pipeline.__call__).parameters  # some models have no negative prompts
        return self.pipeline(**{name: value for name, value in wanted.items() if name in taken}).images[0]

    def _side(self, pixels: int) -> int:
        """The side nearest to this one, and not longer, that the model can draw."""
        multiple = self.family.pixel_multiple(self.pipeline)
        return max(multiple, pixels // multiple * multiple)

    # -- what is in the pipeline ---------------------------------------------------------------------------------------

    def _load(self, base: Base) -> None:
        """Loads the pipeline; the one before stays if that fails."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            check_model_name(base.name)
            model = find_model(base.flags(), PartialState())
            half = torch.bfloat16 if model.family.objective == "flow" else torch.float16
            dtype = half if device.type == "cuda" else torch.float32
            pipeline, denoiser = model.load_pipeline(dtype, device, encoders=True), model.load_denoiser(dtype, device)
        except InvalidArgument as error:
            raise RunError(
                f"The model of this run cannot be loaded: {without_folders(error, Path(base.name))}."
            ) from None
        except Exception as error:  # a hub, a disk or a damaged folder
            raise RunError(f"The model of this run could not be loaded ({type(error).__name__}).") from None
        if base.prediction_type:
            pipeline.scheduler.register_to_config(prediction_type=base.prediction_type)
        setattr(pipeline, model.family.denoiser, denoiser)
        self.loads += 1
        self.pipeline, self.family, self.base, self.state = pipeline, model.family, base, denoiser.state_dict()
        self.encoders = {part.name: getattr(pipeline, part.name) for part in model.family.trainable}
        self.current = None

    def _use(self, run: Run | None, weights: Weights, strength: float) -> None:
        """Puts the weights into the pipeline; `RunError` if they cannot be loaded, which leaves those before."""
        files = (weights.path, weights.config, *(path for _, path in weights.encoders))
        wanted = (*files, *map(changed, files), 1.0 if weights.kind == "base" else strength)
        if self.current == wanted:
            return
        parts = {self.family.denoiser: self._skeleton()} | self._encoders()
        try:
            self._put(parts, run, weights, strength)
        except RunError:
            raise
        except (ValueError, RuntimeError) as error:  # ours say in one line which layer does not fit
            raise RunError(f"{weights.label}: {without_folders(error, weights.path)}.") from None
        except Exception as error:  # damaged
            raise RunError(f"{weights.label} does not fit this model or is damaged ({type(error).__name__}).") from None
        for name, part in parts.items():
            # Not `part.to`: diffusers' own warns about every cast.
            part = torch.nn.Module.to(part, self.pipeline.device, self.pipeline.dtype).eval()
            setattr(self.pipeline, name, part)
        self.current = wanted

    def _put(self, parts: dict[str, torch.nn.Module], run: Run | None, weights: Weights, strength: float) -> None:
        """Puts the weights into what is to become the pipeline's denoiser and text encoders."""
        if weights.kind == "file":
            weight_files.put_file(self.pipeline, parts, weights, strength)
        for name, path in ((self.family.denoiser, weights.path), *weights.encoders):
            one = replace(weights, path=path)
            if weights.kind == "merged" and name in parts:
                weight_files.put_merged(parts[name], one, strength)
            elif weights.kind == "adapter" and name in parts:
                targets = targets_of(run.config["target_modules"]) if path == weights.path else self._targets(name)
                weight_files.put_adapter(parts[name], run.config, targets, one, strength)

    def _targets(self, name: str) -> list[str] | str:
        """The layers of a text encoder that the trainer adapts."""
        (part,) = [part for part in self.family.trainable if part.name == name]
        return part.targets_in(self.encoders[name])

    def _encoders(self) -> dict[str, torch.nn.Module]:
        """Text encoders with the base tensors in them: shared, not copied."""
        return {
            name: copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
            for name, encoder in self.encoders.items()
        }

    def _skeleton(self) -> torch.nn.Module:
        """A denoiser with the base tensors in it: shared, not copied."""
        present = getattr(self.pipeline, self.family.denoiser)
        with torch.device("meta"):
            denoiser = type(present).from_config(present.config)
        denoiser.load_state_dict(self.state, assign=True)
        for name, module in denoiser.named_modules():  # what is no parameter or buffer, as Qwen-Image's frequencies
            own = vars(present.get_submodule(name))
            vars(module).update({key: own[key] for key, value in vars(module).items() if torch.is_tensor(value)})
        return denoiser.requires_grad_(False).eval()

    # -- merging -------------------------------------------------------------------------------------------------------

    def merge(self, run: Run, checkpoint: Weights, method: str) -> dict:
        """Merges an unmerged ResLoRA checkpoint by another method, with the calibration samples the run has kept.

        Writes `reslora/merged-by-<method>-<step>/` (plain LoRA files, merge.json) and returns the report.
        """
        if method not in MERGES or checkpoint.kind != "adapter" or checkpoint.method != "reslora":
            raise RunError("Choose one of the run's ResLoRA checkpoints and one of the merge methods.")
        with self.turns.turn():
            base = base_of(run)
            if self.base != base:
                self._load(base)
            try:
                return self._merge(run, checkpoint, method)
            except OSError:
                raise RunError("The merged weights could not be written into the run's folder.") from None
            except (ValueError, RuntimeError) as error:
                raise RunError(f"It cannot be merged: {without_folders(error, run.folder)}.") from None

    def _merge(self, run: Run, checkpoint: Weights, method: str) -> dict:
        made, report, parts = self._encoders(), {}, {}
        made[self.family.denoiser] = self._skeleton()
        for name, path in ((self.family.denoiser, checkpoint.path), *checkpoint.encoders):
            parts[name] = torch.nn.Module.to(made[name], dtype=torch.float32)
            reslora.load(parts[name], path)
            encoder = name if path != checkpoint.path else None
            found = reslora.merge(parts[name], method=method, calibration=calibration_of(run, encoder)).to_dict()
            report |= {encoder: found} if encoder else found
        folder = checkpoint.path.parent / f"merged-by-{method}-{checkpoint.step}"
        with files.replacing(folder) as temporary:
            temporary.mkdir()
            write_lora(parts, temporary, self.family, {})
            files.write_json(temporary / "merge.json", report)
        return report


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
        )  # fmt: skip


def base_of(run: Run | None) -> Base:
    """The pipeline of a run; the bundled one without a run."""
    if run is None:
        return Base()
    named = run.word("pretrained_model_name_or_path")
    settings = {name: run.word(name) for name in ("revision", "variant", "cache_dir", "prediction_type")}
    # A run that came from another machine has that machine's path of the bundled pipeline, the example a relative one.
    if not named or (Path(named).parts[-2:] == BUNDLED.parts[-2:] and not Path("/", named).is_dir()):
        return Base(prediction_type=settings["prediction_type"])
    is_file = named.endswith(".safetensors")
    vae = run.word("pretrained_vae_model_name_or_path")
    return Base(named, vae, **settings, folder=str(run.folder) if is_file else "")


def calibration_of(run: Run, encoder: str | None = None) -> list[dict] | None:
    """What the run's own merge of the denoiser, or of a text encoder, has read, in batches; None if it kept none."""
    path = run.inside("reslora", f"calibration{f'-{encoder}' if encoder else ''}.safetensors")
    return None if path is None else read_calibration(path)


def changed(path: Path | None) -> int:
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return 0


def without_folders(error: Exception, path: Path) -> str:
    """An error's first line with the names of files, not where they are on this machine."""
    return first_line(error).replace(f"{path.parent}/", "").replace(str(path.parent), path.parent.name)
