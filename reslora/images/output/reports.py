"""Progress reports of training: the log, the trackers, samples, validation loss."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ...errors import Stopped, first_line
from ...io import remove, replacing, write_json
from ...runtime.checkpoint_folders import EXPORTS, adapter_folder
from ...runtime.processes import broadcast_from_main, stop_requested
from ...runtime.sample_folders import MERGED, PROMPTS, REQUESTED, by_step
from ...runtime.signals import StopRequest
from ...tracing import evaluating
from ...training.best import keep_adapter, keep_if_best
from ...training.reports import Reports
from ...training.schedule import Schedule
from ...training.sharding import cuts_base
from ...training.state import Learner
from ..data.batch import Batch
from ..data.samples import TrainingData, ValidationSamples, losses_of, measured, measured_at
from ..denoising import DenoisingLoss
from ..prompts import Prompt, prompts_of
from .metric import load_metric
from .sampling import Sampler, as_image

T = TypeVar("T")
U = TypeVar("U")
VALIDATION_PARTS = ("loss", "samples")
FINISHED = "loss.png"  # written last: it marks a run as finished


class ImageReports(Reports):
    """The log and the trackers of one method, with samples."""

    def forget(self, step: int) -> None:
        """Remove the samples of steps after `step`; if `step` is 0, remove all samples.

        Samples of the merged model are removed too, unless the method is still exported.
        """
        for name in ("samples", REQUESTED):
            for drawn, path in by_step(self.folder / name).items():
                if not step or drawn > step:
                    remove(path)
        if not (self.folder / EXPORTS).exists():
            remove(self.folder / MERGED)

    def similarities(self, values: Mapping[str, float]) -> None:
        """Write the similarities of this step's samples to the held-out images and to the prompts."""
        learner = self.learner
        row = {"step": learner.step, "split": "samples", **values, "seconds": round(learner.seconds, 3)}
        self._write(row, {f"{name}/{learner.name}": value for name, value in values.items()})

    def samples(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        """Write this step's samples to files and to trackers that show images.

        `images`: the same number for each prompt, in the order of `prompts`.
        """
        save_images(self.folder / "samples" / f"step-{self.learner.step:06d}", images, prompts)
        name, step = f"samples/{self.learner.name}", self.learner.step
        for tracker in self.trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: images}, step=step + self.before)
            if tracker.name == "tensorboard":
                for size in dict.fromkeys(image.size for image in images):
                    alike = np.stack([np.asarray(image) for image in images if image.size == size])
                    tag = name if size == images[0].size else f"{name}/{size[0]}x{size[1]}"
                    tracker.writer.add_images(tag, alike, step, dataformats="NHWC")

    def requested(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Path:
        """Write samples of requested prompts to a folder of this step, and return it."""
        folder = self.folder / REQUESTED / f"step-{self.learner.step:06d}"
        folder /= str(len(list(folder.glob("[0-9]*"))) + 1)
        save_images(folder, images, prompts)
        return folder

    def overdue(self, schedule: Schedule) -> list[str]:
        """Return the missing parts of the validation ("loss", "samples") of the step from which training resumes.

        The earlier run may have been stopped before or during the validation after that step.
        """
        step = self.learner.step
        found = super().overdue(schedule) if step else ["loss"]
        due = schedule.is_sampled(step) and (not step or schedule.is_due(step))
        drawn = step and (self.folder / "samples" / f"step-{step:06d}").is_dir()
        return [*found, "samples"] if due and not drawn else found


@dataclass
class SharedLosses:
    """The base model's losses, measured before the first step, and the speed of validation.

    `seconds`: total time of measuring losses; `samples`: the number of samples that the denoiser predicted in that
    time.
    """

    base: torch.Tensor | None = None
    seconds: float = 0.0
    samples: int = 0


@dataclass
class Validation:
    """Validation loss and samples of a denoiser.

    The main process computes both. If the base is sharded, all processes compute them together. `shared`: results that
    other methods' validations have already measured.
    """

    loss: DenoisingLoss
    training_data: TrainingData
    sampler: Sampler
    accelerator: Accelerator
    stop: StopRequest
    shared: SharedLosses = field(default_factory=SharedLosses)

    def __call__(self, learner: Learner, reports: ImageReports, parts: Sequence[str] = VALIDATION_PARTS) -> None:
        """Compute validation loss and samples, and set `learner.over`.

        If a stop request interrupts the computation, the resumed run repeats it.
        """
        validation, denoiser = self.training_data.validation, learner.denoiser
        with learner.averaged():
            if "loss" in parts and self.training_data.held_out:
                self._by_main(lambda: self._losses_of(learner), partial(self._keep_losses, learner, reports))
            if "samples" in parts and validation.validation_prompt and validation.num_validation_images:
                self._by_main(lambda: self._generate(denoiser), partial(self._keep_samples, learner, reports))
        learner.over = broadcast_from_main(lambda: reports.is_over(validation.early_stopping_patience))

    def sample(
        self, learner: Learner, reports: ImageReports, prompts: Sequence[Prompt], encode: Callable[[], Sampler]
    ) -> None:
        """Generate and write samples of requested prompts; `encode` returns a sampler with their text states.

        Without enough memory on the device, or after a stop request, there are no samples.
        """
        count = self.training_data.validation.num_validation_images or 1

        def generate() -> list[np.ndarray] | None:
            """Return the images, or None."""
            try:
                with self.accelerator.autocast():
                    return encode().draw(learner.denoiser, prompts, count, self._leave_if_asked)
            except torch.OutOfMemoryError as error:
                print(f"warning: no samples: {first_line(error)}", flush=True)
                return None

        def keep(drawn: list[np.ndarray]) -> None:
            """Write the images."""
            folder = reports.requested(list(map(as_image, drawn)), [prompt.prompt for prompt in prompts])
            print(f"{learner.name}: requested samples of step {learner.step} in {folder}", flush=True)

        with learner.averaged():
            self._by_main(generate, keep)

    def mean(self, denoiser: nn.Module) -> float | None:
        """Return the mean loss on the held-out images, in every process; None if a stop request interrupts it."""
        return self._by_main(lambda: self.losses(denoiser), lambda losses: losses.mean().item())

    def _by_main(self, compute: Callable[[], T | None], keep: Callable[[T], U]) -> U | None:
        """Call `keep` in the main process with the result of `compute`; return its result in every process.

        With a sharded base, all processes call `compute`, because a forward pass gathers the weights from all of them.
        If a stop request interrupts `compute`, `keep` is not called, and the result is None.
        """

        def compute_unless_stopped() -> T | None:
            """Return the result of `compute`; None if it was stopped."""
            with contextlib.suppress(Stopped):
                return compute()
            return None

        together = compute_unless_stopped() if cuts_base(self.accelerator) else None

        def keep_on_main() -> U | None:
            """Return the result of `keep`; None if `compute` was stopped."""
            found = together if cuts_base(self.accelerator) else compute_unless_stopped()
            return None if found is None else keep(found)

        return broadcast_from_main(keep_on_main)

    def _keep_losses(self, learner: Learner, reports: ImageReports, losses: torch.Tensor) -> None:
        mean = losses.mean().item()
        if self.training_data.validation.save_best and learner.step:
            keep_if_best(learner, reports.folder, mean)
        if learner.step and learner.name != learner.method:  # an experiment chooses among several adapters of a method
            keep_adapter(learner, adapter_folder(reports.folder, learner.step))
        by_timestep = self.by_timestep(losses)
        reports.note("validation", mean, **({"by_timestep": by_timestep} if by_timestep else {}))
        reports.flush()

    def _losses_of(self, learner: Learner) -> torch.Tensor:
        shared = self.shared
        if not learner.step and shared.base is not None:
            return shared.base
        started, losses = time.monotonic(), self.losses(learner.denoiser)
        shared.seconds += time.monotonic() - started
        shared.samples += losses.numel() * (self.training_data.validation.validation_noises or 1)
        if not learner.step:
            shared.base = losses
        return losses

    def losses(self, denoiser: nn.Module) -> torch.Tensor:
        """Return the unweighted losses on the held-out images.

        With --validation_noises, the shape is images x timesteps, and the timesteps are fixed. Without, the shape is
        (samples,). Every call uses the same noise and the same timesteps.
        """
        noises = self.training_data.validation.validation_noises
        with evaluating(denoiser, *self.loss.encoders), torch.no_grad(), self.accelerator.autocast():
            if noises:
                most = 2 * self.training_data.training.train_batch_size  # a pass without gradients needs less memory
                images = measured(self.training_data)
                return losses_of(partial(self._loss, denoiser), self.training_data, images, noises, most)
            return torch.cat([self._loss(denoiser, batch) for batch in ValidationSamples(self.training_data).batches()])

    def _loss(self, denoiser: nn.Module, batch: Batch) -> torch.Tensor:
        self._leave_if_asked()
        return self.loss(denoiser, batch, weighted=False)

    def by_timestep(self, losses: torch.Tensor) -> dict[str, float]:
        """Return the mean loss over all images for each fixed timestep; empty without --validation_noises.

        `losses`: images x timesteps, or (samples,). Keys are timesteps from 0 to 1, which is pure noise.
        """
        if losses.dim() == 1:
            return {}
        objective = self.training_data.objective
        names = [f"{float(timestep) / objective.timesteps:.3f}" for timestep in measured_at(objective)]
        return dict(zip(names, losses.mean(0).tolist(), strict=True))

    def _generate(self, denoiser: nn.Module) -> list[np.ndarray]:
        validation = self.training_data.validation
        prompts, images = prompts_of(validation), validation.num_validation_images
        with self.accelerator.autocast():
            return self.sampler.draw(denoiser, prompts, images, self._leave_if_asked)

    def _keep_samples(self, learner: Learner, reports: ImageReports, drawn: list[np.ndarray]) -> None:
        validation, prompts = self.training_data.validation, self.training_data.validation.validation_prompt
        if not all(np.isfinite(image).all() for image in drawn):
            self.accelerator.print(f"warning: samples of step {learner.step} have pixels that are NaN or infinity")
        images = [as_image(image) for image in drawn]
        captions = [prompt for prompt in prompts for _ in range(validation.num_validation_images)]
        found = self._similarities(images, captions) if validation.metric_model else {}
        reports.samples(images, prompts)
        if found:
            reports.similarities(found)

    def _similarities(self, images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
        """Return the mean similarity of the samples to the held-out images and, with CLIP, to their prompts."""
        metric = load_metric(self.training_data.validation.metric_model, str(self.accelerator.device))
        found, drawn = {}, metric.images(images)
        if self.training_data.held_out:
            held_out = metric.of(self.training_data.sources, measured(self.training_data))
            found["image_similarity"] = float((drawn @ held_out.T).mean())
        if metric.reads_captions:
            found["caption_similarity"] = float((drawn * metric.captions(captions)).sum(1).mean())
        return found

    def _leave_if_asked(self) -> None:
        if not cuts_base(self.accelerator):
            self.stop.check("stopped while validating")
        elif stop_requested(self.stop):  # all processes compute together, so all must stop together
            raise Stopped("stopped while validating")


def save_images(folder: Path, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Replace a folder atomically by images `<prompt>-<image>.png`, numbered from 0, and a file with the prompts."""
    per_prompt = len(images) // len(prompts)
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / PROMPTS, {"prompts": list(prompts)})
        for number, image in enumerate(images):
            image.save(temporary / f"{number // per_prompt}-{number % per_prompt}.png")
