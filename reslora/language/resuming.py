"""What a run may go on from: its own checkpoints or another run's, with the settings and examples of then."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers.utils import logging

from ..common.errors import InvalidArgument
from ..common.flags import as_typed
from ..common.recovery import refuse_afresh
from ..common.together import is_main
from ..experiment.record import EXPERIMENT
from ..files import read_object
from .checkpoints import named_checkpoint

logger = logging.get_logger(__name__)

# What may differ between a run and its continuation: how long it trains, what it shows and keeps, where things are, and
# what makes it faster or smaller. Any other flag, and whatever transformers adds, is fixed.
FREE_ON_RESUME = {
    "merge", "calibration_examples", "merge_and_save", "cache_dir", "token",
    "max_eval_samples", "max_test_samples", "max_predict_samples", "max_new_tokens", "eval_accuracy",
    "output_dir", "resume_from_checkpoint", "local_rank", "max_steps", "num_train_epochs",
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
    "per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "bf16_full_eval", "fp16_full_eval",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "enable_jit_checkpoint",
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics",
    "debug", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
    "use_cpu", "use_cache", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_backend", "ddp_timeout",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_static_graph",
    # The content decides: see `check_data`.
    "data_dir", "dataset_name", "dataset_config_name",
}  # fmt: skip
FOLDERS = ("model_name_or_path", "config_name", "tokenizer_name", "deepspeed")
"""May have moved: then the last part of their paths is compared."""


def check_resume(output_dir: str | os.PathLike, resume: str | None, current: Mapping[str, object]) -> None:
    """Refuses to mix runs.

    Raises `InvalidArgument` if the folder holds checkpoints and `resume` (the flag's value) is None, if all of them are
    gone or were set aside, or if a setting of `current`, but for those in FREE_ON_RESUME, differs when resuming from
    the `config.json` of the folder, or from that of the run whose checkpoint `resume` names.
    """
    output = Path(output_dir)
    if (output / EXPERIMENT).exists():
        fix = "give its methods, rates and seeds, or choose another"
        raise InvalidArgument(f"--output_dir {output}", "holds an experiment", fix)
    finished, checkpoints = (output / "results.json").exists(), any(output.glob("checkpoint-*"))
    if not checkpoints and resume in (None, "latest"):
        refuse_afresh(output, output, finished)
    if resume is None:
        if checkpoints:
            raise InvalidArgument(
                f"--output_dir {output}",
                f"holds {'a finished' if finished else 'an unfinished'} run",
                "go on with --resume_from_checkpoint latest, or choose another",
            )
        return
    for run, earlier in _earlier(output, resume):
        if not earlier and run != output and is_main():
            logger.warning(f"no config.json in {run}: its checkpoint may be of other settings or examples than these")
        for name, value in current.items():
            if name not in FREE_ON_RESUME and name in earlier and not is_same(name, earlier[name], value):
                fix = "leave it out" if earlier[name] is None else "use that"
                raise InvalidArgument(
                    f"--{name} {as_typed(value)}",
                    f"{run} was trained with {as_typed(earlier[name])}",
                    f"{fix}, or start afresh in another --output_dir",
                )


def check_data(output_dir: str | os.PathLike, resume: str | None, data: str) -> None:
    """Raises `InvalidArgument` when resuming on other training examples than `check_resume`'s runs were trained on.

    `data` is their `fingerprint`; where they lie does not matter.
    """
    for run, earlier in _earlier(Path(output_dir), resume) if resume is not None else ():
        if earlier.get("data", data) != data:
            raise InvalidArgument(
                "--resume_from_checkpoint",
                f"{run} was trained on other examples than these",
                "bring them and the --eval_strategy of then back, or start afresh in another --output_dir",
            )


def _earlier(output: Path, resume: str) -> list[tuple[Path, dict]]:
    """The runs that go on, with their settings: the folder's own, and that of a checkpoint from elsewhere."""
    runs, checkpoint = [output], named_checkpoint(output, resume)
    if resume != "latest" and checkpoint.is_dir() and checkpoint.resolve().parent != output.resolve():
        runs.append(checkpoint.resolve().parent)
    return [(run, read_object(run / "config.json")) for run in runs]


def fingerprint(rows: Iterable[object]) -> str:
    """What a run knows its training examples by: a hash of all of them, in order."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def is_same(name: str, earlier: object, current: object) -> bool:
    """Whether a setting is that of an earlier run; folders may have moved."""
    if name in FOLDERS and Path(str(current)).exists():
        return Path(str(earlier)).name == Path(str(current)).name
    return earlier == current
