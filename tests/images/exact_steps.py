"""Training steps in float64, where an error is larger than rounding: in this process, or in several (`main`)."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from images.runs import parts, read_by
from reslora.images.context import ImageContext
from reslora.images.data.samples import TrainingData, training_loader
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.denoising import DenoisingLoss
from reslora.images.initial_lora import add_adapters, read_start
from reslora.images.model.assistant import add_assistant
from reslora.images.model.families import load_family
from reslora.images.model.loading import Model
from reslora.images.model.new_tokens import add_embeddings, add_tokens
from reslora.images.model.objective import objective_of
from reslora.images.model.quantising import pack
from reslora.images.settings import parse_args, with_family
from reslora.runtime.script import shares_the_cpu
from reslora.runtime.signals import StopRequest
from reslora.training.loop import take_step
from reslora.training.preparing import prepare
from reslora.training.schedule import Schedule
from reslora.training.sharding import share, take_plugin
from reslora.training.state import Learner, new_learner
from reslora.training.trained import Trained

STEPS, IMAGES, CAPTIONS = 4, 7, ("blue", "red disc")
SIZE = Size(64, 64)


class RandomLatents:
    """Moments of images that do not exist, as a function of the image's number."""

    variants = 2

    def of(self, index: int, variant: int) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(10 * index + variant)
        return {"moments": torch.rand(2, 4, 8, 8, generator=draws), "sizes": torch.zeros(6)}


def setting(
    folder: Path, accelerator: Accelerator | None = None, *flags: str
) -> tuple[TrainingData, DenoisingLoss, torch.nn.Module]:
    """Return training data, loss and bare denoiser of the pipeline in a folder, in float64."""
    words = ["--pretrained_model_name_or_path", str(folder), "--train_data_dir", str(folder), "--rank", "2"]
    words += ["--output_dir", str(folder / "out"), "--max_grad_norm", "0.05", "--method", "reslora"]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    family = load_family(type(pipeline).__name__)
    words += ["--snr_gamma", "5"] if family.objective == "ddpm" else []
    flags = with_family(parse_args([*words, *flags]), family.defaults)
    objective = objective_of(flags.model, flags.training, family, pipeline)
    tokens = flags.adapter.words_of_tokens
    add_tokens(pipeline, family, tokens)
    said = [" ".join([*tokens, caption]) for caption in CAPTIONS]
    captions = {*said, *flags.training.preserved_prompts}
    if flags.adapter.train_text_encoder or tokens:
        pipeline.text_encoder.double().requires_grad_(False)
        texts = {caption: {} for caption in captions}
    else:
        with torch.no_grad():
            longest = flags.training.max_sequence_length
            texts = {caption: family.encode_captions(pipeline, [caption], longest) for caption in captions}
        texts = {caption: {name: value[0].double() for name, value in text.items()} for caption, text in texts.items()}
    images = SimpleNamespace(captions=[[said[index % 2]] for index in range(IMAGES)])
    train, held_out = tuple(range(IMAGES - 2)), (IMAGES - 2, IMAGES - 1)
    source = Source(images, RandomLatents(), train, held_out, (SIZE,) * IMAGES)
    training_data = TrainingData((source,), texts, objective, {SIZE: (4, 8, 8)}, family, **read_by(flags))
    denoiser = getattr(pipeline, family.denoiser).double().requires_grad_(False)
    if flags.model.base_precision != "no":
        pack(denoiser, flags.model.base_precision, torch.device("cpu"))
    if file := flags.model.assistant_lora:
        start = read_start(file, str(folder), Model(folder, family, "--model"), "assistant_lora")
        add_assistant(denoiser, start.layers, torch.float64, torch.device("cpu"))
    context = ImageContext(flags, SimpleNamespace(family=family), accelerator or Accelerator(cpu=True), StopRequest())
    loss = DenoisingLoss(context, objective, pipeline, denoiser.config, training_data.class_text)
    loss.context, loss.dtype = context, torch.float64
    return training_data, loss, denoiser


def study_of(context: ImageContext) -> SimpleNamespace:
    """Return a study of images with what the training loop reads in a step."""
    passes = context.options.training.gradient_accumulation_steps
    return SimpleNamespace(
        context=context, passes=lambda step: passes, count=lambda batch: None, before_training=lambda learner: None
    )


def learner_of(denoiser: torch.nn.Module, loss: DenoisingLoss, accelerator: Accelerator) -> Learner:
    """Return a learner of the flags' method in float64, with random B and plain gradient descent.

    AdamW would amplify rounding errors.
    """
    encoders = {part.name: encoder for part, encoder in zip(loss.parts, loss.encoders, strict=True)}
    tokens = loss.context.options.adapter.words_of_tokens
    embeddings = add_embeddings(encoders, loss.pipeline, tokens)
    trained = Trained({"unet": denoiser, **({} if tokens else encoders)}, loss, embeddings)
    method, schedule = loss.context.options.adapter.method[-1], Schedule(STEPS, STEPS, 0, False)
    add_adapters(trained, method, STEPS, loss.context)
    made = new_learner(method, trained, schedule, loss.context)
    trained.double()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
    groups = [{"params": g["params"], "lr": g.get("lr_factor", 1.0)} for g in made.optimizer.param_groups]
    made.optimizer = torch.optim.SGD(groups)
    prepare(made, study_of(loss.context))
    return made


def trained(folder: Path, batch: int, accumulation: int, *flags: str) -> dict[str, torch.Tensor]:
    """Return the adapter and the loss after every step."""
    words = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation), *flags]
    plugin = take_plugin(*parts(parse_args([]), "model", "adapter", "training", "output"))
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=shares_the_cpu())
    share(plugin, accelerator)
    training_data, loss, denoiser = setting(folder, accelerator, *words)
    learner = learner_of(denoiser, loss, accelerator)
    batches = iter(
        training_loader(training_data, range(STEPS), accelerator.num_processes, accelerator.process_index, pin=False)
    )
    found = {}
    for step in range(STEPS):
        found[f"loss {step}"] = take_step(learner, batches, study_of(loss.context))
        for name, parameter in learner.trained.named():
            if parameter.requires_grad:
                found[f"{name} {step}"] = parameter.detach().clone()
    found["processes"] = torch.tensor(accelerator.num_processes)
    found["base"] = torch.tensor(sum(map(bytes_here, frozen(learner.denoiser))))
    return found


def frozen(denoiser: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in denoiser.parameters() if not parameter.requires_grad]


def bytes_here(value: torch.Tensor) -> int:
    """Return the bytes of a tensor, or of the shard that this process holds."""
    return (value.to_local() if isinstance(value, DTensor) else value).nbytes


def main(model: str, batch: str, accumulation: str, file: str, *flags: str) -> None:
    """Train, and write the result of rank 0 to a file."""
    found = trained(Path(model), int(batch), int(accumulation), *flags)
    # The wrapped model must be gone first: now and then it waits for ever where it is the last to hold the group.
    gc.collect()
    torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "0":
        save_file(found, file)
