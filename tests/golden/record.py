"""The golden record: what the command line of a checkout does, compared with a commit or with `record.json`.

python tests/golden/record.py check --against COMMIT    # bit by bit, with both run on this machine
python tests/golden/record.py check                     # with record.json, in what no processor changes
python tests/golden/record.py write                     # write record.json again: in a separate commit

The commands are in `commands.py`. They run in processes forked from this one, which has imported the libraries and
nothing of the project, so that any checkout can be recorded.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import resource
import runpy
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CHECKOUT = FOLDER.parents[1]
RECORD = FOLDER / "record.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "reslora-golden"
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= {f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
FROM_LAUNCHERS = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
os.environ.update(ENVIRONMENT)  # before torch is imported

import datasets  # noqa: E402, F401 - a forked process finds these imported
import diffusers.optimization  # noqa: E402
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402
from commands import REFUSALS, RUNS, SCRIPTS, make_fixtures  # noqa: E402
from safetensors import safe_open  # noqa: E402

LIKE = "like"
NOTHING = "nothing"
SETTINGS = "settings of"  # how the section of a config.json begins
LIMIT = 1200  # seconds for one command: for what hangs, not for what is slow
REFUSAL_LIMIT = 30  # seconds of CPU for one that is to be refused: if it is not, it trains
TOLERANCE = 1e-4  # of what is compared between processors, relative where it is above 1
SHOWN = 20  # differences of one run
VOLATILE = re.compile(r"seconds|runtime|_per_second|memory|process|began|ended|date$|version$")


# -- processes ---------------------------------------------------------------------------------------------------------


def fork(function: Callable[[], object], printed: Path, folder: Path, **environment: str) -> int:
    """Call a function in a forked process in `folder`, with its output in a file; return the process id."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    status: object = 1
    try:
        for name in [name for name in os.environ if name.startswith(FROM_LAUNCHERS)]:
            del os.environ[name]
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
        os.chdir(folder)
        status = function()
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def run_script(checkout: Path, script: str, words: list[str]) -> None:
    """Run a script of a checkout as Python would."""
    sys.path[0] = str(checkout)
    sys.argv = [script, *words]
    if script.endswith(".py"):
        sys.argv[0] = str(checkout / script)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def ended(process: int, limit: float = LIMIT) -> int:
    """Wait for a process; return its exit status, minus the signal if one ended it.

    After the time limit, kill it and raise `TimeoutError`.
    """
    until = time.monotonic() + limit
    while (found := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"no end after {limit} s")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def execute(checkout: Path, folder: Path, command: str, scratch: Path, cpu_limit: int = LIMIT) -> str:
    """Execute a command line in `folder`; return its exit status, and the option that its error names.

    The first words may be modifiers: `two` processes, or a process that is sent a signal (`kill`, `stop`) once it has
    written its second checkpoint.
    """
    *how, script, words = split(command)
    printed = scratch / "printed.txt"
    printed.unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(checkout), "TMPDIR": str(scratch)}
    ranks: list[dict[str, str]] = [{}]
    if "two" in how:
        with socket.socket() as free:
            free.bind(("127.0.0.1", secrets.choice(range(20_000, 32_000))))  # none that a system gives to a connection
            store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        store |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
        ranks = [store | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]

    sent = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}.get(how[0] if how else "")

    def call() -> None:
        if sent and os.environ.get("RANK", "0") == "0":
            send_after_second_checkpoint(sent)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))  # on a busy machine a clock says little
        run_script(checkout, SCRIPTS[script], words)

    processes = [fork(call, printed, folder, **environment, **rank) for rank in ranks]
    statuses = " ".join(str(ended(process)) for process in processes)
    text = printed.read_text(errors="replace")
    (folder.parent / f"{folder.name}.txt").open("a").write(f"$ {command}\n{text}\n")
    return f"{statuses} {option_of(text)}".strip()


def send_after_second_checkpoint(number: int) -> None:
    """Let this process send itself a signal once its second checkpoint is in its place.

    Another process might come too late, and find that this one has ended.
    """
    written: list[bool] = []

    def hook(event: str, args: tuple) -> None:
        if written:  # the first event after the folder has got its name
            written.clear()
            os.kill(os.getpid(), number)
        elif event == "os.rename" and str(args[1]).endswith("checkpoint-2"):
            written.append(True)

    sys.addaudithook(hook)


def split(command: str) -> list:
    """Return a command line as its modifiers, the script's short name, and the list of its words."""
    words = shlex.split(command)
    at = next(number for number, word in enumerate(words) if word in SCRIPTS)
    return [*words[: at + 1], words[at + 1 :]]


def option_of(text: str) -> str:
    """Return the option or positional argument that the line of an error names first."""
    lines = [line.partition("error: ")[2] for line in text.splitlines() if "error: " in line]
    found = re.search(r"--[A-Za-z]\w*(-\w+)*|\b(IN|OUT)\b", lines[-1]) if lines else None
    return found[0] if found else ""


# -- what a command leaves ---------------------------------------------------------------------------------------------


class Observer:
    """Runs commands in a checkout, and reads the files that they write."""

    def __init__(self, checkout: Path, fixtures: Path, place: Path) -> None:
        self.checkout, self.fixtures, self.place = checkout, fixtures, place
        self.scratch = place / "scratch"
        self.scratch.mkdir(parents=True)

    def observe(self, name: str) -> dict:
        """Return the result of a run, or of the commands of a group of `REFUSALS`, by section and key."""
        if name in REFUSALS:
            return {script: self.refusals(script, lines) for script, lines in REFUSALS[name].items()}
        folder = self.folder(name)
        outcomes = {}
        for number, command in enumerate(RUNS[name], 1):
            outcomes[f"{number} {command}"] = execute(self.checkout, folder, command, self.scratch)
        found: dict[str, dict] = {"commands": outcomes, "files": {}, "losses": {}, "tensors": {}, "contents": {}}
        for path in self.left_in(folder):
            place = self.normalized(str(path.relative_to(folder)))
            where, _, file = place.rpartition("/")
            found["files"][where] = f"{found['files'].get(where, '')} {file}".strip()
            if path.name == "log.jsonl":
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                found["losses"][place] = [steady(row) for row in rows]
            elif path.suffix == ".json":
                content = self.normalized(json.loads(path.read_text()))
                if path.name == "config.json" and "output_dir" in content:
                    found[f"{SETTINGS} {place}"] = content
                else:
                    found["contents"][place] = steady(content)
            elif path.suffix == ".safetensors":
                found["tensors"][place], found["contents"][place] = self.tensors(path)
            elif path.suffix == ".png":
                found["contents"][place] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def refusals(self, script: str, lines: list[str]) -> dict[str, str]:
        """Return the result of each command line, forked from a process in which the script has printed its help."""
        file, printed = self.scratch / "outcomes.json", self.scratch / "help.txt"

        def refuse_all() -> None:
            with contextlib.suppress(SystemExit):
                run_script(self.checkout, SCRIPTS[script], ["--help"])
            file.write_text(json.dumps({words: self.refusal(script, words) for words in lines}))

        assert ended(fork(refuse_all, printed, self.place), LIMIT * len(lines)) == 0, printed.read_text()
        return json.loads(file.read_text())

    def refusal(self, script: str, words: str) -> str:
        """Return the result of a command that must be refused, and the first file that it writes nevertheless."""
        folder = self.folder("refusal")
        outcome = execute(self.checkout, folder, f"{script} {words}", self.scratch, REFUSAL_LIMIT)
        left = [str(path.relative_to(folder)) for path in self.left_in(folder)]
        shutil.rmtree(folder)
        return f"{outcome}, leaves {left[0]}" if left else outcome

    def folder(self, name: str) -> Path:
        """Return a new working directory with links to the fixtures and to the checkout's assets."""
        folder = self.place / name
        folder.mkdir()
        for path in [*self.fixtures.iterdir(), self.checkout / "assets"]:
            (folder / path.name).symlink_to(path)
        return folder

    def left_in(self, folder: Path) -> Iterator[Path]:
        """Return the files of a working directory that are not fixtures."""
        found = (Path(above, name) for above, _, names in os.walk(folder) for name in names)
        return (path for path in sorted(found) if not path.is_symlink())

    def normalized(self, value: object) -> object:
        """Return a value without the folders of this machine, and without hashes in names."""
        if isinstance(value, dict):
            return {self.normalized(key): self.normalized(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.normalized(each) for each in value]
        if not isinstance(value, str):
            return value
        for path, word in ((self.place, "WORK"), (self.checkout, "CHECKOUT"), (self.fixtures, "FIXTURES")):
            value = value.replace(str(path), word)
        return re.sub(r"\b[0-9a-f]{16,}\b", "HASH", value)

    def tensors(self, path: Path) -> tuple[list, dict]:
        """Return the number, layout and norm of a file's tensors, and its header with each tensor's norm and hash."""
        layout, square, each = hashlib.sha256(), 0.0, {}
        with safe_open(path, "pt") as file:
            header = {key: self.normalized(value) for key, value in (file.metadata() or {}).items()}
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                norm = float(tensor.double().nan_to_num().norm())  # what a window of norms lacks is NaN
                square += norm**2
                content = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
                each[name] = f"{norm:.6g} {content[:16]}"
                layout.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        return [len(each), layout.hexdigest()[:16], math.sqrt(square)], {"header": steady(header), **each}


def steady(value: object) -> object:
    """Return JSON without values that differ in each run: times, dates and versions."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if not VOLATILE.search(key)}
    if isinstance(value, list):
        return [steady(each) for each in value]
    return value


def portable(found: dict, arguments: dict) -> dict:
    """Return the part of an observation that depends neither on the processor nor on versions of libraries.

    `arguments`: the defaults of transformers' `TrainingArguments`.
    """
    found = {section: content for section, content in found.items() if section != "contents"}
    for section, content in found.items():
        if section.startswith(SETTINGS) and "lora_r" in content:  # of a language script: the rest is transformers'
            own = {key: value for key, value in content.items() if key not in arguments or value != arguments[key]}
            found[section] = own
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.6g}"))


def prepare(place: Path, fixtures: Path) -> None:
    """Write the fixtures and the data that `portable` needs.

    In a forked process, because accelerate caches its state.
    """
    make_fixtures(fixtures)
    arguments = transformers.TrainingArguments(output_dir="", report_to="none").to_dict()
    (place / "arguments.json").write_text(json.dumps(arguments))


# -- references --------------------------------------------------------------------------------------------------------


def reference(commit: str, name: str, fixtures: Path, place: Path) -> dict:
    """Return the result of a run in a commit, from the cache if it was made on this machine with these libraries."""
    git = ["git", "-C", str(CHECKOUT)]
    commit = subprocess.check_output([*git, "rev-parse", f"{commit}^{{commit}}"], text=True, timeout=LIMIT).strip()
    file = CACHE / commit / machine() / f"{name}.json"
    if not file.exists():
        checkout = CACHE / commit / "checkout"
        if not checkout.exists():
            checkout.parent.mkdir(parents=True, exist_ok=True)
            archive = subprocess.check_output([*git, "archive", commit], timeout=LIMIT)
            with (
                tempfile.TemporaryDirectory(dir=checkout.parent) as folder,
                tarfile.open(fileobj=io.BytesIO(archive)) as tar,
            ):
                tar.extractall(f"{folder}/checkout", filter="tar")
                Path(folder, "checkout").rename(checkout)
        found = Observer(checkout, fixtures, place / f"reference-{name}").observe(name)
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".new").write_text(json.dumps(found))
        file.with_suffix(".new").rename(file)
    return json.loads(file.read_text())


def machine() -> str:
    """Return a hash of everything else that the bits depend on: commands, libraries and processor."""
    sources = [FOLDER / "record.py", FOLDER / "commands.py", FOLDER.parent / "pipelines.py"]
    facts = [path.read_text() for path in sources] + [sys.version, torch.backends.cpu.get_cpu_capability()]
    facts += sorted(f"{each.name} {each.version}" for each in importlib.metadata.distributions() if each.name)
    with contextlib.suppress(OSError):
        facts += re.findall(r"model name.*", Path("/proc/cpuinfo").read_text())[:1]
    return hashlib.sha256("\n".join([*facts, platform.machine()]).encode()).hexdigest()[:16]


def differences(before: object, now: object, tolerance: float, where: str = "") -> Iterator[str]:
    """Yield a line for each value that differs; floats may differ by `tolerance`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            pair = before.get(key, NOTHING), now.get(key, NOTHING)
            if key.endswith("-HASH.safetensors") and NOTHING not in pair and isinstance(pair[0], list):
                # Of one of several files: which one depends on hashes, and these on the versions of libraries.
                pair = pair[0][:2], pair[1][:2]
            # Adam's first steps follow the sign of a gradient, also of one that is zero but for rounding.
            wider = 10 * tolerance if key in ("tensors", "losses") else tolerance
            yield from differences(*pair, wider, f"{where} / {key}" if where else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, tolerance, f"{where} [{number}]")
    elif not (isinstance(before, float) and isinstance(now, float) and math.isclose(before, now, **both(tolerance))):
        one, other = (each if each is NOTHING else json.dumps(each) for each in (before, now))
        if one != other:  # 1, 1.0 and true are not the same here
            yield f"{where}: {textwrap.shorten(one, 200)} before, {textwrap.shorten(other, 200)} now"


def both(tolerance: float) -> dict[str, float]:
    """Return a tolerance that is absolute below 1 and relative above, for `math.isclose`."""
    return {"rel_tol": tolerance, "abs_tol": tolerance}


def packed(record: dict) -> dict:
    """Return a record in which each configuration has only its differences from an earlier one of the same script."""
    known: dict[str, dict] = {}
    result: dict[str, dict] = {}
    for name, found in record.items():
        result[name] = dict(found)
        for section, content in found.items():
            if not section.startswith(SETTINGS):
                continue
            like = next((other for other, settings in known.items() if settings.keys() == content.keys()), None)
            if like is None:
                known[f"{name}: {section}"] = content
            else:
                others = {key: value for key, value in content.items() if value != known[like][key]}
                result[name][section] = {LIKE: like, **others}
    return result


def unpacked(record: dict) -> dict:
    """Return the record from which `packed` made this one."""
    result: dict[str, dict] = {}
    for name, found in record.items():
        result[name] = {}
        for section, content in found.items():
            run, _, other = content.get(LIKE, "").partition(": ")
            known = result[run][other] if run else {}
            result[name][section] = known | {key: value for key, value in content.items() if key != LIKE}
    return result


def as_text(record: dict) -> str:
    """Return JSON with a line for each command, folder, file and setting."""
    return re.sub(r"\n {4,}|\n {3}(?=[]}])", " ", json.dumps(record, indent=1)) + "\n"


# -- the command line --------------------------------------------------------------------------------------------------


def main() -> int:
    """Check or write; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["check", "write"])
    parser.add_argument("--against", metavar="COMMIT", help="compare every bit with this commit, run on this machine")
    names = [*REFUSALS, *RUNS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    args = parser.parse_args()
    record = unpacked(json.loads(RECORD.read_text())) if RECORD.exists() else {}
    count = 0
    gc.freeze()  # a forked process copies what its collector touches
    with tempfile.TemporaryDirectory(prefix="reslora-golden-") as folder:
        place = Path(folder).resolve()
        (fixtures := place / "fixtures").mkdir()
        if ended(fork(lambda: prepare(place, fixtures), place / "printed.txt", place)):
            sys.exit((place / "printed.txt").read_text())
        arguments = json.loads((place / "arguments.json").read_text())
        for name in args.only:
            before = reference(args.against, name, fixtures, place) if args.against else record.get(name, {})
            began = os.times()
            found = Observer(CHECKOUT, fixtures, place / name).observe(name)
            found = json.loads(json.dumps(found)) if args.against else portable(found, arguments)
            record[name] = found
            lines = list(differences(before, found, 0 if args.against else TOLERANCE))
            count += len(lines)
            seconds = sum(os.times()[:4]) - sum(began[:4])
            print(f"{name}: {seconds:.1f} s of CPU, {len(lines)} differences", flush=True)
            for line in lines[:SHOWN]:
                print(f"  {line}")
            if args.action == "write":
                RECORD.write_text(as_text(packed({name: record[name] for name in names if name in record})))
    return 1 if count and args.action == "check" else 0


if __name__ == "__main__":
    sys.exit(main())
