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
from captions import VALIDATION_PROMPTS, is_known  # noqa: E402


@pytest.mark.exhaustive
def test_bundled_pipeline_draws_on_white_and_takes_a_lora():
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}

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
    assert set(VALIDATION_PROMPTS) == set((ASSETS / "validation_prompts.txt").read_text().splitlines())
    assert len(captions) == 260 and not captions & set(VALIDATION_PROMPTS)
    assert all(is_known(row | {"category": "Objects", "subcategory": ""}) for row in rows)
    assert not [caption for caption in captions if tokenizer.unk_token_id in tokenizer(caption).input_ids]
    assert {row["file_name"] for row in rows} == {path.name for path in (ASSETS / "twemoji").glob("*.png")}
