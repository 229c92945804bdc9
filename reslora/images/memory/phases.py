"""The memory of a run in each of its phases, in bytes: weights from their shapes, activations from fake tensors."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...errors import first_line
from ...methods.adapters import rank_allocator
from ...model import enable_gradient_checkpointing
from ...training.preparing import attention_of
from ...training.state import new_optimizer
from ...training.trained import Trained
from ..context import ImageContext, weight_dtype
from ..data.batch import Batch, stack_texts
from ..data.dataset import ImageDataset
from ..data.encoding import CAPTIONS_AT_ONCE, Variants
from ..data.training_data import sizes_of
from ..denoising import DenoisingLoss
from ..initial_lora import add_adapters
from ..model.assistant import add_assistant
from ..model.families.base import Text
from ..model.loading import overflows
from ..model.objective import objective_of
from ..model_checks import check_pipeline
from .components import META, Reader, empty_denoiser, empty_part, empty_pipeline
from .meta_tensors import Stage, tensor_bytes

BASE, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS = "base", "adapter", "gradients", "optimizer", "activations"
AUTOENCODER, ENCODERS, EXACT, MERGE = "autoencoder", "text encoders", "base in float32", "merge"
Held = dict[str, int | None]
ROWS = (BASE, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, AUTOENCODER, ENCODERS, EXACT, MERGE)


@dataclass(frozen=True)
class Phase:
    """A phase of a run, and its peak memory in bytes, by component."""

    name: str
    held: Held
    """Bytes of each component; None if unknown."""

    @property
    def total(self) -> int:
        """The sum of all known components."""
        return sum(filter(None, self.held.values()))


class Rehearsal:
    """A simulated run on fake tensors: its modules, its largest batch, and the memory of each phase.

    Raises `InvalidArgument` for image sizes that the pipeline does not accept.
    """

    def __init__(self, kinds: Sequence[ImageDataset], context: ImageContext) -> None:
        self.kinds, self.context, self.options, self.model = kinds, context, context.options, context.model
        self.family, self.stage = context.model.family, Stage(context.accelerator.device)
        self.dtype = weight_dtype(self.options.model.mixed_precision)
        self.pipeline = empty_pipeline(self.model, self.dtype, self.stage)
        check_pipeline(self.options.data, self.options.validation, self.pipeline, self.family)
        self.objective = objective_of(self.options.model, self.options.training, self.family, self.pipeline)
        self.trainable = [part.name for part in context.live_encoders]
        self.frozen = self.family.frozen_text_parts if self.trainable else self.family.text_parts
        multiple = self.family.pixel_multiple(self.pipeline)
        self.sizes = [sizes_of(images, multiple, self.options.data) for images in kinds]
        found = {size for by_resolution in self.sizes for sizes in by_resolution for size in sizes if size}
        self.size = max(found, key=lambda size: size.height * size.width)
        self.reference_size = self.family.reference_size(self.size.height, self.size.width)
        self.peak_of_encoders = 0
        self.unknown: list[str] = []
        self.texts = self._read()

    def known(self, what: str, trace: Callable[[], int]) -> int | None:
        """Return the result of `trace`; if it fails, return None and add the reason to `unknown`.

        The trace fails for models that do not run on fake tensors.
        """
        try:
            return trace()
        except Exception as error:  # data-dependent shapes, kernels without a fake version, third-party code
            self.unknown.append(f"{what}: unknown, it needs real tensors ({first_line(error)})")
            return None

    # -- encoding ------------------------------------------------------------------------------------------------------

    def _read(self) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
        """Return shape and dtype of the text states of the longest caption and of the shortest one, by name."""
        found = {text for images in self.kinds for texts in images.captions for text in texts}
        captions = sorted(found | set(self.options.training.preserved_prompts), key=len)
        at_once = min(CAPTIONS_AT_ONCE, len(captions) + len(self.options.validation.validation_prompt) + 1)
        at_once = at_once if self.options.data.cache_text_embeddings else self.options.training.train_batch_size
        reader = Reader(self._modules(self.frozen), self.stage, at_once)
        encode = self.family.encode_frozen if self.trainable else self.family.encode_captions
        longest = self.options.training.max_sequence_length
        with torch.no_grad():
            states = [encode(self.pipeline, [text], longest) for text in (captions[-1], captions[0])]
        self.peak_of_encoders = reader.peak
        more = 0
        if self.family.reads_references:
            self.unknown.append("activations of the text encoder: without those of the reference images (unknown)")
            reader = self.pipeline.processor.image_processor
            pixels = self.options.data.references_per_image * self.family.read_area
            more = pixels // (reader.patch_size * reader.merge_size) ** 2
        return [
            {name: (torch.Size([len(own[0]) + more, *own[0].shape[1:]]), own[0].dtype) for name, own in text.items()}
            for text in states
        ]

    def _modules(self, names: Iterable[str]) -> list[nn.Module]:
        """Return the pipeline components with these names, without those that are missing or have no weights."""
        parts = [getattr(self.pipeline, name, None) for name in names]
        return [part for part in parts if isinstance(part, nn.Module)]

    @property
    def encoders(self) -> list[nn.Module]:
        """All text encoders."""
        return self._modules(self.family.text_parts)

    @property
    def trained_encoders(self) -> list[nn.Module]:
        """The text encoders that are trained."""
        return self._modules(self.trainable)

    @property
    def staying(self) -> Held:
        """The bytes of the frozen text encoders that stay loaded during training; empty if none do."""
        stay = [] if self.options.data.cache_text_embeddings else self._modules(self.frozen)
        return {ENCODERS: tensor_bytes(*stay)} if stay else {}

    def encoding_images(self) -> Phase | None:
        """Return the phase that encodes all crops and flips of an image; None if images are encoded in every step."""
        if not self.options.data.cache_latents:
            return None
        vae = self.autoencoder_in(torch.float32 if overflows(self.family, self.pipeline.vae) else self.dtype)
        activations = self.known("activations of the autoencoder", lambda: self._encode(vae))
        found: Held = {AUTOENCODER: tensor_bytes(vae), ACTIVATIONS: activations}
        trained: Held = {BASE: tensor_bytes(*self.trained_encoders)} if self.trainable else {}
        return Phase("encoding images", found | self.staying | trained)

    def _encode(self, vae: Any) -> int:
        kinds = zip(self.kinds, self.sizes, strict=True)
        count = max(
            Variants(images, [s for s in sizes if s], self.options.data, self.options.training, self.family).count
            for images, (sizes, *_) in kinds
        )
        with torch.no_grad(), self.stage(vae) as live:
            pixels = self.stage.empty(count, 3, self.size.height, self.size.width).to(vae.dtype)
            self.family.encode_images(vae, pixels)
            if references := self.options.data.references_per_image:
                pixels = self.stage.empty(count * references, 3, *self.reference_size).to(vae.dtype)
                self.family.encode_images(vae, pixels)
        return live.peak

    def autoencoder_in(self, dtype: torch.dtype) -> Any:
        """Return the autoencoder in `dtype`."""
        if dtype == self.dtype:
            return self.pipeline.vae
        part = empty_part(self.model, "vae", dtype)
        assert part is not None
        return self.stage.place(part)

    def encoding_captions(self) -> Phase | None:
        """Return the phase that encodes captions while the autoencoder is loaded.

        None if captions are encoded in every step.
        """
        if not self.options.data.cache_text_embeddings or not self.peak_of_encoders:
            return None
        held: Held = {
            ENCODERS: tensor_bytes(*self.encoders),
            AUTOENCODER: tensor_bytes(self.pipeline.vae),
            ACTIVATIONS: self.peak_of_encoders,
        }
        return Phase("encoding captions", held)

    # -- batches -------------------------------------------------------------------------------------------------------

    def text(self, count: int, dtype: torch.dtype | None = None) -> Text:
        """Return text states of `count` captions: the last of them is the shortest caption, the others the longest."""
        longest, shortest = self.texts
        texts = [longest, *[longest] * (count - 2), shortest][:count]
        empty = self.stage.empty
        return stack_texts(
            [{name: empty(*shape, dtype=dtype or own) for name, (shape, own) in text.items()} for text in texts]
        )

    def batch(self, count: int) -> Batch:
        """Return a batch of `count` samples of the largest size, of fake tensors."""
        options, size, empty = self.options, self.size, self.stage.empty
        shape = self._latents()
        pixels = {"pixels": empty(count, 3, size.height, size.width)}
        moments = {"moments": empty(count, 2, *shape, dtype=self.pipeline.vae.dtype)}
        mask = {"mask": empty(count, 1, *shape[1:])} if options.training.masked_loss else {}
        if references := options.data.references_per_image:
            latents = self.family.latent_shape(self.pipeline, *self.reference_size)
            moments["reference"] = empty(count, references, *latents, dtype=self.pipeline.vae.dtype)
            pixels["reference_pixels"] = empty(count, references, 3, *self.reference_size)
        return Batch(
            empty(count, dtype=self.objective.at(0.5).dtype), empty(count, *shape), empty(count, *shape),
            sizes=empty(count, 6), weight=empty(count), caption=self.captions(count), text=self.text(count),
            **(moments if options.data.cache_latents else pixels), **mask,
        )  # fmt: skip

    def captions(self, count: int) -> list[str]:
        """Return `count` copies of the longest caption."""
        return [max((text for texts in self.kinds[0].captions for text in texts), key=len)] * count

    # -- training ------------------------------------------------------------------------------------------------------

    def training(self, method: str) -> Phase:
        """Return the phase of a training step: forward, backward, and the optimizer's state."""
        trained = self.trained(method)
        adapter = tensor_bytes(trained, trained=True)
        copies = 2 if self.context.accelerator.num_processes > 1 else 1  # DDP copies gradients into buckets
        found: Held = {
            BASE: tensor_bytes(trained, trained=False),
            ADAPTER: adapter,
            GRADIENTS: copies * adapter,
            OPTIMIZER: self.known("state of the optimizer", lambda: self._state(trained)),
            ACTIVATIONS: self.known("activations of a step", lambda: self._step(trained)),
            AUTOENCODER: self.autoencoder(),
        }
        return Phase("training", found | self.staying)

    def autoencoder(self, times: int = 1) -> int:
        """Return the bytes of the autoencoder that stay after encoding; `times` scales the bytes of each value."""
        vae, forgotten = self.pipeline.vae, self.options.data.cache_latents and not self.family.edits
        return times * (tensor_bytes(vae) - (tensor_bytes(vae.encoder) if forgotten else 0))

    def base(self) -> nn.Module:
        """Return the denoiser that will be trained, on the meta device and without an adapter."""
        options = self.options.model
        return empty_denoiser(self.model, self.dtype, options.base_precision, options.blocks_to_swap)

    def trained(self, method: str) -> Trained:
        """Return the models that will be trained, as fake tensors and with the method's adapter."""
        denoiser = self.base()
        if self.context.assistant:
            add_assistant(denoiser, self.context.assistant.layers, self.dtype, META)
        parts = {self.family.denoiser: denoiser}
        for name in self.trainable:
            parts[name] = empty_part(self.model, name, self.dtype)
            setattr(self.pipeline, name, parts[name])
        text = None
        if self.options.training.preserved_prompts:
            text = {name: value[0] for name, value in self.text(1).items()}
        loss = DenoisingLoss(self.context, self.objective, self.pipeline, denoiser.config, text)
        loss.dtype = self.dtype
        trained = Trained(parts, loss)
        add_adapters(trained, method, 1000, self.context)
        self.stage.place(trained)
        if self.options.training.gradient_checkpointing:
            for part in parts.values():
                enable_gradient_checkpointing(part)
        return trained.train()

    def _step(self, trained: Trained) -> int:
        """Return the peak memory of activations, in bytes, of a forward and backward pass.

        The weights and their gradients are not counted.
        """
        with self.stage(trained, self.pipeline.vae, *self.encoders) as live:
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: live.forget(p.grad))
            with attention_of(self.context.accelerator, [self._latents()]), self.autocast():
                losses = trained(self.batch(self.options.training.train_batch_size))
            losses.mean().backward()
        return live.peak

    def _latents(self) -> tuple[int, int, int]:
        return self.family.latent_shape(self.pipeline, self.size.height, self.size.width)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context that accelerate would use."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self.stage.device.type, self.dtype if mixed else None, enabled=mixed)

    def _state(self, trained: Trained) -> int:
        """Return the bytes of the optimizer's state, found by a real step with one parameter of each shape."""
        shapes = Counter(parameter.shape for parameter in trained.parameters() if parameter.requires_grad)
        parameters = [nn.Parameter(torch.zeros(shape, device=self.stage.device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = new_optimizer(parameters, self.options.training, self.options.optimizer, self.context.accelerator)
        optimizer.step()
        kept = 0
        for parameter, count in zip(parameters, shapes.values(), strict=True):
            state = [value for value in tree_leaves(dict(optimizer.state[parameter])) if torch.is_tensor(value)]
            kept += count * sum(value.nbytes for value in state)
        # AdaLoRA keeps three averages of each element.
        return kept + (3 * tensor_bytes(trained, trained=True) if rank_allocator(trained.denoiser) else 0)
