"""Several folders, repeats, weights, kohya's folders and several resolutions: what is trained, and how often."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from pipelines import image_folder

from images.runs import (
    FAMILY,
    RESUME,
    assert_same,
    final_weights,
    losses,
    main,
    only,
    parts,
    printed,
    read_by,
    refused,
)
from reslora.images.context import ImageContext
from reslora.images.data import training_data as training_data
from reslora.images.data.class_images import balanced
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.folders import load_folders
from reslora.images.data.plan import Plan
from reslora.images.data.samples import TrainingData
from reslora.images.data.size import Size
from reslora.images.data.sources import Source, without_copies
from reslora.images.data.training_data import print_folder_counts, sources_of
from reslora.images.settings import parse_args


def gather(*flags: object) -> list[ImageDataset]:
    return load_folders(
        *parts(parse_args(list(map(str, flags))), "model", "data", "training", "output"),
    )


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Folders of 4 and 2 images."""
    return [image_folder(tmp_path / name, count) for name, count in (("one", 4), ("two", 2))]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_each_folder_has_its_repeats_and_weight_or_all_have_one(folders):
    found = gather("--train_data_dir", *folders, "--train_data_repeats", 3, 1, "--train_data_weight", 0.5)
    assert [(len(images), images.repeats, images.weight) for images in found] == [(4, 3, 0.5), (2, 1, 0.5)]
    assert [images.label for images in found] == list(map(str, folders))


def test_as_many_as_max_train_samples_are_taken_of_all_folders(folders):
    for wanted in (1, 3, 5, 6, 7):
        found = gather("--train_data_dir", *folders, "--max_train_samples", wanted)
        assert sum(map(len, found)) == min(wanted, 6) and all(map(len, found))
        assert all(len(images.marks) == len(images) for images in found)
    drawn = [gather("--train_data_dir", *folders, "--max_train_samples", 3, "--seed", seed) for seed in range(4)]
    assert len({tuple(tuple(images.marks) for images in found) for found in drawn}) > 1  # the seed says which


def kohyas(folder: Path) -> Path:
    """Two folders as kohya's scripts read them, and files that these scripts skip."""
    image_folder(folder / "10_sks cat", 2, layout="txt")
    (folder / "10_sks cat" / "0.txt").unlink()
    image_folder(folder / "10_sks cat" / "inside", 1)
    image_folder(folder / "2_a_b", 1, layout="none")
    image_folder(folder / "plain", 1)
    image_folder(folder / "0_none", 1)
    (folder / "3_empty").mkdir()
    (folder / ".cache").mkdir()
    (folder / "notes.txt").write_text("")
    PIL.Image.new("RGB", (32, 32)).save(folder / "loose.png")
    return folder


def test_kohyas_folders_say_repeats_and_captions(tmp_path):
    """As in sd-scripts' DreamBooth method: the folder's name is the default caption; other files are skipped."""
    cat, letters = gather("--train_data_dir", kohyas(tmp_path / "p"), "--train_data_repeats", 2)
    assert (cat.repeats, cat.captions) == (20, [["sks cat"], ["blue box"]])
    assert (letters.repeats, letters.captions) == (4, [["a_b"]])
    assert "not 0_none, 3_empty, loose.png, plain" in only(cat.notes, "only kohya's folders")
    only(cat.notes, "10_sks cat: 1 subfolder not read")
    assert cat.label == f"{tmp_path}/p/10_sks cat (1 of 2 images with its name as caption: sks cat)"
    assert letters.label == f"{tmp_path}/p/2_a_b (1 of 1 image with its name as caption: a_b)"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train_data_repeats", 1, 2, 3], "--train_data_repeats 1 2 3: 3 values for 2 folders"),
        (["--train_data_weight", 1, 2, 3], "--train_data_weight 1 2 3: 3 values for 2 folders"),
        (["--train_data_repeats", 0], "--train_data_repeats"),
        (["--train_data_weight", 0], "--train_data_weight"),
        (["--dataset_name", "somebody/images"], "--dataset_name somebody/images: reads one folder of it"),
        (["--resolution", 32, 33], "--resolution 33"),
        (["--resolution", 32, 7], "--resolution 7: "),
        (
            ["--resolution", 32, 48, "--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "32,32"],
            "--resolution 32 48",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folders, brief_flags, capsys, tmp_path, words, expected):
    flags = [*brief_flags, "--train_data_dir", *folders, *words, "--output_dir", tmp_path / "out"]
    assert expected in refused(capsys, *flags, quiet=False)


def test_a_folder_that_is_not_there_is_named(folders, brief_flags, capsys, tmp_path):
    line = refused(capsys, *brief_flags, "--train_data_dir", *folders, tmp_path / "none")
    assert f"--train_data_dir {tmp_path / 'none'}: no such folder" in line


# -- what becomes of them ----------------------------------------------------------------------------------------------


def made(sizes: list[tuple[int, int]], *words: object, least: int = 1, **counted: object) -> list[Source]:
    """Return sources of images with these widths and heights, without encoding them."""
    flags = parse_args(list(map(str, words)))
    family = SimpleNamespace(pixel_multiple=lambda pipeline: 8)
    rows = [{"image": None, "captions": [""]}] * len(sizes)
    images = ImageDataset(Rows(rows), [[""]] * len(sizes), sizes=sizes, **counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "latents_of", lambda *_: (None, {}))
        return sources_of(images, least, None, ImageContext(flags, SimpleNamespace(family=family), None, None))


class Rows(list):
    def select(self, indices: list[int]) -> "Rows":
        return Rows(self[index] for index in indices)


def test_every_image_is_trained_once_at_each_resolution():
    sources = made([(600, 400)] * 10, "--resolution", 64, 96, "--validation_split", 0.2)
    assert [set(source.sizes) for source in sources] == [{Size(64, 64)}, {Size(96, 96)}]
    first, second = sources
    assert len(first.train) == len(second.train) == 8 and len(first.held_out) == 2 and not second.held_out
    plan = Plan(sources, 2, seed=0)
    uses_per_epoch = Counter(
        (draw.size, draw.image) for n in range(plan.forwards_per_epoch) for draw in plan.forward(n)
    )
    assert len(uses_per_epoch) == 16 and set(uses_per_epoch.values()) == {1}


@pytest.mark.parametrize(
    ("image", "resolutions", "expected"),
    [  # width and height
        ((1024, 1024), (512, 768), [Size(512, 512), Size(768, 768)]),
        ((600, 600), (512, 768, 1024), [Size(512, 512), Size(576, 576)]),  # its own size for both of the larger ones
        ((600, 600), (768, 512), [Size(576, 576), Size(512, 512)]),
        ((330, 530), (512, 768), [Size(512, 320)]),  # 528x288 would be its own size once more
        ((300, 300), (768, 512), [Size(288, 288)]),
    ],
)
def test_a_small_image_is_trained_once_at_its_own_size(image, resolutions, expected):
    words = ("--resolution", *resolutions, "--use_aspect_ratio_buckets", "--validation_split", 0)
    sources = [source for source in made([image, (2000, 2000)], *words) if source.images.sizes[0] == image]
    assert [source.sizes[0] for source in sources] == expected
    upscaled = [source.sizes[0] for source in made([image], *words, "--bucket_upscale")]
    assert [size.height * size.width > 0.8 * side**2 for size, side in zip(upscaled, resolutions, strict=True)]


def test_each_folder_holds_out_its_share_and_class_images_nothing():
    """Half of a fifth of folders with 20, 2 and 1 images: a small folder need not hold out any."""
    counts = [(20, 1), (2, 0), (1, 0)]
    held = [len(made([(64, 64)] * n, "--validation_split", 0.1, least=least)[0].held_out) for n, least in counts]
    assert held == [2, 0, 0]
    assert len(made([(64, 64)] * 2, "--validation_split", 0.1)[0].held_out) == 1
    assert not made([(64, 64)] * 20, "--validation_split", 0.1, of_class=True)[0].held_out


def told(sources: list[Source], *words: object) -> list[str]:
    lines: list[str] = []
    flags, accelerator = parse_args(list(map(str, words))), SimpleNamespace(print=lines.append, num_processes=1)
    print_folder_counts(
        TrainingData(tuple(sources), {}, None, {}, FAMILY, **read_by(flags)),
        ImageContext(flags, None, accelerator, None),
    )
    return lines


def test_what_is_told_of_folders_is_what_an_epoch_meets_and_counts():
    """Class images are repeated if there are fewer, and have their own weight; held-out images are not used."""
    words = ("--validation_split", 0.25, "--prior_loss_weight", 0.5, "--class_data_dir", ".", "--class_prompt", "disc")
    learnt = made([(64, 64)] * 8, *words, label="mine", repeats=3)
    of_class = made([(64, 64)] * 3, *words, label="of class", of_class=True)
    assert told(balanced(learnt, of_class, 16), *words) == [
        "mine: 6 images, each 3 times an epoch, weight 1; 2 more held out",
        "of class: 3 class images, each 6 times an epoch, weight 0.5",
    ]
    assert not told(made([(64, 64)] * 8, *words), *words)


def test_copies_of_held_out_images_are_not_trained_whichever_folder_they_are_in():
    words = ("--resolution", 64, 96, "--validation_split", 0.2)
    first, *others = made([(600, 400)] * 5, *words, marks=list("abcde"))
    (held_out,) = (first.images.marks[image] for image in first.held_out)
    copied = made([(600, 400)] * 3, "--resolution", 64, "--validation_split", 0, marks=["f", held_out, "g"])
    only_copies = made([(600, 400)], "--resolution", 64, "--validation_split", 0, marks=[held_out])
    found, removed = without_copies([first, *others, *copied, *only_copies])
    assert removed == 1 and [source.train for source in found[-2:]] == [(0, 2), (0,)]
    assert found[0] == first and [source.train for source in found[1:-2]] == [source.train for source in others]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_run_with_all_of_it_goes_on_as_if_it_had_not_stopped(model, capsys, tmp_path):
    """With kohya's folders, also of class images, repeats, held-out images and two resolutions."""
    for name, count in (("2_disc", 2), ("1_box", 3)):
        image_folder(tmp_path / "images" / name, count, layout="none")
    image_folder(tmp_path / "class" / "1_red box", 1, layout="none")
    common = [
        *("--pretrained_model_name_or_path", model, "--train_data_dir", tmp_path / "images", "--method", "lora"),
        *("--class_data_dir", tmp_path / "class", "--class_prompt", "box", "--resolution", 32, 48, "--rank", 2),
        *("--validation_split", 0.3, "--validation_steps", 4, "--train_batch_size", 2, "--max_train_steps", 8),
        *(
            "--checkpointing_steps",
            4,
            "--validation_prompt",
            "red",
            "--num_validation_images",
            1,
            "--report_to",
            "none",
        ),
        *(
            "--train_data_weight",
            0.5,
            "--num_inference_steps",
            1,
            "--learning_rate",
            "1e-2",
            "--cache_dir",
            tmp_path / "cache",
            "--output_dir",
        ),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lines = printed(*common, whole)
    assert "48x48: " in only(lines, "2 buckets") and not [line for line in lines if "drawing" in line]
    only(lines, "2_disc (2 of 2 images with its name as caption: disc) at 48: ", " 2 times an epoch, weight 0.5")
    (first, second) = (line for line in lines if "1_red box" in line)
    assert "32: 1 class image, each 4 times an epoch, weight 1" in first and "48: 1 class image, each 4" in second
    assert main(*common, parts, "--max_train_steps", 4) == 0
    capsys.readouterr()
    assert "--train_data_repeats 2" in refused(capsys, *common, parts, "--train_data_repeats", 2, *RESUME, quiet=False)
    assert main(*common, parts, *RESUME) == 0
    assert_same(final_weights(parts, "lora", step=8), final_weights(whole, "lora", step=8))
    assert [row for row in losses(parts, "lora") if row[0] > 4] == [row for row in losses(whole, "lora") if row[0] > 4]
    assert PIL.Image.open(whole / "lora" / "samples" / "step-000008" / "0-0.png").size == (32, 32)
    config = json.loads((whole / "config.json").read_text())
    assert (config["resolution"], config["train_data_dir"]) == ([32, 48], str(tmp_path / "images"))
    (tmp_path / "images" / "2_disc").rename(tmp_path / "images" / "3_disc")
    capsys.readouterr()
    assert "was trained on" in refused(capsys, *common, parts, *RESUME, quiet=False)
