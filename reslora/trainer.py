"""ResLoRA, and the methods it is compared with, in transformers' `Trainer`.

model = attach(model, MethodArguments(method="reslora", shortcut="input"), total_steps=1000)
trainer = AdapterTrainer(model, args, train_dataset=..., callbacks=[LogCallback("run/log.jsonl")])
trainer.train()
table = merge_table(model, trainer.evaluate, calibration)       # unmerged and merged by every method
export(model, "run", merge="auto", calibration=calibration)     # plain LoRA in run/peft
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from . import checkpoint
from .adapters import LORA_METHODS, METHODS, adapter_config, known_targets
from .arguments import (
    AdapterTrainingArguments,
    InvalidArgument,
    MethodArguments,
    OneLineParser,
    RunFailed,
    check_resume,
    first_line,
    parse_arguments,
    run_script,
    settings,
)
from .chains import base_model, chains, lora_layers, unwrap
from .config import ResLoraConfig
from .export import export_peft, merged_state_dict
from .files import replacing, write_json, write_tensors
from .model import MergeReport, attach_wires, connect, connection_of, disconnect, enable_gradient_checkpointing, merge

__all__ = [
    "LORA_METHODS",
    "METHODS",
    "AdapterTrainer",
    "AdapterTrainingArguments",
    "InvalidArgument",
    "LogCallback",
    "MethodArguments",
    "OneLineParser",
    "RunFailed",
    "attach",
    "check_resume",
    "export",
    "load_adapter",
    "merge_table",
    "parse_arguments",
    "run_script",
    "save_adapter",
    "settings",
    "table_text",
    "total_steps",
    "usable_checkpoint",
    "write_results",
]

logger = logging.get_logger(__name__)

ADAPTER_NAME = "adapter.safetensors"
ALLOCATOR_NAME = "allocator"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


# -- the adapter -------------------------------------------------------------------------------------------------------


def attach(
    model: PreTrainedModel,
    arguments: MethodArguments,
    total_steps: int,
    example_inputs: dict | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> PeftModel:
    """Gives `model` the method's adapter, connects it where the method is ResLoRA, and returns PEFT's model.

    `total_steps` is AdaLoRA's schedule; `example_inputs` as in `reslora.connect`; `task_type` and `modules_to_save` are
    PEFT's. Raises `InvalidArgument` for target modules that are unknown or match nothing, or a shortcut without a link.
    """
    targets = _targets(model, arguments)
    config = adapter_config(
        arguments.method,
        r=arguments.lora_r,
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        targets=targets,
        total_steps=total_steps,
        task_type=task_type,
        modules_to_save=modules_to_save,
    )
    flag = f"--target_modules {' '.join(targets) if isinstance(targets, list) else targets}"
    try:
        adapted = get_peft_model(model, config)
        if arguments.method == "reslora":
            shortcuts = ResLoraConfig(arguments.shortcut, arguments.pre_num, arguments.head)
            connect(adapted, shortcuts, example_inputs=example_inputs)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(flag, first_line(error), "name other layers, or another --method") from error
    if arguments.merge_and_save:
        _refuse_tied(base_model(adapted), flag)
    return adapted


def _refuse_tied(base: PreTrainedModel, flag: str) -> None:
    """A merged model that shares one weight between its embeddings cannot hold an update of only one of them."""
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    embeddings = [module for module in embeddings if module is not None]
    weights = {id(getattr(module, "base_layer", module).weight) for module in embeddings}
    if len(weights) < len(embeddings) and any(isinstance(module, BaseTunerLayer) for module in embeddings):
        raise InvalidArgument(
            flag, "the input and the output embedding are one weight", "name other layers, or omit --merge_and_save"
        )


def _targets(model: PreTrainedModel, arguments: MethodArguments) -> list[str] | str:
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    targets = arguments.target_modules or known_targets(model.config.model_type)
    if not targets:
        raise InvalidArgument(
            "--target_modules",
            f"missing, and not known for model type {model.config.model_type!r}",
            f"name some of {', '.join(sorted(linear))}",
        )
    if list(targets) == ["all-linear"]:
        return "all-linear"
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InvalidArgument(
                f"--target_modules {' '.join(targets)}",
                f"{target} matches no layer of {type(model).__name__}",
                f"name some of {', '.join(sorted(linear))}",
            )
    return list(targets)


def total_steps(args: TrainingArguments, examples: int) -> int:
    """How many steps `Trainer` takes with these arguments on a data set of `examples` rows."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(math.ceil(examples / args.per_device_train_batch_size) / args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def _allocator(model: nn.Module) -> AdaLoraModel | None:
    tuner = getattr(unwrap(model), "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) else None


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in unwrap(model).named_parameters() if value.requires_grad}


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes what training changes, never the base: by `reslora.save` if connected, else as `adapter.safetensors`."""
    for name, value in _trained(model).items():
        if not bool(torch.isfinite(value).all()):
            raise RunFailed(f"{name} is not finite: lower --learning_rate; the checkpoint before is intact")
    if connection_of(base_model(model)) is not None:
        checkpoint.save(model, directory)
    else:
        write_tensors(Path(directory) / ADAPTER_NAME, _trained(model), {"format": "pt"})


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Reads what `save_adapter` wrote into a model with a matching adapter, connected as the saved one was.

    Raises `ValueError` if files are missing or damaged, or if names or shapes differ; the model is unchanged then.
    """
    if connection_of(base_model(model)) is not None:
        checkpoint.load(model, directory)
        return
    path, trained = Path(directory) / ADAPTER_NAME, _trained(model)
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is of another method, or incomplete")
    try:
        saved = load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)}") from error
    for name in (*trained, *saved):
        if name not in saved or name not in trained or saved[name].shape != trained[name].shape:
            raise ValueError(f"{path} does not fit the model's adapter, first at {name}")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(saved[name])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints_of(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first, whatever their state."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def usable_checkpoint(output_dir: str | os.PathLike, processes: int = 1) -> str | None:
    """Returns the newest complete `checkpoint-N` of a run, or None; damaged ones are left out with a warning."""
    for path in checkpoints_of(output_dir):
        problem = _damage(path, processes)
        if problem is None:
            return str(path)
        logger.warning(f"{path} is damaged ({problem}), trying the one before")
    return None


def _damage(folder: Path, processes: int) -> str | None:
    """What keeps a checkpoint from being resumed from, or None; reads every file of it."""
    ranks = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    # DeepSpeed keeps optimizer and scheduler in a folder of its own, which it checks itself.
    states = [] if (folder / "latest").exists() else ["optimizer.pt", "scheduler.pt"]
    try:
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
        adapters = [path for path in (folder / checkpoint.WEIGHTS_NAME, folder / ADAPTER_NAME) if path.exists()]
        if not adapters:
            return f"no {checkpoint.WEIGHTS_NAME} or {ADAPTER_NAME}"
        for path in (*adapters, *folder.glob(f"{ALLOCATOR_NAME}.safetensors")):
            with safe_open(path, framework="pt"):
                pass
        if adapters[0].name == checkpoint.WEIGHTS_NAME:
            json.loads((folder / checkpoint.CONFIG_NAME).read_text(encoding="utf-8"))
        if not (folder / ranks[-1]).exists():
            return f"no {ranks[-1]}: incomplete, or made by another number of processes"
        for name in (*states, *ranks):
            with safe_globals():
                torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated file fails in as many ways as there are readers
        return f"{type(error).__name__}: {first_line(error)}"
    return None


class _Progress(ProgressCallback):
    """Shows the training loss behind the bar, where stock prints a line each time; evaluations get their line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the loss on the progress bar."""
        if self.training_bar is None or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        elif "eval_loss" in logs:
            timings = ("eval_runtime", "_per_second", "epoch")
            figures = {name.removeprefix("eval_"): v for name, v in logs.items() if not name.endswith(timings)}
            words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
            self.training_bar.write(f"step {state.global_step}: validation {words}")


class AdapterTrainer(Trainer):
    """transformers' `Trainer` for a model from `attach`: checkpoints hold the adapter only and resume exactly.

    Gradient checkpointing, where the arguments ask for it, is ours (`reslora.enable_gradient_checkpointing`); AdaLoRA's
    ranks are allocated and its regularizer is kept out of the reported losses; non-finite losses end the run.

    `train(resume_from_checkpoint="latest")` goes on from the newest checkpoint that is complete. Raises
    `InvalidArgument` for FSDP and ZeRO-3, which shard the weights that a shortcut reads.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs) -> None:
        args = copy.copy(args)
        _refuse_sharding(args)
        if args.deepspeed and _allocator(model) is not None:
            raise InvalidArgument(
                "--method adalora", "reads gradients that DeepSpeed keeps to itself", "train it without --deepspeed"
            )
        args.logging_nan_inf_filter = False  # it would report the mean of earlier losses in place of a NaN
        args.dataloader_pin_memory &= torch.cuda.is_available()  # it warns in every epoch where it cannot
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        config = getattr(base_model(model), "config", None)
        self.use_cache = getattr(config, "use_cache", None)
        checkpointing = args.activation_checkpointing
        args.activation_checkpointing = args.gradient_checkpointing = False
        if args.n_gpu > 1:
            logger.warning("several GPUs in one process: using the first; start with accelerate launch to use all")
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)
        if self.pop_callback(ProgressCallback):
            self.add_callback(_Progress())
        if checkpointing:
            enable_gradient_checkpointing(model)
        self.trainable_parameters = sum(value.numel() for value in _trained(model).values())
        self.allocator = _allocator(model)
        if self.allocator is not None:
            self.add_callback(_AllocateRanks(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `latest` or True means the newest usable checkpoint, or a fresh start without one."""
        if resume_from_checkpoint in ("latest", True):
            resume_from_checkpoint = usable_checkpoint(self.args.output_dir, self.args.world_size)
            found = checkpoints_of(self.args.output_dir)
            if found and resume_from_checkpoint is None:
                problem = _damage(found[0], self.args.world_size)
                raise InvalidArgument(
                    "--resume_from_checkpoint latest",
                    f"none of {len(found)} checkpoints can be used, {found[0]} for: {problem}",
                    "take as many processes as before, or remove them to start afresh",
                )
        elif resume_from_checkpoint:
            inside = Path(self.args.output_dir) / resume_from_checkpoint
            resume_from_checkpoint = str(inside if inside.is_dir() else resume_from_checkpoint)
            problem = _damage(Path(resume_from_checkpoint), self.args.world_size)
            if problem is not None:
                raise InvalidArgument(
                    f"--resume_from_checkpoint {resume_from_checkpoint}", f"damaged ({problem})", "use latest"
                )
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            if self.use_cache is not None:  # `Trainer` turns it off, and it would be saved with a merged model
                base_model(self.model).config.use_cache = self.use_cache

    def _run_epoch(self, *args, **kwargs) -> None:
        # Stock `Trainer` takes one step too many when it resumes from the last step of a run.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As `Trainer.compute_loss`, without AdaLoRA's regularizer, which PEFT adds in evaluation too."""
        with _weight_of_penalty(self.allocator, 0.0):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As `Trainer.training_step`; AdaLoRA's regularizer joins the gradients once per step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.allocator is not None and self.accelerator.sync_gradients:
            scaler = getattr(self.accelerator, "scaler", None)
            _add_penalty(self.allocator, scaler.get_scale() if scaler else 1.0)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; raises `RunFailed` for a training loss that is not a number."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RunFailed(
                f"loss {logs['loss']} at step {self.state.global_step}: lower --learning_rate; the last checkpoint is "
                "intact"
            )
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, never the base model."""
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            load_adapter(self.model, resume_from_checkpoint)
        except ValueError as error:
            raise InvalidArgument(
                f"--resume_from_checkpoint {resume_from_checkpoint}", first_line(error), "give one of this run"
            ) from error

    def _load_best_model(self) -> None:
        logger.info(f"Loading the adapter of {self.state.best_model_checkpoint}, {self.state.best_metric} the best")
        load_adapter(self.model, self.state.best_model_checkpoint)
        if self.allocator is not None:
            _load_allocator(self.allocator, Path(self.state.best_model_checkpoint))

    def create_optimizer(self, *args, **kwargs):
        """As `Trainer.create_optimizer`; raises `InvalidArgument` for one that cannot be had here."""
        with _refused_as(f"--optim {_plain(self.args.optim)}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """As `Trainer.create_scheduler`; raises `InvalidArgument` where it lacks something."""
        with _refused_as(f"--lr_scheduler_type {_plain(self.args.lr_scheduler_type)}"):
            return super().create_scheduler(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            # So torch.save says that a file cannot be written, without the cause.
            where = f"checkpoint of step {self.state.global_step}"
            raise RunFailed(f"{where} cannot be written; is the disk full? Earlier ones are intact") from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.allocator is not None and self.args.should_save:
            _save_allocator(self.allocator, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:  # which has read the weights, but not the norm windows
            load_adapter(self.model, checkpoint)
        if self.allocator is not None:
            _load_allocator(self.allocator, Path(checkpoint))


@contextlib.contextmanager
def _refused_as(flag: str):
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidArgument(flag, first_line(error), "install or give what it needs, or choose another") from error


def _plain(choice) -> str:
    return getattr(choice, "value", choice)


def _refuse_sharding(args: TrainingArguments) -> None:
    stage = 0
    if args.deepspeed:
        content = args.deepspeed
        if not isinstance(content, dict):
            content = json.loads(Path(content).read_text(encoding="utf-8"))
        stage = content.get("zero_optimization", {}).get("stage", 0)
    if args.fsdp or stage == 3:
        raise InvalidArgument(
            "--fsdp" if args.fsdp else "--deepspeed",
            "shards the adapter, whose whole weights the shortcuts and the checkpoints read",
            "use DDP (accelerate launch) or ZeRO-2",
        )


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------


class _AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's allocator between the optimizer's step and the zeroing of the gradients it reads."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Moves ranks, unless the step was skipped."""
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.allocator.update_and_allocate(state.global_step + 1)


@contextlib.contextmanager
def _weight_of_penalty(tuner: AdaLoraModel | None, weight: float):
    if tuner is None:
        yield
        return
    config = tuner.peft_config[tuner.trainable_adapter_name]
    previous, config.orth_reg_weight = config.orth_reg_weight, weight
    try:
        yield
    finally:
        config.orth_reg_weight = previous


def _add_penalty(tuner: AdaLoraModel, scale: float) -> None:
    """Adds the gradient of AdaLoRA's regularizer: how far the factors are from orthonormal, averaged over the factors.

    Every process adds the same after the gradients are averaged; `torch.autograd.grad` passes DDP's hooks by.
    """
    factors = {name: value for name, value in tuner.named_parameters() if "lora_A." in name or "lora_B." in name}
    penalties = []
    for name, factor in factors.items():
        gram = factor @ factor.T if "lora_A." in name else factor.T @ factor
        penalties.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight * scale
    gradients = torch.autograd.grad(weight * torch.stack(penalties).mean(), list(factors.values()))
    for factor, gradient in zip(factors.values(), gradients, strict=True):
        factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)


def _save_allocator(tuner: AdaLoraModel, directory: Path) -> None:
    """Running importance of each parameter, and the ranks that were settled on."""
    averages = {
        f"{kind}/{name}": value for kind in _AVERAGES for name, value in getattr(tuner.rankallocator, kind).items()
    }
    write_tensors(directory / f"{ALLOCATOR_NAME}.safetensors", averages, {"format": "pt"})
    write_json(directory / f"{ALLOCATOR_NAME}.json", tuner.peft_config[tuner.trainable_adapter_name].rank_pattern)


def _load_allocator(tuner: AdaLoraModel, directory: Path) -> None:
    averages: dict[str, dict] = {kind: {} for kind in _AVERAGES}
    parameters = dict(tuner.model.named_parameters())
    for key, value in load_file(directory / f"{ALLOCATOR_NAME}.safetensors").items():
        kind, _, name = key.partition("/")
        averages[kind][name] = value.to(parameters[name].device)
    vars(tuner.rankallocator).update(averages)
    pattern = json.loads((directory / f"{ALLOCATOR_NAME}.json").read_text(encoding="utf-8"))
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = pattern


# -- the log -----------------------------------------------------------------------------------------------------------


class LogCallback(TrainerCallback):
    """Writes `log.jsonl`: rows {"step", "split": "train"|"validation", "loss", "lr", "seconds", ...metrics}.

    `seconds` counts training alone, over all continuations of a run. Rows after the step that a run resumes at are
    dropped when it starts; a fresh run starts a fresh file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.seconds = self.started = 0.0
        self.learning_rate: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Goes on from the rows up to the step that the run resumes at."""
        rows = [row for row in _read_log(self.path) if row["step"] <= state.global_step] if state.global_step else []
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        if state.is_world_process_zero:
            with replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stops the clock: evaluation and saving do not count."""
        self.seconds += time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Writes a row of training or validation figures."""
        if "loss" in logs:
            self.learning_rate = logs.get("learning_rate")
            self._write(state, "train", logs["loss"], {"grad_norm": logs.get("grad_norm")})
        elif "eval_loss" in logs:
            timings = ("runtime", "per_second", "jit", "model_preparation")
            figures = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
            figures = {key: value for key, value in figures.items() if not any(word in key for word in timings)}
            self._write(state, "validation", figures.pop("loss"), figures)

    def _write(self, state, split: str, loss: float, figures: dict) -> None:
        if not state.is_world_process_zero:
            return
        row = {
            "step": state.global_step,
            "split": split,
            "loss": loss,
            "lr": self.learning_rate,
            "seconds": round(self.seconds, 3),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {key: value for key, value in figures.items() if value is not None}) + "\n")


def _read_log(path: Path) -> list[dict]:
    """Rows of a log; a last line cut short by a kill is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


# -- merging -----------------------------------------------------------------------------------------------------------


def merge_table(
    model: nn.Module,
    evaluate: Callable[[], Mapping[str, float]],
    calibration: Sequence[Mapping] | None = None,
    methods: Sequence[str] | None = None,
) -> dict[str, dict]:
    """Returns figures of a model unmerged and merged by each method: the rows of the paper's Tables 3, 6 and 7.

    `evaluate` returns the figures of the model as it stands; `calibration` as in `reslora.merge`. The result maps
    `unmerged` and each method to its figures, merged ones with their `report`. Default methods: all that apply; for
    block-shortcuts `none` and `exact`. `input` takes the norms recorded in training where there are any (Eqs. 8-9),
    else the calibration's. The model is connected and unmerged again afterwards; one that never was has a single row.
    """
    table = {"unmerged": dict(evaluate())}
    connection = connection_of(base_model(model))
    if connection is None or not connection.config.wired:
        return table
    _share_norms(connection)
    for method in methods or _applicable(connection, calibration):
        with unmerged_afterwards(model):
            report = _merge(model, method, calibration)
            table[method] = {**evaluate(), "report": report.to_dict()}
    return table


def _applicable(connection, calibration: object) -> list[str]:
    if connection.config.shortcut == "block":
        return ["none", "exact"]
    has_norms = calibration is not None or connection.wires.norms.count > 0
    return ["none", *(["input"] if has_norms else []), "weights", *(["lstsq"] if calibration is not None else [])]


def _merge(model: nn.Module, method: str, calibration: Sequence[Mapping] | None) -> MergeReport:
    connection = connection_of(base_model(model))
    recorded = connection.wires.norms.count > 0
    if method == "input" and recorded and connection.config.shortcut != "block":
        calibration = None
    return merge(model, "auto" if method == "exact" else method, calibration)


@contextlib.contextmanager
def unmerged_afterwards(model: nn.Module, adapter_name: str = "default"):
    """Whatever happens to the adapter inside, a merge above all, is undone at the end, to the last bit.

    Parameters stay the same objects, so an optimizer that holds them goes on working.
    """
    base = base_model(model)
    connection = connection_of(base)
    config = base.peft_config[adapter_name]
    patterns = copy.deepcopy((config.rank_pattern, config.alpha_pattern))
    layers = {name: layer for name, layer in lora_layers(base, adapter_name).items() if adapter_name in layer.lora_A}
    before = {name: _factors(layer, adapter_name) for name, layer in layers.items()}
    checkpointing = bool(getattr(base, "is_activation_checkpointing", False))
    try:
        yield
    finally:
        if connection_of(base) is not None:
            disconnect(base, adapter_name)
        for name, layer in layers.items():
            _restore_factors(layer, adapter_name, before[name])
        config.rank_pattern, config.alpha_pattern = patterns
        again = attach_wires(base, connection.config, adapter_name, connection.chains)
        again.wires.norms = connection.wires.norms
        if checkpointing:
            enable_gradient_checkpointing(base)


def _factors(layer: nn.Module, adapter_name: str) -> tuple:
    modules = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    numbers = {name: getattr(layer, name)[adapter_name] for name in ("r", "lora_alpha", "scaling")}
    return modules, tuple(module.weight.detach().clone() for module in modules), numbers


def _restore_factors(layer: nn.Module, adapter_name: str, before: tuple) -> None:
    modules, weights, numbers = before
    with torch.no_grad():
        for place, module, weight in zip((layer.lora_A, layer.lora_B), modules, weights, strict=True):
            module.weight.copy_(weight)
            place[adapter_name] = module
    for name, value in numbers.items():
        getattr(layer, name)[adapter_name] = value


def _share_norms(connection) -> None:
    """In a distributed run the window of rank 0 counts, and every process must merge alike."""
    if not torch.distributed.is_initialized():
        return
    norms = connection.wires.norms
    values = norms.values.cpu() if norms.values is not None else None
    shared = [values, norms.count]
    torch.distributed.broadcast_object_list(shared)
    if shared[0] is not None and torch.distributed.get_rank() > 0:
        norms.restore(shared[0], shared[1])


# -- what a run leaves -------------------------------------------------------------------------------------------------


def export(
    model: PeftModel,
    output_dir: str | os.PathLike,
    *,
    merge: str = "auto",
    calibration: Sequence[Mapping] | None = None,
    merged: bool = False,
    tokenizer=None,
) -> MergeReport | None:
    """Merges a connected model for good and writes plain files into `output_dir`; returns the merge's report.

    `peft/`: an adapter that stock PEFT loads, with the same logits. `chains.json` and `merge.json` where the model was
    connected. `merged/` if asked for: the base model with the adapter added, summed in float32, and the tokenizer, for
    stock transformers. With several processes every one must call it; rank 0 writes.
    """
    output, report = Path(output_dir), None
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    connection = connection_of(base_model(model))
    if connection is not None:
        _share_norms(connection)
        plan = chains(model).to_dict() if connection.config.wired else connection.chains.to_dict()
        report = _merge(model, merge, calibration)
        if writes:
            write_json(output / "chains.json", plan)
            write_json(output / "merge.json", report.to_dict())
    if writes:
        export_peft(model, output / "peft")
        if merged:
            _write_merged(base_model(model), output / "merged", tokenizer)
    return report


def _write_merged(base: PreTrainedModel, directory: Path, tokenizer) -> None:
    state = {}
    for key, value in merged_state_dict(base).items():
        if ".original_module." not in key:
            state[key.replace(".modules_to_save.default.", ".")] = value
    with torch.device("meta"):
        plain = type(base)(base.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = getattr(base, "generation_config", None)
    with replacing(directory) as temporary:
        try:
            plain.save_pretrained(str(temporary))
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{directory}: {error}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))


def write_results(
    trainer: AdapterTrainer, arguments: MethodArguments, table: dict[str, dict], report: MergeReport | None, **facts
) -> dict:
    """Writes `results.json` and returns its content.

    `facts` (task, model, sizes), the method with its settings, how long was trained, `table` (see `merge_table`), and
    `merge`: the method by which the exported adapter was merged, None where there was nothing to merge.
    """
    wired = ("shortcut", "pre_num", "head") if arguments.method == "reslora" else ()
    timing = [callback.seconds for callback in trainer.callback_handler.callbacks if isinstance(callback, LogCallback)]
    content = {
        **facts,
        **{name: getattr(arguments, name) for name in ("method", *wired, "lora_r", "lora_alpha")},
        "trainable_parameters": trainer.trainable_parameters,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "train_seconds": round(timing[0], 3) if timing else None,
        "merge": report.method if report is not None else None,
        "table": table,
    }
    if trainer.args.should_save:
        write_json(Path(trainer.args.output_dir) / "results.json", content)
    return content


def table_text(table: Mapping[str, Mapping]) -> str:
    """A `merge_table` for a terminal: one line per row, figures as columns, and the mean error of each merge."""
    names = [name for name in next(iter(table.values())) if name != "report"]
    lines = [f"  {'':<10}" + "".join(f"{name:>14}" for name in names)]
    for row, figures in table.items():
        errors = [block["error"] for block in figures.get("report", {}).get("blocks", ()) if block["error"] is not None]
        error = f"   error of a block {sum(errors) / len(errors):.2%} on average" if errors else ""
        lines.append(f"  {row:<10}" + "".join(f"{figures[name]:>14.4f}" for name in names) + error)
    return "\n".join(lines)
