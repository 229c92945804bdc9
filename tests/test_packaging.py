"""The wheel contains everything that its commands need, and trains from any folder."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version
from waiting import LIMIT

import reslora
from reslora.bundled import ASSETS

ROOT = Path(__file__).resolve().parents[1]
IN_THE_WHEEL = ("accelerate", "deepspeed", "pipeline", "pipeline-flow", "tiny-llama", "tiny-roberta", "twemoji")
QUICK = ["--method", "lora", "--rank", "2", "--max_train_steps", "1", "--max_train_samples", "4"]
QUICK += ["--train_batch_size", "2", "--validation_split", "0", "--num_validation_images", "0", "--report_to", "none"]
COMMANDS = """
import importlib.metadata, json
found = importlib.metadata.distribution("reslora-sd")
commands = {each.name: each.load().__module__ for each in found.entry_points}
from reslora_app.runs import EXAMPLE
from reslora_app.launcher import SCRIPT
print(json.dumps([commands, found.version, str(EXAMPLE), str(SCRIPT)]))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A folder with the distribution as installed from its wheel, and nothing else."""
    wheels, source, target = (tmp_path_factory.mktemp(name) for name in ("wheels", "source", "target"))
    leave = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")  # building leaves files beside the sources
    for name in ("reslora", "app", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    for words in (
        ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)],
        [
            "install",
            "--no-deps",
            "--no-compile",
            "--target",
            str(target),
            "--no-index",
            "-f",
            str(wheels),
            "reslora-sd",
        ],
    ):
        subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True, timeout=LIMIT)
    return target


def run(target: Path, folder: Path, *words: str | Path) -> str:
    """Return the output of a command that sees only the installed distribution."""
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path, pattern: str = "*") -> set[Path]:
    found = {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}
    return {path for path in found if "__pycache__" not in path.parts}


@pytest.mark.exhaustive
def test_a_command_trains_the_bundled_pipeline_from_any_folder(target, tmp_path):
    run(target, tmp_path, target / "bin" / "reslora-train-sd", "--output_dir", "out", *QUICK)
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("pretrained_model_name_or_path", "train_data_dir"):
        assert Path(config[name]).is_relative_to(target)


@pytest.mark.exhaustive
def test_commands_version_and_application_are_those_of_the_wheel(target, tmp_path):
    commands, version, example, script = json.loads(run(target, tmp_path, sys.executable, "-c", COMMANDS))
    wanted = {f"reslora-{name.replace('_', '-')}": name for name in ("train_sd", "train_llm", "train_glue")}
    assert commands == wanted | {
        "reslora-app": "reslora_app.__main__",
        "reslora-caption": "reslora.caption",
        "reslora-compare": "reslora.compare",
        "reslora-convert": "reslora.images.conversion",
    }
    assert version == reslora.__version__
    assert Path(example) == target / "reslora_app" / "example" and Path(script) == target / "train_sd.py"


@pytest.mark.exhaustive
def test_every_module_and_every_bundled_file_is_in_the_wheel(target):
    assert files(target / "reslora", "*.py") == files(ROOT / "reslora", "*.py")
    assert files(target / "reslora_app") == files(ROOT / "app")
    assert (target / "reslora" / "py.typed").is_file()
    for name in IN_THE_WHEEL:
        assert files(target / "reslora" / "assets" / name) == files(ASSETS / name)


def test_scripts_tell_their_version(capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("train_sd").main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"reslora-sd {reslora.__version__}\n")


def test_the_changelog_knows_the_version():
    assert f"## {reslora.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    """`tests/constraints-oldest.txt` pins each dependency to its bound, which may leave out zeros at its end."""
    words = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", word).groups() for word in words)
    lines = (ROOT / "tests" / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == bounds.keys()
    assert all(Version(pins[name]) == Version(bound) for name, bound in bounds.items())
