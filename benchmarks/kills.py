"""Kill two-process runs at random moments, resume them, and compare their final files with an uninterrupted run.

    python benchmarks/kills.py --kills 20

A run is started as in the documentation, on a disk with random delays. SIGKILL, SIGTERM or SIGINT is sent to the
launcher, to one process or to all, at a random moment. The run is then resumed, and killed once more or finished. Every
final file must be byte-identical to that of the uninterrupted run. The result is written to
`benchmarks/results/kills.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "kills.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("launcher", "process 0", "process 1", "all")
LONGEST = 600  # seconds until a run, or its end, counts as a hang
COMPARED = (
    "*/checkpoint-*/*.safetensors", "*/*.safetensors", "*/peft/*", "*/unet/*", "*/samples/**/*.png", "*/merged/*.png",
    "*/merge.json", "*/chains.json",
)  # fmt: skip
# Every file gets its final name up to half a second late.
SLOW_SCRIPT = """
import os, pathlib, random, sys, time
sys.path.insert(0, {root!r})
rename, replace = pathlib.Path.rename, pathlib.Path.replace
def late(move):
    def moved(path, target):
        time.sleep(random.random() / 2)
        return move(path, target)
    return moved
pathlib.Path.rename, pathlib.Path.replace = late(rename), late(replace)
import train_sd
sys.exit(train_sd.main())
"""


def main() -> int:
    """Kill runs, print each result, and return 1 if any run did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    args = parser.parse_args()
    draw, found = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        status, printed = finish(start(whole, Path(folder)))
        if status != 0:
            raise SystemExit(f"the run that nobody kills fails:\n{printed[-3000:]}")
        seconds = time.monotonic() - started
        expected = contents(whole)
        for number in range(args.kills):
            output = Path(folder) / f"killed-{number}"
            found.append(one(output, Path(folder), draw, seconds, expected))
            print(json.dumps(found[-1]), flush=True)
    record = {"seconds_of_a_run": round(seconds, 1), "seed": args.seed, "kills": found}
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(kill["equal"] for kill in found) else 1


def one(output: Path, folder: Path, draw: random.Random, seconds: float, expected: dict[str, str]) -> dict:
    """Kill a run once or twice, resume it to its end, and return the result."""
    deaths = []
    for _ in range(draw.choice((1, 1, 2))):
        number, target, moment = draw.choice(SIGNALS), draw.choice(TARGETS), draw.uniform(0.2, 1.0) * seconds
        launcher = start(output, folder, resume=True)
        time.sleep(moment)
        hit = kill(launcher, number, target)
        status, _ = finish(launcher)
        deaths.append({"signal": number.name, "to": target, "after": round(moment, 1), "hit": hit, "status": status})
    status, printed = finish(start(output, folder, resume=True))
    wrong = [name for name, content in expected.items() if contents(output).get(name) != content]
    whole = "damaged" not in printed and "set-aside" not in printed
    return {"killed": deaths, "status": status, "differs": wrong, "equal": status == 0 and not wrong and whole}


def start(output: Path, folder: Path, resume: bool = False) -> psutil.Popen:
    """Start the run with two processes and the bundled configuration; its output goes to a file next to the folder."""
    script = folder / "slow.py"
    script.write_text(SLOW_SCRIPT.format(root=str(ROOT)))
    words = ["--config_file", str(ROOT / "assets" / "accelerate" / "cpu_two_processes.yaml")]
    words += [
        "--main_process_port",
        "0",
        str(script),
        "--output_dir",
        str(output),
        "--cache_dir",
        str(folder / "cache"),
    ]
    words += ["--mixed_precision", "no", "--max_train_steps", "6", "--checkpointing_steps", "1", "--rank", "4"]
    words += ["--train_batch_size", "2", "--num_inference_steps", "2", "--validation_steps", "3", "--report_to", "none"]
    words += ["--validation_prompt", "cat face", "--max_train_samples", "40", "--merge_calibration_samples", "4"]
    words += ["--method", "reslora", "--checkpoints_total_limit", "3"]
    words += ["--resume_from_checkpoint", "latest"] if resume else []
    with (folder / f"{output.name}.txt").open("w") as file:
        return psutil.Popen(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words],
            stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip


def kill(launcher: psutil.Popen, number: signal.Signals, target: str) -> int:
    """Send the signal; return the number of processes that received it."""
    try:
        workers = [p for p in launcher.children(recursive=True) if "LOCAL_RANK" in p.environ()]
        workers.sort(key=lambda process: process.environ()["LOCAL_RANK"])
        launcher._workers = workers
        chosen = {"launcher": [launcher], "process 0": workers[:1], "process 1": workers[1:2]}
        chosen = chosen.get(target, [launcher, *workers])
    except psutil.Error:
        return 0
    hit = 0
    for process in chosen:
        try:
            process.send_signal(number)
            hit += 1
        except psutil.Error:
            continue
    return hit


def finish(launcher: psutil.Popen) -> tuple[int, str]:
    """Wait until the launcher and its processes have exited; raises `SystemExit` after LONGEST seconds."""
    workers = []
    end = time.monotonic() + LONGEST
    while launcher.poll() is None:
        with contextlib.suppress(psutil.Error):
            workers = [p for p in launcher.children(recursive=True) if "LOCAL_RANK" in p.environ()] or workers
        if time.monotonic() > end:
            raise SystemExit(f"hangs: {launcher.cmdline()}")
        time.sleep(0.05)
    _, alive = psutil.wait_procs(workers or getattr(launcher, "_workers", []), timeout=LONGEST)
    if alive:
        raise SystemExit(f"processes outlive their launcher: {alive}")
    output = launcher.args[launcher.args.index("--output_dir") + 1]
    return launcher.returncode, Path(f"{output}.txt").read_text(errors="replace")


def contents(output: Path) -> dict[str, str]:
    """Return the hash of every file that must be identical."""
    found = (path for pattern in COMPARED for path in output.glob(pattern) if path.is_file())
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


if __name__ == "__main__":
    sys.exit(main())
