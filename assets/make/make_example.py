"""Make the run that a first visitor sees of what a trainer wrote: `python assets/make/make_example.py RUN`.

Copied: settings, losses, samples, chain plan, merge report, and the LoRA files in half precision. Not copied:
checkpoints, complete U-Nets, and paths and times, which depend on the machine and its load.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from app.library import Library
from app.runs import EXAMPLE, Run
from reslora.export import DIFFUSERS_FILE

REPOSITORY = Path(__file__).resolve().parents[2]
KEPT = ("chains.json", "merge.json", "exports.json", "samples", "merged")


def make_example(run: Run, target: Path) -> None:
    """Write a small copy of a finished run to `target`, replacing an existing one."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    config = {name: relative(value) for name, value in run.config.items()}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for method in run.methods:
        (target / method).mkdir()
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in run.log(method)]
        (target / method / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for name in KEPT:
            source = run.inside(method, name)
            if source is not None and source.is_dir():
                shutil.copytree(source, target / method / name)
            elif source is not None:
                shutil.copyfile(source, target / method / name)
        if source := run.inside(method, DIFFUSERS_FILE):
            halve(source, target / method / source.name)


def relative(value):
    """Return a setting without this machine's folders; a path in any checkout's `assets/` becomes relative to it."""
    if isinstance(value, list):
        return list(map(relative, value))
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path = Path(value)
    if path.parent.name == "assets":
        return f"assets/{path.name}"
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def halve(source: Path, target: Path) -> None:
    """Copy a safetensors file in half precision, with its metadata."""
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(torch.float16) for name in file.keys()}  # noqa: SIM118 - no mapping
        save_file(tensors, target, metadata=file.metadata())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of train_sd.py, finished")
    run = parser.parse_args().run.resolve()
    found = Library(run.parent).runs().get(run.name)
    if found is None or found.status != "finished":
        parser.error("that is not a finished run of train_sd.py")
    make_example(found, EXAMPLE)
