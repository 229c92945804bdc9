"""The `Study` of a run with images: model, encoded images, losses, samples and exports."""

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline

from ..runtime.processes import broadcast_from_main
from ..training.preparing import attention_of
from ..training.schedule import Schedule
from ..training.sharding import cuts_base
from ..training.state import Learner, new_learner
from ..training.stopping import SAMPLE
from ..training.study import Study
from ..training.trained import Trained
from ..training.zero import uses_deepspeed
from .context import ImageContext
from .data.batch import Batch
from .data.loaders import stream
from .data.samples import CalibrationSamples, TrainingData, training_loader
from .denoising import DenoisingLoss
from .initial_lora import add_adapters
from .model.assistant import add_assistant
from .model.new_tokens import add_embeddings
from .output.exports import export_method
from .output.reports import VALIDATION_PARTS, ImageReports, SharedLosses, Validation
from .output.sampling import Sampler
from .requested import read_prompts, with_prompts


@dataclass(frozen=True)
class ImageStudy(Study):
    """Model and data of an image run, shared by all its methods."""

    context: ImageContext
    pipeline: DiffusionPipeline
    training_data: TrainingData
    shared: SharedLosses = field(default_factory=SharedLosses)
    """Losses and times that the validations of all methods share."""

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The generator of sample images."""
        context, options = self.context, self.context.options
        return Sampler(
            self.pipeline, context.model.family, self.training_data.texts, options.data, options.training,
            options.validation, context.live_encoders, self.training_data.references(),
        )  # fmt: skip

    def learner(self, method: str) -> Learner:
        """Return the model with a new adapter that is initialized from the seed."""
        context, model = self.context, self.context.options.model
        device = torch.device("cpu") if cuts_base(context.accelerator) else context.accelerator.device
        denoiser = context.model.load_denoiser(context.dtype, device, model.base_precision, model.blocks_to_swap)
        if context.assistant:
            add_assistant(denoiser, context.assistant.layers, context.dtype, device)
        encoders = context.model.load_encoders(context.live_encoders, self.pipeline)
        embeddings = add_embeddings(encoders, self.pipeline, context.options.adapter.words_of_tokens)
        adapted = {part.name: encoders[part.name] for part in context.encoders}
        parts = {context.model.family.denoiser: denoiser} | adapted
        data = self.training_data
        loss = DenoisingLoss(context, data.objective, self.pipeline, denoiser.config, data.class_text)
        trained = Trained(parts, loss, embeddings)
        add_adapters(trained, method, self.schedule.steps, context)
        return new_learner(method, trained, self.schedule, context)

    def batches(self, steps: range) -> Generator[Batch]:
        """Yield this process's batches of these steps; a batch depends only on the seed, the step and the process."""
        accelerator = self.context.accelerator
        pin = accelerator.device.type == "cuda"
        return stream(
            training_loader(self.training_data, steps, accelerator.num_processes, accelerator.process_index, pin)
        )

    def before_training(self, learner: Learner) -> None:
        """Use xformers' attention if asked, and freeze unused weights.

        Unused weights get no gradients, and DistributedDataParallel would wait for these gradients.
        """
        denoiser, accelerator = learner.denoiser, self.context.accelerator
        if self.context.options.model.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()
        for part, weights in self.context.model.family.unused_weights(denoiser).items():
            for weight in weights:
                weight.requires_grad_(uses_deepspeed(accelerator))  # DeepSpeed does not wait for gradients
            line = f"{learner.name}: the output of {part} in the last block is unused, so {part} is not trained"
            accelerator.print(line)

    def calibration(self) -> Iterator[Batch]:
        """Return batches of the --merge_calibration_samples training samples that a control method is calibrated on."""
        count = self.context.options.adapter.merge_calibration_samples
        return CalibrationSamples(self.training_data).batches(count, self.context.accelerator.num_processes)

    @contextlib.contextmanager
    def reports(self, learner: Learner) -> Iterator[ImageReports]:
        """Yield the log and the trackers of a method; use the attention of `attention_of` inside this context."""
        context = self.context
        reports = ImageReports(context.folder_of(learner.method), learner, self.schedule, context.accelerator)
        with contextlib.closing(reports), attention_of(context.accelerator, self.training_data.shapes.values()):
            yield reports

    def validate(self, learner: Learner, reports: ImageReports, parts: Sequence[str] | None = None) -> None:
        """Measure the validation loss, generate samples, and set `learner.over`.

        `parts`: the parts of the validation ("loss", "samples") to compute; None: the parts that are due.
        """
        due = VALIDATION_PARTS if self.schedule.is_sampled(learner.step) else ("loss",)
        self._validation(learner)(learner, reports, parts or due)

    def sample(self, learner: Learner, reports: ImageReports, prompts: str) -> None:
        """Generate samples of other prompts, one per line, with the learner's present weights."""
        if found := read_prompts(prompts, SAMPLE, self.pipeline, self.context):
            encode = functools.partial(with_prompts, self.sampler, found, self.context)
            self._validation(learner).sample(learner, reports, found, encode)

    def validation_loss(self, learner: Learner) -> float | None:
        """Return the mean loss on the held-out images with the learner's present weights, in every process.

        Returns None if a stop request interrupts it.
        """
        return self._validation(learner).mean(learner.denoiser)

    def _validation(self, learner: Learner) -> Validation:
        context = self.context
        shared = SharedLosses() if context.start else self.shared  # losses before training differ from the base's
        return Validation(
            learner.trained.loss, self.training_data, self.sampler, context.accelerator, context.stop, shared
        )

    def export(self, learner: Learner, schedule: Schedule) -> dict[str, float]:
        """Write the trained method's files.

        Returns, for each file, the largest relative difference of a layer from the merged model.
        """
        return broadcast_from_main(
            lambda: export_method(learner, self.training_data, self.sampler, schedule, self.context)
        )
