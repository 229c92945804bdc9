"""A tiny Stable Diffusion, images, flags and runs that the tests of this folder share and only read."""

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
    """Return flags that the runs of several tests have in common."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "32"),
        *("--rank", "4", "--learning_rate", "1e-2", "--report_to", "none"),
    ]


@pytest.fixture(scope="session")
def base_flags(few_flags) -> list[str]:
    """Return flags of four steps with samples, validation losses and checkpoints."""
    return [
        *few_flags,
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--train_batch_size", "2"),
        *("--validation_prompt", "red disc", "blue box", "--num_validation_images", "1", "--validation_steps", "2"),
        *("--num_inference_steps", "2", "--random_flip", "--validation_split", "0.3"),
        *("--merge_calibration_samples", "4"),
    ]


@pytest.fixture(scope="session")
def brief_flags(few_flags) -> list[str]:
    """Return flags of one step of LoRA, without anything optional."""
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
    """Run each test in another working directory: default output folders are relative."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def runs(model, tmp_path_factory) -> Runs:
    """Start runs of ResLoRA with dropout that save at every step.

    Steps end mid-epoch (5 images, 4 samples a step) and mid-accumulation.
    """
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
    """Return the uninterrupted run of `runs`."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert runs.finish(output) == 0
    return output
