"""Options shared by the scripts for images and texts: of the adapter, and of experiments."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import AUTO, HEADS, MERGES, SHORTCUTS, ResLoraConfig
from ..methods.patterns import HELP as PATTERNS
from ..methods.registry import (
    DEFAULT_PRE_NUM,
    IN_WORDS,
    INITIALIZATIONS,
    METHODS,
    initialization,
    known_method,
    own_name,
)
from .averages import averages
from .groups import DEFAULTS, Groups
from .optimizers import ADAMS, OPTIMIZERS
from .option import (
    COUNT,
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    Need,
    free,
    group,
    option,
    shown,
    whole,
)

HIGHEST_RANK = 65536
LARGEST_BATCH = 65536
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant",
)  # fmt: skip
WITHOUT_WARMUP = ("constant", "piecewise_constant")
BATCHES = "the images of a step and their noise"
CHOSEN_OVER_SEEDS = "leave it out: experiments choose checkpoints over seeds"
HELD_OUT = Need(
    lambda options: options.validation.validation_split or options.experiment.select_split,
    "add --validation_split 0.1", "no images are held out",
)  # fmt: skip
RAY = Need(lambda options: options.experiment.executor == "ray", "add --executor ray")
ADAM = Need(
    lambda options: options.optimizer.optimizer in ADAMS,
    "use --optimizer_args", "it has no effect with --optimizer {optimizer}", refuse=False,
)  # fmt: skip


# fmt: off
@group
class SharedMethodOptions:
    """Adapter method and merge."""

    method: list[str] = option(["reslora"], f"which adapter is trained. {IN_WORDS}", known_method, choices=METHODS,
        essential="lora, reslora, lora_x2, dora, ...; several are compared")
    rank: int = option(None, "rank of the update matrices", whole(1, HIGHEST_RANK), varies=True, essential=True,
        read_by="ranked")
    lora_alpha: float = option(None, "scale times rank", POSITIVE, or_else="twice the rank", read_by="alpha",
        yields_to="rank", variable=True, kohya=("network_alpha",))
    rank_pattern: list[str] | None = option(None, PATTERNS["rank_pattern"], metavar="NAME=VALUE")
    alpha_pattern: list[str] | None = option(None, PATTERNS["alpha_pattern"], metavar="NAME=VALUE")
    lora_dropout: float = option(0.0, "dropout on the adapter's input; for loha and lokr, dropout of ranks", FRACTION,
        variable=True)
    init_lora_weights: str = option("true",
        f"lora, lora_x2 and rslora: PEFT's initialization of A and B: {INITIALIZATIONS}, with a number of iterations. "
        "With true, PEFT's default, and gaussian, A is random and B is zero", initialization,
        metavar="NAME", variable=True, read_by="reads_initialization")
    target_modules: list[str] = option(None, "layers that get an adapter, by the end of their name", metavar="NAME",
        variable=True)
    shortcut: str = option("input",
        "ResLoRA and lora_matched: what a block adds from preceding blocks", choices=SHORTCUTS, varies=True,
        essential="ResLoRA: input, block, middle or none", implies="reslora", read_by="reads_shortcut")
    pre_num: int = option(DEFAULT_PRE_NUM,
        "ResLoRA and lora_matched: how many preceding blocks a block uses, -1 for all; with "
        "--shortcut input any number except 0 means one", whole(-1), varies=True,
        essential="ResLoRA: how many preceding blocks a block uses, -1 for all", implies="reslora",
        read_by="reads_shortcut")
    head: str = option("repeat",
        "--shortcut input: what the first block of a chain adds to its input; repeat: the same input "
        "again; none: nothing", choices=HEADS, variable=True, implies="reslora", read_by="reads_shortcut")
    merge: str = option(AUTO, "ResLoRA: how the shortcuts are merged into plain LoRA weights", choices=(AUTO, *MERGES),
        essential="ResLoRA: how shortcuts are merged into plain LoRA weights", resume="merged", implies="reslora",
        read_by="shortcuts")
    merge_calibration_samples: int = option(64,
        "number of training samples on which ResLoRA's merge and lora_matched are calibrated",
        NATURAL, resume="merged", implies="reslora")

    def initialization_of(self, method: str) -> str:
        """Return the initialization of a method's adapter; methods that do not read the option have its default."""
        return self.init_lora_weights if METHODS[method].reads_initialization else type(self).init_lora_weights

    @property
    def reslora_config(self) -> ResLoraConfig:
        """Configuration of ResLoRA's shortcuts."""
        return ResLoraConfig(self.shortcut, self.pre_num, self.head)


@group
class SharedExperimentOptions:
    """Data splits and schedule of an experiment, which is several runs with different values of some options."""

    select_split: float | None = option(None,
        "fraction of the training data that is held out to choose learning rates and checkpoints", PART, or_else="0.1")
    test_split: float | None = option(None, "fraction of the training data by which methods are compared", PART,
        or_else="0.1")
    reference: str | None = free(None,
        "method with which the others are compared; if options vary, also one variant of a method, by its name in the "
        "report, such as 'lora rank 4'", own_name, or_else="lora, or the first variant of a single other method",
        metavar="NAME")
    against: str | None = free(None,
        "reference: compare every method with the reference only, which shows smaller differences. all: compare all "
        "pairs, to find the best methods. Averages are compared with their own method only",
        choices=("reference", "all"), or_else="reference if --reference is given, else all")
    extend_rates: bool = free(False,
        "if the best learning rate is the lowest or highest, try the next one, up to three times")
    racing: bool | None = free(None,
        "end a run early if its learning rate is clearly worse than the best one, and try further learning rates only "
        "in the direction in which the loss falls; without it, every learning rate is trained to its end",
        or_else="on; off with more --arms_at_once than methods")
    experiment_minutes: float | None = free(None,
        "time limit: start no further run after this many minutes; the same command resumes for as long again",
        POSITIVE)
    arms_at_once: int | None = free(None,
        "number of runs to train at once, each in its own process; several GPUs are divided evenly", COUNT,
        or_else="1")
    executor: str = free("local",
        "where runs are trained. local: on this machine. ray: on the machines of a Ray cluster, which share the "
        "storage of --output_dir", choices=("local", "ray"))
    ray_address: str = free("auto", "address of the Ray cluster; auto: the cluster of this machine", needs=RAY)
    gpus_per_run: float | None = free(None, "GPUs of a run, at most 1; 0.5: two runs share a GPU", NOT_NEGATIVE,
        or_else="1 if the Ray cluster has GPUs, else 0", needs=RAY)

    @property
    def in_this_process(self) -> bool:
        """Whether this process trains the runs, one after the other."""
        return (self.arms_at_once or 1) == 1 and self.executor == "local"


@group
class SharedTrainingOptions:
    """Length of training and batch size."""

    seed: int = option(0, "random seed; the same seed gives identical files", NATURAL, varies=True, essential=True,
        compared_as="seed")
    train_batch_size: int = free(16, "images per process and forward pass", whole(1, LARGEST_BATCH), essential=True,
        variable=True, unshared=BATCHES)
    gradient_accumulation_steps: int = free(1, "forward passes per step", COUNT, variable=True, unshared=BATCHES)
    num_train_epochs: float = free(100,
        "passes over the images; each takes images / (batch x processes) forward passes, rounded up for every bucket. "
        "A step takes --gradient_accumulation_steps of these; with a bundled pipeline the default is 200 steps", COUNT,
        counts_if_given=True, yields_to="max_train_steps", kohya=("max_train_epochs",))
    max_train_steps: int | None = free(None, "training steps; takes precedence over --num_train_epochs", COUNT,
        or_else="200 for bundled models, else --num_train_epochs decides", short="steps", essential="training steps",
        yields_to="num_train_epochs")
    gradient_checkpointing: bool = free(False, "less memory, slower", essential=True)
    compile: bool = free(False,
        "compile the denoiser with torch.compile: takes minutes at the start and makes steps faster")


@group
class SharedOptimizerOptions:
    """Optimizer and learning rate."""

    learning_rate: float = option(1e-4,
        "learning rate after warmup; with --optimizer prodigy the default is 1", POSITIVE,
        varies=True, short="lr", essential="highest learning rate", bundled=5e-4, bundled_flow=1e-3,
        kohya=("unet_lr",))
    lr_pattern: list[str] | None = option(None, PATTERNS["lr_pattern"], metavar="NAME=VALUE")
    loraplus_lr_ratio: float = option(1.0, "LoRA+: factor of the learning rate of B; 16 is usual", POSITIVE,
        variable=True, read_by="trains_b")
    scale_lr: bool = option(False, "multiply learning rates by batch size, accumulation steps and processes")
    lr_scheduler: str = option("constant", "how the learning rate changes", choices=SCHEDULES, variable=True)
    lr_warmup_steps: int | None = option(None,
        "warmup steps, in which the learning rate rises; none with --lr_scheduler constant", NATURAL,
        or_else="500, at most a tenth of the run",
        needs=Need(lambda options: options.optimizer.lr_scheduler not in WITHOUT_WARMUP
        or not options.optimizer.lr_warmup_steps,
        "", "it has no effect with --lr_scheduler {lr_scheduler}", refuse=False))
    lr_step_rules: str | None = option(None,
        "for piecewise_constant: factors with the steps at which they end, then the last factor, such as "
        "1:100,0.1:200,0.01",
        metavar="RULES", needs=Need(lambda options: options.optimizer.lr_scheduler == "piecewise_constant",
        "add --lr_scheduler piecewise_constant",
        "--lr_scheduler {lr_scheduler} does not use it"))
    optimizer: str = option("adamw",
        f"one of {', '.join(OPTIMIZERS)}, or the path of a class as package.Class. Except for the two AdamW, the "
        "settings are those of the authors; --optimizer_args changes them", metavar="NAME", counts_if_given=True,
        variable=True,
        essential="adamw, adamw8bit, prodigy, adafactor, lion, schedulefree, or package.Class", kohya=("optimizer_type",
        ))
    optimizer_args: list[str] = option([], "arguments of the optimizer's class, such as beta3=0.98",
        metavar="KEY=VALUE")
    adam_beta1: float = option(0.9, "decay of the mean of the gradient", FRACTION, variable=True, needs=ADAM)
    adam_beta2: float = option(0.999, "decay of the mean of the squared gradient", FRACTION, variable=True, needs=ADAM)
    adam_weight_decay: float = option(1e-2, "weight decay", NOT_NEGATIVE, variable=True, needs=ADAM)
    adam_epsilon: float = option(1e-8, "added to the denominator", POSITIVE, variable=True, needs=ADAM)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0 turns clipping off", NOT_NEGATIVE, variable=True)

    @property
    def has_factors(self) -> bool:
        """Whether parameters of one model have different learning rates."""
        return bool(self.lr_pattern) or self.loraplus_lr_ratio != 1


@group
class SharedValidationOptions:
    """What the validation loss decides."""

    save_best: bool = option(False,
        "save the adapter with the lowest validation loss in <method>/best, and export that one in the end",
        needs=HELD_OUT, in_experiments=CHOSEN_OVER_SEEDS, compared_as="how losses are measured")
    average_checkpoints: str | None = shown(None,
        "after training, also average the retained checkpoints, and export an average if its validation loss is the "
        "lowest: ema:0.99 averages all with exponentially decaying weights, last:5 the last 5; several with a comma. "
        "In an experiment, each average is compared like a method, without further training",
        averages, metavar="ema:DECAY,last:N", needs=Need(lambda options: options.validation.save_best,
        "add --save_best, which exports the adapter with the lowest loss"))
    early_stopping_patience: int | None = free(None,
        "stop training a method after N validations in a row without a new lowest loss", COUNT, metavar="N",
        needs=HELD_OUT, in_experiments=CHOSEN_OVER_SEEDS, compared_as="how losses are measured")


@group
class SharedOutputOptions:
    """Location of the outputs, and checkpoints."""

    output_dir: str = free("runs/sd-model-finetuned-lora", "folder of the run", metavar="FOLDER", short="output",
        essential=True, path="relative")
    checkpointing_steps: int = free(500, "steps between checkpoints", COUNT, bundled=100, kohya=("save_every_n_steps",))
    checkpointing_minutes: float | None = free(None,
        "also save a checkpoint this many minutes after the previous one", POSITIVE)
    checkpoints_total_limit: int | None = free(None, "checkpoints to retain per method", COUNT, or_else="all")
    resume_from_checkpoint: str | None = free(None,
        "latest: resume from the newest complete checkpoint; FOLDER: resume from the checkpoint in this folder; a "
        "finished run cannot be resumed",
        metavar="latest|FOLDER", essential="latest resumes the run in --output", path="relative", secret=True,
        kohya=("resume",))
    plan: bool | None = free(None,
        "print how much memory each phase of the run needs, and exit; if the run does not fit, suggest options with "
        "which it fits, and exit with status 2. Without --plan, a run that may not fit is refused with the same "
        "output; --no-plan starts it anyway", essential="print how much memory the run would take, and end")
# fmt: on


@dataclass(frozen=True)
class RunOptions(Groups):
    """Options of one run that all scripts have, and that an experiment needs."""

    adapter: SharedMethodOptions = DEFAULTS
    experiment: SharedExperimentOptions = DEFAULTS


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Options of one run that the training loop reads."""

    training: SharedTrainingOptions = DEFAULTS
    optimizer: SharedOptimizerOptions = DEFAULTS
    validation: SharedValidationOptions = DEFAULTS
    output: SharedOutputOptions = DEFAULTS

    def folder_of(self, method: str, place: str = "") -> Path:
        """Return the directory of a method; `place`: the directory of an arm inside that of the experiment."""
        return Path(self.output.output_dir) / method / place

    def no_samples(self, prompts: str = "") -> str:
        """Return why training generates no samples of `prompts` or, without `prompts`, of the run's own prompts; empty
        if it generates samples.
        """
        return "no language script does"

    def refuse_record(self, place: Path, settings: Mapping[str, Any]) -> None:
        """Raise `InvalidArgument` if training cannot continue with these options from a place with such settings."""

    @classmethod
    def more_settings(cls, values: Mapping[str, Any], samples: list[int]) -> dict[str, Any]:
        """Return settings that follow from the values of options, and that a resumed run must share.

        `samples`: number of samples in a forward pass of all processes.
        """
        return {}
