"""Class images: generated if missing, used as often as training images, weighted, and part of the run's identity."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from pipelines import FAMILIES, image_folder, random_image, same_image

from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main, only, parts, printed, refused
from reslora.errors import InvalidArgument
from reslora.images.data.class_images import LOCK, balanced, generate_missing, missing_class_images
from reslora.images.data.images import open_image
from reslora.images.data.plan import Plan
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.model import loading, quantising
from reslora.images.run import resolve_context
from reslora.images.settings import parse_args
from reslora.runtime.folder_lock import guard_of
from reslora.runtime.signals import StopRequest


def flags_for(folder: Path, model: Path, data: Path, output: str, *more: object) -> list[object]:
    return [
        *("--pretrained_model_name_or_path", model, "--train_data_dir", data, "--resolution", 32, "--rank", 2),
        *("--class_data_dir", folder / "class", "--class_prompt", "a disc", "--num_class_images", 3),
        *("--train_batch_size", 2, "--max_train_steps", 4, "--checkpointing_steps", 2, "--learning_rate", "1e-2"),
        *("--num_validation_images", 0, "--num_inference_steps", 1, "--merge_calibration_samples", 2),
        *("--method", "lora", "--report_to", "none", "--output_dir", folder / output, *more),
    ]


# Krea 2's pipeline is asked as the others are.
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "krea2"])
def test_what_is_missing_is_drawn_by_every_family_and_the_same_again(family, data, tmp_path, capsys):
    """A removed image is generated again identically; an image that the user has added counts and stays."""
    model = FAMILIES[family](tmp_path / "model")
    flags = flags_for(tmp_path, model, data, "out", "--max_train_steps", 1)
    assert "generating 3 class images" in "".join(printed(*flags))
    drawn = pictures(tmp_path / "class")
    assert len(drawn) == 3 and not np.array_equal(drawn[0], drawn[1])
    (tmp_path / "class" / "class-00001.png").unlink()
    generate_missing(resolve_context(parse_args([*map(str, flags)]), Accelerator(cpu=True), StopRequest()))
    assert "generating 1 class image in" in capsys.readouterr().out
    for before, after in zip(drawn, pictures(tmp_path / "class"), strict=True):
        assert np.abs(before - after).max() <= 2  # of 255: another batch rounds otherwise


def test_qwen_images_class_images_are_guided(data, tmp_path):
    """Its pipeline applies no guidance without a negative prompt, and has another name for the scale."""
    model, drawn = FAMILIES["qwen_image"](tmp_path / "model"), []
    for scale in (1, 9):
        flags = parse_args([*map(str, flags_for(tmp_path / str(scale), model, data, "out", "--guidance_scale", scale))])
        generate_missing(resolve_context(flags, Accelerator(cpu=True), StopRequest()))
        drawn += [pictures(tmp_path / str(scale) / "class")]
    assert all(np.abs(one - other).max() > 2 for one, other in zip(*drawn, strict=True))


@pytest.mark.exhaustive
def test_class_images_are_drawn_by_what_the_denoiser_predicts(data, tmp_path):
    """The scheduler's configuration may be wrong, which --prediction_type corrects."""
    drawn = []
    for said, told in (("epsilon", ()), ("v_prediction", ("--prediction_type", "epsilon")), ("v_prediction", ())):
        folder = tmp_path / str(len(drawn))
        model = FAMILIES["stable_diffusion"](folder / "model", scheduler={"prediction_type": said})
        flags = parse_args([*map(str, flags_for(folder, model, data, "out", *told))])
        generate_missing(resolve_context(flags, Accelerator(cpu=True), StopRequest()))
        drawn.append(pictures(folder / "class"))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_blocks_that_are_swapped_draw_the_same(data, tmp_path, monkeypatch):
    model, drawn, copied = FAMILIES["z_image"](tmp_path / "model"), [], []
    monkeypatch.setattr(quantising, "on_device", lambda codes, device: copied.append(device) or codes.clone())
    for blocks in (0, 2):
        flags = flags_for(tmp_path / str(blocks), model, data, "out", "--blocks_to_swap", blocks)
        assert not copied
        generate_missing(resolve_context(parse_args([*map(str, flags)]), Accelerator(cpu=True), StopRequest()))
        drawn += [pictures(tmp_path / str(blocks) / "class")]
    assert copied and np.array_equal(*drawn)


def test_a_base_in_fewer_bits_draws_them_too(data, tmp_path, monkeypatch):
    """A GPU that can only hold the quantized base could not generate them otherwise."""
    model, packed = FAMILIES["z_image"](tmp_path / "model"), []
    pack = loading.pack
    monkeypatch.setattr(
        loading, "pack", lambda denoiser, name, *rest: packed.append(name) or pack(denoiser, name, *rest)
    )
    flags = flags_for(tmp_path, model, data, "out", "--base_precision", "fp8")
    generate_missing(resolve_context(parse_args([*map(str, flags)]), Accelerator(cpu=True), StopRequest()))
    assert packed == ["fp8"] and len(pictures(tmp_path / "class")) == 3


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(PIL.Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.mark.exhaustive
def test_a_run_with_class_images_goes_on_as_if_it_had_not_stopped(model, data, tmp_path):
    whole, parts = (flags_for(tmp_path, model, data, name) for name in ("whole", "parts"))
    assert main(*whole) == 0
    killed_after(2, tmp_path / "whole", tmp_path / "parts", "lora")
    assert main(*parts, *RESUME) == 0
    assert_same(*(final_weights(tmp_path / name, "lora") for name in ("whole", "parts")))
    assert losses(tmp_path / "parts", "lora") == losses(tmp_path / "whole", "lora")


def test_class_images_that_another_run_draws_are_waited_for_and_not_drawn_over(model, data, tmp_path, capsys):
    """That run may have read them already: with other images in their place it could not be resumed."""
    flags = parse_args([*map(str, flags_for(tmp_path, model, data, "out"))])
    context = resolve_context(flags, Accelerator(cpu=True), StopRequest())
    theirs, asked = guard_of(tmp_path / "class" / LOCK).acquire(timeout=0), []

    def draws_meanwhile(message: str) -> None:
        asked.append(message)
        if len(asked) == 1:
            image_folder(tmp_path / "other", 3, layout="none")
            for number in range(3):
                (tmp_path / "other" / f"{number}.png").rename(tmp_path / "class" / f"class-{number:05d}.png")
            theirs.lock.release()

    generate_missing(dataclasses.replace(context, stop=SimpleNamespace(check=draws_meanwhile)))
    assert all(map(same_image, map(open_image, sorted((tmp_path / "class").iterdir())), map(random_image, range(3))))
    assert len(asked) == 1 and "waiting for it" in capsys.readouterr().out


def test_none_are_drawn_that_a_metadata_file_does_not_list(tmp_path):
    """They would not be trained on."""
    folder = image_folder(tmp_path / "class", 2, layout="jsonl")
    flags = parse_args(["--class_data_dir", str(folder), "--class_prompt", "a disc", "--num_class_images", "3"])
    with pytest.raises(InvalidArgument, match=r"class_images 3: 1 image would .*metadata.jsonl .*--num_class_images 2"):
        missing_class_images(flags.data, flags.output)
    assert missing_class_images(*parts(flags.replace(num_class_images=2), "data", "output")) == 0
    (folder / "metadata.jsonl").unlink()
    assert missing_class_images(flags.data, flags.output) == 1


@pytest.mark.parametrize("place", [".", "10_sks disc", "below/10_sks disc"])
def test_what_is_to_be_learnt_is_no_class_image(tmp_path, place):
    """No class image is generated there either; a folder of class images inside the training folder is not read."""
    learnt = tmp_path / "class" / place
    learnt.mkdir(parents=True, exist_ok=True)
    flags = ["--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a disc", "--train_data_dir"]
    with pytest.raises(InvalidArgument, match=r"^--class_data_dir \S+/class: contains the training images of"):
        missing_class_images(*parts(parse_args([*flags, str(learnt)]), "data", "output"))
    assert missing_class_images(*parts(parse_args([*flags, str(tmp_path)]), "data", "output")) == 100


def test_none_are_drawn_where_they_cannot_be_kept(tmp_path):
    """The model is not even loaded."""
    (tmp_path / "class").write_text("")
    flags = parse_args(["--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a disc"])
    with pytest.raises(InvalidArgument, match=r"^--class_data_dir \S+/class: .* is not a writable folder"):
        missing_class_images(flags.data, flags.output)


@pytest.mark.exhaustive
def test_class_images_count_by_their_weight(model, data, tmp_path):
    """With weight 0, the samples are those of the run with weight 1, but the losses differ."""
    for name, weight in (("one", 1), ("none", 0)):
        assert main(*flags_for(tmp_path, model, data, name, "--prior_loss_weight", weight, "--max_train_steps", 1)) == 0
    one, none = (final_weights(tmp_path / name, "lora", step=1) for name in ("one", "none"))
    assert any(not torch.equal(one[name], none[name]) for name in one)
    (_, _, of_one), (_, _, of_none) = losses(tmp_path / "one", "lora")[0], losses(tmp_path / "none", "lora")[0]
    assert of_none < of_one


@pytest.mark.exhaustive
def test_other_class_images_are_another_run(model, data, tmp_path, capsys):
    flags = flags_for(tmp_path, model, data, "out", "--target_modules", "to_q", "nowhere")
    assert main(*flags, "--max_train_steps", 2) == 0
    assert capsys.readouterr().out.count("0 layers of the denoiser end in nowhere") == 1  # though checked twice
    assert "--num_class_images 4" in refused(capsys, *flags, "--num_class_images", 4, *RESUME)
    assert len(pictures(tmp_path / "class")) == 3  # a fourth would keep the run from going on
    (tmp_path / "class" / "class-00000.png").unlink()
    image_folder(tmp_path / "other", 1)
    (tmp_path / "other" / "0.png").rename(tmp_path / "class" / "mine.png")
    line = refused(capsys, *flags, *RESUME, quiet=False)
    assert f"--class_data_dir {tmp_path}/class: " in line and "was trained on" in line


@pytest.mark.parametrize("left_out", ["--class_prompt", "--class_data_dir"])
def test_one_of_the_flags_alone_is_refused(brief_flags, capsys, tmp_path, left_out):
    given = {"--class_prompt": "a disc", "--class_data_dir": str(tmp_path / "class")}
    del given[left_out]
    line = refused(capsys, *brief_flags, *next(iter(given.items())), "--output_dir", tmp_path / "out")
    assert left_out in line and not (tmp_path / "class").exists()


@pytest.mark.parametrize(
    ("images", "times"),
    [((5, 100), (100, 100)), ((100, 5), (100, 100)), ((7, 7), (7, 7)), ((10, 19), (20, 19)), ((10, 14), (10, 14))],
)
def test_an_epoch_meets_about_as_many_of_either_and_each_at_least_once(images, times):
    made = [Source(None, None, tuple(range(n)), (), (Size(8, 8),) * n) for n in images]
    plan = Plan(balanced(*([source] for source in made), per_forward=1), 1, seed=0)
    uses_per_epoch = [plan.forward(number)[0] for number in range(plan.forwards_per_epoch)]
    assert tuple(sum(draw.source == source for draw in uses_per_epoch) for source in (0, 1)) == times and len(
        uses_per_epoch
    ) == sum(times)
    assert len({(draw.source, draw.image) for draw in uses_per_epoch}) == sum(images)


@pytest.mark.parametrize(
    "shapes", [([8] * 8, [8, 16, 24, 32, 40]), ([8, 16, 24], [32] * 48), ([8] * 3, [8] * 9), ([16, 24], [8] * 8)]
)
def test_images_are_balanced_with_what_fills_up_small_buckets(shapes):
    """A batch has 16 samples, also of a bucket with one image. `shapes`: widths of images, and of class images."""
    made = []
    for widths in shapes:
        sizes = tuple(Size(8, width) for width in widths)
        made.append(Source(None, None, tuple(range(len(widths))), (), sizes))
    plan = Plan(balanced(*([source] for source in made), per_forward=16), 16, seed=0)
    epochs = 60  # what a forward is filled up with is drawn
    uses_per_epoch = Counter(draw.source for n in range(epochs * plan.forwards_per_epoch) for draw in plan.forward(n))
    assert abs(uses_per_epoch[0] / uses_per_epoch[1] - 1) < 0.1


def test_repeats_count_where_both_are_balanced():
    """8 images are used 8 times together with 4 class images: each of these twice, whatever their folders."""
    made = [Source(None, None, tuple(range(n)), (), (Size(8, 8),) * n, repeats=r) for n, r in ((2, 3), (2, 1))]
    of_class = [dataclasses.replace(made[1], repeats=r) for r in (1, 1)]
    plan = Plan(balanced(made, of_class, 1), 1, seed=0)
    uses_per_epoch = Counter(plan.forward(number)[0].source for number in range(plan.forwards_per_epoch))
    assert uses_per_epoch == {0: 6, 1: 2, 2: 4, 3: 4}


def test_what_can_be_refused_is_refused_before_any_is_drawn(model, data, tmp_path, capsys):
    line = refused(capsys, *flags_for(tmp_path, model, data, "out", "--resolution", 33), quiet=False)
    assert "--resolution 33" in line and not (tmp_path / "class").exists()


def test_notes_on_what_is_refused_are_told(model, data, tmp_path, capsys):
    """For some targets there is no note, and the error alone would not explain it."""
    targets = ("--target_modules", "to_q", "to_nothing", "--rank_pattern", "to_k=2")
    assert main(*flags_for(tmp_path, model, data, "out", *targets)) == 2
    out, error = capsys.readouterr()
    assert "0 layers of the denoiser end in to_nothing" in out and "to_k=2" in error and "drawing" not in out


@pytest.mark.exhaustive
def test_what_is_checked_before_they_are_drawn_and_after_is_told_once(model, data, tmp_path):
    targets = ("--target_modules", "to_q", "to_nothing")
    lines = printed(*flags_for(tmp_path, model, data, "out", "--max_train_steps", 1, "--train_text_encoder", *targets))
    assert only(lines, "generating 3 class images")
    assert only(lines, "0 layers of the denoiser end in to_nothing")
    assert only(lines, "text_encoder in addition to the unet")
