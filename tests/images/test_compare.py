"""`reslora-compare`: files have the losses of their run, equal files do not differ, and bad input is refused."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from pipelines import FAMILIES, image_folder, tiny_dino
from safetensors.torch import load_file, save_file

from images.model.lora_files.loras import random_lora, tiny
from images.runs import main as train
from reslora.compare import main
from reslora.convert import main as convert
from reslora.errors import InvalidArgument
from reslora.experiment import compare_losses
from reslora.export import Factors, write_diffusers
from reslora.images.comparison import measuring
from reslora.images.comparison.files import Entry, entries_of, groups_of
from reslora.images.comparison.loras import LoraFile, in_order_of_seeds, trained_on
from reslora.images.comparison.results import ONE_RUN
from reslora.images.model.lora_files.adding import add_lora

NAMED = ("stable_diffusion", "sdxl", "flux")


def compare(*flags) -> int:
    """Return the exit status, also if argparse exits."""
    try:
        return main(list(map(str, flags)))
    except SystemExit as error:
        return error.code


def refused(capsys, *flags) -> str:
    """Return the one line of a refusal."""
    capsys.readouterr()
    assert compare(*flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("reslora-compare: error: "), lines
    return lines[0]


def flags_of(images: Path) -> list:
    return ["--model", tiny("stable_diffusion"), "--data", images, "--resolution", "32"]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


def written(path: Path, family: str = "stable_diffusion", scale: float = 0.1) -> Path:
    """Write a small LoRA of attention layers in diffusers' format."""
    parts = random_lora(family, lambda name: "attn" in name)
    small = {
        part: {name: Factors(scale * f.down.float(), f.up.float(), f.scale) for name, f in layers.items()}
        for part, layers in parts.items()
    }
    write_diffusers(path, small, {})
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "some_images", count=8)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "flags"), [(NAMED[0], ()), (NAMED[1], ("--train_text_encoder",)), (NAMED[2], ())])
def test_files_of_a_run_have_the_loss_of_the_run(family, flags, images, tmp_path, capsys):
    """The losses of an experiment's merged checkpoint are those of its files, in the formats of diffusers and kohya."""
    model = FAMILIES[family](tmp_path / "model")
    common = ["--model", model, "--data", images, "--resolution", "32", "--caption_prefix", "sks"]
    common += ["--cache_dir", tmp_path / "cache"]
    run = ["--rank", "2", "--max_train_steps", "2", "--learning_rate", "3e-2", "--seed", "0", "1", "--method", "lora"]
    run += ["--train_batch_size", "2", "--num_validation_images", "0", "--report_to", "none", *flags]
    run += ["--select_split", "0.2", "--test_split", "0.3", "--num_inference_steps", "1"]
    assert train(*common, *run, "--output_dir", tmp_path / "run") == 0
    arm = tmp_path / "run" / "lora" / "lr-0.03" / "seed-0"
    tested = json.loads((arm / "test.json").read_text())
    expected = dict(zip(tested["images"], tested["losses"], strict=True))
    files = [arm / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors", tmp_path / "copy.safetensors"]
    assert convert([*map(str, files[:2]), "--to", "kohya", "--base", str(model)]) == 0
    shutil.copyfile(*files[1:])
    capsys.readouterr()
    assert compare(*common, *files, "--strength", "1", "0", "--output_dir", tmp_path / "out") == 0
    printed, found = capsys.readouterr().out, result_of(tmp_path / "out")
    marks = [image["content"] for image in found["images"]]
    losses = {file["label"]: dict(zip(marks, file["losses"], strict=True)) for file in found["files"]}
    assert set(expected) < set(marks) and len(marks) == 8
    for name in ("pytorch_lora_weights", "kohya"):
        for mark, loss in expected.items():
            assert losses[f"{name} at 1"][mark] == pytest.approx(loss, rel=1e-6)
    assert losses["kohya at 0"] == losses["base"] != losses["kohya at 1"] == losses["copy at 1"]
    verdicts = {each["label"]: each for each in found["verdicts"]}
    assert verdicts["copy at 1"]["conclusion"] == verdicts["kohya at 1"]["conclusion"] == "not shown"
    trained = json.loads((tmp_path / "run" / "experiment.json").read_text())["split"]["train"]
    assert f"kohya: its metadata list {trained} of the 8 images as training images" in printed
    assert "each file is one training run, so images are the only random effect" in printed


@pytest.mark.exhaustive
def test_a_stopped_comparison_is_resumed_and_reported_with_samples(images, tmp_path, capsys, monkeypatch):
    a, b = (written(tmp_path / f"{name}.safetensors", scale=scale) for name, scale in (("a", 0.1), ("b", 0.2)))
    flags = [*flags_of(images), "--output_dir", tmp_path / "o"]
    flags += ["--validation_prompt", "red disc", "--num_inference_steps", "1"]
    flags += ["--metric_model", tiny_dino(tmp_path / "dino")]
    assert compare(*flags, a) == 0
    added = []
    monkeypatch.setattr(measuring, "add_lora", lambda *given: added.append(given) or add_lora(*given))
    assert compare(*flags, a, b, "--reference", "base") == 0
    assert len(added) == 1  # only b is measured
    report, found = (tmp_path / "o" / "report.html").read_text(), result_of(tmp_path / "o")
    assert {each["label"]: each["reference"] for each in found["verdicts"]} == {"a": "base", "b": "base"}
    assert report.count("data:image/png") + report.count("data:image/webp") + report.count("data:image/jpeg") >= 3
    for words in ("To test images", "Difference to base, in percent", "of 8 images", ONE_RUN[:60]):
        assert words in report
    assert set(found["files"][0]["similarities"]) == {"image_similarity", "unrelated_similarity", "diversity"}
    with (tmp_path / "o" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 8 and [*dict.fromkeys(row["method"] for row in rows)] == ["base", "a", "b"]
    (verdict,) = [each for each in found["verdicts"] if each["label"] == "b"]
    status = {"better": 0, "worse": 3, "not shown": 1}[verdict["conclusion"]]
    capsys.readouterr()
    assert compare(tmp_path / "o", "--check", "b < base") == status
    assert verdict["sentence"] in capsys.readouterr().out


@pytest.mark.exhaustive
def test_groups_are_compared_with_seeds_as_a_random_effect(images, tmp_path, capsys):
    for name, seed in itertools.product("ab", (0, 1)):
        written(tmp_path / f"{name}-{seed}.safetensors", scale=0.01 * (1 + seed))
    flags = [*flags_of(images), "--output_dir", tmp_path / "o"]
    groups = [f"a={tmp_path}/a-*.safetensors", f"b={tmp_path}/b-*.safetensors"]
    assert compare(*flags, "--group", *groups) == 0
    found = result_of(tmp_path / "o")
    assert [(file["label"], file["seed"]) for file in found["files"]][:2] == [("a", 0), ("a", 1)]
    again = compare_losses(tmp_path / "o" / "losses.csv", unit="image")
    assert [each["sentence"] for each in again.verdicts] == [each["sentence"] for each in found["verdicts"]]
    assert found["verdicts"][0]["seeds"] == 2
    assert found["verdicts"][0]["sentence"] == "b and a have the same test losses"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a-*.safetensors"], "FILE a-*.safetensors: no file has such a name"),
        (["none.safetensors"], "FILE none.safetensors: no such file or folder"),
        ([], "FILE: missing"),
        (["--strength", "strong"], "--strength strong: is not a finite number"),
        (["--group", "x.safetensors"], "--group x.safetensors: is not NAME=FILE"),
        (["--group", "a=one.safetensors"], "--group a: has 1 file"),
        (
            ["--group", "a=one.safetensors", "a=two.safetensors", "b=*.safetensors"],
            "--group b: has 3 files, and a has 2",
        ),
        (["one.safetensors", "--reference", "two"], "--reference two: is not compared; give one of one, base"),
        (["one.safetensors", "--data", "none"], "--train_data_dir none: no such folder"),
    ],
)
def test_options_that_cannot_work_are_refused(flags, words, images, tmp_path, capsys):
    for name in ("one", "two", "three"):
        Path(f"{name}.safetensors").touch()
    assert words in refused(capsys, "--model", tiny("stable_diffusion"), "--data", images, *flags)
    assert refused(capsys, "one.safetensors", "--data", "x") == (
        "reslora-compare: error: --model: missing; give the files' base model"
    )


def with_nan(path: Path) -> None:
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: written(path, "flux"), "is not a layer of stable_diffusion"),
        (with_nan, "not finite"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "give a complete .safetensors file"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(change, words, images, tmp_path, capsys):
    path = written(tmp_path / "a.safetensors")
    change(path)
    flags = [*flags_of(images), "--output_dir", tmp_path / "o"]
    line = refused(capsys, *flags, path)
    assert f"FILE {path}" in line and words in line
    assert not (tmp_path / "o").exists()


def test_too_few_images_are_refused(tmp_path, capsys):
    few = image_folder(tmp_path / "few", count=5)
    flags = [*flags_of(few), "--output_dir", tmp_path / "o"]
    line = refused(capsys, *flags, written(tmp_path / "a.safetensors"))
    assert "only 5 images; a verdict needs at least 6" in line
    for path in few.glob("*.png"):
        path.unlink()
    assert "few: no image" in refused(capsys, *flags, tmp_path / "a.safetensors")


# -- names and metadata ------------------------------------------------------------------------------------------------


def test_files_have_the_shortest_names_that_differ(tmp_path):
    names = ("x/epoch-2", "x/epoch-10", "y/epoch-2")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    found = entries_of([f"{tmp_path}/x/*", f"{tmp_path}/y/epoch-2.safetensors", f"{tmp_path}/x/epoch-2.safetensors"])
    assert [entry.name for entry in found] == list(names)
    assert [entry.name for entry in entries_of([f"{tmp_path}/x/*.safetensors"])] == ["epoch-2", "epoch-10"]
    (group,) = groups_of([f"mine={tmp_path}/x/*.safetensors"])
    assert group == Entry("mine", (tmp_path / "x/epoch-2.safetensors", tmp_path / "x/epoch-10.safetensors"))
    with pytest.raises(InvalidArgument, match="base is the name of the base model"):
        groups_of([f"base={tmp_path}/x/*.safetensors"])


def lora(**metadata: str) -> LoraFile:
    return LoraFile(Path("a.safetensors"), None, "", ("unet",), (2,), metadata)


def test_metadata_name_the_images_that_a_file_was_trained_on():
    dirs = json.dumps({"10_cat": {"n_repeats": 10, "img_count": 3}})
    assert "a training folder 10_cat" in trained_on(lora(ss_dataset_dirs=dirs), ["9:abcdef0123"], {"10_cat"})
    assert not trained_on(lora(ss_dataset_dirs=dirs, ss_tag_frequency="[{]"), ["9:abcdef0123"], {"10_dog"})
    marks = ["9:abcdef0123456789+7:00", "9:0123456789abcdef"]
    own = lora(**{"reslora.images": "abcdef01 99999999"})
    assert trained_on(own, marks, ()) == "its metadata list 1 of the 2 images as training images"
    assert not trained_on(own, marks[1:], ())


def test_groups_are_paired_by_the_seeds_in_their_metadata():
    a, b = [lora(ss_seed="1"), lora(ss_seed="0")], [lora(ss_seed="0"), lora(ss_seed="1")]
    found = in_order_of_seeds({"a": a, "b": b})
    assert found == {"a": a[::-1], "b": b}
    assert in_order_of_seeds({"a": a, "b": [lora(ss_seed="0"), lora()]}) is None
    assert in_order_of_seeds({"a": a, "b": [b[0], b[0]]}) is None
