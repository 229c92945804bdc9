"""Outputs appear whole or not at all: they are written beside their place and renamed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .common.errors import first_line

if TYPE_CHECKING:
    import torch

CHECKSUMS_NAME = "checksums.json"
ABANDONED = 24 * 3600  # seconds after which a temporary of another machine counts as left behind
LONGEST_NAME = 50  # characters of a name that its temporary repeats; systems allow 255 bytes

before_writing: list[Callable[[], None]] = []
"""What `replacing` asks before it makes a folder or a file: `folder.check_held`, in a process that trains."""

# What `replacing` writes to before it renames: the name, then machine, process and when that was started, and a random
# part.
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}(?:\.old)?\.tmp")


class Damaged(ValueError):
    """A file is missing, or its content is not what was written; one that cannot be read just now is not damaged."""


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the body leaves there, file or folder, becomes `path` afterwards.

    Whatever `before_writing` holds is called first, and may raise.

    If the body raises, `path` is as it was and the temporary is removed. An `OSError` then names `path` in place of the
    temporary, or of nothing: a full disk is noticed by a write, which knows no file. Processes of any number of
    machines may write one path: the last one's stays. `remove_leftovers` removes what a killed process has left.
    """
    for check in before_writing:
        check()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over another one: the old one steps aside first.
            aside = temporary_beside(path, ".old")
            path.rename(aside)
            temporary.rename(path)
            remove(aside)
        else:
            temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename2 is None:
            named = str(path if error.filename is None else error.filename)
            error.filename = named.replace(str(temporary), str(path))
        raise
    finally:
        remove(temporary)


@contextmanager
def replacing_both(description: Path, weights: Path) -> Iterator[tuple[Path, Path]]:
    """As `replacing`, of weights and what describes them: killed in between leaves weights without a description."""
    with replacing(description) as new_description, replacing(weights) as new_weights:
        yield new_description, new_weights
        description.unlink(missing_ok=True)  # it describes the old weights, and the new ones are put there first


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporaries in a folder, not below it, of processes that were killed while they were `replacing`.

    One of this machine goes when its process is gone, one of another machine (or container), whose processes are not
    seen from here, when nobody has written to it for `ABANDONED` seconds.
    """
    for path in Path(folder).glob(".*.tmp"):
        if found := _TEMPORARY.fullmatch(path.name):
            host, process, start = found.groups()
            with suppress(OSError):  # another process removes it too, or it is somebody else's
                seen = host == _host() and os.name == "posix"  # elsewhere `os.kill` would end the process
                old = time.time() - path.lstat().st_mtime > ABANDONED
                if _is_gone(int(process), start) if seen else old:
                    remove(path)


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """Return a temporary name in the same folder that nobody else uses, and that says whose it is."""
    writer = f"{this_process()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name[:LONGEST_NAME]}.{writer}{suffix}.tmp")


def this_process() -> str:
    """This process, as `has_ended` knows it: machine, process and when that was started."""
    return f"{_host()}-{os.getpid()}-{_start_of(os.getpid())}"


def has_ended(process: str) -> bool:
    """Return whether what `this_process` has named is gone;

    False for a process of another machine, which nobody sees here.
    """
    host, number, start = process.split("-")
    return host == _host() and os.name == "posix" and _is_gone(int(number), start)


def is_running(process: str) -> bool:
    """Return whether what `this_process` has named runs on this machine and is another; False where nobody can tell."""
    host, _, rest = process.partition("-")
    number, _, start = rest.partition("-")
    seen = host == _host() and number.isdecimal() and start.isdecimal() and start != "0"
    return seen and process != this_process() and _start_of(int(number)) == start


@functools.cache
def _host() -> str:
    """This machine in short, and the container in it: process ids mean nothing outside."""
    known: list[str | Path] = [platform.node()]
    for read in (Path("/etc/machine-id").read_text, Path("/proc/self/ns/pid").readlink):
        with suppress(OSError):
            known.append(read())
    return hashlib.blake2b(repr(known).encode(), digest_size=4).hexdigest()


def _is_gone(process: int, start: str) -> bool:
    """Return whether a process of this machine has ended; another one may have its id by now."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it is another user's
    now = _start_of(process)
    return "0" not in (start, now) and now != start


def _start_of(process: int) -> str:
    """When a process was started, in its system's ticks; "ended" for one that nobody has waited for, "0" if unknown."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "ended" if state in "ZX" else fields[18]


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all: the same tensors and metadata give the same bytes.

    safetensors itself writes the metadata in random order, and the file readable by its owner only.
    """
    from safetensors.torch import save  # imports torch, which scripts that only check their options do not wait for

    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    content = save(tensors, metadata=metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    with replacing(path) as temporary:
        temporary.write_bytes(_header(header) + content[start:])


def write_one_by_one(
    path: str | os.PathLike, like: Mapping[str, torch.Tensor], value: Callable[[str], torch.Tensor]
) -> None:
    """Write the safetensors file that `save_file` writes of all `value(name)`, with one of them in memory at a time.

    `like` has their shapes and dtypes, and may be on the meta device; raises `ValueError` for a value of another. The
    file grows in its place: it belongs into a folder that one is `replacing`.
    """
    import torch

    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    names, end = sorted(like, key=lambda name: (-like[name].itemsize, name)), 0
    for name in names:
        start, end = end, end + like[name].nbytes
        header[name] = {
            "dtype": _dtype_name(like[name].dtype),
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    with Path(path).open("wb") as file:
        file.write(_header(header))
        for name in names:
            tensor = value(name).detach().cpu().contiguous()
            if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not as announced")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as safetensors' headers have it."""
    import torch
    from safetensors.torch import save

    content = save({"": torch.empty(0, dtype=dtype)})
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[""]["dtype"]


def _header(header: dict) -> bytes:
    """Return the start of a safetensors file: how long the header is, and the header, padded."""
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write JSON that a person can read, whole or not at all; a path that is not UTF-8 is read back as it was."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON has the same escapes


def read_object(path: str | os.PathLike) -> dict:
    """Return the JSON object of a file; empty where it is missing or damaged.

    Raises `OSError` if it cannot be read now.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def write_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Write `checksums.json`: the SHA-256 of every file below `folder`, or of `names` beside those already listed.

    Call it last, and again after every change: a file that is not listed is not checked.
    """
    folder = Path(folder)
    known = {} if names is None else _listed(folder)
    found = (path for path in folder.rglob("*") if path.is_file() and not _TEMPORARY.fullmatch(path.name))
    names = [path.relative_to(folder).as_posix() for path in found] if names is None else names
    sums = known | {name: _sha256(folder / name) for name in names if name != CHECKSUMS_NAME}
    write_json(folder / CHECKSUMS_NAME, dict(sorted(sums.items())))


def forget_checksums(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Take `names` out of `checksums.json`, before they are replaced.

    Without it a process that ends before it has written the new sums would leave good files that look damaged.
    """
    path = Path(folder) / CHECKSUMS_NAME
    if path.exists():
        names = {*names}
        write_json(path, {name: value for name, value in _listed(path.parent).items() if name not in names})


def check_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Compare the files of `folder`, or only `names`, with its `checksums.json`; without that file all is well.

    Raises `Damaged` naming the first file that is missing or differs, and `OSError` for one that cannot be read now.
    """
    folder = Path(folder)
    sums = _read_checksums(folder)
    for name in sums if names is None else [name for name in names if name in sums]:
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name} is missing, though {CHECKSUMS_NAME} lists it")
        if _sha256(folder / name) != sums[name]:
            raise Damaged(
                f"{folder / name} is damaged: its SHA-256 is not the one in {CHECKSUMS_NAME} (which you may delete if "
                "you have changed the file yourself)"
            )


def _listed(folder: Path) -> dict[str, str]:
    """Return the checksums that a new list goes on from; a damaged list is replaced."""
    try:
        return _read_checksums(folder)
    except ValueError:
        return {}


def _read_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS_NAME
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {first_line(error)}") from error
    plain = isinstance(sums, dict) and all(isinstance(value, str) for value in sums.values())
    if not plain or any(Path(name).is_absolute() or ".." in Path(name).parts for name in sums):
        raise Damaged(f"{path} is damaged: it is no list of files and their SHA-256")
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_below(folder: Path) -> Iterator[Path]:
    """Every file and folder in a folder and below it, but for hidden folders and for what links lead to.

    Raises `OSError` for a folder that cannot be listed, where `rglob` passes over it; but for a disk's `lost+found`,
    which nobody else may list.
    """

    def fail(error: OSError) -> None:
        if Path(error.filename).name != "lost+found":
            raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in (*folders, *files))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
