"""Options shared by the scripts for images and texts: of the adapter, and of experiments."""

from dataclasses import dataclass, field

from ..config import HEADS, SCALES, SHORTCUTS, ResLoraConfig
from ..merges import AUTO
from ..merges import NAMES as MERGES
from ..methods.patterns import HELP as PATTERNS
from ..methods.registry import DEFAULT_PRE_NUM, IN_WORDS, METHODS
from .groups import Groups
from .option import COUNT, FRACTION, NATURAL, NOT_NEGATIVE, PART, POSITIVE, free, group, option, whole

HIGHEST_RANK = 65536


# fmt: off
@group
class SharedMethodOptions:
    """Adapter method and merge."""

    method: list[str] = option(["reslora"], f"which adapter is trained. {IN_WORDS}", choices=METHODS,
        essential="lora, reslora, lora_x2, dora, ...; several are compared")
    rank: int = option(None, "rank of the update matrices", whole(1, HIGHEST_RANK), varies=True, essential=True)
    lora_alpha: float = option(None, "scale times rank", POSITIVE, or_else="twice the rank", read_by="alpha",
        yields_to="rank", variable=True, kohya=("network_alpha",))
    rank_pattern: list[str] | None = option(None, PATTERNS["rank_pattern"], metavar="NAME=VALUE")
    alpha_pattern: list[str] | None = option(None, PATTERNS["alpha_pattern"], metavar="NAME=VALUE")
    lora_dropout: float = option(0.0, "dropout on the adapter's input; for loha and lokr, dropout of ranks", FRACTION,
        variable=True)
    target_modules: list[str] = option(None, "layers that get an adapter, by the end of their name", metavar="NAME",
        variable=True)
    shortcut: str = option("input",
        "ResLoRA and lora_matched: what a block adds from the blocks before it. gated, which also trains a gate for "
        "each rank, is not for lora_matched",
        choices=SHORTCUTS, varies=True, essential="ResLoRA: input, block, middle, gated or none", implies="reslora",
        read_by="reads_shortcut")
    pre_num: int = option(DEFAULT_PRE_NUM,
        "ResLoRA, lora_matched and ms_placebo: how many preceding blocks a block uses, -1 for all; with "
        "--shortcut input any number except 0 means one, with gated the complete chain", whole(-1), varies=True,
        essential="ResLoRA: how many preceding blocks a block uses, -1 for all", implies="reslora",
        read_by="reads_shortcut_flags")
    head: str = option("repeat",
        "--shortcut input and is_placebo. repeat: the first block of a chain adds to its input the same input again; "
        "none: it adds nothing", choices=HEADS, variable=True, implies="reslora", read_by="reads_shortcut_flags")
    shortcut_scale: str = option("sum",
        "ResLoRA, lora_matched and placebos. sum: add a block's own term and those of the m preceding blocks that "
        "--pre_num gives; mean: divide this sum by m + 1",
        choices=SCALES, variable=True, implies="reslora", read_by="reads_shortcut_flags")
    shortcut_decay: float | None = option(None,
        "ResLoRA, lora_matched and placebos: multiply the neighbors' terms by a factor that falls linearly from 1 to 0 "
        "over this fraction of the steps and stays 0, so that plain LoRA remains", PART, or_else="the factor stays 1",
        variable=True, implies="reslora", read_by="reads_shortcut_flags")
    merge: str = option(AUTO, "ResLoRA: how the shortcuts are merged into plain LoRA weights", choices=MERGES,
        essential="ResLoRA: how shortcuts are merged into plain LoRA weights", resume="merged", implies="reslora",
        read_by="shortcuts")
    merge_calibration_samples: int = option(64, "number of training samples that ResLoRA's merge and the controls read",
        NATURAL, resume="merged", implies="reslora")

    @property
    def reslora_config(self) -> ResLoraConfig:
        """Configuration of ResLoRA's shortcuts."""
        return ResLoraConfig(self.shortcut, self.pre_num, self.head, shortcut_scale=self.shortcut_scale)


@group
class SharedExperimentOptions:
    """Data splits and schedule of an experiment: runs with several values of some options."""

    select_split: float | None = option(None,
        "fraction of the training data that is held out to choose learning rates and checkpoints", PART, or_else="0.1")
    test_split: float | None = option(None, "fraction of the training data by which methods are compared", PART,
        or_else="0.1")
    reference: str | None = free(None,
        "baseline with which the others are compared: a method, or a label of the report (a method with the values "
        "that vary)", or_else="lora; without it, of a single method the first label", metavar="LABEL")
    claim: str | None = free(None,
        "label of the report that is claimed to have a lower test loss than --reference; state it before the "
        "experiment, in a file for --config, whose hash the report shows", metavar="LABEL")
    claim_margin: float | None = free(None,
        "smallest improvement that matters for --claim, in percent of the reference's test loss", NOT_NEGATIVE,
        or_else="0")
    compare_at: str | None = free(None,
        "steps: compare every method at its best evaluated step, within the same number of steps. time: compare every "
        "method at the last step that it evaluated within the training time of the reference", or_else="steps",
        choices=("steps", "time"))
    extend_rates: bool = free(False,
        "if the best learning rate is the lowest or highest, try the next one, up to three times")
    racing: bool | None = free(None,
        "end a run early if its learning rate is clearly worse than the best one, and try further learning rates only "
        "in the direction in which the loss falls; without it, every learning rate is trained to its end",
        or_else="on; off with more --arms_at_once than methods")
    experiment_minutes: float | None = free(None,
        "time limit: start another run only if it, and all tests and exports, are expected to end within this many "
        "minutes; the same command resumes later", POSITIVE)
    arms_at_once: int | None = free(None,
        "number of arms to train at once, each in its own process; several GPUs are shared out evenly", COUNT,
        or_else="1")
# fmt: on


@dataclass(frozen=True)
class RunOptions(Groups):
    """Options of one run that all scripts have, and that an experiment needs."""

    adapter: SharedMethodOptions = field(default_factory=SharedMethodOptions)
    experiment: SharedExperimentOptions = field(default_factory=SharedExperimentOptions)
