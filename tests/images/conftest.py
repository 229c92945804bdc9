"""A tiny Stable Diffusion, images, flags and runs that the tests of this folder share; they only read the runs."""

from pathlib import Path

import pytest
from pipelines import image_folder, stable_diffusion

from images.runs import Runs, main

STEPS = 5  # of the runs in processes of their own


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model") / "tiny-sd")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def few_flags(model, data) -> list[str]:
    """What the runs of several tests have in common."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "32"),
        *("--rank", "4", "--learning_rate", "1e-2", "--report_to", "none"),
    ]


@pytest.fixture(scope="session")
def base_flags(few_flags) -> list[str]:
    """Four steps with samples, validation losses and checkpoints on the way."""
    return [
        *few_flags,
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--train_batch_size", "2"),
        *("--validation_prompt", "red disc", "blue box", "--num_validation_images", "1", "--validation_steps", "2"),
        *("--num_inference_steps", "2", "--random_flip", "--validation_split", "0.3"),
        *("--merge_calibration_samples", "4"),
    ]


@pytest.fixture(scope="session")
def brief_flags(few_flags) -> list[str]:
    """One step of LoRA, and nothing that could be left out."""
    return [
        *few_flags,
        *("--max_train_steps", "1", "--train_batch_size", "2"),
        *("--method", "lora", "--num_validation_images", "1", "--num_inference_steps", "1"),
        *("--merge_calibration_samples", "2"),
    ]


@pytest.fixture(scope="session")
def run(base_flags, tmp_path_factory) -> Path:
    """One uninterrupted run of LoRA and ResLoRA."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert main(*base_flags, "--method", "lora", "reslora", "--output_dir", output) == 0
    return output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default output folders are relative: a run that was left in the checkout must not meet the tests."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def runs(model, tmp_path_factory) -> Runs:
    """ResLoRA mid-epoch (5 images, 4 samples a step), mid-accumulation and with dropout, saving at every step."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--pretrained_model_name_or_path", str(model), "--rank", "2"]
    flags += ["--train_data_dir", str(image_folder(folder / "images", count=5)), "--resolution", "32"]
    flags += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--lora_dropout", "0.2"]
    flags += ["--max_train_steps", str(STEPS), "--checkpointing_steps", "1", "--learning_rate", "1e-2"]
    flags += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--merge_calibration_samples", "2"]
    flags += ["--num_inference_steps", "1", "--num_validation_images", "1", "--report_to", "none"]
    return Runs(flags, folder)


@pytest.fixture(scope="session")
def whole(runs, tmp_path_factory) -> Path:
    """The run of `runs` that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert runs.finish(output) == 0
    return output
