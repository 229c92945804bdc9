"""`config.json` and the trackers that accelerate knows."""

from __future__ import annotations

from pathlib import Path

from ...common.errors import refused_as
from ...common.together import decided, each
from ...files import write_json
from ..context import Context
from ..prompts import clean
from ..training.schedule import Schedule

TENSORBOARD_SECONDS = 10  # until it shows what is new
NOT_KEPT = ("config", "hub_token", "resume_from_checkpoint")  # where this run went on from is no setting of another
PLACES = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "train_data_dir",
    "class_data_dir",
    "init_lora",
    "dataset_name",
    "cache_dir",
)


def start_trackers(context: Context) -> None:
    """The trackers; refuses those that cannot start."""
    often = {"tensorboard": {"flush_secs": TENSORBOARD_SECONDS}}

    def start() -> None:
        with refused_as(f"--report_to {context.flags.report_to}", "log in there, or give --report_to none"):
            context.accelerator.init_trackers("train_sd", init_kwargs=often)

    each(start)


def note_settings(schedule: Schedule, context: Context, write: bool = True) -> None:
    """Every setting of the run, to `config.json`, which may be written already, and to the trackers."""
    steps = {"max_train_steps": schedule.steps, "validation_steps": schedule.validation_steps}
    flags, accelerator = context.flags.replace(**steps), context.accelerator
    public = {name: value for name, value in vars(flags).items() if name not in NOT_KEPT}
    for name in PLACES:
        if isinstance(public[name], list):
            public[name] = list(map(whole_path, public[name]))
        elif public[name]:
            public[name] = whole_path(public[name])
    if write:
        decided(lambda: write_json(Path(flags.output_dir) / "config.json", public))
    plain = {k: v if isinstance(v, (int, float, bool)) else clean(str(v)) for k, v in public.items()}
    for tracker in accelerator.trackers:
        tracker.store_init_configuration(plain)


def whole_path(place: str) -> str:
    """Where a folder is, for whoever reads of it in another one; names that are no path stay."""
    return str(Path(place).resolve()) if Path(place).exists() else place
