"""The scripts that make the bundled pipeline, and the pipeline itself."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
ASSETS, EXAMPLE = ROOT / "assets", ROOT / "app" / "example"
sys.path.insert(0, str(ASSETS / "make"))

import make_data  # noqa: E402
from augment import STYLES, load_pictures, mirrorable, move, restyle, styled_caption  # noqa: E402
from captions import VALIDATION_PROMPTS, is_held_out, is_known, new_tokenizer  # noqa: E402
from checkpoint import load_checkpoint, save_checkpoint  # noqa: E402


@pytest.fixture
def images() -> torch.Tensor:
    """Four white images with a colored rectangle to the left of the middle."""
    images = torch.ones(4, 3, 64, 64)
    images[:, 0, 20:40, 10:30] = -0.5
    return images


def row(text: str, category: str = "Objects", subcategory: str = "tool") -> dict:
    return {"text": text, "category": category, "subcategory": subcategory}


def test_moved_images_keep_a_white_ground_and_are_repeatable(images):
    moved = move(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, move(images, torch.Generator().manual_seed(0)))
    assert moved.amax() <= 1 and moved.amin() >= -1
    assert torch.equal(moved[:, :, :4, -4:], torch.ones(4, 3, 4, 4))


def test_only_allowed_images_are_mirrored(images):
    images = images[:1].repeat(64, 1, 1, 1)
    allowed = torch.arange(64) % 2 == 0
    moved = move(images, torch.Generator().manual_seed(0), mirror=allowed)
    on_the_right = moved[..., 32:].sum((1, 2, 3)) < moved[..., :32].sum((1, 2, 3))
    assert on_the_right[allowed].any() and not on_the_right[allowed].all()
    assert not on_the_right[~allowed].any()


@pytest.mark.parametrize("style", STYLES)
def test_styles_keep_the_ground_white(images, style):
    styled = restyle(images, style, torch.Generator().manual_seed(0))
    assert styled.shape == images.shape and styled.amin() >= -1
    torch.testing.assert_close(styled[:, :, 50:], images[:, :, 50:])
    assert style == "plain" or not torch.equal(styled, images)


def test_captions_say_the_style_unless_plain():
    assert styled_caption("red apple", "plain") == "red apple"
    assert styled_caption("red apple", "outlined") == "outlined red apple"
    assert styled_caption("red apple", "outlined", "noto") == "outlined red apple, noto style"
    assert styled_caption("", of="noto") == "noto style"
    assert mirrorable("red apple") and not mirrorable("magnifying glass tilted left")


def test_known_and_held_out_captions():
    assert is_known(row("hammer")) and not is_known(row("two o'clock")) and not is_known(row("om", "Symbols"))
    assert is_held_out(row("open file folder"), {"open", "file", "folder"})
    assert not is_held_out(row("open file folder"), {"open", "file"})


def test_tokenizer_knows_every_word_and_pads():
    tokenizer = new_tokenizer(["red apple", "t-shirt"])
    tokens = tokenizer("Outlined T-shirt", padding="max_length").input_ids
    assert len(tokens) == 12 and tokenizer.unk_token_id not in tokens
    assert tokenizer.unk_token_id in tokenizer("quark").input_ids


def test_checkpoint_restores_its_parts(tmp_path):
    layer = torch.nn.Linear(2, 2)
    assert load_checkpoint(tmp_path / "checkpoint.pt", {"layer": layer}) == 0
    save_checkpoint(tmp_path / "checkpoint.pt", {"layer": layer}, 7)
    other = torch.nn.Linear(2, 2)
    assert load_checkpoint(tmp_path / "checkpoint.pt", {"layer": other}) == 7
    assert torch.equal(layer.weight, other.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_missing_images_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="make_data"):
        load_pictures(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_bundled_pipeline_draws_on_white_and_takes_a_lora_in_every_dtype(dtype):
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "pipeline", **({"dtype": dtype} if dtype else {}))
    pipeline.set_progress_bar_config(disable=True)
    expected = dtype or torch.float32
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {expected}

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline("red apple", num_inference_steps=10, guidance_scale=4.0, generator=generator, output_type="pt")
        assert drawn.images.shape == (1, 3, 64, 64) and drawn.images.isfinite().all()
        return drawn.images.float()

    plain = draw()
    assert plain[0][:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.9
    for method in ("lora", "reslora"):  # of the run that README's first command makes
        pipeline.load_lora_weights(EXAMPLE / method, adapter_name=method)
        pipeline.set_adapters(method)
        assert (draw() - plain).abs().mean() > 0.01


def test_validation_prompts_are_those_of_the_file():
    assert set(VALIDATION_PROMPTS) == set((ASSETS / "validation_prompts.txt").read_text().splitlines())


def test_the_fine_tuning_set_is_that_of_its_name_without_the_prompts(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "flat", tmp_path / "chosen" / "flat"
    source.mkdir()
    rows = [
        {"file_name": f"{i}.png", "text": text} for i, text in enumerate(["pear", "red apple", "a b c", "plum", "kiwi"])
    ]
    lines = [json.dumps(row | {"category": "Food & Drink", "subcategory": "fruit"}) + "\n" for row in rows]
    (source / "metadata.jsonl").write_text("".join(lines))
    for row in rows:
        (source / row["file_name"]).write_bytes(row["text"].encode())
    monkeypatch.setattr("sys.argv", ["make_data.py", "--output", str(tmp_path), "--select", str(target)])
    monkeypatch.setattr(make_data.select, "__defaults__", (2,))
    make_data.main()
    assert "2 of 3 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in target.glob("*.png")} == {"0.png": b"pear", "3.png": b"plum"}
    chosen = [json.loads(line) for line in (target / "metadata.jsonl").read_text().splitlines()]
    assert chosen == [rows[0], rows[3]]


def test_fine_tuning_set_has_known_captions_and_none_of_the_prompts():
    rows = [json.loads(line) for line in (ASSETS / "twemoji" / "metadata.jsonl").read_text().splitlines()]
    captions = {row["text"] for row in rows}
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "pipeline" / "tokenizer")
    assert len(captions) == 260 and not captions & set(VALIDATION_PROMPTS)
    assert all(is_known(row | {"category": "Objects", "subcategory": ""}) for row in rows)
    assert not [caption for caption in captions if tokenizer.unk_token_id in tokenizer(caption).input_ids]
    assert {row["file_name"] for row in rows} == {path.name for path in (ASSETS / "twemoji").glob("*.png")}
