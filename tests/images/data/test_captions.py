"""Caption transforms: their order and probabilities, and that every caption of a run is known in advance."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from pipelines import flux, image_folder

from images.runs import FAMILY, load_images, losses, only, printed, read_by, refused
from reslora.images.context import ImageContext
from reslora.images.data import training_data as making
from reslora.images.data.captions import VERBATIM, CaptionTransform, build_caption_transform
from reslora.images.data.samples import CalibrationSamples, TrainingData, ValidationSamples, training_loader
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.data.training_data import captions_of, source_of
from reslora.images.generators import generator
from reslora.images.settings import parse_args
from reslora.options.images import Options


def outcomes(transform: CaptionTransform, *captions: str, count: int = 400) -> list[str]:
    return [transform.sampled(captions, generator("test", number)) for number in range(count)]


def joined(*tags: tuple[str, ...]) -> set[str]:
    return {", ".join(some) for some in tags}


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_without_options_a_caption_is_itself():
    text = " a {red|blue} fox ,, b\nand {{more}}"
    assert VERBATIM.plain(text) == text and set(outcomes(VERBATIM, text, count=3)) == {text}
    assert not VERBATIM.varies and CaptionTransform(dropout=0.5).varies


def test_prefix_and_suffix_are_put_around_with_a_space():
    transform = CaptionTransform(prefix="sks", suffix="on white")
    assert transform.plain("red fox") == "sks red fox on white" and transform.plain("") == "sks on white"
    assert set(outcomes(transform, "red fox", "hen", count=40)) == {"sks red fox on white", "sks hen on white"}


def test_the_prefix_is_part_of_the_first_tag_and_the_suffix_of_the_last():
    transform = CaptionTransform(prefix="sks", suffix="end", shuffle=True, keep=1)
    orders = itertools.permutations(["grass", "tree", "sun end"])
    assert set(outcomes(transform, "fox,grass , tree,sun")) == joined(*(("sks fox", *order) for order in orders))
    assert transform.plain("fox,grass , tree,sun") == "sks fox,grass , tree,sun end"


def test_empty_tags_are_tags_as_in_kohyas_scripts():
    orders = itertools.permutations(["b", "", "c"])
    assert set(outcomes(CaptionTransform(shuffle=True, keep=1), "a, b,, c")) == joined(
        *(("a", *order) for order in orders)
    )
    assert set(outcomes(CaptionTransform(shuffle=True, keep=2), ",a,b,")) == joined(
        ("", "a", "b", ""), ("", "a", "", "b")
    )
    assert set(outcomes(CaptionTransform(tag_dropout=0.5), "a,,")) == {"", "a", ", ", "a, ", "a, , "}


def test_of_nested_wildcards_the_innermost_is_chosen():
    assert set(outcomes(CaptionTransform(wildcards=True), "{a|{b|c} d}")) == {"{a|b d}", "{a|c d}"}


def test_wildcards_are_resolved_before_tags_are_taken_apart():
    found = set(outcomes(CaptionTransform(wildcards=True, shuffle=True), "{a, b|c}, d"))
    assert found == joined(*itertools.permutations("abd"), *itertools.permutations("cd"))


def test_a_prefix_may_hold_wildcards_and_doubled_braces_are_braces():
    transform = CaptionTransform(prefix="{a|b}", wildcards=True)
    assert set(outcomes(transform, "{{c}} {{{d|e}}}")) == {f"{x} {{c}} {{{y}}}" for x in "ab" for y in "de"}
    assert transform.plain("{{c}} {{{d|e}}}") == "a {c} {d}"


def test_with_wildcards_each_line_is_a_caption_and_each_has_the_prefix():
    transform = CaptionTransform(prefix="sks", wildcards=True)
    assert (
        set(outcomes(transform, "one\n\ntwo\n")) == {"sks one", "sks two"} and transform.plain("one\ntwo") == "sks one"
    )
    assert CaptionTransform(prefix="sks").plain("one\ntwo") == "sks one\ntwo" and transform.plain("") == "sks"


def test_tags_are_left_out_but_for_those_that_are_kept():
    found = outcomes(CaptionTransform(tag_dropout=0.25, keep=2), "a, b, c, d", count=2000)
    assert set(found) == joined(*(("a", "b", *more) for more in ((), ("c",), ("d",), ("c", "d"))))
    assert found.count("a, b, c, d") / 2000 == pytest.approx(0.75**2, abs=0.04)
    assert set(outcomes(CaptionTransform(tag_dropout=0.9), "a, b")) == {"", "a", "b", "a, b"}


def test_dropout_leaves_nothing_of_the_caption_not_even_the_prefix():
    found = outcomes(CaptionTransform(prefix="sks", suffix="end", dropout=0.3), "fox", count=2000)
    assert set(found) == {"", "sks fox end"} and found.count("") / 2000 == pytest.approx(0.3, abs=0.04)
    assert CaptionTransform(dropout=0.3).plain("fox") == "fox"


def test_each_part_of_the_recipe_is_that_of_its_flag():
    words = "--caption_prefix sks --caption_suffix end --caption_dropout 0.3 --caption_tag_dropout_rate 0.1"
    found = build_caption_transform(parse_args([*words.split(), "--shuffle_caption", "--keep_tokens", "2"]).data)
    assert found == CaptionTransform("sks", "end", dropout=0.3, shuffle=True, keep=2, tag_dropout=0.1)
    assert build_caption_transform(parse_args(["--enable_wildcard"]).data) == CaptionTransform(wildcards=True)


# -- a function of seed and position ---------------------------------------------------------------------------------

EVERYTHING = CaptionTransform(prefix="sks", dropout=0.2, wildcards=True, shuffle=True, keep=1, tag_dropout=0.2)
CAPTIONS = [[f"{{red|blue}} {number}, a, b, c", f"other {number}, d"] for number in range(7)]


def material_with(
    transform: CaptionTransform, steps: int = 12, batch: int = 4, accumulation: int = 1, seed: int = 3
) -> TrainingData:
    """Return seven images with two captions each, one of them held out, and three class images."""
    flags = Options.of(
        seed=seed, train_batch_size=batch, gradient_accumulation_steps=accumulation, max_train_steps=steps,
        noise_offset=0.0, cache_text_embeddings=False, dataloader_num_workers=0, max_validation_images=64,
    )  # fmt: skip
    size = Size(16, 16)
    latents = SimpleNamespace(variants=1, of=lambda index, variant: {"sizes": torch.tensor(index)})
    objective = SimpleNamespace(draw=lambda draws, tokens: torch.tensor(0), at=torch.tensor)
    learnt = Source(SimpleNamespace(captions=CAPTIONS), latents, tuple(range(6)), (6,), (size,) * 7)
    of_class = Source(SimpleNamespace(captions=[["a {dog}"]] * 3), latents, (0, 1, 2), (), (size,) * 3)
    sources = (dataclasses.replace(learnt, transform=transform), of_class)
    return TrainingData(sources, {}, objective, {size: (1, 2, 2)}, FAMILY, **read_by(flags))


def told(training_data: TrainingData, steps: range, processes: int = 1) -> list[str]:
    """Return the captions of these steps, in the order of their positions."""
    loaders = [training_loader(training_data, steps, processes, rank, pin=False) for rank in range(processes)]
    return [text for batches in zip(*loaders, strict=True) for batch in batches for text in batch.caption]


def test_processes_accumulation_and_a_resumed_run_see_the_same_variants():
    whole = told(material_with(EVERYTHING), range(12))
    assert len(set(whole)) > 20
    assert told(material_with(EVERYTHING, batch=2), range(12), processes=2) == whole
    assert told(material_with(EVERYTHING, batch=2, accumulation=2), range(12)) == whole
    assert told(material_with(EVERYTHING, steps=99), range(7, 12)) == whole[7 * 4 :]
    assert told(material_with(EVERYTHING, seed=4), range(12)) != whole


def test_what_is_measured_and_merged_with_has_whole_captions():
    training_data = material_with(EVERYTHING)
    whole = [EVERYTHING.plain(text) for text in CAPTIONS[6]]
    found = {text for batch in ValidationSamples(training_data).batches() for text in batch.caption}
    assert found <= set(whole) == {"sks red 6, a, b, c", "sks other 6, d"}
    found = {text for batch in CalibrationSamples(training_data).batches(16) for text in batch.caption}
    assert found <= {EVERYTHING.plain(text) for options in CAPTIONS for text in options} | {"a {dog}"}


def test_every_caption_of_a_run_is_known_beforehand(monkeypatch):
    processes = 2
    training_data = material_with(EVERYTHING, accumulation=3)
    read, known = set(told(training_data, range(12), processes)), captions_of(training_data, processes)
    for samples in (ValidationSamples(training_data).batches(), CalibrationSamples(training_data).batches(16)):
        read |= {text for batch in samples for text in batch.caption}
    assert read <= set(known) and len(known) == len(set(known))
    monkeypatch.setattr(making, "FEW_VARIANTS", len(known))
    monkeypatch.setattr(making, "VARIANTS", 0)
    assert captions_of(training_data, processes) == known
    monkeypatch.setattr(making, "FEW_VARIANTS", len(known) - 1)
    assert captions_of(training_data, processes) is None
    assert len(captions_of(material_with(CaptionTransform(prefix="sks", dropout=0.5)), processes)) == 15


def test_class_images_keep_their_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "latents_of", lambda *_: (None, {}))
    words = ["--pretrained_model_name_or_path", "someone/model", "--train_data_dir", image_folder(tmp_path / "images")]
    flags = parse_args([*map(str, words), "--caption_prefix", "sks", "--caption_suffix", "end"])
    images = dataclasses.replace(load_images(flags), of_class=True)
    source = source_of(images, [Size(16, 16)] * len(images), None, ImageContext(flags, None, None, None))
    assert source.transform == VERBATIM


# -- whole runs ------------------------------------------------------------------------------------------------------

OPTIONS = ("--caption_prefix", "red", "--caption_dropout", 0.3, "--shuffle_caption", "--keep_tokens", 1)
OPTIONS += ("--caption_tag_dropout_rate", 0.2, "--enable_wildcard", "--center_crop", "--no-random_flip")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    return image_folder(
        tmp_path_factory.mktemp("tagged") / "images", 4, lambda number: f"{{red|blue}} disc, box, {number}, blue"
    )


@pytest.mark.exhaustive
def test_variants_that_are_encoded_in_the_steps_train_what_kept_ones_do(tagged, monkeypatch, tmp_path):
    """Flux has a trained and a frozen text encoder; each is run where it should be."""
    flags = ["--pretrained_model_name_or_path", flux(tmp_path / "model"), "--train_data_dir", tagged, *OPTIONS]
    flags += ["--resolution", 32, "--max_train_steps", 3, "--train_batch_size", 2, "--rank", 2, "--method", "lora"]
    flags += ["--validation_split", 0.3, "--num_validation_images", 0, "--num_inference_steps", 1]
    flags += ["--train_text_encoder"]
    flags += ["--merge_calibration_samples", 0, "--report_to", "none", "--learning_rate", "1e-2"]
    assert not [line for line in printed(*flags, "--output_dir", tmp_path / "kept") if "too many variants" in line]
    monkeypatch.setattr(making, "FEW_VARIANTS", 0)
    monkeypatch.setattr(making, "VARIANTS", 1)
    only(printed(*flags, "--output_dir", tmp_path / "loop"), "too many variants", "text encoders stay in memory")
    kept, loop = (losses(tmp_path / name, "lora") for name in ("kept", "loop"))
    assert [row[:2] for row in kept] == [row[:2] for row in loop] and len(kept) > 3
    assert [row[2] for row in kept] == pytest.approx([row[2] for row in loop], rel=1e-4)


@pytest.mark.parametrize(
    "words", [("--keep_tokens", "1"), ("--caption_dropout", "1.5"), ("--caption_tag_dropout_rate", "-0.1")]
)
def test_what_nothing_reads_is_refused(words, brief_flags, capsys):
    line = refused(capsys, *brief_flags, *words)
    assert words[0] in line and words[1] in line
