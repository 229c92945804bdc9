"""Checkpoints: written atomically, verified before loading, and compared with the options of a resumed run."""

import io
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import InvalidArgument, RunFailed, first_line
from ..io import Damaged, check_checksums, read_object, replacing, write_checksums, write_json
from ..methods.adapters import load_adapter, save_adapter
from ..methods.registry import METHODS
from ..options.grid import Grid
from ..options.option import in_words
from ..options.shared import SharedOutputOptions, TrainOptions
from ..options.unused import is_read
from ..options.values import listed, refuse_other_value
from ..runtime.checkpoint_folders import (
    EXPORTS,
    MERGED,
    RECORD,
    STATE,
    checkpoints_of,
    discard,
    numbered,
    refuse_afresh,
    set_aside,
    set_others_aside,
    step_of,
)
from ..runtime.processes import broadcast_from_main, on_all
from .best import FOLDER, forget_beaten, to_export
from .context import Context
from .embeddings import load_embeddings, save_embeddings
from .schedule import Schedule
from .state import Learner
from .study import Identity, Study

OF_CLASS = "; class images: "  # separates the content hashes of training images and class images
OF_ANY_LENGTH = ("constant", "constant_with_warmup", "piecewise_constant", "inverse_sqrt")
"""Values of --lr_scheduler that, after the warmup, do not depend on the number of steps."""

# files in a method's directory that belong to the same training history as its checkpoints
TOLD = ("log.jsonl", FOLDER, "samples")

BATCHES = ("train_batch_size", "gradient_accumulation_steps")
DESCRIBED = {
    "samples_per_step": "batch size x accumulation x processes =",
    "samples_per_forward": "with images of several sizes, batch size x processes =",
    "deepspeed": "DeepSpeed:",
}


def named_by(resume: str, options: TrainOptions) -> list[str]:
    """Return the names of the options with this value of `Option.resume`."""
    return [name for name, option in options.table().items() if option.resume == resume]


def settings_of(asked: TrainOptions | Grid) -> dict:
    """Return the settings that a resumed run must share with the earlier run, except its `Identity`."""
    options, values = asked.base if isinstance(asked, Grid) else asked, asked.flat()
    settings = {name: values[name] for name in named_by("fixed", options)}
    # several in an experiment that varies them
    sizes, passes = (listed(values[options.option(name).name]) for name in BATCHES)
    samples = [size * int(os.environ.get("WORLD_SIZE", 1)) for size in sizes]  # per forward pass
    per_step = [some * each for some in samples for each in passes]
    settings["samples_per_step"] = per_step if len(per_step) > 1 else per_step[0]
    settings["deepspeed"] = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # it changes the saved state
    return settings | options.more_settings(values, samples)


# -- finding checkpoints -----------------------------------------------------------------------------------------------


def read_checkpoint(checkpoint: Path) -> dict:
    """Return a checkpoint's record; empty if the record is missing or damaged."""
    try:
        check_checksums(checkpoint, [RECORD])
    except Damaged:
        return {}
    return read_object(checkpoint / RECORD)


# -- what is left to do ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resume:
    """State of a run on disk, and the checkpoint from which each method resumes."""

    finished: list[str]
    """Methods that are trained, merged and exported as requested."""
    merge_anew: list[str]
    """Trained methods that must be merged again, because the options of merging have changed or a file is missing."""
    checkpoints: dict[str, list[Path]]
    """Checkpoints of each method, in the order in which to try them; empty for a method that starts from zero."""
    notes: list[str] = field(default_factory=list)
    """Lines to print about options that have no effect on finished methods."""
    records: dict[str, dict] = field(default_factory=dict)
    """The record of each unfinished method's first checkpoint."""

    @property
    def resuming(self) -> bool:
        """Whether anything was trained before."""
        return bool(self.finished or any(self.checkpoints.values()))


def plan_resume(
    options: TrainOptions, identity: Identity | None = None, place: str = "", files: Sequence[str] = ()
) -> Resume:
    """Compare the options with the run's directory and return what to resume.

    `files`: names of files that the export of a method writes; a trained method without one of them is exported again.
    Raises `InvalidArgument` if the earlier run had other settings, or another `identity` (not compared if None).
    `place`: directory of an experiment's run inside its method's directory. Only the main process calls this, and
    broadcasts the result.
    """
    output, named = Path(options.output.output_dir), options.output.resume_from_checkpoint
    folders = {method: options.folder_of(method, place) for method in options.adapter.method}
    checkpoints = {method: checkpoints_of(folder) for method, folder in folders.items()}
    for checkpoint in (checkpoint for found in checkpoints.values() for checkpoint in found):
        record = read_checkpoint(checkpoint)
        check_past(options, checkpoint, record, identity, listed(record.get("method", [])))
    finished, merge_anew, notes = already_trained(options, folders, identity, files)
    checkpoints |= {method: [path] for method, path in merge_anew.items()}
    todo = [method for method in options.adapter.method if method not in finished]
    if named is None and any(checkpoints[method] for method in todo if method not in merge_anew):
        fix = "resume with --resume_from_checkpoint latest, or choose another"
        raise InvalidArgument(f"--output_dir {output}", "contains an unfinished run", fix)
    if named not in (None, "latest"):
        method, path = _named_checkpoint(options, named, todo, place)
        check_past(options, path, read_checkpoint(path), identity, [method])
        checkpoints[method] = [path]
        if method in finished:
            done, fix = folders[method] / EXPORTS, "to train it from there once more"
            notes.append(f"--resume_from_checkpoint {named}: {method} is finished; remove {done} {fix}")
    for method in todo:
        if not checkpoints[method]:
            refuse_afresh(output, folders[method], finished=(folders[method] / EXPORTS).exists())
    records = {method: read_checkpoint(checkpoints[method][0]) for method in todo if checkpoints[method]}
    resume = Resume(finished, list(merge_anew), checkpoints, notes, records)
    if options.training.max_train_steps:
        check_length(options, resume, options.training.max_train_steps)
    return resume


def already_trained(
    options: TrainOptions, folders: dict[str, Path], identity: Identity | None, files: Sequence[str]
) -> tuple[list[str], dict[str, Path], list[str]]:
    """Return the finished methods, the checkpoints of methods to merge again, and notes about the finished ones.

    `files`: as in `plan_resume`. Raises `InvalidArgument` if such a checkpoint is missing.
    """
    finished, merge_anew, notes = [], {}, []
    for method, folder in folders.items():
        record = read_object(folder / EXPORTS)
        if not record or not is_trained(options, folder, record):
            continue
        check_past(options, folder, record, identity, [method])
        merging = named_by("merged", options)
        merged = METHODS[method].shortcuts and {name: record[name] for name in merging if name in record}
        remerged = merged and any(options[name] != value for name, value in merged.items())
        missing = [name for name in files if not (folder / name).exists()]
        if remerged or missing:
            path = folder / f"checkpoint-{record['step']}"
            if not (path / RECORD).is_file():
                state = "was merged by another method" if remerged else f"has no {missing[0]}"
                flag = f"--merge {options.adapter.merge}" if remerged else f"--output_dir {options.output.output_dir}"
                problem = f"{folder} {state}, and {path.name}, which holds the adapter, is missing"
                raise InvalidArgument(flag, problem, "choose another --output_dir")
            merge_anew[method] = path
        elif all((folder / name).exists() for name in record.get("read_back", ["none"])):
            finished.append(method)
            notes += notes_of(options, folder, record)
    return finished, merge_anew, notes


def check_length(options: TrainOptions, resume: Resume, steps: int) -> None:
    """Raise `InvalidArgument` if an unfinished method was already trained for more than `steps` steps."""
    for method, record in resume.records.items():
        refuse_fewer(options, resume.checkpoints[method][0], record, steps)


def refuse_fewer(options: TrainOptions, place: Path, record: dict, steps: int) -> None:
    """Raise `InvalidArgument` if the record's step is after `steps`, because training cannot be undone."""
    step = record.get("step")
    if isinstance(step, int) and step > steps:
        epochs = f"--num_train_epochs {options.training.num_train_epochs} ({steps} steps)"
        fix = "give at least as many, or choose another --output_dir"
        given = f"{options.option('max_train_steps').flag} {steps}"
        flag = given if options.training.max_train_steps else epochs
        raise InvalidArgument(flag, f"{place} was trained for {step} already", fix)


def is_trained(options: TrainOptions, folder: Path, record: dict) -> bool:
    """Return whether a method was exported after the requested number of steps or epochs.

    Raises `InvalidArgument` if the method was exported after more steps.
    """
    training = options.training
    step, steps = record.get("step"), training.max_train_steps
    if steps:
        refuse_fewer(options, folder, record, steps)
    if patience := record.get("early_stopping_patience"):  # early stopping ended the training
        return patience == options.validation.early_stopping_patience
    same_epochs = bool(record.get("by_epochs")) and record.get("num_train_epochs") == training.num_train_epochs
    return step == steps if steps else same_epochs


def notes_of(options: TrainOptions, folder: Path, record: dict) -> list[str]:
    """Return a note for each changed option that has no effect on a finished method."""
    shown = record.get("shown", {})
    names = [name for name in named_by("shown", options) if name in shown and options[name] not in (None, shown[name])]
    return [f"{folder} is finished, so --{name} has no effect: it was {in_words(shown[name])}" for name in names]


def _named_checkpoint(options: TrainOptions, named: str, todo: list[str], place: str) -> tuple[str, Path]:
    methods = options.adapter.method
    first = (todo or methods)[0]
    path = Path(named) if Path(named).is_dir() or os.sep in named else options.folder_of(first, place) / named
    flag = f"--resume_from_checkpoint {named}"
    if not (path / RECORD).is_file():
        raise InvalidArgument(flag, "no complete checkpoint there", "use latest")
    method = read_checkpoint(path).get("method")
    if method is None:
        raise InvalidArgument(flag, f"damaged ({RECORD})", "use latest")
    if method not in methods:
        raise InvalidArgument(flag, f"it belongs to --method {method}", f"add {method} to --method")
    return method, path


def check_past(
    asked: TrainOptions | Grid, place: Path, record: dict, identity: Identity | None, methods: Collection[str] = ()
) -> None:
    """Raise `InvalidArgument` if a checkpoint or finished method had another rank, seed, model, data set etc.

    `methods`: those that the record describes, if known; options that none of them uses are not compared.
    """
    there = record.get("settings")
    there = there if isinstance(there, dict) else {}  # a damaged record
    options = asked.base if isinstance(asked, Grid) else asked
    options.refuse_record(place, there)
    unused = {name for name, option in options.table().items() if methods and not is_read(option, methods)}
    for name, value in json.loads(json.dumps(settings_of(asked))).items():
        # None may still be resolved by the model's family or accelerate; this is called again with the identity then.
        settled = value is not None or identity is not None
        if settled and name not in unused and name in there and there[name] != value:
            before, otherwise = f"{place} was trained with", "choose another --output_dir"
            refuse_other_value(DESCRIBED.get(name, f"--{name}"), value, before, there[name], otherwise)
    if identity and record:
        refuse_other_content(place, record, identity)


def refuse_other_content(place: Path, record: dict, identity: Identity) -> None:
    """Raise `InvalidArgument` if the content of LoRAs, model or images differs from that of the earlier run."""
    for name, option, was, without in (
        ("lora", "--init_lora", "was started from", "zero"),
        ("assistant", "--assistant_lora", "was trained with", "none"),
    ):
        there, here = record.get(name, ""), getattr(identity, name)
        if there != here:
            problem, fix = f"{place} {was} {'another LoRA' if there else without}", "give what it had"
            argument = getattr(identity, f"{name}_flag") if here else option
            raise InvalidArgument(argument, problem, f"{fix}, or choose another --output_dir")
    for name in ("model", "images"):
        here = getattr(identity, name)
        there = record.get(name, here)
        if here != there:
            what = f"on {there}, these are {here}" if name == "images" else "from a model with other content"
            problem, fix = f"{place} was trained {what}", "restore it, or choose another --output_dir"
            flag = getattr(identity, f"{name}_flag")
            if name == "images" and here.partition(OF_CLASS)[0] == str(there).partition(OF_CLASS)[0]:
                flag = identity.class_images_flag
            raise InvalidArgument(flag, problem, fix)


# -- saving and restoring ----------------------------------------------------------------------------------------------


def save_checkpoint(learner: Learner, study: Study) -> None:
    """Write `checkpoint-<step>`: the adapter, and the state with which a resumed run equals an uninterrupted one.

    Removes older checkpoints beyond --checkpoints_total_limit. Raises `RunFailed` for non-finite weights. Every process
    must call this, because DeepSpeed gathers the state from all processes; only the main process writes.
    """
    context, identity = study.context, study.identity
    options, folder = context.options, context.folder_of(learner.method)
    state = learner.state(context.accelerator)
    record = {"method": learner.method, "step": learner.step, "seconds": learner.seconds}
    record |= {"steps": study.schedule.steps} | past_of(options, identity)
    # needed by tools that load the checkpoint to generate images
    if identity.lora or options.adapter.rank_pattern or options.adapter.alpha_pattern:
        config = learner.denoiser.peft_config["default"]
        record |= {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}

    def write() -> None:
        """Write the checkpoint, and remove the checkpoints that are no longer needed."""
        write_checkpoint(learner, folder / f"checkpoint-{learner.step}", state, record)
        forget_beaten(folder)
        if options.output.checkpoints_total_limit:
            of_this_line = [old for old in checkpoints_of(folder) if step_of(old) <= learner.step]
            for old in beyond_limit(of_this_line, options.output, bool(options.validation.average_checkpoints)):
                discard(old)

    broadcast_from_main(write)


def beyond_limit(checkpoints: list[Path], output: SharedOutputOptions, averaged: bool) -> list[Path]:
    """Return the checkpoints that --checkpoints_total_limit removes, newest first.

    `averaged`: retain the checkpoints that will be averaged, although others were saved in between.
    """
    retained = to_average(checkpoints, output) if averaged else []
    return [old for old in checkpoints[output.checkpoints_total_limit :] if old not in retained]


def to_average(checkpoints: list[Path], output: SharedOutputOptions) -> list[Path]:
    """Return the checkpoints that are averaged, newest first.

    The averaged checkpoints are the newest one and those of --checkpointing_steps, at most --checkpoints_total_limit.
    Checkpoints that were saved because of a stop, a file or a time are not averaged. Therefore a resumed run averages
    the same checkpoints as an uninterrupted one.
    """
    regular = [path for path in checkpoints[1:] if step_of(path) % output.checkpointing_steps == 0]
    return [*checkpoints[:1], *regular][: output.checkpoints_total_limit]


def write_checkpoint(learner: Learner, path: Path, state: dict, record: dict) -> None:
    """Write adapter, state and record atomically; an existing path with this name is renamed."""
    if path.exists():
        set_aside(path)
    with replacing(path) as temporary:
        temporary.mkdir()
        with learner.averaged():
            for place, part in learner.trained.places(temporary):
                save_adapter(part, place)
            save_embeddings(learner.trained, temporary)
        buffer = io.BytesIO()  # torch.save to a file reports no cause if the disk is full
        torch.save(state, buffer)
        (temporary / STATE).write_bytes(buffer.getbuffer())
        write_json(temporary / RECORD, record)
        write_checksums(temporary)


def past_of(asked: TrainOptions | Grid, identity: Identity) -> dict:
    """Return the record with which `check_past` compares a resumed run."""
    loras = {name: mark for name in ("lora", "assistant") if (mark := getattr(identity, name))}
    content = {"model": identity.model, "images": identity.images}
    return content | {"settings": settings_of(asked)} | loras


def write_exports(
    folder: Path, options: TrainOptions, identity: Identity, schedule: Schedule, differences: dict[str, float]
) -> None:
    """Write `exports.json`, which marks a method as finished.

    The file contains the settings and, for each exported file, the largest relative difference of a layer from the
    merged model.
    """
    record: dict[str, Any] = {
        "step": schedule.steps,
        "num_train_epochs": options.training.num_train_epochs,
        "by_epochs": schedule.by_epochs,
        "read_back": differences,
        **{name: options[name] for name in named_by("merged", options)},
        "shown": {name: options[name] for name in named_by("shown", options)},
        **past_of(options, identity),
    }
    if schedule.is_over:
        record["early_stopping_patience"] = options.validation.early_stopping_patience
    if options.validation.save_best and (best := to_export(folder, schedule.steps)):
        record["best"] = best.to_dict()
    write_json(folder / EXPORTS, record)


def restore(learner: Learner, candidates: list[Path], steps: int, context: Context) -> None:
    """Load the first complete checkpoint into the learner; skip damaged ones with a warning.

    `steps`: length of the run. If the checkpoint is of a run of another length, whose learning rate fell towards its
    end, a line says that it follows the new length. The main process chooses the checkpoint. There are three outcomes:

    - `InvalidArgument` if no checkpoint is complete, or if the one that the user named is damaged. Files are unchanged.
    - `RunFailed` if a complete checkpoint cannot be loaded. Files are unchanged.
    - Otherwise the checkpoint is loaded, and files that belong to another training history are renamed. A checkpoint
      from elsewhere is copied to the method's directory; then log, best adapters and samples begin anew.
    """
    if not candidates:
        return
    accelerator, folder = context.accelerator, context.folder_of(learner.method)
    chosen = broadcast_from_main(lambda: newest_whole(candidates, folder, context.options.output))
    on_all(lambda: load_checkpoint(learner, chosen, accelerator))
    place = folder / f"checkpoint-{learner.step}"

    def set_aside() -> None:
        """Rename the folder's other checkpoints and merged weights."""
        set_others_aside(chosen, [*checkpoints_of(folder), *numbered(folder, MERGED)], place, TOLD)

    broadcast_from_main(set_aside)
    accelerator.print(f"{learner.name}: resuming from {chosen}")
    schedule = context.options.optimizer.lr_scheduler
    if accelerator.is_main_process and schedule not in OF_ANY_LENGTH:
        before = read_object(place / RECORD).get("steps", steps)
        if before != steps:
            follows = f"from here on, the learning rate follows --lr_scheduler {schedule} over {steps} steps"
            print(f"{learner.name}: {follows}; before, it was {before} steps", flush=True)


def newest_whole(candidates: list[Path], folder: Path, options: SharedOutputOptions) -> Path:
    """Return the first candidate whose files match their checksums.

    Raises `InvalidArgument` if there is no such checkpoint, or if the user named a checkpoint and the checkpoint is
    damaged.
    """
    for checkpoint in candidates:
        try:
            check_checksums(checkpoint)
            if missing := [name for name in (STATE, RECORD) if not (checkpoint / name).is_file()]:
                raise Damaged(f"{missing[0]} is missing")
        except Damaged as error:
            if options.resume_from_checkpoint != "latest":
                flag = f"--resume_from_checkpoint {options.resume_from_checkpoint or checkpoint}"
                raise InvalidArgument(flag, f"damaged ({first_line(error)})", "use latest") from None
            print(f"warning: {checkpoint} is damaged ({first_line(error)}), trying the previous one", flush=True)
            continue
        return checkpoint
    problem, fix = f"no checkpoint in {folder} is complete", "remove that folder to start afresh, or choose another"
    raise InvalidArgument("--resume_from_checkpoint latest", problem, fix)


def load_checkpoint(learner: Learner, checkpoint: Path, accelerator: Accelerator) -> None:
    """Load a checkpoint into the learner.

    Raises `RunFailed` if the files cannot be read or do not fit the learner.
    """
    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        record = read_object(checkpoint / RECORD)
        for place, part in learner.trained.places(checkpoint):
            load_adapter(part, place)
        load_embeddings(learner.trained, checkpoint)
        learner.load_state(state, record["step"], record["seconds"], accelerator)
    # Exhausted memory, or a state of another version: each file format and device has its own exceptions.
    except Exception as error:
        problem = f"{learner.name}: {checkpoint} is complete, but cannot be loaded ({first_line(error)})"
        raise RunFailed(f"{problem}; nothing on disk was changed: run the same command to try again") from None
