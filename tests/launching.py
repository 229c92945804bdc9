"""Start a script by the bundled configurations of `accelerate launch`, always with two processes on the CPU.

Most tests of two processes are not about the launcher: `forked` starts the processes without it, which is faster.
"""

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import runpy
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from waiting import LIMIT, default_sigint, ended, ignore_sigint, wait_until

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "accelerate"
MACHINES = {
    "cpu_two_processes.yaml": 1,
    "one_node.yaml": 1,
    "two_nodes.yaml": 2,
    "deepspeed_zero2.yaml": 1,
    "fsdp2.yaml": 1,
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs DeepSpeed and, for the part of it that compiles itself on a CPU, a C++ compiler",
)


def configurations(*without: str) -> list:
    """Return pytest's parameters for the bundled configurations, except those in `without`."""
    marks = {"deepspeed_zero2.yaml": [needs_deepspeed]}
    return [pytest.param(name, marks=marks.get(name, [])) for name in MACHINES if name not in without]


def launch(name: str, script: Path | str, *flags: str, folder: Path, launcher: tuple[str, ...] = ()) -> str:
    """Run `script` by the configuration `name` to its end; return its output.

    There are two processes, on two "machines" if the configuration is for several. `launcher`: further arguments of
    `accelerate launch`; `folder`: for the output. If a launcher fails, the test fails with the end of the output.
    """
    machines = MACHINES[name]
    port = free_port() if machines > 1 else "0"  # 0: the launcher chooses
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
    """Start `accelerate launch` with these arguments as a user without a GPU would; its output goes to a file.

    `background`: as by `nohup accelerate launch ... &`, which leaves SIGHUP and SIGINT ignored.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PATH"] = path_with_ninja()
    with printed.open("w") as file:
        return subprocess.Popen(
            [*(["nohup"] if background else []), sys.executable, "-m", "accelerate.commands.launch", *words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=ignore_sigint if background else default_sigint,
            **options,
        )


def path_with_ninja() -> str:
    """Return PATH with the directory of ninja, which DeepSpeed calls."""
    return os.environ["PATH"] + os.pathsep + str(Path(sys.executable).parent)


def free_port() -> str:
    """Return a free port outside the range from which systems choose ports of connections.

    So no connection can have it before a slow process listens on it.
    """
    while True:
        port = secrets.choice(range(20_000, 32_000))  # not `random`, which two processes may seed alike
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)


# -- without the launcher ----------------------------------------------------------------------------------------------


LIBRARIES = ["torch", "accelerate", "datasets", "matplotlib.pyplot", "peft", "safetensors.torch", "transformers"]
LIBRARIES += ["diffusers.optimization", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]


def fork_server() -> multiprocessing.context.BaseContext:
    """Return a server that forks processes with imported libraries, and that never trains itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def told_by(name: str) -> dict[str, str]:
    """Return the environment variables that accelerate's launcher sets by the configuration `name`."""
    words = ["--config_file", str(FOLDER / name), "script.py"]
    with ExitStack() as stack:
        kinds = ("multi_gpu_launcher", "deepspeed_launcher")
        calls = [stack.enter_context(mock.patch.object(accelerate_launch, kind)) for kind in kinds]
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    (args,) = next(call.call_args.args for call in calls if call.called)
    told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    found = {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    del found["ACCELERATE_MIXED_PRECISION"]
    return found | ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if MACHINES[name] > 1 else {})  # torch's says these


NOTHING: Mapping[str, str] = MappingProxyType({})


def start_forked(
    script: Path | str, *flags: str, printed: Path, environment: Mapping[str, str] = NOTHING, processes: int = 2
) -> list[multiprocessing.process.BaseProcess]:
    """Start the processes of a script, by rank, in the environment that `accelerate launch` sets on a CPU.

    All their output is in one file. Unlike with a launcher, no process ends the others. `environment`: additional
    variables, such as those of `told_by`.
    """
    count = str(processes)
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    store["ACCELERATE_MIXED_PRECISION"] = "no"
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    told = [store | rank | environment for rank in ranks]
    return [start_alone(script, *flags, printed=printed, environment=each) for each in told]


def start_alone(
    script: Path | str, *flags: str, printed: Path, environment: Mapping[str, str] = NOTHING
) -> multiprocessing.process.BaseProcess:
    """Start a process of a script as a shell would, on a CPU, with the additional variables `environment`."""
    printed.touch()
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": path_with_ninja(), **environment}
    process = fork_server().Process(target=_run_script, args=(own, [str(script), *flags], str(printed)))
    process.start()
    return process


def forked(
    script: Path | str, *flags: str, folder: Path, environment: Mapping[str, str] = NOTHING, processes: int = 2
) -> str:
    """Do the same as `launch`, by the configuration of `environment` (see `told_by`) or `cpu_two_processes.yaml`."""
    printed = folder / "printed.txt"
    started = start_forked(script, *flags, printed=printed, environment=environment, processes=processes)
    statuses = [ended(process) for process in started]
    text = printed.read_text(errors="replace")
    assert statuses == [0] * processes, text[-5000:]
    return text


def _run_script(environment: dict[str, str], words: list[str], printed: str) -> None:
    """Run the script in a forked process."""
    gc.freeze()
    default_sigint()
    multiprocessing.set_start_method("fork", force=True)  # what the data loader's workers are used to
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name == "RANK"]:
        del os.environ[name]
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
