"""Presets of --layers: which layers they name, how many parameters these have, and what is refused."""

import json

import pytest
from safetensors.torch import load_file

from images.runs import only, printed, refused
from reslora.images.layers import page
from reslora.images.model.families import FAMILIES


def test_a_preset_trains_its_layers_and_prints_their_parameters(brief_flags, capsys, tmp_path):
    """A resumed run and one with the run's config.json have the same layers."""
    words = [*brief_flags, "--layers", "attention+mlp", "--output_dir", tmp_path / "out"]
    lines = printed(*words)
    tensors = load_file(tmp_path / "out" / "lora" / "peft" / "adapter_model.safetensors")
    roles = {name.split(".transformer_blocks.0.")[1].rpartition(".lora")[0] for name in tensors}
    attention = {f"attn{number}.{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert roles == attention | {"ff.net.0.proj", "ff.net.2"}
    count = sum(value.numel() for value in tensors.values())
    only(lines, f"--layers attention+mlp: {len(tensors) // 2} layers, {count:,} parameters in a LoRA of rank 4")
    config = tmp_path / "out" / "config.json"
    assert json.loads(config.read_text())["layers"] == "attention+mlp"
    for again in (words, ["--config", config]):
        only(printed(*again), "this run, which is finished")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("style", "stable_diffusion has no preset style, only sdxl has; give attention, mlp, all, or several"),
        ("attention+norms", "stable_diffusion has no preset norms; give attention, mlp, all"),
    ],
)
def test_a_preset_that_the_family_lacks_is_refused(brief_flags, capsys, name, reason):
    assert f"--layers {name}: {reason}" in refused(capsys, *brief_flags, "--layers", name)


def test_a_preset_and_target_modules_are_refused(brief_flags, capsys):
    words = ("--layers", "attention", "--target_modules", "to_q")
    assert "--layers attention: --target_modules names layers, too" in refused(capsys, *brief_flags, *words)


@pytest.mark.exhaustive
def test_the_page_counts_the_parameters_of_the_published_models():
    """By the formula rank * (inputs + outputs) and the layout of the published models."""
    rows = [line.split() for line in page().splitlines()]
    found = {
        (row[0], row[1]): (int(row[2]), int(row[3].replace(",", "")))
        for row in rows
        if row[:1] and row[0] in {*FAMILIES.values()}
    }
    widths = [320] * 5 + [640] * 5 + [1280] * 6  # of the transformer blocks of Stable Diffusion 1
    expected = sum(6 * 2 * width + 2 * (width + 768) for width in widths)
    assert found["stable_diffusion", "attention"] == (8 * len(widths), 16 * expected)
    block = 6 * 2 * 1280 + 2 * (1280 + 2048)  # SDXL's widest
    assert found["sdxl", "style"] == found["sdxl", "content"] == (10 * 8, 16 * 10 * block)
    double, single = 8 * 2 * 3072, 3 * 2 * 3072  # Flux.1: both streams; q, k and v
    assert found["flux", "attention"] == (19 * 8 + 38 * 3, 16 * (19 * double + 38 * single))
    for family in FAMILIES.values():
        parts = [found[family, name] for name in ("attention", "mlp")]
        assert all(min(part) > 0 for part in parts)
        assert all(
            sum(numbers) <= most for numbers, most in zip(zip(*parts, strict=True), found[family, "all"], strict=True)
        )
