"""What an experiment with images cannot do, by its flags."""

from __future__ import annotations

from ...common.errors import InvalidArgument
from ...experiment.arms import alpha_of, check_values, values_of
from ..arguments import SEVERAL, Flags, is_experiment

OF_EXPERIMENTS = ("select_split", "test_split", "extend_rates", "experiment_minutes", "arms_at_once", "merged_weights")
STEERING = ("save_best", "early_stopping_patience", "validation_noises")
OF_RUNS = ("validation_split", "max_train_samples", "push_to_hub", *STEERING)  # which experiments cannot do


def plain_variants(flags: Flags) -> list[Flags]:
    """The flags as runs without an experiment have them, with all methods: one for each rate, rank, shortcut and
    number of blocks."""
    plain = [flags.replace(seed=values_of(flags, "seed")[0])]
    for name in ("shortcut", "pre_num", "rank", "learning_rate"):
        plain = [one.replace(**{name: value}) for one in plain for value in values_of(flags, name)]
    return [one.replace(lora_alpha=alpha_of(one, one.rank)) for one in plain]


def check_experiment(flags: Flags) -> None:
    """Refuse what an experiment cannot do, and its flags without several values."""
    if not is_experiment(vars(flags)):
        for name in OF_EXPERIMENTS:
            if getattr(flags, name):
                fix = f"give several values of --{', --'.join(SEVERAL)}, or leave it out"
                raise InvalidArgument(f"--{name}", "this is no experiment, nothing reads it", fix)
        return
    check_values(flags, {name: name for name in SEVERAL})
    if isinstance(flags.rank, list) and flags.init_lora:
        problem = "--init_lora has ranks of its own"
        raise InvalidArgument(f"--rank {' '.join(map(str, flags.rank))}", problem, "leave it out")
    if flags.select_split + flags.test_split >= 1:
        problem = f"with --test_split {flags.test_split:g} nothing is left to train on"
        raise InvalidArgument(f"--select_split {flags.select_split:g}", problem, "give smaller shares")
    for name, fix in (
        ("validation_split", "leave it out: experiments hold out --select_split and --test_split"),
        ("max_train_samples", "leave it out: each seed would draw other images"),
        ("push_to_hub", "leave it out, and upload the folder of the arm that you like"),
    ):
        if getattr(flags, name):
            raise InvalidArgument(f"--{name}", "this is an experiment", fix)
    if flags.resume_from_checkpoint not in (None, "latest"):
        argument = f"--resume_from_checkpoint {flags.resume_from_checkpoint}"
        raise InvalidArgument(argument, "an experiment goes on as a whole", "give latest")
