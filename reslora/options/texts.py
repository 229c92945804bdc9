"""The options of train_llm.py and train_glue.py.

Options that are fields of transformers' `TrainingArguments` have the names, meanings and defaults of the fields. The
fields that are not defined as options here are recognized by name and passed on to transformers, which is imported for
parsing only if one of them is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ..bundled import ASSETS
from .option import (
    COUNT,
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    again,
    by_content,
    free,
    group,
    option,
    steps,
    whole,
)
from .shared import RunOptions, SharedExperimentOptions, SharedMethodOptions

LLM_MODEL, LLM_TASK = ASSETS / "tiny-llama", ASSETS / "tiny-llama" / "task"
GLUE_MODEL, GLUE_TASK = ASSETS / "tiny-roberta", ASSETS / "tiny-roberta" / "task"
ZERO2_OFFLOAD = ASSETS / "deepspeed" / "zero2_offload.json"
LLM_TASKS = ("gsm8k", "svamp", "mathqa", "metamathqa", "hellaswag")
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
BATCHES = "the examples of a step"
PASSED_ON = {
    "fixed": (
        "lr_scheduler_kwargs", "optim_args", "optim_target_modules", "average_tokens_across_devices",
        "label_smoothing_factor", "use_liger_kernel", "liger_kernel_config", "neftune_noise_alpha",
        "auto_find_batch_size", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism",
        "data_seed", "accelerator_config", "parallelism_config", "dataloader_drop_last", "dataloader_in_order",
        "remove_unused_columns", "label_names", "train_sampling_strategy", "length_column_name", "fsdp", "fsdp_config",
    ),
    "free": (
        "bf16_full_eval", "fp16_full_eval", "activation_checkpointing", "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs", "torch_compile_backend", "torch_compile_mode", "use_cache",
        "torch_empty_cache_steps", "logging_strategy", "logging_first_step", "log_on_each_node",
        "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm",
        "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_delay",
        "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
        "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "save_only_model", "save_on_each_node",
        "enable_jit_checkpoint", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout", "debug", "skip_memory_metrics", "do_train", "do_eval", "do_predict", "local_rank",
    ),
}  # fmt: skip
"""Other options of `TrainingArguments`: a resumed run must not change `fixed` ones, but may change `free` ones."""


# fmt: off
@group
class MethodOptions(SharedMethodOptions):
    """Adapter method and merge."""

    method: list[str] = again(collapses=True)
    rank: int = again(name="lora_r", default=4, parse=COUNT)
    target_modules: list[str] = again(or_else="query and value")
    merge_calibration_samples: int = again(name="calibration_examples",
        help="number of training examples used for calibration: merges of ResLoRA read them, and lora_matched and "
        "placebos are computed from them; 0: none")
    merge_and_save: bool = free(False, "write the model with the adapter added, for stock transformers")

    @property
    def name(self) -> str:
        """The only method of a single run."""
        return self.method[0]


@group
class ExperimentOptions(SharedExperimentOptions):
    """Data splits and schedule of an experiment: runs with several values of some options."""

    select_split: float | None = again(
        help="fraction of the training examples that is held out to choose learning rates and checkpoints; for tasks "
        "without both a validation file and a test file")
    test_split: float | None = again(
        help="fraction of the training examples that is held out to compare methods; for tasks without a test file and "
        "without a validation file")


@group
class LlmTaskOptions:
    """Model and training data."""

    model_name_or_path: str = option(str(LLM_MODEL), "causal model, folder or name on the hub", short="model",
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
    pad_to_max_length: bool = option(False,
        "pad every input to --max_seq_length, instead of each batch to its longest input")
    max_train_samples: int | None = option(None,
        "use only this many training examples, from the start of the file", COUNT)
    max_eval_samples: int | None = free(None,
        "use only this many validation examples, from the start of the file; in experiments: of the selection split",
        COUNT)
    max_predict_samples: int | None = free(None,
        "predict only this many examples, from the start of the file; in experiments: of the test split", COUNT)


@group
class GlueModelOptions:
    """Model to fine-tune."""

    model_name_or_path: str = option(str(GLUE_MODEL), "encoder model: folder or name on the hub", short="model",
        or_else="the bundled one", essential="encoder model, folder or name on the hub", metavar="MODEL")
    config_name: str | None = option(None, "configuration (name or folder), if it differs from the model's")
    tokenizer_name: str | None = option(None, "tokenizer (name or folder), if it differs from the model's")
    cache_dir: str | None = free(None, "folder for downloaded models and data", metavar="FOLDER")
    model_revision: str = option("main", "revision of the model on the hub")
    token: str | None = free(None, "token for the hub", secret=True)
    ignore_mismatched_sizes: bool = option(False,
        "replace the model's classification head if it has another number of labels than the task")


@group
class TrainingOptions:
    """Length of training, batch size and outputs, as in transformers' `TrainingArguments`."""

    output_dir: str = free("runs/adapter", "folder of the run", short="output", metavar="FOLDER", path="relative",
        essential=True)
    seed: int = option(42, "the same seed gives the same bytes", whole(0, 2**32 - 1), varies=True, essential=True)
    max_steps: int = free(-1, "training steps; wins over --num_train_epochs", steps, short="steps",
        or_else="--num_train_epochs decides", essential="training steps")
    num_train_epochs: float = free(3.0, "passes over the training examples", POSITIVE, essential=True)
    per_device_train_batch_size: int = option(8, "examples per process and forward pass", COUNT, essential=True,
        variable=True, unshared=BATCHES)
    per_device_eval_batch_size: int = free(8, "examples per process and forward pass of evaluations", COUNT)
    gradient_accumulation_steps: int = option(1, "forward passes per step", COUNT, variable=True, unshared=BATCHES)
    learning_rate: float = option(5e-5, "highest learning rate", POSITIVE, varies=True, short="lr", essential=True)
    weight_decay: float = option(0.0, "weight decay", NOT_NEGATIVE, variable=True)
    adam_beta1: float = option(0.9, "decay of the mean of the gradient", FRACTION, variable=True)
    adam_beta2: float = option(0.999, "decay of the mean of the squared gradient", FRACTION, variable=True)
    adam_epsilon: float = option(1e-8, "added to the denominator", POSITIVE, variable=True)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0 turns clipping off", NOT_NEGATIVE,
        variable=True)
    lr_scheduler_type: str = option("linear", "how the learning rate changes", choices=SCHEDULES, variable=True)
    warmup_steps: float = option(0, "warmup steps; a value below 1 is a fraction of all training steps",
        NOT_NEGATIVE, variable=True)
    optim: str = option("adamw_torch_fused", "optimizer, by transformers' name", variable=True)
    bf16: bool = option(False, "train in bfloat16", essential=True)
    fp16: bool = option(False, "train in float16, on a GPU")
    tf32: bool | None = option(None, "allow TF32 matrix products on Ampere and later GPUs")
    gradient_checkpointing: bool | None = free(None, "less memory, slower", essential=True)
    torch_compile: bool = free(False, "compile the model by torch.compile")
    eval_strategy: str = free("no", "when to evaluate", choices=("no", "steps", "epoch"),
        essential="when to evaluate: no, steps or epoch")
    eval_steps: float | None = free(None,
        "steps between evaluations; a value below 1 is a fraction of all training steps", POSITIVE)
    save_strategy: str = free("steps", "when to write a checkpoint", choices=("no", "steps", "epoch", "best"))
    save_steps: float = free(500,
        "steps between checkpoints; a value below 1 is a fraction of all training steps", POSITIVE)
    save_total_limit: int | None = free(None, "checkpoints to retain", COUNT)
    logging_steps: float = free(1, "steps between rows of log.jsonl", POSITIVE)
    report_to: list[str] = free(["tensorboard"], "trackers to report to, all, or none")
    run_name: str | None = free(None, "name of the run for trackers")
    dataloader_num_workers: int = free(0, "processes that prepare batches", NATURAL)
    use_cpu: bool = free(False, "train on the CPU", essential=True)
    deepspeed: str | None = option(None, "DeepSpeed's configuration, a file or JSON", metavar="JSON",
        in_experiments="leave it out: each arm would need an engine of its own")
    resume_from_checkpoint: str | None = free(None,
        "resume from a checkpoint folder, or from the latest usable one: latest", metavar="latest|FOLDER",
        essential="latest resumes the run in --output")
    push_to_hub: bool = free(False, "refused: upload the run's peft/ with `hf upload`")
    hub_model_id: str | None = free(None, "refused, as --push_to_hub is")
    hub_token: str | None = option(None, "refused, as --push_to_hub is", secret=True)


@group
class LlmTrainingOptions(TrainingOptions):
    """`TrainingOptions` with usual defaults for causal models, and with defaults for the bundled model."""

    output_dir: str = again(default="runs/llm")
    learning_rate: float = again(default=1e-4, bundled=5e-3)
    per_device_train_batch_size: int = again(bundled=16)
    per_device_eval_batch_size: int = again(bundled=64)
    num_train_epochs: float = again(bundled=5)
    eval_strategy: str = again(bundled="epoch")
    save_strategy: str = again(bundled="epoch")
    deepspeed: str | None = again(alone=str(ZERO2_OFFLOAD),
        help="DeepSpeed's configuration, a file or JSON; without a value ZeRO-2 that keeps its state in the CPU's "
        "memory")


@group
class GlueTrainingOptions(TrainingOptions):
    """`TrainingOptions` with the learning rate and epochs of LoRA on RoBERTa-large (Hu et al., 2022)."""

    output_dir: str = again(default="runs/glue")
    learning_rate: float = again(default=4e-4, bundled=3e-3)
    num_train_epochs: float = again(default=10.0, bundled=12)
    per_device_train_batch_size: int = again(bundled=16)
    eval_strategy: str = again(default="epoch")
    save_strategy: str = again(default="epoch")
    save_total_limit: int | None = again(default=2)


@group
class GlueMethodOptions(MethodOptions):
    """Adapter method and merge."""

    # Texts are short: 64 texts of SST-2 have only two tokens for each of a layer's 384 inputs, too few for a good
    # merge.
    merge_calibration_samples: int = again(default=256)
# fmt: on


@dataclass(frozen=True)
class TextOptions(RunOptions):
    """Values of one run of a language script."""

    adapter: MethodOptions = field(default_factory=MethodOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    experiment: ExperimentOptions = field(default_factory=ExperimentOptions)
    passed_on: Mapping[str, Any] = field(default_factory=dict)
    """Given options of `TrainingArguments` that are not defined as options here."""

    switches_take_values: ClassVar[bool] = True
    shared_titles: ClassVar[Mapping[str, str]] = {
        "adapter": "method", "training": "training", "experiment": "experiments",
    }  # fmt: skip


@dataclass(frozen=True)
class LlmOptions(TextOptions):
    """Values of one run of train_llm.py."""

    task: LlmTaskOptions = field(default_factory=LlmTaskOptions)
    training: LlmTrainingOptions = field(default_factory=LlmTrainingOptions)

    titles: ClassVar[Mapping[str, str]] = {"task": "model and task", **TextOptions.shared_titles}


@dataclass(frozen=True)
class GlueOptions(TextOptions):
    """Values of one run of train_glue.py."""

    data: GlueDataOptions = field(default_factory=GlueDataOptions)
    model: GlueModelOptions = field(default_factory=GlueModelOptions)
    adapter: GlueMethodOptions = field(default_factory=GlueMethodOptions)
    training: GlueTrainingOptions = field(default_factory=GlueTrainingOptions)

    titles: ClassVar[Mapping[str, str]] = {"data": "task", "model": "model", **TextOptions.shared_titles}


T = TypeVar("T", bound=TextOptions)
