"""The wheels hold all that their parts need, and train from any folder."""

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from waiting import LIMIT

import reslora
from reslora.common.assets import ASSETS

ROOT = Path(__file__).resolve().parents[1]
IN_THE_WHEEL = ("accelerate", "deepspeed", "openmoji", "pipeline", "pipeline-flow", "tiny-llama", "tiny-roberta")
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
CONNECT_AND_MERGE = """
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import reslora
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj"]))
links = reslora.connect(model, reslora.ResLoraConfig(shortcut="block", pre_num=1)).links
print(links, [block.rank for block in reslora.merge(model).blocks], reslora.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, Path]:
    """A folder for each distribution, as installed from its wheel and nothing else."""
    wheels, source = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("source")
    leave = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")  # building leaves files beside the sources
    for name in ("reslora", "app", "assets", "core"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source), str(source / "core")]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build], check=True, timeout=LIMIT)
    targets = {}
    for wheel in wheels.glob("*.whl"):
        name = wheel.name.partition("-")[0]
        targets[name] = tmp_path_factory.mktemp(name)
        install = ["install", "--no-deps", "--no-compile", "--target", str(targets[name]), str(wheel)]
        subprocess.run([sys.executable, "-m", "pip", "--quiet", *install], check=True, timeout=LIMIT)
    return targets


def run(installed: Path, folder: Path, *words: str | Path) -> str:
    """What a command prints that knows of nothing but the installed distribution."""
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path, pattern: str = "*") -> set[Path]:
    found = {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}
    return {path for path in found if "__pycache__" not in path.parts}


def test_a_command_trains_the_bundled_pipeline_from_any_folder(installed, tmp_path):
    target = installed["reslora_sd"]
    run(target, tmp_path, target / "bin" / "reslora-train-sd", "--output_dir", "out", *QUICK)
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("pretrained_model_name_or_path", "train_data_dir"):
        assert Path(config[name]).is_relative_to(target)


def test_commands_version_and_application_are_those_of_the_wheel(installed, tmp_path):
    target = installed["reslora_sd"]
    commands, version, example, script = json.loads(run(target, tmp_path, sys.executable, "-c", COMMANDS))
    wanted = {f"reslora-{name.replace('_', '-')}": name for name in ("train_sd", "train_llm", "train_glue")}
    assert commands == wanted | {"reslora-app": "reslora_app.__main__", "reslora-convert": "reslora.convert"}
    assert version == reslora.__version__
    assert Path(example) == target / "reslora_app" / "example" and Path(script) == target / "train_sd.py"


def test_every_module_and_every_bundled_file_is_in_the_wheel(installed):
    target = installed["reslora_sd"]
    assert files(target / "reslora", "*.py") == files(ROOT / "reslora", "*.py")
    assert files(target / "reslora_app") == files(ROOT / "app")
    assert (target / "reslora" / "py.typed").is_file()
    for name in IN_THE_WHEEL:
        assert files(target / "reslora" / "assets" / name) == files(ASSETS / name)


def test_the_core_connects_and_merges_without_the_rest(installed, tmp_path):
    target = installed["reslora_core"]
    links, ranks = "1", "[2, 4]"
    printed = run(target, tmp_path, sys.executable, "-c", CONNECT_AND_MERGE).split(maxsplit=1)
    assert printed == [links, f"{ranks} {target / 'reslora' / '__init__.py'}\n"]
    assert not (target / "reslora" / "diffusion").exists()


def test_the_core_says_that_the_converter_is_not_in_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "reslora.diffusion.conversion", raising=False)
    monkeypatch.setitem(sys.modules, "reslora.diffusion", None)
    assert importlib.import_module("reslora.convert").main(["--help"]) == 2
    said = "reslora-convert: error: reslora-core does not have the converter; install reslora-sd instead\n"
    assert capsys.readouterr().err == said


def test_the_core_asks_for_four_libraries_and_the_same_versions():
    core, everything = (
        tomllib.loads((ROOT / name).read_text())["project"]["dependencies"]
        for name in ("core/pyproject.toml", "pyproject.toml")
    )
    assert {line.partition(">")[0] for line in core} == {"torch", "transformers", "peft", "safetensors"}
    assert set(core) <= set(everything)


@pytest.mark.parametrize("script", ["train_sd", "train_llm", "train_glue"])
def test_scripts_tell_their_version(script, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"reslora-sd {reslora.__version__}\n")


def test_continuous_integration_runs_the_test_command_of_readme():
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("```bash\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    (command,) = (command for command in commands if command.endswith("pytest"))
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == command and "ruff check ." in lines and "mypy" in lines


def test_the_changelog_knows_the_version():
    assert f"## {reslora.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
