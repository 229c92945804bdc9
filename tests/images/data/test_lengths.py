"""Captions longer than the text encoder's limit: counted as the pipelines truncate them, and printed in one line."""

import json
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import image_folder

from images.runs import only, printed
from reslora.images.data.lengths import reader_of
from reslora.images.model.families import load_family
from reslora.images.model.loading import Model

FAMILIES = ("stable_diffusion", "sdxl", "flux", "sd3", "z_image", "flux2", "flux2_klein", "chroma", "lumina2")
LONGEST = 12  # --max_sequence_length
TELLING = ("captions and prompts", "longer than")


def loaded(name: str, folder: Path) -> tuple:
    stock = DiffusionPipeline.from_pretrained(getattr(pipelines, name)(folder))
    index = json.loads((folder / "model_index.json").read_text())
    family = load_family(type(stock).__name__)
    return stock, family, reader_of(stock, Model(folder, family, "--model", index=index))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_caption_that_is_no_longer_is_read_to_its_last_word_and_of_a_longer_one_that_is_not(name, tmp_path):
    stock, family, (part, tokenizer) = loaded(name, tmp_path / "model")
    longest = 40 if name in ("flux2", "lumina2") else LONGEST  # their system message counts, too
    most = longest if "max_sequence_length" in family.defaults else tokenizer.model_max_length
    assert part == {"flux": "tokenizer_2", "sdxl": "tokenizer_2", "sd3": "tokenizer_3"}.get(name, "tokenizer")
    around = family.token_counts(stock, tokenizer, ["red"])[0] - 1
    for words, is_read in ((most - around, True), (most - around + 1, False)):
        texts = ["red " * (words - 1) + last for last in ("red", "blue")]
        assert family.token_counts(stock, tokenizer, texts) == [words + around] * 2
        one, other = (family.encode_captions(stock, [text], longest) for text in texts)
        assert is_read != torch.equal(one["states"][0], other["states"][0])


@torch.no_grad()
def test_of_qwens_template_what_is_dropped_is_not_counted(tmp_path):
    stock, family, (_, tokenizer) = loaded("qwen_image", tmp_path / "model")
    texts = ["red", "red blue disc " * 9]
    states = family.encode_captions(stock, texts, 512)["states"]
    assert family.token_counts(stock, tokenizer, texts) == list(map(len, states))


def test_without_t5_stable_diffusion_3_is_measured_by_clip(tmp_path):
    folder = pipelines.sd3(tmp_path / "model", with_t5=False)
    stock = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    index = json.loads((folder / "model_index.json").read_text())
    family = load_family(type(stock).__name__)
    assert reader_of(stock, Model(folder, family, "--model", index=index))[0] == "tokenizer_2"


@pytest.mark.exhaustive
@pytest.mark.parametrize("more", [(), ("--train_text_encoder", "--strict")])
def test_one_line_tells_how_many_captions_are_cut_and_which_is_the_longest(brief_flags, tmp_path, more):
    """If captions are encoded in this run, in an earlier one, or in every step."""
    data = image_folder(tmp_path / "data", 3, ["red " * 7, "blue " * 30, "red disc"].__getitem__)
    flags = [*brief_flags, "--train_data_dir", data, "--validation_prompt", "disc", *more]
    for output in ("first", "second"):
        line = only(printed(*flags, "--output_dir", tmp_path / output), *TELLING)
        assert line.startswith("2 of 4 captions") and "the 8 tokens that text_encoder reads" in line
        assert "1.png: 32 tokens" in line and "max_sequence_length" not in line
