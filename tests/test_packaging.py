"""The wheel holds all that training needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import image_folder, stable_diffusion
from waiting import LIMIT

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "--rank",
    "2",
    "--resolution",
    "32",
    "--train_batch_size",
    "2",
    "--max_train_steps",
    "2",
    "--report_to",
    "none",
]
QUICK += ["--num_inference_steps", "2", "--num_validation_images", "0", "--merge_calibration_samples", "2"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the project as installed from its wheel, and nothing else."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = tmp_path_factory.mktemp("source")  # building leaves files behind
    shutil.copytree(ROOT / "reslora", source / "reslora", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=LIMIT)
    install = ["install", "--no-deps", "--target", str(target), *map(str, wheels.glob("*.whl"))]
    subprocess.run([*pip, *install], check=True, timeout=LIMIT)
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train_sd", *words]
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)


def test_the_wheel_trains(installed, tmp_path):
    where = "import reslora.diffusion.run as run; print(run.__file__)"
    environment = {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", where]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert Path(found.stdout.strip()).is_relative_to(installed), found.stderr
    model, images = stable_diffusion(tmp_path / "model"), image_folder(tmp_path / "images")
    places = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--output_dir", "out"]
    done = run(installed, tmp_path, *places, *QUICK)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "reslora" / "pytorch_lora_weights.safetensors").is_file()


def test_without_the_repository_a_model_must_be_named(installed, tmp_path):
    done = run(installed, tmp_path)
    assert done.returncode == 2 and "the bundled pipeline comes with the repository" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
