"""transformers' `Trainer` for adapters: checkpoints contain only the adapter, and resuming is exact."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..attributes import override_attributes
from ..chains import base_model
from ..errors import Diverged, InvalidArgument, RunFailed, Stopped, refused_as
from ..formatting import is_or_are, pluralize
from ..io import write_checksums, write_tensors
from ..methods import adapters
from ..methods.adapters import check_rank, known_targets, load_adapter, rank_allocator, save_adapter
from ..methods.control_scales import gauged
from ..methods.controls import Settings, put_on
from ..methods.patterns import entries, spell_out
from ..methods.registry import METHODS, AdapterSettings, adapter_config, check_steps, refuse_unable
from ..methods.targets import check_layers
from ..model import enable_gradient_checkpointing
from ..options.texts import MethodOptions
from ..runtime.checkpoint_folders import cannot_be_loaded, discard, numbered
from ..runtime.folder_lock import check_held
from ..runtime.processes import broadcast_from_main, is_main
from ..runtime.signals import NOT_BEGUN, StopRequest
from ..tracing import to_device
from .callbacks import AllocateRanks, GoesOnFrom, Progress, SaveValidated, StopWhenAsked
from .checkpoints import ALLOCATOR_NAME, damage, named_checkpoint, set_unfinished_aside, usable_checkpoint

logger = logging.get_logger(__name__)

UNFIT = (ValueError, TypeError, ImportError)
"""Exceptions of PEFT and transformers for an invalid setting, or a missing package."""
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""Exceptions of transformers for a model that cannot be read."""
UNWRITTEN = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Text in exceptions of torch.save if a file cannot be written; the last one for small files."""
OTHER_CHOICE = "install or give what it needs, or choose another"


# -- adapter -----------------------------------------------------------------------------------------------------------


def attach(
    model: PreTrainedModel,
    adapter: MethodOptions,
    total_steps: int,
    example_inputs: dict | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> PeftModel:
    """Add the method's adapter to `model`, connect it if the method is ResLoRA, and return PEFT's model.

    `total_steps` is for AdaLoRA's schedule; `example_inputs` as in `reslora.connect`; `modules_to_save` as in PEFT.
    PEFT's task type follows from the model: generation or classification.

    Raises `InvalidArgument` for target modules that are unknown or match nothing, a rank larger than a layer, or
    shortcuts that connect no blocks.
    """
    targets = _targets(model, adapter)
    check_layers(model, targets, modules_to_save or ())
    check_steps([adapter.name], total_steps, f"--method {adapter.name} with {pluralize(total_steps, 'step')}")
    task = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    settings = AdapterSettings(
        adapter.rank, adapter.lora_alpha, adapter.lora_dropout, targets, total_steps, task, modules_to_save,
        rank_pattern=entries("rank_pattern", adapter.rank_pattern),
        alpha_pattern=entries("alpha_pattern", adapter.alpha_pattern),
    )  # fmt: skip
    config = adapter_config(adapter.name, settings)
    shortcuts = adapter.reslora_config if METHODS[adapter.name].shortcuts else None
    with refused_as(f"--lora_r {adapter.rank}", "give a smaller one, or name other --target_modules", UNFIT):
        check_rank(model, config)
    spell_out(model, config)
    flag = f"--target_modules {' '.join(targets) if isinstance(targets, list) else targets}"
    with refused_as(flag, "name other layers, or another --method", UNFIT):
        adapted = adapters.attach(model, config, shortcuts, example_inputs)
        if METHODS[adapter.name].measured:
            with gauged(adapter.name, adapted, adapter.reslora_config, example_inputs):
                pass
    if adapter.merge_and_save:
        _refuse_tied(base_model(adapted), flag)
    return adapted


def put_control_on(
    trainer: AdapterTrainer, adapter: MethodOptions, batches: Sequence[Mapping], example_inputs: dict | None = None
) -> None:
    """Calibrate a control method (`lora_matched` or a placebo) on training batches, and apply the result to the model.

    Checkpoints include the result. Does nothing for other methods. `example_inputs` as in `attach`.
    """
    if not METHODS[adapter.name].measured:
        return
    base = base_model(trainer.model)

    def measured() -> Settings:
        with gauged(adapter.name, trainer.model, adapter.reslora_config, example_inputs) as gauge:
            for batch in batches:
                base(**to_device(dict(batch), trainer.args.device))
        return gauge.settings(trainer.args.seed)

    put_on(trainer.model, broadcast_from_main(measured))


def _refuse_tied(base: PreTrainedModel, flag: str) -> None:
    """Raise `InvalidArgument` for an adapter on tied embeddings, for which a merged model has only one weight."""
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    embeddings = [module for module in embeddings if module is not None]
    weights = {id(getattr(module, "base_layer", module).weight) for module in embeddings}
    if len(weights) < len(embeddings) and any(isinstance(module, BaseTunerLayer) for module in embeddings):
        raise InvalidArgument(
            flag, "the input and the output embedding are one weight", "name other layers, or omit --merge_and_save"
        )


def _targets(model: PreTrainedModel, adapter: MethodOptions) -> list[str] | str:
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    known = ", ".join(sorted(linear))
    targets = adapter.target_modules or known_targets(model.config.model_type)
    if not targets:
        raise InvalidArgument(
            "--target_modules",
            f"missing, and not known for model type {model.config.model_type!r}",
            f"name some of {known}",
        )
    if targets == ["all-linear"]:
        return "all-linear"
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            problem = f"{target} matches no layer of {type(model).__name__}"
            raise InvalidArgument(f"--target_modules {' '.join(targets)}", problem, f"name some of {known}")
    return targets


def total_steps(args: TrainingArguments, examples: int) -> int:
    """Return the number of steps `Trainer` takes with these arguments on a data set of `examples` rows.

    Raises `InvalidArgument` if --dataloader_drop_last leaves none.
    """
    rounded = math.floor if args.dataloader_drop_last else math.ceil
    batches = rounded(rounded(examples / args.per_device_train_batch_size) / args.world_size)
    if batches == 0:
        size = args.per_device_train_batch_size * args.world_size
        problem = f"{pluralize(examples, 'training example')} {is_or_are(examples)} less than a batch of {size}"
        raise InvalidArgument(
            "--dataloader_drop_last True", problem, "leave it out, or lower --per_device_train_batch_size"
        )
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


# -- trainer -----------------------------------------------------------------------------------------------------------


class AdapterTrainer(Trainer):
    """transformers' `Trainer` for a model from `attach`: checkpoints contain only the adapter, and resuming is exact.

    Gradient checkpointing uses `reslora.enable_gradient_checkpointing`. AdaLoRA's ranks are updated, and its
    regularizer is excluded from the reported losses. A non-finite loss ends the run.

    `train(resume_from_checkpoint="latest")` resumes from the newest complete checkpoint. After a request to `stop` it
    saves a checkpoint and raises `Stopped`. Raises `InvalidArgument` for FSDP and ZeRO-3, which shard the weights that
    a shortcut reads.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, stop: StopRequest | None = None, **kwargs) -> None:
        args = copy.copy(args)
        self.allocator = rank_allocator(model)
        self._refuse_sharding(args)
        args.logging_nan_inf_filter = False  # True would report the mean of earlier losses instead of NaN
        args.dataloader_pin_memory &= torch.cuda.is_available()  # PyTorch would warn in every epoch without a GPU
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        self.use_cache = getattr(base_model(model).config, "use_cache", None)
        checkpointing = args.activation_checkpointing
        args.activation_checkpointing = args.gradient_checkpointing = False
        if args.n_gpu > 1:
            logger.warning("several GPUs in one process: using the first; start with accelerate launch to use all")
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)
        if args.deepspeed and not self.is_deepspeed_enabled:
            raise InvalidArgument("--deepspeed", "accelerate ignores it with --cpu", "give --use_cpu here instead")
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress())
        if checkpointing:
            enable_gradient_checkpointing(model)
        self.trainable_parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
        if self.allocator is not None:
            self.add_callback(AllocateRanks(self.allocator, self.accelerator))
        self.stopping = StopWhenAsked(stop or StopRequest(), self)
        self.add_callback(self.stopping)
        self.add_callback(SaveValidated())

    def _refuse_sharding(self, args: TrainingArguments) -> None:
        """Raise `InvalidArgument` for FSDP and ZeRO-3, and for AdaLoRA with DeepSpeed.

        FSDP and ZeRO-3 are requested by options or by the environment of `accelerate launch`.
        """
        fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        stage = None  # of DeepSpeed's ZeRO
        if plugin := getattr(args, "deepspeed_plugin", None):
            stage = plugin.zero_stage
        elif args.deepspeed:
            stage = HfDeepSpeedConfig(args.deepspeed).get_value("zero_optimization.stage", 0)
        if fsdp or stage == 3:
            raise InvalidArgument(
                "--fsdp" if fsdp else "--deepspeed",
                "shards the adapter, but shortcuts and checkpoints need its complete weights",
                "use DDP (accelerate launch) or ZeRO-2",
            )
        if stage is not None and self.allocator is not None:
            refuse_unable(["adalora"], "deepspeed")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train as `Trainer.train`; `latest` or True resumes from the newest complete checkpoint, if there is one."""
        found = (
            broadcast_from_main(lambda: self._resumed_from(resume_from_checkpoint)) if resume_from_checkpoint else None
        )
        if self.args.save_only_model and is_main():
            logger.warning(
                "--save_only_model: no checkpoint can be resumed, except the complete one that a stopped run saves"
            )
        if found:
            self.add_callback(GoesOnFrom(Path(found)))
        try:
            result = super().train(resume_from_checkpoint=found, **kwargs)
        except ValueError as error:
            if "DeepSpeed config values that mismatch" not in str(error):
                raise
            lines = str(error).splitlines()
            differ = "; ".join(line.removeprefix("- ") for line in lines if line.startswith("- "))
            problem = f"differs from the flags: {differ}"
            raise InvalidArgument("DeepSpeed's configuration", problem, "set the same value in both") from error
        except Exception as error:  # raised again if an evaluation failed: a checkpoint is saved only after it
            if self.control.should_evaluate or not self.stopping.ended_the_compiler(error):
                raise
            self._stop_within_a_step(error)
        finally:
            self.remove_callback(GoesOnFrom)
            if self.use_cache is not None:  # `Trainer` sets it to False; a merged model would be saved with that
                base_model(self.model).config.use_cache = self.use_cache
        if self.stopping.leaving:
            raise Stopped(f"stopped after step {self.state.global_step}; resume with --resume_from_checkpoint latest")
        return result

    def _stop_within_a_step(self, error: Exception) -> None:
        """Save a checkpoint of the completed steps; raise `Stopped` if there are none.

        The checkpoint has the random state after the failed step, not that before it.
        """
        if not self.state.global_step:
            raise Stopped(NOT_BEGUN) from error
        self.stopping.leaving, self.args.save_only_model = True, False
        if not self._checkpoint().is_dir():
            self._save_checkpoint(self.model, None)

    def _resumed_from(self, named: Any) -> str | None:
        """Return the checkpoint to resume from; None to start anew. Only the main process calls this method."""
        processes = self.args.world_size
        if named not in ("latest", True):
            return self._named(named)
        if (folder := usable_checkpoint(self.args.folder, processes)) is not None:
            return folder
        set_unfinished_aside(self.args.folder)
        if found := numbered(self.args.folder):
            problem, fix = damage(found[0], processes), "remove them to start afresh"
            raise InvalidArgument(
                "--resume_from_checkpoint latest",
                f"none of {pluralize(len(found), 'checkpoint')} can be used, {found[0]} for: {problem}",
                f"use as many processes as before, or {fix}" if "number of processes" in str(problem) else fix,
            )
        logger.warning(f"--resume_from_checkpoint latest: no checkpoint in {self.args.folder}, starting afresh")
        return None

    def _named(self, name: str) -> str:
        """Return the checkpoint that --resume_from_checkpoint names.

        Raises `InvalidArgument` if it is incomplete.
        """
        folder = named_checkpoint(self.args.folder, name)
        flag, there = f"--resume_from_checkpoint {folder}", numbered(self.args.folder)
        if not folder.is_dir():
            fix = f"give latest, or one of {', '.join(path.name for path in there)}" if there else "leave it out"
            raise InvalidArgument(flag, "no such checkpoint", fix)
        if (problem := damage(folder, self.args.world_size)) is not None:
            usable = usable_checkpoint(self.args.folder, self.args.world_size)
            fix = "use latest" if usable else "leave it out, and choose another --output_dir"
            raise InvalidArgument(flag, f"cannot be resumed ({problem})", fix)
        return str(folder)

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        # `Trainer` would drop examples in evaluations and predictions too.
        with override_attributes(self.args, dataloader_drop_last=self.args.dataloader_drop_last and is_training):
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        # `Trainer` takes one step too many if it resumes from the last step of a run.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        # A run that is stopped now, or in the evaluation after training, resumes from the checkpoint saved here. After
        # saving, `Trainer` loads the best checkpoint.
        stopped, unsaved = self.stopping.leaving, self.args.save_strategy == SaveStrategy.NO
        if not stopped:
            self.take_average()
        if (stopped or unsaved) and not broadcast_from_main(self._checkpoint().is_dir):
            self._save_checkpoint(self.model, None)
        if stopped:  # `Trainer` would remove all checkpoints except the best one, and load the best one
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def take_average(self) -> None:
        """Switch a schedule-free optimizer to its averaged weights, which are those for evaluation and export.

        Does nothing with other optimizers.
        """
        if hasattr(self.optimizer, "eval"):  # accelerate's wrapper has it for any optimizer
            self.optimizer.eval()

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return `Trainer.compute_loss` without AdaLoRA's regularizer, which PEFT adds in evaluation too."""
        with self.allocator.silenced() if self.allocator is not None else contextlib.nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run `Trainer.training_step`, and add the gradient of AdaLoRA's regularizer once per optimizer step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.allocator is not None:
            self.allocator.add_gradient(self.accelerator)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log`.

        Raises `Diverged` for a training loss that is not finite.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            problem = f"loss {logs['loss']} at step {self.state.global_step}"
            raise Diverged(problem, "lower --learning_rate; what was saved before is intact")
        super().log(logs, start_time)

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer as `Trainer` does.

        Raises `InvalidArgument` for one that is not available.
        """
        with refused_as(f"--optim {self.args.optim.value}", OTHER_CHOICE, UNFIT):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """Create the scheduler as `Trainer` does.

        Raises `InvalidArgument` if a required argument is missing.
        """
        given = f"--lr_scheduler_type {self.args.lr_scheduler_type.value}"
        if self.args.lr_scheduler_kwargs:
            given += f" --lr_scheduler_kwargs {json.dumps(self.args.lr_scheduler_kwargs)}"
        with refused_as(given, OTHER_CHOICE, UNFIT):
            return super().create_scheduler(*args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write only the adapter, without the base model."""
        folder = output_dir or self.args.output_dir
        broadcast_from_main(lambda: save_adapter(self.model, folder))
        if self.args.should_save and not is_main():  # --save_on_each_node
            save_adapter(self.model, folder)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        broadcast_from_main(check_held)
        # `Trainer` removes older checkpoints before all processes have written their part of this one.
        try:
            with override_attributes(self.args, save_total_limit=None):
                super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if getattr(error, "filename", "") is not None and not any(word in str(error) for word in UNWRITTEN):
                raise
            # The exception of torch.save does not state the cause; that of writing a text file does not name the file.
            where = f"checkpoint of step {self.state.global_step}"
            raise RunFailed(f"{where} cannot be written; is the disk full? Earlier ones are intact") from error
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if self.args.should_save:
            write_checksums(self._checkpoint())
            self._remove_older()

    def _remove_older(self) -> None:
        """Remove checkpoints beyond --save_total_limit, atomically, but never the newest or the best."""
        found, limit = numbered(self.args.folder), self.args.save_total_limit
        best = Path(self.state.best_model_checkpoint or "").name
        others = [path for path in found[1:] if path.name != best]
        if limit is not None:
            for old in others[max(0, limit - len(found) + len(others)) :]:
                discard(old)

    def _checkpoint(self) -> Path:
        return self.args.folder / f"checkpoint-{self.state.global_step}"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.allocator is not None and self.args.should_save:
            write_tensors(Path(output_dir) / ALLOCATOR_NAME, self.allocator.state_dict(), {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with refused_as(f"--resume_from_checkpoint {resume_from_checkpoint}", "give one of this run", UNFIT):
            load_adapter(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                if self.is_deepspeed_enabled:  # DeepSpeed has loaded the weights, but not the recorded norms
                    load_adapter(self.model, checkpoint)
                self._load_allocator(checkpoint)
        # out of memory or the state of another version: each reader and device has its own exceptions
        except Exception as error:
            if checkpoint is None:
                raise
            raise RunFailed(cannot_be_loaded(checkpoint, error)) from error

    def _load_best_model(self) -> None:
        logger.info(f"Loading the adapter of {self.state.best_model_checkpoint}, {self.state.best_metric} the best")
        load_adapter(self.model, self.state.best_model_checkpoint)
        self._load_allocator(self.state.best_model_checkpoint)

    def _load_allocator(self, checkpoint: str) -> None:
        if self.allocator is not None:
            self.allocator.load_state_dict(load_file(Path(checkpoint) / ALLOCATOR_NAME))
