"""Write files and directories atomically: under a temporary name next to the target, then renamed.

Functions import torch when they are called, because `--help` uses this module and should appear at once.
"""

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

from safetensors import safe_open

from .errors import first_line

if TYPE_CHECKING:
    import torch

CHECKSUMS_NAME = "checksums.json"
ABANDONED = 24 * 3600  # seconds after which `remove_leftovers` removes a temporary file of another machine
LONGEST_NAME = 50  # characters of a file's name that its temporary name contains; file systems allow 255 bytes

before_writing: list[Callable[[], None]] = []
"""Functions that `replacing` calls before it writes; a training process adds `folder_lock.check_held`."""

# Temporary names of `replacing`: the name, then machine, process, the process's start time, and a random part.
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}(?:\.old)?\.tmp")


class Damaged(ValueError):
    """A file is missing or its content is damaged; an existing file that cannot be read raises `OSError` instead."""


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename the file or directory created there to `path` at the end.

    Calls all functions in `before_writing` first. If the body raises an error, `path` is unchanged and the temporary
    file is removed; an `OSError` then names `path` instead of the temporary path. Several processes, also on several
    machines, may write the same path: the last one wins. `remove_leftovers` removes the files of killed processes.
    """
    for check in before_writing:
        check()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            # A directory cannot be renamed onto another one, so the old one is renamed first.
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
    """Yield temporary paths for a weights file and the file that describes it; both are replaced as in `replacing`.

    If the process is killed between the two replacements, weights without a description remain.
    """
    with replacing(description) as new_description, replacing(weights) as new_weights:
        yield new_description, new_weights
        description.unlink(missing_ok=True)  # it describes the old weights; the new weights are renamed first


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files that killed processes left directly in a directory.

    A temporary file of this machine is removed if its process has ended. Processes of other machines and containers
    cannot be checked, so their temporary files are removed if they have not been written to for `ABANDONED` seconds.
    """
    for path in Path(folder).glob(".*.tmp"):
        if found := _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):  # another process removes it too, or another user owns it
                old = time.time() - path.lstat().st_mtime > ABANDONED
                if has_ended(found[1]) if _can_be_checked(found[1]) else old:
                    remove(path)


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """Return a temporary path in the same directory, unique to this process."""
    writer = f"{this_process()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name[:LONGEST_NAME]}.{writer}{suffix}.tmp")


def this_process() -> str:
    """Return an identifier of this process for `has_ended`: machine, process id and start time."""
    return f"{_host()}-{os.getpid()}-{_start_of(os.getpid())}"


def has_ended(process: str) -> bool:
    """Return whether the process with this identifier from `this_process` has ended.

    Also works if another process has the same process id now. Returns False for a process of another machine.
    """
    _, number, start = process.split("-")
    if not _can_be_checked(process):
        return False
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # the process belongs to another user
    now = _start_of(int(number))
    return "0" not in (start, now) and now != start


def _can_be_checked(process: str) -> bool:
    return process.startswith(f"{_host()}-") and os.name == "posix"  # on Windows `os.kill` would end the process


def is_running(process: str) -> bool:
    """Return whether `process`, an identifier from `this_process`, is another process that runs on this machine."""
    host, _, rest = process.partition("-")
    number, _, start = rest.partition("-")
    seen = host == _host() and number.isdecimal() and start.isdecimal() and start != "0"
    return seen and process != this_process() and _start_of(int(number)) == start


@functools.cache
def _host() -> str:
    """Return a short hash that identifies this machine and container, within which process ids are unique."""
    known: list[str | Path] = [platform.node()]
    for read in (Path("/etc/machine-id").read_text, Path("/proc/self/ns/pid").readlink):
        with suppress(OSError):
            known.append(read())
    return hashlib.blake2b(repr(known).encode(), digest_size=4).hexdigest()


def _start_of(process: int) -> str:
    """Return a process's start time in clock ticks; "ended" for a zombie, "0" if unknown."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "ended" if state in "ZX" else fields[18]


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes.

    safetensors' own `save_file` writes metadata in random order, and makes the file readable by its owner only.
    """
    header, content = serialized(tensors, metadata)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    with replacing(path) as temporary:
        temporary.write_bytes(_header(header) + content)


def serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> tuple[dict, bytes]:
    """Return the header of a safetensors file, and the bytes of its tensors.

    Raises `ValueError` for a tensor on the meta device.
    """
    from safetensors.torch import save

    stored: dict[str, torch.Tensor] = {}
    places = set()
    for key, value in tensors.items():
        if value.is_meta:
            raise ValueError(f"{key} is on the meta device: load it, or disable offloading, first")
        value = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied weights that are trained in `modules_to_save`.
        stored[key] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    content = save(stored, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file; raises `ValueError` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
            return tensors, file.metadata() or {}
    except Exception as error:  # a damaged file fails with any kind of exception
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)}") from error


def write_one_by_one(
    path: str | os.PathLike, like: Mapping[str, torch.Tensor], value: Callable[[str], torch.Tensor]
) -> None:
    """Write a safetensors file of `value(name)` for every name in `like`, with one tensor in memory at a time.

    `like` gives shapes and dtypes and may be on the meta device. The file is written in place: use it inside
    `replacing`. Raises `ValueError` for a tensor of another shape or dtype.
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
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, other than in `like`")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in safetensors' headers."""
    import torch

    return serialized({"": torch.empty(0, dtype=dtype)})[0][""]["dtype"]


def _header(header: dict) -> bytes:
    """Return the first bytes of a safetensors file: the header's length, and the header as padded JSON."""
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write indented JSON atomically; paths that are not UTF-8 survive a round trip."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON has the same escapes


def read_object(path: str | os.PathLike) -> dict:
    """Return the JSON object of a file; empty if the file is missing or damaged.

    Raises `OSError` if the file exists but cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def write_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Write `checksums.json`, the list of SHA-256 checksums of every file below `folder`.

    With `names`, compute only the checksums of these files, and keep the other entries of the existing list. Call this
    after all files are written, and again after every change: a file that is not listed is not checked.
    """
    folder = Path(folder)
    known = {} if names is None else _listed(folder)
    found = (path for path in folder.rglob("*") if path.is_file() and not _TEMPORARY.fullmatch(path.name))
    names = [path.relative_to(folder).as_posix() for path in found] if names is None else names
    sums = known | {name: _sha256(folder / name) for name in names if name != CHECKSUMS_NAME}
    write_json(folder / CHECKSUMS_NAME, dict(sorted(sums.items())))


def forget_checksums(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Remove `names` from `checksums.json` before these files are replaced.

    Otherwise a process killed before it writes the new checksums would leave good files that look damaged.
    """
    path = Path(folder) / CHECKSUMS_NAME
    if path.exists():
        names = {*names}
        write_json(path, {name: value for name, value in _listed(path.parent).items() if name not in names})


def check_checksums(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Compare the files of `folder`, or only `names`, with `checksums.json`; without `checksums.json` do nothing.

    Raises `Damaged` naming the first file that is missing or differs, and `OSError` if a file cannot be read at the
    moment.
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
    """Return file name -> SHA-256 from `checksums.json`; empty if the file is missing or damaged."""
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
        raise Damaged(f"{path} is damaged: it is not a list of files and their SHA-256")
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_below(folder: Path) -> Iterator[Path]:
    """Yield every file and directory below a directory; skip hidden directories, and do not follow links.

    Raises `OSError` for a directory that cannot be listed; `rglob` would skip it. The only exception is a file system's
    `lost+found`, which only root can read and which is skipped.
    """

    def raise_error(error: OSError) -> None:
        """Raise the error of a folder that cannot be listed, except for `lost+found`."""
        if Path(error.filename).name != "lost+found":
            raise error

    for place, folders, files in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in (*folders, *files))


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
