"""The bundled configurations, as accelerate itself reads and applies them."""

import re

import pytest
from accelerate.commands import launch as launching_command
from accelerate.commands.config.config_args import load_config_from_file
from launching import FOLDER, MACHINES, launch

EXPECTED = {  # file: (what starts the processes, machines, processes)
    "cpu_two_processes.yaml": ("multi_gpu_launcher", 1, 2),
    "one_node.yaml": ("multi_gpu_launcher", 1, 8),
    "two_nodes.yaml": ("multi_gpu_launcher", 2, 16),
    "deepspeed_zero2.yaml": ("deepspeed_launcher", 1, 8),
    "fsdp2.yaml": ("multi_gpu_launcher", 1, 8),
}


def launched(monkeypatch, *flags: str):
    """Return name and arguments of the launcher that `accelerate launch` would call."""
    calls = []
    for name in ("multi_gpu_launcher", "deepspeed_launcher", "simple_launcher"):
        monkeypatch.setattr(launching_command, name, lambda args, name=name: calls.append((name, args)))
    launching_command.launch_command(
        launching_command.launch_command_parser().parse_args([*flags, "train_sd.py", "--rank", "4"])
    )
    (call,) = calls
    return call


def test_every_bundled_configuration_is_tested_and_described():
    assert {path.name for path in FOLDER.glob("*.yaml")} == EXPECTED.keys() == MACHINES.keys()
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in EXPECTED)


def test_documents_that_name_zero_2_say_that_no_gpu_has_run_it():
    root = FOLDER.parents[1]
    documents = {*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "assets").rglob("*.md")}
    documents -= {root / "CHANGELOG.md", root / "docs" / "options.md"}
    texts = {path: " ".join(path.read_text(encoding="utf-8").split()) for path in documents}
    naming = {path for path, text in texts.items() if re.search("zero-?2", text, re.IGNORECASE)}
    assert FOLDER / "README.md" in naming
    untried = re.compile(r"N(one of them|either|othing on this page) has (been tried|run) on a? ?GPU")
    assert naming == {path for path in naming if untried.search(texts[path])}


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_accepts_the_configuration(monkeypatch, name):
    launcher, machines, processes = EXPECTED[name]
    config = load_config_from_file(str(FOLDER / name))  # raises on a key it doesn't know
    assert (config.num_machines, config.num_processes) == (machines, processes)
    called, args = launched(monkeypatch, "--config_file", str(FOLDER / name))
    assert called == launcher
    assert (args.num_machines, args.num_processes) == (machines, processes)
    assert args.training_script_args == ["--rank", "4"]
    assert args.mixed_precision == ("no" if name.startswith("cpu") else "bf16")


def test_command_line_wins(monkeypatch):
    _, args = launched(monkeypatch, "--config_file", str(FOLDER / "one_node.yaml"), "--num_processes", "2")
    assert args.num_processes == 2


def test_deepspeed_gets_stage_2(monkeypatch):
    _, args = launched(monkeypatch, "--config_file", str(FOLDER / "deepspeed_zero2.yaml"))
    assert (args.zero_stage, args.gradient_accumulation_steps, args.gradient_clipping) == (2, 1, 1.0)


def test_the_cpus_configuration_hides_gpus(monkeypatch):
    _, args = launched(monkeypatch, "--config_file", str(FOLDER / "cpu_two_processes.yaml"))
    assert all(int(device) < 0 for device in args.gpu_ids.split(","))  # the launcher's CUDA_VISIBLE_DEVICES


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["cpu_two_processes.yaml", "one_node.yaml"])
def test_two_processes_on_the_cpu_find_each_other(tmp_path, name):
    """For the other configurations, see tests/images/test_launching.py."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, torch, accelerate\nsys.path.insert(0, {str(FOLDER.parent.parent)!r})\n"
        "from reslora.runtime.script import shares_the_cpu\n"
        "a = accelerate.Accelerator(cpu=shares_the_cpu())\n"
        "total = a.reduce(torch.tensor(a.process_index + 1)).item()\n"
        "os.write(1, f'{a.device.type} {a.num_processes} {total}\\n'.encode())\n"  # at once: two print to one file
        # Without this gloo's threads abort, now and then, the process that leaves last: often on a busy machine.
        "a.end_training()\n"
    )
    printed = launch(name, script, folder=tmp_path)
    assert printed.count("cpu 2 3\n") == 2
