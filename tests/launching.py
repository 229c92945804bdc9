"""Starts a script by the bundled configurations of `accelerate launch`: two processes on the CPU, whatever they say."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from waiting import LIMIT, default_sigint, ignore_sigint, wait_until

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "accelerate"
MACHINES = {"cpu_two_processes.yaml": 1, "one_node.yaml": 1, "two_nodes.yaml": 2, "deepspeed_zero2.yaml": 1}
# On the CPU DeepSpeed compiles a part of itself. Where it cannot, pytest's last lines say what was not run.
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("c++") is not None
CONFIGURATIONS = [name for name in MACHINES if DEEPSPEED or not name.startswith("deepspeed")]


def launch(name: str, script: Path | str, *flags: str, folder: Path, launcher: tuple[str, ...] = ()) -> str:
    """Runs `script` by the configuration `name` to its end; returns all that it printed.

    Two processes, on two "machines" where the configuration is for several. `launcher`: further words for `accelerate
    launch`; `folder`: for what is printed. Fails with the end of it if a launcher does.
    """
    machines, port = MACHINES[name], "0"
    if machines > 1:  # port 0 means that each launcher chooses
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
    words = ["--config_file", str(FOLDER / name), "--num_processes", "2", "--main_process_port", port]
    words += ["--main_process_ip", "127.0.0.1"] if machines > 1 else []
    processes, files = [], [folder / f"launcher-{rank}.txt" for rank in range(machines)]
    for rank, file in enumerate(files):
        command = [*words, *(["--machine_rank", str(rank)] if machines > 1 else []), *launcher, str(script), *flags]
        processes.append(start(command, file))
    try:  # if one fails, the other would wait for it for ever
        wait_until(lambda: any(p.poll() for p in processes) or all(p.poll() == 0 for p in processes), "the launchers")
    finally:
        for process in processes:
            process.kill()
            process.wait(LIMIT)
    printed = "".join(file.read_text(errors="replace") for file in files)
    assert [process.returncode for process in processes] == [0] * machines, printed[-5000:]
    return printed


def start(words: list[str], printed: Path, background: bool = False, **options) -> subprocess.Popen:
    """`accelerate launch` with these words as a user starts it who has no GPU, its output in a file.

    `background`: as by `nohup accelerate launch ... &`, which leaves SIGHUP and SIGINT ignored.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # for the program ninja, which DeepSpeed calls
    with printed.open("w") as file:
        return subprocess.Popen(
            [*(["nohup"] if background else []), sys.executable, "-m", "accelerate.commands.launch", *words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=ignore_sigint if background else default_sigint,
            **options,
        )
