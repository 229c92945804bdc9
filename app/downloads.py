"""List the files that a run has exported, and how to load each of them. This module does not import Gradio."""

import contextlib
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from reslora.export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from reslora.methods.registry import METHODS

from .bases import DEFAULT, PIPELINES, bundled
from .launcher import safe_name
from .runs import Run, RunError, Weights, pick

LARGEST = 2**30
"""Maximum size in bytes of a download through the browser."""
KINDS = {DIFFUSERS_FILE: "diffusers", KOHYA_FILE: "kohya, ComfyUI, A1111", COMFYUI_FILE: "ComfyUI"}
COMFYUI = 'Put it into ComfyUI/models/loras and choose it in the node "Load LoRA"'


@dataclass(frozen=True)
class Download:
    """A file or folder to download."""

    label: str
    root: Path
    """A file, or the folder that contains the files."""
    files: tuple[Path, ...]
    place: str
    """Absolute path of the file or folder."""
    use: str
    """How to load the download: lines of Python, or the folder of another tool to copy it to."""


def new_file(name: str) -> Path:
    """Return the path of a file with this name in a new temporary folder, which is removed with the application's."""
    return Path(tempfile.mkdtemp(prefix="file-")) / name


def downloads_of(run: Run) -> list[Download]:
    """Return all exported files and folders of a run; links to outside of the run's folder are left out."""
    exported = [weights for weights in run.weights() if weights.kind in ("file", "merged")]
    found = [one for one in (of_weights(run, weights) for weights in exported) if one.files]
    for method in () if run.unreadable else run.methods:
        if file := run.inside(method, LYCORIS_FILE):
            label, place = f"{METHODS[method].title}: {LYCORIS_FILE} (ComfyUI, Forge)", file.as_posix()
            found.append(Download(label, file, (file,), place, f"{COMFYUI}; in Forge: models/Lora."))
        files = files_below(run, method, "peft")
        if files and (root := run.inside(method, "peft")):
            place = root.as_posix()
            found.append(Download(f"{METHODS[method].title}: peft (PEFT)", root, files, place, peft_lines(run, place)))
    return found


def find(run: Run, label: object) -> Download:
    """Return the run's download with this label. Raises `RunError` if the run has none."""
    known = {one.label: one for one in downloads_of(run)}
    return pick(known, label, "This run has no such file; choose one from the list.")


def packed(run: Run, one: Download) -> Path:
    """Return the path of a copy to download; a folder becomes a zip file. Raises `RunError` above `LARGEST` bytes."""
    if sum(path.stat().st_size for path in one.files) > LARGEST:
        raise RunError(f"This download is larger than {LARGEST // 2**30} GB: copy the files from the path shown above.")
    name = safe_name("-".join(dict.fromkeys([run.name, one.root.parent.name, one.root.name.partition(".")[0]])))
    if one.root.is_dir():
        path = new_file(f"{name}.zip")
        # Not compressed: weights would not get smaller. Not strict: a copied file may have a time before 1980.
        with zipfile.ZipFile(path, "w", strict_timestamps=False) as archive:
            for file in one.files:
                archive.write(file, file.relative_to(one.root))
    else:
        path = new_file(f"{name}.safetensors")
        shutil.copyfile(one.root, path)
    return path


def of_weights(run: Run, weights: Weights) -> Download:
    """Return the download of a LoRA file or of merged weights."""
    place = weights.path.as_posix()
    if weights.kind == "merged":
        files = files_below(run, weights.method, weights.path.name)
        return Download(weights.label, weights.path, files, place, merged_lines(run, weights, place))
    kind, label = KINDS[weights.path.name], weights.label
    use = lora_lines(run, place)
    if kind != "diffusers":
        use = f"{COMFYUI}{'; in A1111 or Forge: models/Lora' if 'A1111' in kind else ''}.\n\n{use}"
    return Download(f"{label} ({kind})", weights.path, (weights.path,), place, use)


def files_below(run: Run, *parts: str) -> tuple[Path, ...]:
    """Return all files below a folder of the run, or no files if one of them is outside of the run's folder."""
    root, names = run.inside(*parts), []
    with contextlib.suppress(OSError):  # the folder has just been moved or removed
        names = [path.relative_to(root) for path in sorted(root.rglob("[!.]*"))] if root else []
    found = [run.inside(*parts, *name.parts) for name in names]
    return tuple(path for path in found if path.is_file()) if all(found) else ()


# -- how to load them --------------------------------------------------------------------------------------------------


def pipeline_line(run: Run, more: str = "") -> str:
    """Return the line of Python that loads the run's base pipeline; `more` is appended to the arguments."""
    named = run.word("pretrained_model_name_or_path") or DEFAULT
    base = Path(PIPELINES.get(bundled(named) or "", named)).as_posix()
    if base.endswith(".safetensors"):
        return f"pipeline = ...  # made of {base!r}"
    if (file := run.word("pretrained_transformer_file")) and not more:
        return f"pipeline = ...  # made of {base!r} with the transformer in {file!r}"
    more += "".join(f", {name}={value!r}" for name in ("revision", "variant") if (value := run.word(name)))
    return f"pipeline = DiffusionPipeline.from_pretrained({base!r}{more})"


def lora_lines(run: Run, place: str) -> str:
    """Return the lines of Python that load the LoRA file at `place`."""
    folder, _, name = place.rpartition("/")
    return (
        "from diffusers import DiffusionPipeline\n"
        f"{pipeline_line(run)}\n"
        f"pipeline.load_lora_weights({folder!r}, weight_name={name!r})"
    )


def peft_lines(run: Run, place: str) -> str:
    """Return the lines of Python that load the folder `place`, which PEFT has saved."""
    part = "transformer" if any(run.inside(method, "transformer") for method in run.methods) else "unet"
    return (
        "from diffusers import DiffusionPipeline; from peft import PeftModel\n"
        f"{pipeline_line(run)}\n"
        f"pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, {place!r})"
    )


def merged_lines(run: Run, weights: Weights, place: str) -> str:
    """Return the lines of Python that load the merged weights in the folder `place`."""
    part = weights.path.name
    pipeline = pipeline_line(run, f", {part}={part}")
    return (
        f"from diffusers import AutoModel, DiffusionPipeline\n{part} = AutoModel.from_pretrained({place!r})\n{pipeline}"
    )
