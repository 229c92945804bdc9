"""Options of train_sd.py, and refusals."""

import subprocess
import sys

import pytest
from waiting import LIMIT

from images.runs import SCRIPT, refused
from reslora.images.model.loading import Model
from reslora.images.settings import build_parser


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "flags",
    [
        "--rank 0",
        "--rank four",
        "--rank 100000",
        "--learning_rate nan",
        "--lora_alpha inf",
        "--lora_dropout 1",
        "--logit_mean nan",
        "--mode_scale inf",
        "--train_batch_size 99999999999999999999",
        "--resolution 99999999999999999999",
        "--aspect_ratio_buckets 32,99999999999999999999 --use_aspect_ratio_buckets",
        "--pre_num -2",
        "--checkpoints_total_limit 0",
        "--method vera",
        "--shortcut sideways",
        "--resolution 30",
        "--target_modules to_nothing",
        "--pretrained_model_name_or_path /no/such/folder",
        "--train_data_dir /no/such/folder",
        "--caption_column caption",
        "--output_dir /proc/run",
        "--cache_dir /dev/null/cache",
        "--class_data_dir /dev/null/class --class_prompt disc",
        "--resume_from_checkpoint checkpoint-1",
        "--report_to comet_ml",
        "--report_to swanlab",
        "--report_to no_such_tracker",
        "--config /no/such/file.toml",
        ("--no_such_flag", "unknown option"),
        ("--lr_warmup", "did you mean --lr_warmup_steps?"),  # which alone begins so
        "--learning_rate -1e-4",
        "--noise_offset -inf",
        "--resolution 12",
        "--validation_height 36",
        "--validation_width 36",
        "--num_inference_steps 2000",
        "--learning_rate 1e-08 --lr_scheduler polynomial",
        "--lr_scheduler piecewise_constant",
        "--lr_scheduler no_such_schedule",
        "--lr_step_rules 1:ten,0.1 --lr_scheduler piecewise_constant",
        "--lr_step_rules 1:10,nan --lr_scheduler piecewise_constant",
        "--lr_step_rules 1:10,0.1",
        "--max_train_steps 2 --method adalora",
        "--init_lora_weights orthogonal --method lora --base_precision nf4",
        "--init_lora_weights pissa --method lora --blocks_to_swap 1",
        "--init_lora_weights pissa",  # with shortcuts
        "--init_lora_weights orthogonal --method lora --rank 3",
        "--init_lora_weights eva --method lora",
        "--method pissa",
        "--target_modules conv1 --method adalora",
    ],
)
def test_bad_flags_are_refused_in_one_line(base_flags, capsys, tmp_path, flags):
    flags = flags.split() if isinstance(flags, str) else flags
    output = [] if flags[0] == "--output_dir" else ["--output_dir", tmp_path / "out"]
    line = refused(capsys, *base_flags, "--method", "reslora", *output, *flags)
    assert flags[0] in line and flags[1] in line
    assert not list(tmp_path.glob("out/*"))


def test_a_tracker_that_is_not_installed_is_named_with_its_fix(base_flags, capsys):
    tracker = "comet_ml"
    line = refused(capsys, *base_flags, "--report_to", tracker)
    assert "not installed" in line and f"pip install {tracker}" in line


def test_model_without_data_is_refused(model, capsys):
    assert "--train_data_dir" in refused(capsys, "--pretrained_model_name_or_path", model)


def test_script_itself_exits_with_2_and_answers_help_without_heavy_imports():
    done = subprocess.run([sys.executable, str(SCRIPT), "--rank", "0"], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--rank" in done.stderr
    code = "import runpy, sys\ntry:\n    runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", code, str(SCRIPT), "--help"]
    done = subprocess.run(words, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and "--shortcut" in done.stdout, done.stderr


def test_every_flag_of_diffusers_script_is_there():
    names = {
        "pretrained_model_name_or_path", "revision", "variant", "dataset_name", "dataset_config_name",
        "train_data_dir", "image_column", "caption_column", "validation_prompt", "num_validation_images",
        "validation_epochs", "max_train_samples", "output_dir", "cache_dir", "seed", "resolution",
        "center_crop", "random_flip", "train_batch_size", "num_train_epochs", "max_train_steps",
        "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "scale_lr", "lr_scheduler",
        "lr_warmup_steps", "snr_gamma", "use_8bit_adam", "allow_tf32", "dataloader_num_workers", "adam_beta1",
        "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "push_to_hub", "hub_token",
        "prediction_type", "hub_model_id", "logging_dir", "mixed_precision", "report_to", "local_rank",
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "enable_xformers_memory_efficient_attention", "noise_offset", "rank", "image_interpolation_mode",
    }  # fmt: skip
    assert len(names) == 51
    assert names <= {action.dest for action in build_parser()._actions}


def test_defaults_are_in_words_and_one_is_a_number():
    helps = {action.dest: action.help for action in build_parser()._actions}
    assert helps["gradient_accumulation_steps"].endswith("(default: 1)")
    assert helps["cache_latents"].endswith("(default: on)") and "otherwise: none)" in helps["validation_prompt"]


@pytest.mark.parametrize(
    "name",
    ["output_dir", "train_data_dir"],
)
def test_an_empty_path_is_refused(capsys, name):
    """It usually comes from an unset shell variable: the run would use the working directory or a default."""
    assert f"error: --{name}: is empty" in refused(capsys, f"--{name}", "")


def test_an_output_folder_that_the_run_reads_is_refused(base_flags, capsys, model, data):
    for name, folder in {"train_data_dir": data, "pretrained_model_name_or_path": model}.items():
        before = sorted(folder.rglob("*"))
        line = refused(capsys, *base_flags, "--output_dir", f"{folder}/")
        assert f"--output_dir {folder}" in line and f"the folder of --{name}" in line
        assert sorted(folder.rglob("*")) == before


def test_a_schedule_free_optimizer_with_a_schedule_is_refused(capsys):
    schedule = "cosine"
    for optimizer in ("schedulefree", "schedulefree.RAdamScheduleFree"):
        line = refused(capsys, "--optimizer", optimizer, "--lr_scheduler", schedule)
        assert f"--lr_scheduler {schedule}: --optimizer {optimizer}" in line and "give constant" in line


def test_a_cache_that_the_system_does_not_let_be_made_is_refused(base_flags, capsys):
    """Permissions allow it: only an attempt shows that /proc has no folders of users."""
    assert "--cache_dir /proc/x: /proc is not a writable folder" in refused(
        capsys, *base_flags, "--cache_dir", "/proc/x"
    )


def test_a_resolution_between_the_multiples_is_refused_before_weights_are_read(
    base_flags, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(Model, "load_pipeline", lambda *args, **more: pytest.fail("weights are read"))
    line = refused(capsys, *base_flags, "--resolution", "63", "--output_dir", tmp_path / "out")
    assert "--resolution 63: height and width must be multiples of 8; give 56" in line
