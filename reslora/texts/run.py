"""A single run of a language script: options -> examples -> model -> training -> merges -> files."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

from ..content_hash import files_mark, folder_mark
from ..errors import InvalidArgument, Stopped, refused_as
from ..experiment.record import EXPERIMENT
from ..export import PEFT_CONFIG_FILE, PEFT_FILE
from ..formatting import pluralize
from ..options.contradictions import check_averages
from ..options.texts import T, TextOptions, TrainingOptions
from ..options.unused import report_unread_by_methods, report_unused
from ..options.values import as_typed
from ..runtime.folder_lock import locked
from ..runtime.processes import broadcast_from_main, say, stop_requested
from ..runtime.script import shares_the_cpu
from ..runtime.signals import NOT_BEGUN, StopRequest
from ..runtime.status import Status
from ..seeds import derive
from ..training.accelerator import new_accelerator, tracker_of
from ..training.checkpoints import Resume, check_length, plan_resume
from ..training.context import Context
from ..training.loop import train_method
from ..training.state import check_optimizer
from ..training.study import Identity
from ..training.trackers import note_settings, start_trackers
from .adapter import config_for
from .study import Texts, TextStudy, plan_of, schedule_of


def run(texts: Texts, options: T, stop: StopRequest) -> None:
    """Train, merge and export the method of the options."""
    report_unread_by_methods(options)
    report_unused(options)
    (method,) = options.adapter.method
    with contextlib.ExitStack() as stack:
        context = begin(options, stop, stack, lambda: check_folder(options))
        texts.read(options)
        identity = identity_of(texts, options)
        resume = broadcast_from_main(lambda: plan_resume(options, identity, files=texts.files(options)))
        for line in resume.notes:
            say(line)
        if method in resume.finished:
            say(f"{context.folder} contains this run, which is finished; nothing to do")
            return
        study = build(texts, options, context, identity, resume)
        if stop_requested(stop):
            raise Stopped(NOT_BEGUN)
        train_method(method, resume, study)
        context.accelerator.end_training()


def build(texts: Texts, options: T, context: Context, identity: Identity, resume: Resume) -> TextStudy:
    """Return the study of the run, after all checks that need the length of the run."""
    schedule, resolved = schedule_of(plan_of(texts, options, context.accelerator).updates, options)
    context = dataclasses.replace(context, options=resolved, model=texts)
    with torch.device("meta"):  # before anything is written
        config_for(texts.empty(resolved), resolved.adapter, schedule.steps, texts.classifier or None)
    check_optimizer(context)
    check_averages(resolved, schedule.steps)
    check_length(options, resume, schedule.steps)
    start_trackers(context, "reslora", wandb={"name": options.output.run_name})
    note_settings(resolved, {}, context.accelerator)
    return TextStudy(schedule, identity, context, texts)


def begin(
    options: TextOptions,
    stop: StopRequest,
    stack: contextlib.ExitStack,
    check: Callable[[], object],
    lock: Callable[[Path], contextlib.AbstractContextManager] = locked,
) -> Context:
    """Lock the run's directory until `stack` closes, and return the context.

    `check` raises `InvalidArgument` if the directory's content does not allow the run.
    """
    with stop.at_once():
        accelerator = start_accelerator(options)
    folder = Path(options.output.output_dir)

    def lock_folder() -> None:
        """Lock the output folder until the run ends, and check its content."""
        stop.check(NOT_BEGUN)
        stack.enter_context(lock(folder))
        check()

    broadcast_from_main(lock_folder)
    return Context(options, None, accelerator, stop, status=Status(folder, accelerator.device))


def check_folder(options: TextOptions) -> None:
    """Raise `InvalidArgument` for a directory whose content does not allow the run."""
    folder = Path(options.output.output_dir)
    if (folder / EXPERIMENT).exists():
        fix = "give its methods, rates and seeds, or choose another"
        raise InvalidArgument(f"--output_dir {folder}", "contains an experiment", fix)
    plan_resume(options)


def identity_of(texts: Texts, options: TextOptions) -> Identity:
    """Return the content hashes of the model and the training examples."""
    name, revision = texts.model_of(options)
    model = f"content {folder_mark(Path(name))}" if Path(name).is_dir() else f"{name} {revision or 'main'}"
    examples = f"{pluralize(len(texts.rows), 'example')}, content {derive(json.dumps(texts.rows)):016x}"
    data = " ".join(f"--{option} {as_typed(options[option])}" for option in texts.data_options)
    start = options.adapter.init_lora
    return Identity(
        model, examples, f"--model_name_or_path {name}", data,
        lora=f"content {files_mark(Path(start) / name for name in (PEFT_CONFIG_FILE, PEFT_FILE))}" if start else "",
        lora_flag=f"--init_lora {start}",
    )  # fmt: skip


# -- accelerate --------------------------------------------------------------------------------------------------------


def start_accelerator(options: TextOptions) -> Accelerator:
    """Return accelerate's `Accelerator` with the requested trackers, precision and DeepSpeed configuration.

    Raises `InvalidArgument` for FSDP, which shards the weights that a shortcut reads, and for a precision without a
    GPU.
    """
    training = options.training
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        problem = "its configuration says FSDP, but merges and metrics need the complete weights"
        raise InvalidArgument("accelerate launch", problem, "use DDP or ZeRO-2")
    told = parse_flag_from_env("ACCELERATE_USE_CPU")  # `accelerate launch --cpu` sets it
    use_cpu = training.use_cpu or told
    if not torch.cuda.is_available() or use_cpu:
        if training.fp16:
            raise InvalidArgument("--fp16", "needs a GPU", "leave it out, or take --bf16 --use_cpu")
        if training.bf16 and not use_cpu:
            raise InvalidArgument("--bf16", "there is no GPU", "add --use_cpu, or leave --bf16 out")
    if training.deepspeed and told:
        raise InvalidArgument("--deepspeed", "accelerate ignores it with --cpu", "give --use_cpu here instead")
    by_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if by_deepspeed and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        PartialState(cpu=True)  # connects the processes; `Accelerator(cpu=True)` would, but without DeepSpeed
    trackers = [tracker for tracker in map(tracker_of, options.output.report_to) if tracker]
    accelerator = new_accelerator(
        f"--{training.mixed_precision}",
        options,
        cpu=(use_cpu or shares_the_cpu()) and not (training.deepspeed or by_deepspeed),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        log_with=trackers or None,
        deepspeed_plugin=deepspeed_plugin(training),
    )
    if training.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = training.tf32
    return accelerator


def deepspeed_plugin(training: TrainingOptions) -> DeepSpeedPlugin | None:
    """Return the configuration of --deepspeed for accelerate; None without it."""
    if not training.deepspeed:
        return None
    if not {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        # A single process, as torch's launcher describes it: DeepSpeed would look for MPI otherwise.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    with refused_as(f"--deepspeed {training.deepspeed}", "give a JSON object with keys that it knows, or a file"):
        text = training.deepspeed
        return DeepSpeedPlugin(hf_ds_config=json.loads(text) if text.startswith("{") else text)
