"""Read any source of images and captions into one `datasets.Dataset`; of image files, only the headers are read."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import PIL.Image
from huggingface_hub.constants import HF_HUB_CACHE

from ...content_hash import Content, content_mark
from ...errors import InvalidArgument, RunFailed, first_line
from ...formatting import pluralize
from ...io import all_below
from ...options.images import DataOptions, ModelOptions, OutputOptions, TrainingOptions
from ...options.prompts import clean
from ..generators import derive, shuffled
from .buckets import kept
from .caption_files import CAPTIONS, caption_files, caption_in, read_caption
from .images import UNREADABLE, image_size, is_image, is_masked, mask_problem, open_image, open_masked
from .listing import files_of, hidden_images, hidden_images_line
from .shards import check_archives, training_files, training_split
from .size import Size
from .tables import (
    REFERENCE,
    ROWS,
    check_inside,
    file_inside,
    has_file_names,
    names_files,
    reference_column,
    reference_columns,
    unlisted,
)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("dataset_dict.json", "state.json")  # `save_to_disk` writes one of them into the folder
REPEATED = re.compile(r"(\d+)_(.*)")  # kohya's folder names: repeats per epoch, and the caption
MOST_REPEATS = 1000  # in a folder's name; a larger number is probably a year or a date
ALIKE = 0.98  # warn if the crop to the image's aspect ratio keeps less than this fraction of a reference image
LEAST_SIDE = 8  # in pixels: an autoencoder encodes 8 x 8 pixels into one latent
ONE_BY_ONE = "name the folders one by one with --train_data_dir, none inside another"
GROUP = "group"
"""Column of metadata files with the group of an image: images of one session or subject, which resemble each other."""
COLUMNS = ("image_column", "caption_column", "conditioning_image_column")
"""Options that name columns. metadata.jsonl and .csv have a caption column and a reference column; caption files have
no columns.
"""
FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), "captions": datasets.List(datasets.Value("string"))}
)


@dataclass(frozen=True)
class ImageDataset:
    """Images and their captions. The random choices of a run depend on the order of the images."""

    rows: datasets.Dataset
    """Columns `image`, `{"bytes", "path"}`; `captions`, a list of strings.

    With --masked_loss also `mask`, and with reference images also their columns, all like `image`.
    """
    captions: Sequence[Sequence[str]]
    """The captions of each image, in memory, because reading a row would read its image too."""
    left_out: tuple[str, ...] = ()
    """Images that cannot be used, each with the reason."""
    notes: tuple[str, ...] = ()
    """Lines to print about files that were not read."""
    sizes: Sequence[tuple[int, int]] = ()
    """Width and height of each image after its EXIF rotation, in pixels."""
    marks: Sequence[str] = ()
    """Hash of each image's content."""
    repeats: int = 1
    """How often an epoch uses each image."""
    weight: float = 1.0
    """Factor that the loss of each sample is multiplied by."""
    of_class: bool = False
    """Whether the images are class images."""
    masked: Sequence[bool] = ()
    """Whether each image has a mask or an alpha channel; empty without --masked_loss."""
    groups: Sequence[str] = ()
    """The group of each image, from the column GROUP of the metadata; empty without that column."""
    columns: Sequence[str] = ()
    """The options, such as image_column, whose columns were read."""
    label: str = ""
    """Name of this source in the log; empty if there is only one source with the default repeats and weight."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def paired(self) -> bool:
        """Whether each image has reference images, which an edit model changes into the image."""
        return REFERENCE in self.rows.column_names

    @property
    def fingerprint(self) -> str:
        """The number of images, and hashes of their content, captions, repeats and weight."""
        repeats = f", {self.repeats} times" if self.repeats != 1 else ""
        weight = f", weight {self.weight:g}" if self.weight != 1 else ""
        return f"{len(self)} images, content {derive(self.captions, self.marks):x}{repeats}{weight}"

    def select(self, indices: Sequence[int], left_out: Sequence[str] = ()) -> ImageDataset:
        """Return the images at `indices`; `left_out` adds reasons why the other images are left out."""

        def selected(values: Sequence) -> Sequence:
            """Return the values at `indices`; empty if no image has a value."""
            return [values[i] for i in indices] if values else ()

        return dataclasses.replace(
            self, rows=self.rows.select(indices), captions=selected(self.captions), sizes=selected(self.sizes),
            marks=selected(self.marks), masked=selected(self.masked), groups=selected(self.groups),
            left_out=(*self.left_out, *left_out),
        )  # fmt: skip

    def open(self, index: int) -> PIL.Image.Image:
        """Return the image as 8-bit RGB."""
        return open_image(_source(self._unchanged(index)))

    def open_masked(self, index: int) -> tuple[PIL.Image.Image, PIL.Image.Image]:
        """Return the image as 8-bit RGB, and its mask as 8-bit grayscale."""
        row = self._unchanged(index)
        return open_masked(_source(row), _source(row, "mask"))

    def open_references(self, index: int) -> list[PIL.Image.Image]:
        """Return the reference images of an image as 8-bit RGB."""
        row = self._unchanged(index)
        return [open_image(_source(row, column)) for column in reference_columns(row)]

    def _unchanged(self, index: int) -> dict:
        """Return an image's row; raises `RunFailed` if a file's hash differs from the one in `marks`."""
        row = self.rows[index]
        marks = self.marks[index].split("+") if self.marks else ()
        for source, mark in zip(_sources(row), marks, strict=bool(marks)):
            if content_mark(source) != mark:
                name = self.name(index) if isinstance(source, bytes) else source
                raise RunFailed(f"{name} has changed since the run began; restore it, and resume")
        return row

    def name(self, index: int) -> str:
        """Return the path of an image's file, or `image N`."""
        return self.rows[index]["image"]["path"] or f"image {index}"


@dataclass
class Found:
    """The content of a folder or dataset before unusable images are removed."""

    rows: datasets.Dataset
    problems: dict[int, str]
    """The problem with the caption or the reference image of a row, by the row's index."""
    notes: list[str]
    metadata: Path | None = None
    """The metadata file that the rows were read from, in the file's order; None if the captions come from elsewhere."""
    files: Sequence[Path] = ()
    """The image file of each row, if a folder was read. A path that is not UTF-8 is changed in `rows`, but not here."""
    groups: Sequence[str] = ()
    """The group of each row; empty if the metadata have no column GROUP."""
    places: Sequence[Path] = ()
    """The folders in which the image files of the rows must be. Empty if this was checked already."""

    def size(self, index: int, row: dict) -> tuple[int, int] | str:
        """Return width and height of a usable row's image, or a string that says why the row cannot be used."""
        source = _source(row)
        size = image_size(source) if source else "no image"
        problem = self.problems.get(index) or ("" if any(map(str.strip, row["captions"])) else "no caption")
        if problem or isinstance(size, str):
            return problem or size
        if min(size) < LEAST_SIDE:
            return f"{size[0]} x {size[1]} pixels, less than a latent ({LEAST_SIDE} x {LEAST_SIDE})"
        others = [(source := _source(row, column)) and image_size(source) for column in reference_columns(row)]
        problems = [f"its reference image: {other or 'missing'}" for other in others if not isinstance(other, tuple)]
        return mask_problem(_source(row, "mask"), size) or next(iter(problems), size)


def usable(
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    output: OutputOptions,
    caption: str | None = None,
    deep: bool = True,
) -> ImageDataset:
    """Return the usable images of one folder or dataset with their sizes.

    `caption` is the caption of images without a caption file. If `deep` is false, subfolders are not read. Raises
    `RunFailed` if an image cannot be read at present (memory, disk, network). Raises `InvalidArgument` if no image can
    be used or, with --strict, if any image cannot be used.
    """
    folder = Path(data.dataset_name or data.train_data_dir[0])
    in_folder = read_folder(folder, data, training, output, caption, deep) if folder.is_dir() else None
    found = in_folder or read_dataset(model, data, training, output)
    columns = COLUMNS if in_folder is None else COLUMNS[1:] if in_folder.metadata else ()
    for number, partners in enumerate(data.conditioning_data_dir):
        found = with_partners(found, folder, Path(partners), reference_column(number))
    keep, left_out, sizes, masked, others = [], [], [], [], []
    for index, row in enumerate(found.rows):
        check_inside(row, found.places, f"{data_flag(data)} row {index}")
        source, size = _source(row), found.size(index, row)
        if isinstance(size, str):
            name = source if isinstance(source, str) else f"image {index}"
            if UNREADABLE in size:
                raise RunFailed(f"{name}: {size}; restore it, or run the command again later")
            if data.strict:
                raise InvalidArgument(f"--strict {name}", size, "repair or remove it, or leave --strict out")
            left_out.append(f"{name}: {size}")
            continue
        keep.append(index)
        sizes.append(size)
        masked += [is_masked(source, _source(row, "mask"))] if training.masked_loss else []
        sides = [image_size(_source(row, column)) for column in reference_columns(row)]
        others += [source for side in sides if isinstance(side, tuple) and kept(side, Size(size[1], size[0])) < ALIKE]
    if not keep:
        example = f" (for example {left_out[0]})" if left_out else ""
        fix = "add a metadata.jsonl, or .txt captions next to the images"
        raise InvalidArgument(data_flag(data), f"no image with a caption in it{example}", fix)
    if others:
        example = others[0] if isinstance(others[0], str) else "the first of them"
        what = f"{pluralize(len(others), 'reference image')} cropped to the aspect ratio of the image"
        found.notes.append(f"warning: {what}, such as that of {example}")
    rows = found.rows.select(keep)
    groups = [found.groups[index] for index in keep] if found.groups else ()
    return ImageDataset(
        rows, list(rows["captions"]), tuple(left_out), tuple(found.notes), sizes, masked=masked, groups=groups,
        columns=columns,
    )  # fmt: skip


def sample(folders: Sequence[ImageDataset], data: DataOptions, training: TrainingOptions) -> list[ImageDataset]:
    """Choose at most --max_train_samples images at random; return the folders with the hashes of their images.

    The limit applies to all folders together.
    """
    places = [(number, index) for number, images in enumerate(folders) for index in range(len(images))]
    if data.max_train_samples and data.max_train_samples < len(places):
        places = [
            places[i] for i in shuffled(len(places), training.seed, "max_train_samples")[: data.max_train_samples]
        ]
        folders = [images.select([i for of, i in places if of == number]) for number, images in enumerate(folders)]
    return [
        dataclasses.replace(images, marks=["+".join(map(content_mark, _sources(row))) for row in images.rows])
        for images in folders
    ]


def _sources(row: dict) -> list[Content]:
    """Return the existing ones among a row's image, mask and reference images, each as a path or bytes."""
    return [source for column in ("image", "mask", *reference_columns(row)) if (source := _source(row, column))]


def _source(row: dict, column: str = "image") -> Content:
    """Return the path or the bytes of a row's image; empty if the row has neither."""
    image = row.get(column)
    return (image and (image["path"] if image["bytes"] is None else image["bytes"])) or b""


def data_flag(options: DataOptions) -> str:
    """Return the option that names the data, with its value."""
    folders = " ".join(options.train_data_dir)
    return f"--dataset_name {options.dataset_name}" if options.dataset_name else f"--train_data_dir {folders}"


# -- folders -----------------------------------------------------------------------------------------------------------


def read_folder(
    folder: Path,
    data: DataOptions,
    training: TrainingOptions,
    output: OutputOptions,
    caption: str | None = None,
    deep: bool = True,
) -> Found | None:
    """Read a folder with metadata.jsonl or .csv, or with caption files; return None for other layouts."""
    everything = files_of(folder, data, output, deep)
    files = list(filter(is_image, everything))
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    layout = layout_of(everything, folder) or data.dataset_name
    if metadata is not None and has_file_names(metadata, layout):
        found = dataclasses.replace(read_metadata(metadata, data, training), metadata=metadata)
        missing = len(unlisted(found.rows, files))
        found.notes += [f"{pluralize(missing, 'image')} not listed in {metadata.name}"] if missing else []
        if beside := sum(bool(caption_files(path)) for path in files):
            unread = f"a caption file, which is not read: the captions are those of {metadata.name}"
            found.notes.append(f"{pluralize(beside, 'image')} with {unread}")
        return _with_folder_notes(found, folder, data, everything, deep)
    if any(path.name in METADATA for path in everything):
        return None
    texts = list(map(caption_files, files))
    if not any(texts) and (caption is None or not files):
        if layout:
            return None
        without = "without captions (folder names are not captions)"
        what = f"{pluralize(len(files), 'image')} {without}" if files else "no images"
        fix = f"add a metadata.jsonl (file_name, {data.caption_column}), or .txt captions next to the images"
        if above := above_repeated(files):
            fix = f"give {above[0]}, in which kohya's folders (10_name) set repeats and captions, or {fix}"
        raise InvalidArgument(data_flag(data), what, f"{fix}; --dataset_name reads other layouts")
    otherwise = [] if caption is None else [caption]
    found = _as_found(files, [read_caption(beside[0]) if beside else otherwise for beside in texts])
    if twice := sum(len(beside) > 1 for beside in texts):
        found.notes.append(f"{pluralize(twice, 'image')} with a .txt and a .caption file: the .txt is read")
    return _with_folder_notes(found, folder, data, everything, deep)


def _with_folder_notes(found: Found, folder: Path, options: DataOptions, everything: list[Path], deep: bool) -> Found:
    found.notes += hidden_images_line(unlisted(found.rows, hidden_images(folder)))
    if not deep:
        folders = sum(path.is_dir() for path in everything)
        found.notes += [f"{folder}: {pluralize(folders, 'subfolder')} not read"] if folders else []
        return found
    links = sum(path.is_symlink() and path.is_dir() for path in everything)
    repeated = above_repeated(list(filter(is_image, everything)))
    found.notes += [f"not searched: {pluralize(links, 'symbolic link')} to folders"] if links else []
    of_class = options.class_data_dir is not None and folder == Path(options.class_data_dir)  # have computed repeats
    if repeated and not of_class:
        found.notes.append(
            f"{pluralize(len(repeated), 'image')} in kohya's folders (10_name), whose repeats are not used: to use "
            f"them, give {repeated[0]} as the folder of images, without a metadata file"
        )
    return found


def with_partners(found: Found, folder: Path, partners: Path, column: str) -> Found:
    """Add a reference image to each row, in `column`: the file in the folder `partners` with the name of the image.

    Suffixes may differ. Raises `InvalidArgument` if the rows were not read from files.
    """
    if not found.files:
        fix = "name a column with --conditioning_image_column instead"
        raise InvalidArgument(f"--conditioning_data_dir {partners}", f"{folder} has no image files", fix)
    files = sorted(filter(is_image, all_below(partners))) if partners.is_dir() else []
    there = {path.relative_to(partners).with_suffix(""): path for path in files}
    names = [path.relative_to(folder).with_suffix("") for path in found.files]
    lacking = {number: name for number, name in enumerate(names) if name not in there}
    problems = {
        number: f"no reference image {partners / name} (.png, .jpg, ...): add it, or remove the image"
        for number, name in lacking.items()
    }
    notes = list(found.notes)
    if alone := [str(path) for name, path in there.items() if name not in set(names)]:
        notes.append(
            f"warning: {pluralize(len(alone), 'reference image')} without an image of the same name in {folder}: "
            f"remove {alone[0]}, or add its image"
        )
    cells, unnamed = _files_column([there.get(name) for name in names])
    rows = found.rows.add_column(column, cells, feature=FEATURES["image"])
    return dataclasses.replace(found, rows=rows, problems=unnamed | problems | found.problems, notes=notes)


def above_repeated(files: Sequence[Path]) -> list[Path]:
    """Return `folder` for each image `folder/10_name/1.png`, that is, for each image in one of kohya's folders."""
    named = [(path, REPEATED.fullmatch(path.parent.name)) for path in files]
    return [path.parent.parent for path, match in named if match and 0 < int(match[1]) <= MOST_REPEATS]


def _as_found(
    files: Sequence[Path], captions: Sequence[list | str], others: Mapping[str, Sequence[Path | None]] | None = None
) -> Found:
    """Return one row per file; `captions` has a list of captions per file, or the reason why they cannot be used.

    `others`: the files of further columns, such as masks; a column without any file is left out.
    """
    problems, texts = _sorted_out(captions)
    columns: dict[str, list] = {"captions": texts}
    features = {"captions": FEATURES["captions"]}
    for name, paths in ({"image": files} | dict(others or {})).items():
        if any(paths) or name != "mask":
            columns[name], unnamed = _files_column(paths)
            features[name] = FEATURES["image"]
            problems |= unnamed
    return Found(datasets.Dataset.from_dict(columns, datasets.Features(features)), problems, [], files=files)


def _files_column(paths: Sequence[Path | None]) -> tuple[list[dict | None], dict[int, str]]:
    """Return the column of these files, and a problem for each path that is not UTF-8, because Arrow requires UTF-8."""
    names = [path and clean(str(path)) for path in paths]
    problems = {
        index: "its path is not UTF-8" for index, name in enumerate(names) if name and name != str(paths[index])
    }
    return [{"path": name, "bytes": None} if name else None for name in names], problems


def read_metadata(path: Path, data: DataOptions, training: TrainingOptions) -> Found:
    """Read metadata.jsonl or metadata.csv: `file_name`, a caption (in JSON also a list of captions), optionally a mask.

    `datasets` reads these layouts too, but its errors do not name the line.
    """
    files, captions, lines, groups = [], [], [], list[str]()
    where = f"{data_flag(data)}, {path.name}"
    others: dict[str, list[Path | None]] = {ours: [] for ours in others_of(data, training)}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{where} byte {error.start}", "not UTF-8", "save the file as UTF-8") from None
    for line, row in ROWS[path.suffix](text, where):
        place, row = f"{where} line {line}", row if isinstance(row, dict) else {}
        files.append(file_inside(path.parent, row.get("file_name"), place, "file_name"))
        lines.append(f"line {line}")
        groups.append(str(row.get(GROUP) or ""))
        references = (("conditioning_image", column) for column in data.conditioning_image_column)
        for flag, column in (("caption", data.caption_column), *references):
            if column not in row:
                problem = f"{place} has the columns {', '.join(map(repr, sorted(row)))}"
                raise InvalidArgument(f"--{flag}_column {column}", problem, "name one of these")
        caption = row[data.caption_column]
        texts = caption if isinstance(caption, list) else [caption]
        captions.append(texts if all(isinstance(text, str) for text in texts) else [])
        for ours, column in others_of(data, training).items():
            named = row.get(column)
            others[ours].append(file_inside(path.parent, named, place, column) if named else None)
    _check_listed_once(files, where, lines)
    if any(groups) and not all(groups):
        place = lines[groups.index("")]
        raise InvalidArgument(
            f"{where} {place}", f"no {GROUP}, but other images have one", "fill it in, or remove the column"
        )
    return dataclasses.replace(_as_found(files, captions, others), groups=groups if any(groups) else ())


def _check_listed_once(files: Sequence[Path], where: str, lines: Sequence[str]) -> None:
    """Raise `InvalidArgument` for a file that two lines or rows of a table name."""
    first: dict[str, str] = {}
    for file, line in zip(files, lines, strict=True):
        if (before := first.setdefault(os.path.normpath(file), line)) != line:
            fix = "keep one of them; in JSON, text may be a list of captions"
            raise InvalidArgument(f"{where} {line}", f"names {file}, as {before} does", fix)


def others_of(data: DataOptions, training: TrainingOptions) -> dict[str, str]:
    """Return the columns of masks and reference images: a dict of names in `Found.rows` to names in the data."""
    masks = {"mask": "mask"} if training.masked_loss else {}
    return masks | {reference_column(number): name for number, name in enumerate(data.conditioning_image_column)}


# -- the datasets library ----------------------------------------------------------------------------------------------


def layout_of(everything: Sequence[Path], folder: Path) -> str | None:
    """Return the layout in which `datasets` reads a folder: "saved", "parquet", "webdataset" or "json".

    None means that the folder has none of these layouts, or that it is an `imagefolder`.
    """
    if any((folder / name).is_file() for name in SAVED):
        return "saved"
    suffixes = {path.suffix for path in everything if path.name not in METADATA}
    images = {path.with_suffix("") for path in everything if is_image(path)}
    if ".parquet" in suffixes:
        return "parquet"
    if any(path.name in METADATA for path in everything):
        return None
    if ".tar" in suffixes and not images:
        return "webdataset"
    tables = [path for path in everything if path.suffix in (".json", ".jsonl")]
    # JSON files that are named like images are not tables.
    return "json" if tables and not any(path.with_suffix("") in images for path in tables) else None


def read_dataset(model: ModelOptions, data: DataOptions, training: TrainingOptions, output: OutputOptions) -> Found:
    """Read a dataset of the Hub, or a folder in another layout that the datasets library knows."""
    folder = Path(data.dataset_name or data.train_data_dir[0])
    everything = files_of(folder, data, output) if folder.is_dir() else []
    layout = layout_of(everything, folder)
    notes: list[str] = []
    rows = _load_split(model, data, folder, layout, everything, notes)
    image, caption = _columns(rows, layout, data, notes)
    problems, texts = _sorted_out([_captions(value, layout == "webdataset") for value in rows[caption]])
    if texts and not any(text.strip() for own in texts for text in own):
        fix = "name another column" + (", or write captions into .txt files" if layout == "webdataset" else "")
        raise InvalidArgument(f"--caption_column {caption}", "holds no text", fix)
    others = {ours: name for ours, name in others_of(data, training).items() if name in rows.column_names}
    groups = list(map(str, rows[GROUP])) if GROUP in rows.column_names else []
    if folder.is_dir() and (layout == "json" or names_files(rows, image)):

        def file_of_row(number: int, column: str) -> Path:
            """Return the file that a row names in `column`."""
            return file_inside(folder, rows[number][column], f"{data_flag(data)} row {number}", column)

        files = [file_of_row(number, image) for number in range(len(rows))]
        _check_listed_once(files, data_flag(data), [f"row {number}" for number in range(len(rows))])
        named = {
            ours: [file_of_row(number, column) if name else None for number, name in enumerate(rows[column])]
            for ours, column in others.items()
        }
        return dataclasses.replace(_as_found(files, texts, named), notes=notes, groups=groups)
    try:
        images = rows.select_columns([image, *others.values()])
        images = images.rename_columns({image: "image"} | {column: ours for ours, column in others.items()})
        for name in images.column_names:  # `open_image` decodes them, with rotation, transparency and 16 bits
            images = images.cast_column(name, datasets.Image(decode=False))
    except Exception as error:  # Arrow raises many types of errors
        raise InvalidArgument(
            f"--image_column {image}", f"holds no images ({first_line(error)})", "name another column"
        ) from None
    column = datasets.Dataset.from_dict({"captions": texts}, datasets.Features({"captions": FEATURES["captions"]}))
    rows = datasets.concatenate_datasets([images, column], axis=1)
    if layout is None and not (data.dataset_name and data.train_data_dir):  # not only some files of the folder
        notes += _passed_over(rows, everything, data) + hidden_images_line(unlisted(rows, hidden_images(folder)))
    caches = [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE, model.cache_dir] if layout is None else []
    return Found(rows, problems, notes, groups=groups, places=[folder, *(Path(cache) for cache in caches if cache)])


def _captions(value: object, in_files: bool) -> list | str:
    """Return a list of a row's captions, or a string with the reason why the captions cannot be used.

    `in_files`: whether the captions are text files in a webdataset; `datasets` decodes only some suffixes.
    """
    if in_files and isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return caption_in(value)
    return value if isinstance(value, list) else [value]


def _sorted_out(captions: Sequence[list | str]) -> tuple[dict[int, str], list[list[str]]]:
    """Return the problems of captions by row number, and the captions of every row ([] for a row with a problem)."""
    problems = {index: value for index, value in enumerate(captions) if isinstance(value, str)}
    texts = [[clean(c) for c in value if isinstance(c, str)] if isinstance(value, list) else [] for value in captions]
    return problems, texts


def _passed_over(rows: datasets.Dataset, everything: Sequence[Path], options: DataOptions) -> list[str]:
    """Return a line about the images of a folder that are in no row.

    Raises `InvalidArgument` if such an image has a caption file, because the image is probably meant for training.
    """
    missing = unlisted(rows, list(filter(is_image, everything)))
    if captioned := [path for path in missing if caption_files(path)]:
        problem = (
            f"{pluralize(len(captioned), 'image')} with caption files, such as {captioned[0]}, but not in the metadata"
        )
        raise InvalidArgument(data_flag(options), problem, f"put them into a folder of their own, and {ONE_BY_ONE}")
    return [f"{pluralize(len(missing), 'image')} not read: not in the metadata, or of another split"] if missing else []


def _columns(rows: datasets.Dataset, layout: str | None, options: DataOptions, notes: list[str]) -> tuple[str, str]:
    """Return the names of the image column and of the caption column.

    The columns of a webdataset are named after file suffixes. If a webdataset lacks the column that an option names,
    the function returns the only image column, or the caption column with a suffix in CAPTIONS. Raises
    `InvalidArgument` if a column is missing.
    """
    image, caption, known = options.image_column, options.caption_column, rows.column_names
    if layout == "webdataset":
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        image = images[0] if image not in known and len(images) == 1 else image
        texts = [suffix[1:] for suffix in CAPTIONS if suffix[1:] in known]
        caption = texts[0] if caption not in known and texts else caption
        notes.append(f"the images are {image} of the .tar files, the captions {caption}")
    references = (("--conditioning_image_column", column) for column in options.conditioning_image_column)
    for flag, column in (("--image_column", image), ("--caption_column", caption), *references):
        if column not in known:
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            problem = f"the columns are {', '.join(known[:20])}{more}"
            raise InvalidArgument(f"{flag} {column}", problem, "name one of these")
    return image, caption


def _load_split(
    model: ModelOptions,
    data: DataOptions,
    folder: Path,
    layout: str | None,
    everything: Sequence[Path],
    notes: list[str],
) -> datasets.Dataset:
    datasets.disable_progress_bars()
    try:
        if layout == "webdataset":
            check_archives([path for path in everything if path.suffix == ".tar"], data_flag(data), notes)
        if layout == "saved":
            splits = datasets.load_from_disk(str(folder))
        elif data.dataset_name:
            splits = datasets.load_dataset(
                data.dataset_name,
                data.dataset_config_name,
                cache_dir=model.cache_dir,
                data_dir=next(iter(data.train_data_dir), None),
            )
        elif layout in ("webdataset", "json") or (layout == "parquet" and any(map(is_image, everything))):
            suffixes = {"webdataset": (".tar",), "json": (".json", ".jsonl")}.get(layout, (".parquet",))
            shards = training_files([path for path in everything if path.suffix in suffixes], folder, notes)
            splits = datasets.load_dataset(
                layout, data_files={"train": [glob.escape(str(shard)) for shard in shards]}, cache_dir=model.cache_dir
            )
        else:
            source = {"path": str(folder)} if layout else {"path": "imagefolder", "data_dir": glob.escape(str(folder))}
            splits = datasets.load_dataset(**source, cache_dir=model.cache_dir)
    except InvalidArgument:
        raise
    except Exception as error:  # the Hub, the network and parsers raise many types
        problem, fix = f"cannot be loaded ({first_line(error)})", "check the name, the connection and the layout"
        if several := re.search(r"available configs: \[(.*)\]", str(error)):
            problem = f"has the configurations {several[1]}"
            fix = f"give --dataset_name {folder} --dataset_config_name NAME, and no --train_data_dir"
        below = {path.parent for path in everything if path.name in METADATA}
        raise InvalidArgument(data_flag(data), problem, ONE_BY_ONE if len(below) > 1 else fix) from None
    if isinstance(splits, datasets.Dataset):
        return splits.with_format(None)
    return training_split(splits, notes).with_format(None)
