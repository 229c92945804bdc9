"""The pipeline, the weights that are in it, and pictures from it; one lock serialises everything that touches it.

The base weights are never changed: other weights go into another U-Net *skeleton* that shares the base tensors, made
on the meta device in a fraction of a second. So switching reloads nothing, and a load that fails changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import random
import struct
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .runs import Run, RunError, Weights

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "pipeline"
LARGEST_ADAPTER = 2**30
LARGEST_HEADER = 32 * 2**20
MERGES = ("lstsq", "input", "weights", "none")
PATIENCE = 20.0
"""Seconds that a finished denoising step waits for a reader before the generation counts as abandoned."""


class Cancelled(Exception):
    """Somebody pressed cancel, or nobody is there any more to see the pictures."""


@dataclass(frozen=True)
class Request:
    """What to draw. Whatever the browser sent, `clamped` makes it something the pipeline can take."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    width: int = 64
    height: int = 64
    images: int = 1
    strength: float = 1.0

    def clamped(self) -> Request:
        """The nearest request within the limits; a negative seed becomes a random one."""
        seed = bounded(self.seed, -1, 2**32 - 1, 0)
        return Request(
            prompt=str(self.prompt or "").replace("\0", "")[:1000],
            negative_prompt=str(self.negative_prompt or "").replace("\0", "")[:1000],
            seed=random.SystemRandom().randrange(2**32) if seed < 0 else seed,
            steps=bounded(self.steps, 1, 150, 20),
            guidance=float(bounded(self.guidance, 0, 30, 4.0, whole=False)),
            width=bounded(self.width, 32, 1024, 64) // 8 * 8,
            height=bounded(self.height, 32, 1024, 64) // 8 * 8,
            images=bounded(self.images, 1, 8, 1),
            strength=float(bounded(self.strength, -2, 2, 1.0, whole=False)),
        )


def bounded(value, low, high, otherwise, whole: bool = True):
    """`value` as a number in [low, high]; `otherwise` for what is no finite number."""
    try:
        value = float(value) if not whole or isinstance(value, float) else int(value)
        if not math.isfinite(value):
            return otherwise
        return min(high, max(low, int(value) if whole else value))
    except (TypeError, ValueError, OverflowError):
        return otherwise


@dataclass(frozen=True)
class Step:
    """A denoising step of a picture is done."""

    image: int
    done: int
    total: int


@dataclass(frozen=True)
class Status:
    """One line on what is going on."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A finished picture with the settings that make it again: a request for one image, and what it was made with."""

    image: object
    request: Request
    source: dict


class Studio:
    """The pipeline and what is in it. Nothing is loaded before the first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pipeline = None
        self.base = None
        """Path or hub name of the pipeline that is loaded."""
        self.state = {}
        """The base U-Net's tensors, shared by every skeleton."""
        self.current = None
        """What is in the pipeline's U-Net: path, its time of change, strength."""
        self.loads = 0
        """How many times a pipeline was loaded from its files."""
        self.running: dict[str, threading.Event] = {}

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self, run: Run | None, choices: list[Weights], request: Request, session: str = ""
    ) -> Iterator[Status | Step | Picture]:
        """Yields what happens, and the pictures: for each image one per choice, with the same seed.

        Each picture is drawn on its own with its own seed, so it doesn't depend on how many were asked for. Closing the
        iterator, or `cancel(session)`, stops within one denoising step; the latter raises
        `Cancelled`. Raises `RunError` for weights that cannot be loaded.
        """
        events: queue.Queue = queue.Queue(maxsize=1)
        stop = threading.Event()
        self.running[session] = stop

        def put(event) -> None:
            # A reader that has gone takes nothing any more: give up rather than hold the lock for nobody.
            waited = 0.0
            while not stop.is_set() and waited < PATIENCE:
                with contextlib.suppress(queue.Full):
                    events.put(event, timeout=0.1)
                    return
                waited += 0.1
            raise Cancelled

        worker = threading.Thread(target=self._work, args=(run, choices, request.clamped(), stop, put, events))
        worker.daemon = True
        worker.start()
        try:
            while True:
                event = events.get()
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()
            if self.running.get(session) is stop:
                del self.running[session]

    def cancel(self, session: str) -> bool:
        """Stop the generation of a session within one step; False if there is none."""
        stop = self.running.get(session)
        if stop is not None:
            stop.set()
        return stop is not None

    def _work(self, run, choices, request, stop, put, events) -> None:
        outcome = None
        try:
            if self.lock.locked():
                put(Status("Waiting for another picture to be finished"))
            while not self.lock.acquire(timeout=0.2):
                if stop.is_set():
                    raise Cancelled
            try:
                self._draw_all(run, choices, request, stop, put)
            finally:
                self.lock.release()
        except (Cancelled, RunError) as error:
            outcome = error
        except Exception as error:  # whatever a model or a device can raise; the page gets one sentence
            outcome = RunError(f"This could not be generated ({type(error).__name__}).")
        with contextlib.suppress(queue.Empty):
            if stop.is_set():
                events.get_nowait()  # a step that nobody will look at must not keep the outcome out
        with contextlib.suppress(queue.Full):
            events.put(outcome, timeout=PATIENCE)

    def _draw_all(self, run, choices, request, stop, put) -> None:
        base = base_of(run)
        if self.base != base:
            put(Status("Loading the model: this happens once"))
            self._load(base)
        for image in range(request.images):
            for choice in choices:
                put(Status(f"Picture {image + 1} of {request.images}, {choice.label}"))
                self._use(run, choice, request.strength)
                one = replace(request, seed=(request.seed + image) % 2**32, images=1)
                picture = self._draw(one, lambda done, image=image: put(Step(image, done, request.steps)), stop)
                put(Picture(picture, one, {"run": run.name if run else "", "weights": choice.label}))

    def _draw(self, request: Request, on_step, stop: threading.Event):
        import torch

        def callback(pipeline, index, timestep, tensors):
            if stop.is_set():
                raise Cancelled
            on_step(index + 1)
            return tensors

        return self.pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            generator=torch.Generator().manual_seed(request.seed),
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            height=request.height,
            width=request.width,
            callback_on_step_end=callback,
        ).images[0]

    # -- what is in the pipeline ---------------------------------------------------------------------------------------

    def _load(self, base: Base) -> None:
        """Load the pipeline; the one before stays if that fails."""
        import torch
        from diffusers import StableDiffusionPipeline

        cuda = torch.cuda.is_available()
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                base.name,
                revision=base.revision,
                variant=base.variant,
                cache_dir=base.cache_dir,
                torch_dtype=torch.float16 if cuda else torch.float32,
                safety_checker=None,
                use_safetensors=True,
            ).to("cuda" if cuda else "cpu")
        except Exception as error:  # a hub, a disk or a damaged folder
            raise RunError(f"The model of this run could not be loaded ({type(error).__name__}).") from None
        if base.prediction_type:
            pipeline.scheduler.register_to_config(prediction_type=base.prediction_type)
        pipeline.set_progress_bar_config(disable=True)
        self.loads += 1
        self.pipeline, self.base, self.state = pipeline, base, pipeline.unet.state_dict()
        self.current = (None, 0, 1.0)

    def _use(self, run: Run | None, weights: Weights, strength: float) -> None:
        """Put the weights into the pipeline; `RunError` if they cannot be loaded, which leaves those before."""
        import torch

        wanted = (weights.path, changed(weights.path), 1.0 if weights.kind == "base" else strength)
        if self.current == wanted:
            return
        unet = self._skeleton()
        try:
            if weights.kind == "merged":
                put_merged(unet, weights.path, strength)
            elif weights.kind == "file":
                check_adapter_file(weights.path)
                put_file(self.pipeline, unet, weights.path, strength)
            elif weights.kind == "adapter":
                put_adapter(unet, run.config, weights, strength)
        except RunError:
            raise
        except Exception as error:  # damaged, or of another model
            raise RunError(f"{weights.label} does not fit this model or is damaged ({type(error).__name__}).") from None
        # Not `unet.to`: diffusers' own warns about every cast.
        self.pipeline.unet = torch.nn.Module.to(unet, self.pipeline.device, self.pipeline.dtype).eval()
        self.current = wanted

    def _skeleton(self):
        """A U-Net with the base tensors in it: shared, not copied."""
        import torch

        present = self.pipeline.unet
        with torch.device("meta"):
            unet = type(present).from_config(present.config)
        unet.load_state_dict(self.state, assign=True)
        return unet.requires_grad_(False).eval()

    # -- merging -------------------------------------------------------------------------------------------------------

    def merge(self, run: Run, checkpoint: Weights, method: str) -> dict:
        """Merge an unmerged ResLoRA checkpoint by another method, with the calibration samples the run has kept.

        Writes `reslora/merged-by-<method>-<step>/` (diffusers and kohya files, merge.json) and returns the report.
        """
        if method not in MERGES or checkpoint.kind != "adapter" or checkpoint.method != "reslora":
            raise RunError("Choose one of the run's ResLoRA checkpoints and one of the merge methods.")
        with self.lock:
            base = base_of(run)
            if self.base != base:
                self._load(base)
            try:
                return self._merge(run, checkpoint, method)
            except OSError:
                raise RunError("The merged weights could not be written into the run's folder.") from None
            except (ValueError, RuntimeError) as error:
                text = str(error).splitlines()[0].replace(str(run.folder), run.name)
                raise RunError(f"It cannot be merged: {text}.") from None

    def _merge(self, run: Run, checkpoint: Weights, method: str) -> dict:
        import torch

        import reslora
        from reslora import export, files

        unet = torch.nn.Module.to(self._skeleton(), dtype=torch.float32)
        reslora.load(unet, checkpoint.path)
        report = reslora.merge(unet, method=method, calibration=calibration_of(run)).to_dict()
        folder = checkpoint.path.parent / f"merged-by-{method}-{checkpoint.step}"
        with files.replacing(folder) as temporary:
            temporary.mkdir()
            export.export_diffusers(unet, temporary)
            export.export_kohya(unet, temporary / "kohya.safetensors")
            files.write_json(temporary / "merge.json", report)
        return report


@dataclass(frozen=True)
class Base:
    """The pipeline that a run trains: path or hub name, and how the trainer loaded it."""

    name: str = str(BUNDLED)
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    prediction_type: str | None = None


def base_of(run: Run | None) -> Base:
    """The pipeline of a run; the bundled one without a run."""
    config = run.config if run is not None else {}
    named = config.get("pretrained_model_name_or_path")
    settings = {name: config.get(name) for name in ("revision", "variant", "cache_dir", "prediction_type")}
    # A run that came from another machine has that machine's path of the bundled pipeline, the example a relative one.
    if not named or (Path(named).parts[-2:] == BUNDLED.parts[-2:] and not Path("/", named).is_dir()):
        return Base(prediction_type=settings["prediction_type"])
    return Base(str(named), **settings)


def calibration_of(run: Run) -> list[dict] | None:
    """The samples that the run's own merge has read, in batches; None if it kept none."""
    from safetensors.torch import load_file

    path = run.inside("reslora", "calibration.safetensors")
    if path is None:
        return None
    together = load_file(path)
    size, count = int(run.config.get("train_batch_size") or 8), len(next(iter(together.values())))
    return [{name: value[i : i + size] for name, value in together.items()} for i in range(0, count, size)]


def changed(path: Path | None) -> int:
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return 0


def put_merged(unet, folder: Path, strength: float) -> None:
    """Whole merged weights; another strength lies on the line from the base through them, as with a LoRA's scale."""
    import torch
    from safetensors.torch import load_file

    present = unet.state_dict()
    merged = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged.update(load_file(file))
    for name, value in merged.items():
        base = present[name]
        if strength == 1.0 or torch.equal(value.to(base), base):
            merged[name] = value.to(base) if strength == 1.0 else base
        else:
            merged[name] = torch.lerp(base.float(), value.to(base.device).float(), strength).to(base.dtype)
    unet.load_state_dict(merged, assign=True)


def put_file(pipeline, unet, path: Path, strength: float) -> None:
    """A LoRA file in diffusers' or kohya's form; only what is for the U-Net is used."""
    # Without use_safetensors=True diffusers falls back to unpickling where it cannot read a file.
    state, alphas, metadata = pipeline.lora_state_dict(
        path.parent, weight_name=path.name, use_safetensors=True, return_lora_metadata=True
    )
    state = {name: value for name, value in state.items() if name.startswith("unet.")}
    if not state:
        raise RunError("This file has no LoRA weights for a U-Net.")
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="default", metadata=metadata)
    if strength != 1.0:
        unet.set_adapters("default", strength)


def put_adapter(unet, config: dict, weights: Weights, strength: float) -> None:
    """An unmerged checkpoint: with its shortcuts, as it was trained."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    import reslora

    if weights.method == "reslora":
        reslora.load(unet, weights.path)
    else:
        alpha = config["lora_alpha"] * (2 if weights.method == "lora_x2" else 1)
        unet.add_adapter(LoraConfig(r=config["rank"], lora_alpha=alpha, target_modules=config["target_modules"]))
        state = load_file(weights.path / "adapter.safetensors")
        missing = {name for name in unet.state_dict() if ".lora_" in name} ^ state.keys()
        if missing:
            raise ValueError(f"other layers, first {min(missing)}")
        unet.load_state_dict(state, strict=False)
    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= strength


# -- files from and for people -----------------------------------------------------------------------------------------


def check_adapter_file(path: Path) -> None:
    """Refuse what isn't a LoRA in safetensors form, by its content: nothing is ever unpickled."""
    if path.stat().st_size > LARGEST_ADAPTER:
        raise RunError(f"This file is larger than {LARGEST_ADAPTER // 2**20} MB.")
    refusal = RunError("This is not a safetensors file; .bin, .ckpt and .pt files can run code.")
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, path.stat().st_size - 8):
            raise refusal
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            complete = max(ends, default=0) == path.stat().st_size - 8 - length
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
            raise refusal from None
    if not complete:
        raise RunError("This file is cut short or damaged.")
    if not any("lora" in name.lower() for name in entries):
        raise RunError("This file has no LoRA weights in it.")


def uploaded(path: str | Path) -> Weights:
    """An uploaded LoRA file as something to generate with; `RunError` if it isn't one."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise RunError("Only .safetensors files are taken; .bin, .ckpt and .pt files can run code.")
    check_adapter_file(path)
    return Weights("uploaded file", "file", "", path)


def save_picture(picture: Picture, path: Path) -> Path:
    """Write a PNG whose metadata makes the picture again: `reslora` for this page, `parameters` as A1111 has it."""
    from PIL.PngImagePlugin import PngInfo

    info, request = PngInfo(), picture.request
    info.add_itxt("reslora", json.dumps(asdict(request) | picture.source, ensure_ascii=False))
    info.add_itxt(
        "parameters",
        f"{request.prompt}\nNegative prompt: {request.negative_prompt}\nSteps: {request.steps}, CFG scale: "
        f"{request.guidance}, Seed: {request.seed}, Size: {request.width}x{request.height}",
    )
    picture.image.save(path, format="PNG", pnginfo=info)
    return path


def read_picture(path: str | Path) -> tuple[Request, dict]:
    """Request and source (run, weights) from a PNG that `save_picture` wrote; `RunError` for any other file."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            settings = json.loads(image.info["reslora"])
            names = [field.name for field in fields(Request)]
            source = {name: str(settings.get(name, ""))[:200] for name in ("run", "weights")}
            request = Request(**{name: settings[name] for name in names}).clamped()
    except Exception:  # anything may be uploaded
        raise RunError("This picture has no settings of this application in it.") from None
    return request, source
