"""The options of train_llm.py and train_glue.py.

Options that transformers' `TrainingArguments` also have have the names, meanings and defaults of `TrainingArguments`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from ..bundled import ASSETS
from .groups import DEFAULTS
from .optimizers import OPTIMIZERS
from .option import (
    COUNT,
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    SAME,
    Need,
    again,
    by_content,
    free,
    group,
    option,
    steps,
    whole,
)  # fmt: skip
from .shared import (
    SCHEDULES,
    WITHOUT_WARMUP,
    SharedExperimentOptions,
    SharedMethodOptions,
    SharedOptimizerOptions,
    SharedOutputOptions,
    SharedTrainingOptions,
    SharedValidationOptions,
    TrainOptions,
)

LLM_MODEL, LLM_TASK = ASSETS / "tiny-llama", ASSETS / "tiny-llama" / "task"
GLUE_MODEL, GLUE_TASK = ASSETS / "tiny-roberta", ASSETS / "tiny-roberta" / "task"
ZERO2_OFFLOAD = ASSETS / "deepspeed" / "zero2_offload.json"
LLM_TASKS = ("gsm8k", "svamp", "mathqa", "metamathqa", "hellaswag")
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
BATCHES = "the examples of a step"
VALIDATED = Need(
    lambda options: options.validation.eval_strategy != "no", "add --eval_strategy epoch", "nothing is validated"
)
EVALUATED_BY_STEPS = Need(
    lambda options: options.validation.eval_strategy == "steps",
    "", "it has no effect with --eval_strategy {eval_strategy}", refuse=False,
)  # fmt: skip
SAVED_BY_STEPS = Need(
    lambda options: options.output.save_strategy == "steps",
    "", "it has no effect with --save_strategy {save_strategy}", refuse=False,
)  # fmt: skip
WARMED_UP = Need(
    lambda options: options.optimizer.lr_scheduler not in WITHOUT_WARMUP,
    "", "it has no effect with --lr_scheduler_type {lr_scheduler_type}", refuse=False,
)  # fmt: skip
NEAREST = {
    "deepspeed": "fsdp fsdp_config parallelism_config",
    "dataloader_num_workers": "dataloader_drop_last dataloader_in_order dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
    "remove_unused_columns",
    "eval_strategy": "do_train do_eval do_predict eval_on_start eval_delay prediction_loss_only include_for_metrics "
    "label_names",
    "gradient_accumulation_steps": "average_tokens_across_devices",
    "gradient_checkpointing": "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    "group_by_length": "train_sampling_strategy length_column_name",
    "logging_steps": "logging_strategy logging_first_step logging_nan_inf_filter disable_tqdm log_level "
    "log_level_replica log_on_each_node include_num_input_tokens_seen",
    "lr_scheduler_type": "lr_scheduler_kwargs",
    "bf16": "bf16_full_eval",
    "fp16": "fp16_full_eval",
    "lora_dropout": "label_smoothing_factor neftune_noise_alpha",
    "optimizer_args": "optim_args",
    "per_device_eval_batch_size": "eval_accumulation_steps eval_do_concat_batches batch_eval_metrics "
    "eval_use_gather_object auto_find_batch_size torch_empty_cache_steps",
    "report_to": "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "resume_from_checkpoint": "ignore_data_skip restore_callback_states_from_checkpoint",
    "save_best": "load_best_model_at_end metric_for_best_model greater_is_better",
    "save_strategy": "save_only_model save_on_each_node enable_jit_checkpoint",
    "seed": "data_seed full_determinism",
    "target_modules": "optim_target_modules",
    "torch_compile": "torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config",
    "use_cpu": "ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph local_rank accelerator_config use_cache debug skip_memory_metrics",
}
"""Options of `TrainingArguments` that the scripts refuse, by the option that comes nearest; the parser finds others
that are similar by their spelling."""
INSTEAD = {
    "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision": "upload the run's "
    "peft/ with `hf upload`",
    "token": "set HF_TOKEN, or run `hf auth login`",
    "config_name tokenizer_name": "put its files into the folder of --model_name_or_path",
    "pad_to_max_length": "leave it out; each batch is padded to its longest example",
}
"""What to do instead of giving other options of transformers' scripts."""
TRANSFORMERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit",
    "schedule_free_adamw": "schedulefree",
}  # fmt: skip
"""Optimizers by transformers' name."""


# fmt: off
@group
class MethodOptions(SharedMethodOptions):
    """Adapter method and merge."""

    method: list[str] = again(collapses=True)
    rank: int = again(name="lora_r", default=4, parse=COUNT)
    target_modules: list[str] = again(or_else="query and value")
    merge_calibration_samples: int = again(name="calibration_examples",
        help="number of training examples used for calibration: merges of ResLoRA and lora_matched read "
        "them; 0: none")
    init_lora: str | None = by_content(None,
        "start from this LoRA, a folder that PEFT has written, instead of from zero; its rank, alpha and target "
        "modules are used", metavar="FOLDER", path="absolute",
        in_experiments="leave it out: the compared methods start from zero")
    merge_and_save: bool = free(False, "write the model with the adapter added, for stock transformers")

    @property
    def name(self) -> str:
        """The only method of a single run."""
        return self.method[0]


@group
class ExperimentOptions(SharedExperimentOptions):
    """Data splits and schedule of an experiment, which is several runs with different values of some options."""

    select_split: float | None = again(
        help="fraction of the training examples that is held out to choose learning rates and checkpoints; for tasks "
        "that lack a validation file or a test file")
    test_split: float | None = again(
        help="fraction of the training examples that is held out to compare methods; for tasks with neither a "
        "validation file nor a test file")


@group
class LlmTaskOptions:
    """Model and training data."""

    model_name_or_path: str = by_content(str(LLM_MODEL), "causal model, folder or name on the hub", short="model",
        or_else="the bundled one", essential=True, metavar="MODEL")
    task: str = option("svamp", ", ".join(LLM_TASKS), essential="task of the paper: svamp, gsm8k, mathqa, ...")
    data_dir: str | None = by_content(None,
        "folder with train.jsonl, validation.jsonl, test.jsonl in the columns of the hub's data set",
        or_else="the hub's data set", short="data", metavar="FOLDER", bundled=str(LLM_TASK),
        essential="folder with train.jsonl, validation.jsonl, test.jsonl")
    revision: str | None = option(None, "revision of the model on the hub")
    cache_dir: str | None = free(None, "folder for downloads", metavar="FOLDER")
    dtype: str = option("auto",
        "data type of the frozen model's weights; the adapter is always float32. auto: bfloat16 with --bf16, float16 "
        "with --fp16, otherwise float32",
        choices=("auto", "float32", "bfloat16", "float16"))
    load_in_4bit: bool = option(False, "quantize the frozen model to NF4 (QLoRA)")
    max_train_samples: int | None = option(None, "train on this many examples, chosen at random (metamathqa: 40000)",
        COUNT)
    max_eval_samples: int | None = free(None,
        "use only this many validation examples, from the start of the file; in experiments: of the selection split",
        COUNT)
    max_test_samples: int | None = free(None,
        "use only this many test examples, from the start of the file; in experiments: of the test split", COUNT)
    max_length: int = option(512,
        "largest number of tokens of prompt and answer; longer training examples are left out", whole(2))
    max_new_tokens: int = free(256, "longest answer generated", COUNT, bundled=24)
    eval_accuracy: bool = free(False, "generate answers in validation too, not only in the final test")


@group
class GlueDataOptions:
    """Task and location of its data."""

    task_name: str | None = option(None, "task of GLUE", choices=GLUE_TASKS, essential=True)
    data_dir: str | None = by_content(None,
        "folder with train.jsonl, validation.jsonl and optionally test.jsonl (mnli: validation_matched.jsonl, "
        "validation_mismatched.jsonl, and test files named likewise)", or_else="the hub's GLUE", short="data",
        metavar="FOLDER", essential="folder with train.jsonl, validation.jsonl and optionally test.jsonl")
    dataset_name: str = by_content("nyu-mll/glue", "data set on the hub, or a folder")
    dataset_config_name: str | None = by_content(None, "configuration of this data set", or_else="the task's name")
    max_seq_length: int = option(128, "largest number of tokens of an input; longer inputs are truncated", whole(4))
    max_train_samples: int | None = option(None,
        "use only this many training examples, from the start of the file", COUNT)
    max_eval_samples: int | None = free(None,
        "use only this many validation examples, from the start of the file; in experiments: of the selection split",
        COUNT)
    do_predict: bool = free(False, "predict the hub's test splits too, not only those of --data_dir",
        in_experiments="leave it out, and predict with the run that you choose")
    max_predict_samples: int | None = free(None,
        "predict only this many examples, from the start of the file; in experiments: of the test split", COUNT)


@group
class GlueModelOptions:
    """Model to fine-tune."""

    model_name_or_path: str = by_content(str(GLUE_MODEL), "encoder model: folder or name on the hub", short="model",
        or_else="the bundled one", essential="encoder model, folder or name on the hub", metavar="MODEL")
    cache_dir: str | None = free(None, "folder for downloaded models and data", metavar="FOLDER")
    model_revision: str = option("main", "revision of the model on the hub")
    ignore_mismatched_sizes: bool = option(False,
        "replace the model's classification head if it has another number of labels than the task")


@group
class TrainingOptions(SharedTrainingOptions):
    """Length of training, batch size and precision."""

    seed: int = again(default=42, parse=whole(0, 2**32 - 1))
    train_batch_size: int = again(name="per_device_train_batch_size", default=8, parse=COUNT,
        help="examples per process and forward pass", unshared=BATCHES)
    gradient_accumulation_steps: int = again(unshared=BATCHES)
    num_train_epochs: float = again(default=3.0, parse=POSITIVE, help="passes over the training examples",
        essential="passes over the training examples")
    max_train_steps: int | None = again(name="max_steps", parse=steps, or_else="--num_train_epochs decides",
        help="training steps; takes precedence over --num_train_epochs")
    compile: bool = again(name="torch_compile", help="compile the model by torch.compile")
    eval_batch_size: int = free(8,
        "examples per process and forward pass of evaluations", COUNT, name="per_device_eval_batch_size")
    group_by_length: bool = option(False, "batches of examples of similar length")
    dataloader_num_workers: int = free(0, "processes that prepare batches", NATURAL)
    bf16: bool = option(False, "train in bfloat16", essential=True)
    fp16: bool = option(False, "train in float16, on a GPU")
    tf32: bool | None = option(None, "allow TF32 matrix products on Ampere and later GPUs")
    use_cpu: bool = free(False, "train on the CPU", essential=True)
    deepspeed: str | None = by_content(None, "DeepSpeed's configuration, a file or JSON", metavar="JSON",
        in_experiments="leave it out: each run would need an engine of its own")

    @property
    def mixed_precision(self) -> str:
        """Precision by accelerate's name."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"


@group
class OptimizerOptions(SharedOptimizerOptions):
    """Optimizer and learning rate."""

    learning_rate: float = again(default=5e-5, bundled=SAME, bundled_flow=SAME)
    lr_scheduler: str = again(name="lr_scheduler_type", default="linear", choices=(*SCHEDULES, "inverse_sqrt"))
    lr_warmup_steps: int | None = again(name="warmup_steps", default=0, parse=NOT_NEGATIVE, or_else="", needs=WARMED_UP,
        help="warmup steps; a value below 1 is a fraction of all training steps")
    warmup_ratio: float | None = option(None, "--warmup_steps as a fraction of all training steps", FRACTION,
        needs=WARMED_UP)
    optimizer: str = again(name="optim", short="optimizer", help=f"one of {', '.join(OPTIMIZERS)}, or the path of a "
        f"class as package.Class; or transformers' name: {', '.join(TRANSFORMERS)}")
    adam_weight_decay: float = again(name="weight_decay", default=0.0)


@group
class ValidationOptions(SharedValidationOptions):
    """Evaluations during training."""

    save_best: bool = again(needs=VALIDATED,
        help="save the adapter with the lowest validation loss in best/, and export that one in the end")
    early_stopping_patience: int | None = again(needs=VALIDATED,
        help="stop training after N evaluations in a row without a new lowest loss")
    eval_strategy: str = free("no", "when to evaluate, in addition to the last step", choices=("no", "steps", "epoch"),
        essential="when to evaluate: no, steps or epoch")
    eval_steps: float | None = free(None,
        "steps between evaluations; a value below 1 is a fraction of all steps", POSITIVE,
        or_else="--logging_steps", needs=EVALUATED_BY_STEPS)


@group
class OutputOptions(SharedOutputOptions):
    """Outputs and their location."""

    output_dir: str = again(default="runs/adapter")
    checkpointing_steps: int = again(name="save_steps", parse=POSITIVE, bundled=SAME,
        help="steps between checkpoints; a value below 1 is a fraction of all steps", needs=SAVED_BY_STEPS)
    checkpoints_total_limit: int | None = again(name="save_total_limit", help="checkpoints to retain")
    plan: bool | None = again(
        help="print the number of steps and an estimate of the memory, and exit",
        essential="print the number of steps and the memory, and end")
    save_strategy: str = free("steps", "when to write a checkpoint, in addition to the last step",
        choices=("no", "steps", "epoch"))
    logging_steps: float = free(1,
        "steps between rows of log.jsonl; a value below 1 is a fraction of all steps", POSITIVE)
    logging_dir: str = free("logs", "TensorBoard's folder inside --output_dir", metavar="FOLDER", path="relative")
    report_to: list[str] = free(["tensorboard"], "trackers that accelerate knows, all, or none")
    run_name: str | None = free(None, "name of the run for trackers")


@group
class LlmTrainingOptions(TrainingOptions):
    """`TrainingOptions` with defaults for the bundled model."""

    train_batch_size: int = again(bundled=16)
    eval_batch_size: int = again(bundled=64)
    num_train_epochs: float = again(bundled=5)
    deepspeed: str | None = again(alone=str(ZERO2_OFFLOAD),
        help="DeepSpeed's configuration, a file or JSON; without a value ZeRO-2 that keeps its state in the CPU's "
        "memory")


@group
class LlmOptimizerOptions(OptimizerOptions):
    """`OptimizerOptions` with a usual learning rate for causal models."""

    learning_rate: float = again(default=1e-4, bundled=5e-3)


@group
class LlmValidationOptions(ValidationOptions):
    """`ValidationOptions` with defaults for the bundled model."""

    eval_strategy: str = again(bundled="epoch")


@group
class LlmOutputOptions(OutputOptions):
    """`OutputOptions` with defaults for the bundled model."""

    output_dir: str = again(default="runs/llm")
    save_strategy: str = again(bundled="epoch")


@group
class GlueTrainingOptions(TrainingOptions):
    """`TrainingOptions` with the epochs of LoRA on RoBERTa-large (Hu et al., 2022)."""

    num_train_epochs: float = again(default=10.0, bundled=12)
    train_batch_size: int = again(bundled=16)


@group
class GlueOptimizerOptions(OptimizerOptions):
    """`OptimizerOptions` with the learning rate of LoRA on RoBERTa-large (Hu et al., 2022)."""

    learning_rate: float = again(default=4e-4, bundled=3e-3)


@group
class GlueValidationOptions(ValidationOptions):
    """`ValidationOptions` with an evaluation after each epoch."""

    eval_strategy: str = again(default="epoch")


@group
class GlueOutputOptions(OutputOptions):
    """`OutputOptions` with a checkpoint after each epoch."""

    output_dir: str = again(default="runs/glue")
    save_strategy: str = again(default="epoch")
    checkpoints_total_limit: int | None = again(default=2, or_else="")


@group
class GlueMethodOptions(MethodOptions):
    """Adapter method and merge."""

    # Texts are short: 64 texts of SST-2 have only two tokens for each of a layer's 384 inputs, too few for a good
    # merge.
    merge_calibration_samples: int = again(default=256)
# fmt: on


@dataclass(frozen=True)
class TextOptions(TrainOptions):
    """Values of one run of a language script."""

    adapter: MethodOptions = DEFAULTS
    training: TrainingOptions = DEFAULTS
    optimizer: OptimizerOptions = DEFAULTS
    validation: ValidationOptions = DEFAULTS
    experiment: ExperimentOptions = DEFAULTS
    output: OutputOptions = DEFAULTS

    switches_take_values: ClassVar[bool] = True
    shared_titles: ClassVar[Mapping[str, str]] = {
        "adapter": "method", "training": "training", "optimizer": "optimizer", "validation": "evaluation",
        "experiment": "experiments", "output": "output, checkpoints and reports",
    }  # fmt: skip

    def folder_of(self, method: str, place: str = "") -> Path:
        """Return the directory of the run, which has one method; that of an arm of an experiment too."""
        return Path(self.output.output_dir)


@dataclass(frozen=True)
class LlmOptions(TextOptions):
    """Values of one run of train_llm.py."""

    task: LlmTaskOptions = DEFAULTS
    training: LlmTrainingOptions = DEFAULTS
    optimizer: LlmOptimizerOptions = DEFAULTS
    validation: LlmValidationOptions = DEFAULTS
    output: LlmOutputOptions = DEFAULTS

    titles: ClassVar[Mapping[str, str]] = {"task": "model and task", **TextOptions.shared_titles}


@dataclass(frozen=True)
class GlueOptions(TextOptions):
    """Values of one run of train_glue.py."""

    data: GlueDataOptions = DEFAULTS
    model: GlueModelOptions = DEFAULTS
    adapter: GlueMethodOptions = DEFAULTS
    training: GlueTrainingOptions = DEFAULTS
    optimizer: GlueOptimizerOptions = DEFAULTS
    validation: GlueValidationOptions = DEFAULTS
    output: GlueOutputOptions = DEFAULTS

    titles: ClassVar[Mapping[str, str]] = {"data": "task", "model": "model", **TextOptions.shared_titles}


T = TypeVar("T", bound=TextOptions)
