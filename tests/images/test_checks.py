"""Messages about targets, ranks and shortcuts before anything is encoded; most refusals are in test_arguments.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from pipelines import EDITS, FAMILIES, image_folder, qwen_image
from suites import quick

from images.runs import main, only, parts, printed, refused, without
from reslora.errors import InvalidArgument
from reslora.images.context import ImageContext
from reslora.images.data.dataset import ImageDataset
from reslora.images.memory.components import outline
from reslora.images.model.families import load_family
from reslora.images.model.loading import find_model
from reslora.images.model_checks import check_family, check_held_out
from reslora.images.settings import parse_args


@pytest.mark.exhaustive
def test_a_clipped_pre_num_and_names_that_match_nothing_are_said(brief_flags, tmp_path):
    flags = [*brief_flags, "--method", "reslora", "--shortcut", "block", "--pre_num", "50"]
    lines = printed(*flags, "--target_modules", "to_q", "nothing", "--output_dir", tmp_path / "out")
    assert "2 of 2 chains" in (line := only(lines, "--pre_num 50")) and "2 blocks" in line
    assert "0 layers" in only(lines, "--target_modules", "nothing")


@pytest.mark.parametrize(
    ("target", "fix"), [("to_out", "give to_out.0"), (".*attn1.*", "match only layers, such as down_blocks.0.")]
)
def test_targets_that_fit_a_list_of_layers_are_refused_by_what_would_do(brief_flags, capsys, tmp_path, target, fix):
    flags = [*brief_flags, "--target_modules", target, "--output_dir", tmp_path / "out"]
    line = refused(capsys, *flags)
    assert f"--target_modules {target}: down_blocks.0.attentions.0." in line and f"; {fix}" in line


@pytest.mark.exhaustive
@pytest.mark.parametrize(("shortcut", "pre_num", "said"), [("input", 999, True), ("input", 4, False)])
def test_a_pre_num_beyond_all_chains_is_said_of_input_shortcuts_too(brief_flags, tmp_path, shortcut, pre_num, said):
    flags = [*brief_flags, "--method", "reslora", "--shortcut", shortcut, "--pre_num", str(pre_num)]
    lines = printed(*flags, "--output_dir", tmp_path / "out")
    found = [line for line in lines if line.startswith("--pre_num")]
    assert len(found) == said and all("999" in line and "2 blocks" in line and "input" in line for line in found)


# -- what the model does not read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "config", "words"),
    [
        ("StableDiffusionPipeline", {}, "--max_sequence_length 64"),
        ("StableDiffusionXLPipeline", {}, "--max_sequence_length 64"),
        ("ZImagePipeline", {}, "--guidance_scale_train 3.5"),
        ("Flux2KleinPipeline", {"guidance_embeds": True}, "--guidance_scale_train 3.5"),
        ("FluxPipeline", {"guidance_embeds": False}, "--guidance_scale_train 3.5"),
        ("ChromaPipeline", {}, "--guidance_scale_train 3.5"),
    ],
)
def test_what_the_model_does_not_read_is_refused(pipeline, config, words):
    """With its default value it may be given."""
    model = SimpleNamespace(family=load_family(pipeline), denoiser_config=lambda: config)
    with pytest.raises(InvalidArgument, match=f"^{words}: .*{model.family.name} .*; leave it"):
        check_family(*parts(parse_args(words.split()), "adapter", "training"), model)
    check_family(*parts(parse_args(["--guidance_scale_train", "1"]), "adapter", "training"), model)


def test_more_tokens_than_the_denoiser_has_positions_for_are_refused():
    model = SimpleNamespace(family=load_family("Lumina2Pipeline"), denoiser_config=dict)
    check_family(*parts(parse_args(["--max_sequence_length", "299"]), "adapter", "training"), model)
    with pytest.raises(InvalidArgument, match=r"^--max_sequence_length 300: lumina2 .* 299 tokens; give 299"):
        check_family(*parts(parse_args(["--max_sequence_length", "300"]), "adapter", "training"), model)


def test_what_the_model_reads_is_taken():
    """`check_family` raises an error for an option that the model does not use."""
    flags = parse_args(["--max_sequence_length", "64", "--guidance_scale_train", "3.5"])
    check_family(
        flags.adapter,
        flags.training,
        SimpleNamespace(family=load_family("FluxPipeline"), denoiser_config=lambda: {"guidance_embeds": 1}),
    )


# -- the images --------------------------------------------------------------------------------------------------------


def test_one_image_cannot_steer_and_train(brief_flags, capsys, tmp_path):
    """Before the model is loaded; nothing is written."""
    steering = "--save_best"
    one, output = image_folder(tmp_path / "one", 1), tmp_path / "out"
    flags = [*without(brief_flags, "--train_data_dir"), "--train_data_dir", one, "--output_dir", output]
    line = refused(capsys, *flags, "--validation_split", "0.1", *steering.split())
    assert f"error: {steering.split()[0]}: no image can be held out, since no folder has more than one" in line
    assert not output.exists()


@pytest.mark.parametrize(("counts", "warned"), [([1], True), ([1, 2], False)])
def test_a_validation_loss_of_no_image_is_warned_of(capsys, counts, warned):
    """Class images are never held out."""
    context = ImageContext(parse_args(["--validation_split", "0.1"]), None, SimpleNamespace(print=print), None)
    class_images = ImageDataset(range(9), (), of_class=True)
    check_held_out([*(ImageDataset(range(count), ()) for count in counts), class_images], context)
    line = "warning: --validation_split 0.1: no image can be held out, since no folder has more than one; "
    assert capsys.readouterr().out == (f"{line}there is no validation loss\n" if warned else "")


# -- the rank ----------------------------------------------------------------------------------------------------------


def settings(output) -> tuple[int, float]:
    config = json.loads((output / "config.json").read_text())
    return config["rank"], config["lora_alpha"]


@pytest.mark.exhaustive
def test_without_a_rank_the_narrowest_layer_says_it(brief_flags, tmp_path):
    """The widest attention of the tiny U-Net has 8 features; diffusers' own test pipelines are as narrow."""
    flags, output = without(brief_flags, "--rank"), tmp_path / "out"
    line = only(printed(*flags, "--output_dir", output), "--rank 8", "16")
    assert "to_q" in line and settings(output) == (8, 16)
    assert main(*flags, "--lora_alpha", "3", "--output_dir", tmp_path / "alpha") == 0
    assert settings(tmp_path / "alpha") == (8, 3)


def test_a_rank_that_is_given_and_too_large_is_refused(brief_flags, capsys, tmp_path):
    flags = without(brief_flags, "--rank")
    (tmp_path / "flags.toml").write_text("rank = 16")
    for given in (["--rank", "16"], ["--config", str(tmp_path / "flags.toml")]):
        line = refused(capsys, *flags, *given, "--output_dir", tmp_path / "out")
        assert "--rank 16" in line and "at most 8" in line
    assert not (tmp_path / "out" / "config.json").exists()


def test_adalora_is_refused_where_nothing_reads_a_layer(brief_flags, capsys, tmp_path):
    """As in Qwen-Image's last block; AdaLoRA ranks every factor by its gradient."""
    flags = [*without(brief_flags, "--pretrained_model_name_or_path"), "--method", "adalora"]
    flags += ["--pretrained_model_name_or_path", qwen_image(tmp_path / "model"), "--output_dir", tmp_path / "out"]
    line = refused(capsys, *flags, "--target_modules", "to_q", "to_add_out", "--max_train_steps", 3, quiet=False)
    assert "the outputs of attn.to_add_out in the last block are unused, so AdaLoRA cannot rank them" in line


@pytest.mark.parametrize("family", quick([*FAMILIES, *EDITS], "stable_diffusion", "sd3"))
def test_the_pixel_multiple_is_known_without_weights(tmp_path, family):
    folder = (FAMILIES | EDITS)[family](tmp_path / "model")
    options = parse_args(["--pretrained_model_name_or_path", str(folder), "--train_data_dir", "."])
    model = find_model(options.model, options.output, Accelerator(cpu=True))
    whole = model.load_pipeline(torch.float32, torch.device("cpu"), encoders=False)
    assert model.family.pixel_multiple(outline(model)) == model.family.pixel_multiple(whole)


@pytest.mark.exhaustive
def test_a_batch_that_is_larger_than_the_data_set_is_warned_of(brief_flags, tmp_path):
    images = image_folder(tmp_path / "images", 3)
    flags = [*brief_flags, "--train_data_dir", images, "--train_batch_size", "6", "--gradient_accumulation_steps", "2"]
    line = only(printed(*flags, "--output_dir", tmp_path / "out"), "warning: --train_batch_size 6")
    assert "3 training images" in line and "each image 4 times" in line and "give 3 or fewer" in line
