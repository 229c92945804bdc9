"""The folders of training images, with repeats per epoch and loss weights."""

import dataclasses
from pathlib import Path

from ...errors import InvalidArgument
from ...formatting import pluralize
from ...options.images import DataOptions, ModelOptions, OutputOptions, TrainingOptions
from ...options.values import as_typed
from .dataset import COLUMNS, METADATA, MOST_REPEATS, REPEATED, SAVED, ImageDataset, sample, usable
from .images import is_image
from .listing import files_of, hidden_images, hidden_images_line

Part = tuple[str, int, str | None]
"""A folder, its repeats, and the caption of its images without a caption file, if any."""


def load_folders(
    model: ModelOptions, data: DataOptions, training: TrainingOptions, output: OutputOptions, caption: str | None = None
) -> list[ImageDataset]:
    """Return the images of each folder that the options name, or of the dataset that they name.

    A folder with kohya's subfolders (10_name) gives one item per subfolder. `caption` is the caption of images without
    a caption file. Raises `InvalidArgument` with --masked_loss if no training image has a mask or an alpha channel.
    """
    names = data.train_data_dir or [str(data.dataset_name)]
    repeats, weights = data.train_data_repeats, data.train_data_weight  # one value per folder, or one for all
    repeats, weights = repeats * (len(names) // len(repeats)), weights * (len(names) // len(weights))
    found, labels, lines = [], [], []
    for number, (name, times, weight) in enumerate(zip(names, repeats, weights, strict=True)):
        partners = data.conditioning_data_dir[number :: len(names)]
        kohyas, notes = ([], []) if data.dataset_name else kohyas_folders(Path(name), data, output)
        lines += notes
        for path, own, text in kohyas or [(name, 1, caption)]:
            own_data = dataclasses.replace(
                data, train_data_dir=[str(path)] if data.train_data_dir else [],
                conditioning_data_dir=[str(Path(partner) / Path(path).relative_to(name)) for partner in partners],
            )  # fmt: skip
            images = usable(model, own_data, training, output, text, deep=not kohyas)
            found.append(dataclasses.replace(images, repeats=times * own, weight=weight))
            labels.append((str(path), text if kohyas else None))
    for name in COLUMNS if caption is None else ():
        given = getattr(data, name)
        if given != getattr(DataOptions(), name) and not any(name in images.columns for images in found):
            files = "images" if name == "image_column" else "captions"
            raise InvalidArgument(
                f"--{name} {as_typed(given)}", f"the {files} are files, not a table's column", "leave it out"
            )
    if training.masked_loss and caption is None and not any(any(images.masked) for images in found):
        fix = "add alpha channels or a column mask in metadata.jsonl, or leave it out"
        raise InvalidArgument("--masked_loss", "no image has an alpha channel or a mask", fix)
    found = sample(found, data, training)
    differ = len(found) > 1 or kohyas or found[0].repeats > 1 or found[0].weight != 1
    if differ or data.class_data_dir or training.masked_loss:
        found = [dataclasses.replace(each, label=_label(each, *of)) for each, of in zip(found, labels, strict=True)]
        lines += [f"{images.label}: 0 images" for images in found if not len(images)]
    first, *others = (images for images in found if len(images))
    return [dataclasses.replace(first, notes=(*lines, *first.notes)), *others]


def _label(images: ImageDataset, name: str, caption: str | None) -> str:
    """Return a source's name for the log: its folder, and how many images have the folder's name as caption."""
    count = sum(texts == [caption] for texts in images.captions)
    return (
        f"{name} ({count} of {pluralize(len(images), 'image')} with its name as caption: {caption})" if count else name
    )


def kohyas_folders(folder: Path, data: DataOptions, output: OutputOptions) -> tuple[list[Part], list[str]]:
    """Return the subfolders that are named `<repeats>_<caption>` and contain images, as in kohya's DreamBooth method.

    The second return value has lines to print about the rest of the folder, which kohya's method ignores. Both return
    values are empty if the folder has a metadata file. Raises `InvalidArgument` if a name asks for more than
    MOST_REPEATS repeats.
    """
    content = files_of(folder, data, output, deep=False)
    if any(path.name in (*METADATA, *SAVED) for path in content):
        return [], []
    folders = [path for path in content if path.name[:1].isdecimal() and path.is_dir()]
    folders = [path for path in folders if any(map(is_image, path.iterdir()))]
    found: list[Part] = [
        (str(path), int(match[1]), match[2] or None)
        for path in folders
        if (match := REPEATED.fullmatch(path.name)) and int(match[1])
    ]
    for path, repeats, text in found:
        if repeats > MOST_REPEATS:
            problem = f"its name means that an epoch uses each image {repeats} times, as in kohya's scripts"
            raise InvalidArgument(f"folder {path}", problem, f"rename it, for example to 1_{text or ''}")
    taken = {path for path, _, _ in found}
    seen = [path for path in content if path.is_dir() or is_image(path)]
    beside = [path.name for path in seen if str(path) not in taken and not path.name.startswith(".")]
    bare = [path.name for path in folders if path.name.isdecimal() and 0 < int(path.name) <= MOST_REPEATS]
    lines = [
        f"{folder}: the name {name} sets no repeats; name it {name}_ to use each image {int(name)} times an epoch"
        for name in bare[:1]
    ]
    if not found:
        return [], lines
    # Hidden images inside the folders that are read are reported with those folders.
    hidden = [path for path in hidden_images(folder) if not taken & set(map(str, path.parents))]
    more = f" and {len(beside) - 5} more" if len(beside) > 5 else ""
    alone = [f"{folder}: only kohya's folders (10_name) are read, not {', '.join(beside[:5])}{more}"]
    return found, [*(alone if beside else []), *lines, *hidden_images_line(hidden)]
