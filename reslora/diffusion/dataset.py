"""Any source of images and captions as one `datasets.Dataset`; nothing but file headers is read yet."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import PIL.Image

from ..errors import InvalidArgument, first_line
from .arguments import Flags
from .images import SUFFIXES, Source, image_size, open_image
from .seeds import derive, shuffled
from .settings import clean

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
EDGE = 4096  # bytes of a file's head and tail that its fingerprint reads
FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), "captions": datasets.List(datasets.Value("string"))}
)


@dataclass(frozen=True)
class ImageDataset:
    """Images and their captions, in an order that is part of the run."""

    rows: datasets.Dataset
    """`image`: `{"bytes", "path"}`; `captions`: a list of strings."""
    captions: Sequence[Sequence[str]]
    """The captions of each image, in memory: reading them from a row would read its image too."""
    left_out: tuple[str, ...] = ()
    """Images that cannot be used, each with the reason."""
    notes: tuple[str, ...] = ()
    """What was passed over, a line each."""
    square: bool = True
    """Whether all images are."""
    fingerprint: str = ""
    """The content in short: captions, and size, head and tail of each image."""
    content: str = ""
    """The same without the captions."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int], left_out: Sequence[str] = ()) -> ImageDataset:
        """Some of the images; `left_out` says why the others are not among them."""
        captions = [self.captions[index] for index in indices]
        rows, left_out = self.rows.select(indices), (*self.left_out, *left_out)
        return dataclasses.replace(self, rows=rows, captions=captions, left_out=left_out)

    def source(self, index: int) -> Source:
        """The file of an image, or its content."""
        image = self.rows[index]["image"]
        return image["bytes"] or image["path"]

    def open(self, index: int) -> PIL.Image.Image:
        """The image as 8-bit RGB."""
        return open_image(self.source(index))


@dataclass
class Found:
    """What a folder or dataset holds, before it is known which of it can be used."""

    rows: datasets.Dataset
    problems: dict[int, str]
    """What is wrong with the caption of a row."""
    notes: list[str]


def load_images(flags: Flags) -> ImageDataset:
    """The images and captions that the flags name, without those that cannot be used (refused with --strict)."""
    folder = Path(flags.dataset_name or flags.train_data_dir)
    found = (read_folder(folder, flags) if folder.is_dir() else None) or read_dataset(flags)
    keep, left_out, square, marks = [], [], True, []
    for index, row in enumerate(found.rows):
        source = row["image"] and (row["image"]["bytes"] or row["image"]["path"])
        size = image_size(source) if source else "no image"
        problem = (
            found.problems.get(index) or _caption_problem(row["captions"]) or (size if isinstance(size, str) else "")
        )
        if problem:
            name = source if isinstance(source, str) else f"image {index}"
            if flags.strict:
                raise InvalidArgument(f"--strict {name}", problem, "repair or remove it, or leave --strict out")
            left_out.append(f"{name}: {problem}")
            continue
        keep.append(index)
        marks.append(content_mark(source))
        square &= size[0] == size[1]
    if not keep:
        example = f" (for example {left_out[0]})" if left_out else ""
        fix = "add a metadata.jsonl, or .txt captions beside the images"
        raise InvalidArgument(data_flag(flags), f"no image with a caption in it{example}", fix)
    if flags.max_train_samples and flags.max_train_samples < len(keep):
        chosen = shuffled(len(keep), flags.seed, "max_train_samples")[: flags.max_train_samples]
        keep, marks = [keep[i] for i in chosen], [marks[i] for i in chosen]
    rows = found.rows.select(keep) if keep != list(range(len(found.rows))) else found.rows
    captions = list(rows["captions"])
    fingerprint, content = (f"{len(rows)} images, {derive(*key):x}" for key in ((captions, marks), (marks,)))
    return ImageDataset(rows, captions, tuple(left_out), tuple(found.notes), square, fingerprint, content)


def _caption_problem(captions: Sequence) -> str:
    # A missing caption is a mistake; an empty one is a choice (the image then trains the empty caption).
    return "" if captions and all(isinstance(caption, str) for caption in captions) else "no caption"


def content_mark(source: Source) -> str:
    """Size and a hash of the head and the tail of a file: enough to notice that another one is in its place."""
    if isinstance(source, bytes):
        size, edges = len(source), source[:EDGE] + source[-EDGE:]
    else:
        with Path(source).open("rb") as file:
            head = file.read(EDGE)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - EDGE))
            edges = head + file.read(EDGE)
    return f"{size}:{hashlib.blake2b(edges, digest_size=8).hexdigest()}"


def data_flag(flags: Flags) -> str:
    """The flag that names the data, with its value."""
    return f"--dataset_name {flags.dataset_name}" if flags.dataset_name else f"--train_data_dir {flags.train_data_dir}"


# -- folders -----------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, flags: Flags) -> Found | None:
    """A folder with metadata.jsonl or .csv, or a .txt caption beside each image; None for what `datasets` reads."""
    output, everything = Path(flags.output_dir).absolute(), sorted(folder.rglob("*"))
    own = output != folder.absolute()  # samples of this very run are no training images
    files = [
        path
        for path in everything
        if path.suffix.lower() in SUFFIXES and not (own and path.absolute().is_relative_to(output))
    ]
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None and _has_file_names(metadata):
        found = read_metadata(metadata, flags)
        listed = {os.path.normpath(image["path"]) for image in found.rows["image"]}
        unlisted = sum(os.path.normpath(path) not in listed for path in files)
        found.notes += [f"{unlisted} images are not listed in {metadata.name}"] if unlisted else []
        return _with_folder_notes(found, files, everything)
    if any(path.name in METADATA for path in everything):
        return None
    if not any(path.with_suffix(".txt").is_file() for path in files):
        if any(path.suffix == ".parquet" for path in everything) or flags.dataset_name:
            return None
        what = "no images" if not files else f"{len(files)} images without captions (class folders are not captions)"
        fix = f"add a metadata.jsonl (file_name, {flags.caption_column}), or .txt captions beside the images"
        raise InvalidArgument(data_flag(flags), what, fix)
    texts = [path.with_suffix(".txt") for path in files]
    captions = [read_caption(text) if text.is_file() else [] for text in texts]
    return _with_folder_notes(_as_found(files, captions), files, everything)


def _with_folder_notes(found: Found, files: list[Path], everything: list[Path]) -> Found:
    links = sum(path.is_symlink() and path.is_dir() for path in everything)
    repeated = sum(bool(re.fullmatch(r"\d+_.+", path.parent.name)) for path in files)
    if links:
        found.notes.append(f"{links} folders are symbolic links, which are not searched")
    if repeated:
        found.notes.append(f"{repeated} images are in kohya's repeat folders (10_name): repeats are not applied")
    return found


def _as_found(files: Sequence[Path], captions: Sequence[list | str]) -> Found:
    """Rows of files; a string in the place of the captions says what is wrong with them."""
    problems = {index: value for index, value in enumerate(captions) if isinstance(value, str)}
    texts = [[clean(c) for c in value if isinstance(c, str)] if isinstance(value, list) else [] for value in captions]
    images = [{"path": str(path), "bytes": None} for path in files]
    return Found(datasets.Dataset.from_dict({"image": images, "captions": texts}, features=FEATURES), problems, [])


def read_caption(path: Path) -> list[str] | str:
    """The caption of a .txt file, or what is wrong with it; Windows' editors write UTF-16 and byte order marks."""
    content = path.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return [content.decode("utf-16" if marked else "utf-8-sig").strip()]
    except UnicodeDecodeError:
        return "its caption is not UTF-8"


def _has_file_names(metadata: Path) -> bool:
    """Whether its images are in a column file_name: `datasets` knows other names, and reads Parquet."""
    if metadata.suffix != ".csv":
        return metadata.suffix in ROWS
    with metadata.open(encoding="utf-8-sig", errors="replace", newline="") as file, suppress(csv.Error):
        return "file_name" in next(csv.reader(file), [])
    return False


def read_metadata(path: Path, flags: Flags) -> Found:
    """Rows of metadata.jsonl or metadata.csv: file_name, and a caption, or in JSON a list of captions.

    `datasets` reads these layouts too, but it does not say which line is wrong.
    """
    files, captions, where = [], [], f"{data_flag(flags)}, {path.name}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{where} byte {error.start}", "not UTF-8", "save the file as UTF-8") from None
    for line, row in ROWS[path.suffix](text, where):
        file, caption = _metadata_row(path.parent, row, f"{where} line {line}", flags)
        files.append(file)
        captions.append(caption if isinstance(caption, list) else [caption])
    problems = [value if all(isinstance(c, str) for c in value) else [] for value in captions]
    return _as_found(files, problems)


def _json_rows(text: str, where: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                raise InvalidArgument(f"{where} line {number}", "is no JSON", "correct it") from None


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, object]]:
    """An empty cell is none."""
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in rows:
            if any(row.pop(None, ())):
                fix = "put captions with commas into double quotes"
                raise InvalidArgument(f"{where} line {rows.line_num}", "has more cells than the first line", fix)
            yield rows.line_num, {column: cell or None for column, cell in row.items()}
    except csv.Error as error:
        line = rows.reader.line_num
        raise InvalidArgument(f"{where} line {line}", f"cannot be read ({error})", "correct it") from None


ROWS = {".csv": _csv_rows, ".jsonl": _json_rows}


def _metadata_row(folder: Path, row: object, where: str, flags: Flags) -> tuple[Path, object]:
    try:
        path = folder / row["file_name"]
        inside = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, KeyError, TypeError, OSError, RuntimeError):
        raise InvalidArgument(where, "names no image as its file_name", "correct it") from None
    if flags.caption_column not in row:
        problem = f"{where} has the columns {', '.join(sorted(row))}"
        raise InvalidArgument(f"--caption_column {flags.caption_column}", problem, "name one of these")
    if not inside:
        raise InvalidArgument(where, f"names {row['file_name']}, outside the folder", "move the image into it")
    return path, row[flags.caption_column]


# -- the datasets library ----------------------------------------------------------------------------------------------


def read_dataset(flags: Flags) -> Found:
    """A dataset of the hub, or a folder in one of the other layouts the datasets library knows."""
    rows = _load_split(flags)
    for flag, column in (("--image_column", flags.image_column), ("--caption_column", flags.caption_column)):
        if column not in rows.column_names:
            problem = f"the columns are {', '.join(rows.column_names)}"
            raise InvalidArgument(f"{flag} {column}", problem, "name one of these")
    try:
        images = rows.select_columns([flags.image_column])
        if flags.image_column != "image":
            images = images.rename_column(flags.image_column, "image")
        images = images.cast_column("image", datasets.Image(decode=False))  # decoded by open_image, which does it right
    except Exception as error:  # whatever arrow raises
        problem = f"holds no images ({first_line(error)})"
        raise InvalidArgument(f"--image_column {flags.image_column}", problem, "name another column") from None
    captions = [value if isinstance(value, list) else [value] for value in rows[flags.caption_column]]
    if captions and not any(isinstance(caption, str) for options in captions for caption in options):
        raise InvalidArgument(f"--caption_column {flags.caption_column}", "holds no text", "name another column")
    texts = [[clean(c) for c in value] if all(isinstance(c, str) for c in value) else [] for value in captions]
    column = datasets.Dataset.from_dict(
        {"captions": texts}, features=datasets.Features({"captions": FEATURES["captions"]})
    )
    return Found(datasets.concatenate_datasets([images, column], axis=1), {}, [])


def _load_split(flags: Flags) -> datasets.Dataset:
    datasets.disable_progress_bars()
    try:
        if flags.dataset_name:
            splits = datasets.load_dataset(
                flags.dataset_name, flags.dataset_config_name, cache_dir=flags.cache_dir, data_dir=flags.train_data_dir
            )
        else:
            folder = Path(flags.train_data_dir)
            shards = any(path.name not in METADATA for path in folder.rglob("*.parquet"))
            source = {"path": str(folder)} if shards else {"path": "imagefolder", "data_dir": str(folder)}
            splits = datasets.load_dataset(**source, cache_dir=flags.cache_dir)
    except Exception as error:  # whatever a hub, a network or a parser can raise
        problem = f"cannot be loaded ({first_line(error)})"
        raise InvalidArgument(data_flag(flags), problem, "check the name, the connection and the layout") from None
    return splits["train"] if "train" in splits else next(iter(splits.values()))
