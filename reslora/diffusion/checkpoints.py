"""Checkpoints: saved whole, checked before they are believed, and what a resumed run must share with its past."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..adapters import load_adapter, save_adapter
from ..errors import InvalidArgument, first_line
from ..files import check_checksums, read_object, replacing, write_checksums
from .arguments import Flags
from .folder import refuse_busy, remove
from .trainee import Trainee

STATE, RECORD = "trainer.pt", "trainer.json"

# What may differ between a run and its continuation: how long it trains, what it shows and keeps, and where things are.
FREE_ON_RESUME = {
    "config", "output_dir", "logging_dir", "cache_dir", "method", "max_train_steps", "num_train_epochs", "local_rank",
    "validation_prompt", "num_validation_images", "validation_steps", "validation_epochs", "num_inference_steps",
    "guidance_scale", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to",
    "merge", "merge_calibration_samples", "push_to_hub", "hub_token", "hub_model_id", "dataloader_num_workers",
    "gradient_checkpointing", "compile", "train_batch_size", "gradient_accumulation_steps", "strict",
    "cache_latents", "cache_text_embeddings",
    # The content decides: see `Identity`.
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "train_data_dir",
    "dataset_name", "dataset_config_name", "image_column", "caption_column",
}  # fmt: skip

DESCRIBED = {"samples_per_step": "batch size x accumulation x processes =", "deepspeed": "DeepSpeed:"}


@dataclass(frozen=True)
class Identity:
    """What a run is trained from, by content: it goes on only with the same."""

    model: str
    images: str


def settings_of(flags: Flags) -> dict:
    """What a continuation must share with the run it continues, but for what its `Identity` says."""
    settings = {name: value for name, value in vars(flags).items() if name not in FREE_ON_RESUME}
    samples = flags.train_batch_size * flags.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # it keeps another state
    return settings | {"samples_per_step": samples, "deepspeed": deepspeed}


# -- which there are ---------------------------------------------------------------------------------------------------


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints of one method, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / RECORD).is_file()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_checkpoint(checkpoint: Path) -> dict:
    """What a checkpoint says of itself; empty where that is missing or damaged."""
    try:
        check_checksums(checkpoint, [RECORD])
    except ValueError:
        return {}
    return read_object(checkpoint / RECORD)


def plan_resume(flags: Flags) -> dict[str, list[Path]]:
    """Checkpoints each method may start from, best first; empty lists where it starts afresh."""
    output, named = Path(flags.output_dir), flags.resume_from_checkpoint
    plan = {method: checkpoints_of(output / method) for method in flags.method}
    for checkpoint in (checkpoint for found in plan.values() for checkpoint in found):
        check_settings(flags, checkpoint)
    done = finished_methods(flags)
    if named is None and any(found for method, found in plan.items() if method not in done):
        refuse_busy(output)
        fix = "go on with --resume_from_checkpoint latest, or choose another"
        raise InvalidArgument(f"--output_dir {output}", "holds an unfinished run", fix)
    if named not in (None, "latest"):
        method, path = _named_checkpoint(flags, named, done)
        plan[method] = [path]
    return plan


def _named_checkpoint(flags: Flags, named: str, done: list[str]) -> tuple[str, Path]:
    output = Path(flags.output_dir)
    method = next((method for method in flags.method if method not in done), flags.method[0])
    path = Path(named) if Path(named).is_dir() or os.sep in named else output / method / named
    flag = f"--resume_from_checkpoint {named}"
    if not (path / RECORD).is_file():
        raise InvalidArgument(flag, "no complete checkpoint there", "use latest")
    method = read_checkpoint(path).get("method")
    if method is None:
        raise InvalidArgument(flag, f"damaged ({RECORD})", "use latest")
    if method not in flags.method:
        raise InvalidArgument(flag, f"it belongs to --method {method}", "add that")
    check_settings(flags, path)
    return method, path


def check_settings(flags: Flags, checkpoint: Path) -> None:
    """Refuse to go on with another rank, shortcut, seed ... than the checkpoint's."""
    there, here = read_checkpoint(checkpoint).get("settings"), json.loads(json.dumps(settings_of(flags)))
    if not isinstance(there, dict):
        return  # damaged
    for name, value in here.items():
        # None: the model's family or accelerate will say it, and this is called again then.
        unknown = name == "mixed_precision" and there.get(name) is None  # not kept by earlier versions
        if value is not None and name in there and there[name] != value and not unknown:
            flag = DESCRIBED.get(name, f"--{name}")
            problem = f"{checkpoint} was trained with {there[name]}"
            raise InvalidArgument(f"{flag} {value}", problem, "use that, or choose another --output_dir")


def check_identity(plan: dict[str, list[Path]], identity: Identity, model_flag: str, data_flag: str) -> None:
    """Refuse to go on with another model or other images than the checkpoints', wherever either is."""
    for checkpoint in (checkpoint for found in plan.values() for checkpoint in found):
        record = read_checkpoint(checkpoint)
        for name, flag in (("model", model_flag), ("images", data_flag)):
            here, there = getattr(identity, name), record.get(name, getattr(identity, name))
            if here != there:
                what = f"on {there}, these are {here}" if name == "images" else "from a model with other content"
                problem = f"{checkpoint} was trained {what}"
                raise InvalidArgument(flag, problem, "bring that back, or choose another --output_dir")


def finished_methods(flags: Flags) -> list[str]:
    """Methods whose exports were written and compared, for as many steps or epochs as are asked for now."""
    done = []
    for method in flags.method:
        record = read_object(Path(flags.output_dir) / method / "exports.json")
        step, steps = record.get("step"), flags.max_train_steps
        if isinstance(step, int) and steps and step > steps:
            problem = f"{Path(flags.output_dir) / method} was trained for {step} already"
            fix = "give at least as many, or choose another --output_dir"
            raise InvalidArgument(f"--max_train_steps {steps}", problem, fix)
        same_epochs = record.get("by_epochs") and record.get("num_train_epochs") == flags.num_train_epochs
        done += [method] if (step == steps if steps else same_epochs) else []
    return done


# -- saving and restoring ----------------------------------------------------------------------------------------------


def save_checkpoint(trainee: Trainee, folder: Path, flags: Flags, identity: Identity, accelerator: Accelerator) -> None:
    """Writes `checkpoint-<step>`: the adapter and what a resumed run needs to equal an uninterrupted one.

    Older ones than --checkpoints_total_limit allows go then. Raises `RunFailed` for weights that are not finite. Every
    process must call it, since DeepSpeed gathers the state from all; the main process alone writes.
    """
    state = trainee.state(accelerator)
    if not accelerator.is_main_process:
        return
    with replacing(folder / f"checkpoint-{trainee.step}") as temporary:
        temporary.mkdir()
        save_adapter(trainee.denoiser, temporary)
        buffer = io.BytesIO()  # torch.save's own writing names no cause where a disk is full
        torch.save(state, buffer)
        (temporary / STATE).write_bytes(buffer.getbuffer())
        record = {
            "method": trainee.method,
            "step": trainee.step,
            "seconds": trainee.seconds,
            "model": identity.model,
            "images": identity.images,
            "settings": settings_of(flags),
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_checksums(temporary)
    if flags.checkpoints_total_limit:
        # Later ones are of an earlier try, damaged or left behind: they do not count, and are overwritten in turn.
        kept = [old for old in checkpoints_of(folder) if step_of(old) <= trainee.step]
        for old in kept[flags.checkpoints_total_limit :]:
            remove(old)


def restore(trainee: Trainee, candidates: list[Path], flags: Flags, accelerator: Accelerator) -> None:
    """Brings the trainee to the first checkpoint that is whole; damaged ones are passed over with a warning.

    One that the user has named must be whole: `InvalidArgument` otherwise.
    """
    for checkpoint in candidates:
        try:
            check_checksums(checkpoint)
            state = torch.load(checkpoint / STATE, map_location=accelerator.device, weights_only=True)
            load_adapter(trainee.denoiser, checkpoint)
            record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
            trainee.load_state(state, record["step"], record["seconds"], accelerator)
        except Exception as error:  # a truncated file fails in as many ways as there are readers
            if flags.resume_from_checkpoint != "latest":
                problem = f"damaged ({first_line(error)})"
                raise InvalidArgument(f"--resume_from_checkpoint {checkpoint}", problem, "use latest") from None
            accelerator.print(f"warning: {checkpoint} is damaged ({first_line(error)}), trying the one before")
            continue
        accelerator.print(f"{trainee.method}: going on from {checkpoint}")
        return
    if candidates:
        accelerator.print(f"{trainee.method}: no checkpoint is whole, starting afresh")
