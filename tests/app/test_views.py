"""app/views.py: the HTML of a run, whatever its files contain."""

import numpy as np
import pytest
from app_runs import run_by_hand
from safetensors.numpy import save_file

from app import compared, views


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_damage_is_told(run):
    log = run.folder / "lora" / "log.jsonl"
    log.write_text(log.read_text().replace("\n", '\n{"step": 2, "lo\n', 1))
    assert len(run.log("lora")) == 7 and "1 damaged line of the log left out" in compared.numbers(run, 4)
    image = run.folder / "lora" / "samples" / "step-000004" / "0-0.png"
    content = bytearray(image.read_bytes())
    content[43:53] = bytes(10)
    image.write_bytes(content)
    assert compared.images(run, 4).count('<div class="empty">damaged') == 1


def test_nothing_of_a_run_becomes_markup(run):
    plan = {"links": 0, "chains": [{"role": "<b>", "blocks": [block("<i>x"), block("<i>y")]}]}
    merge = {"method": "<b>", "blocks": [{"name": "<i>z", "role": "", "alpha": 1.0, "rank": 2, "error": 0.1}]}
    shown = compared.images(run, 2) + views.chain_plan(plan) + views.merge_report(merge | {"notes": ["<u>"]})
    for forbidden in ("<script", "${1}", "{{2}}", "<b>:", "<i>", "<u>"):
        assert forbidden not in shown
    assert "&lt;script&gt;" in shown


def block(name: str) -> dict:
    return {"name": name, "in_features": 4, "out_features": 4, "rank": 2, "tokens": [1], "cut": "<i>"}


def test_chain_plan_shows_links_and_cuts():
    first, second, third = block("down_blocks.0.attentions.0.x"), block("mid_block.attentions.0.x"), block("other")
    third["cut"] = "8->8 follows 4->4 features"
    plan = {"links": 1, "chains": [{"role": "to_q", "blocks": [first, second]}, {"role": "to_q", "blocks": [third]}]}
    shown = views.chain_plan(plan)
    order = [shown.index(text) for text in (">d0.0<", ">→<", ">m.0<", "✂", ">other<")]
    assert order == sorted(order)
    assert "8-&gt;8 follows" in shown
    assert "not known yet" in views.chain_plan(None)


@pytest.mark.parametrize(
    ("name", "place", "role"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "d1.0", "attn1.to_q"),
        ("mid_block.attentions.0.transformer_blocks.2.attn2.to_out.0", "m.0/2", "attn2.to_out.0"),
        ("single_transformer_blocks.12.attn.to_q", "s12", "attn.to_q"),
    ],
)
def test_places_and_roles_of_every_familys_blocks(name, place, role):
    assert (views.place(name), views.role_of(name)) == (place, role)


def test_norms_of_an_exported_file_are_those_of_the_product(run):
    random = np.random.default_rng(0)
    down, up = random.normal(size=(2, 5)).astype("float32"), random.normal(size=(7, 2)).astype("float32")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for method, scale in (("lora", 1.0), ("reslora", 3.0)):
        tensors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": scale * up}
        save_file(tensors, run.folder / method / "pytorch_lora_weights.safetensors")
    assert run.lora_norms("lora")[name] == pytest.approx(np.linalg.norm(up @ down), rel=1e-5)
    shown = views.norm_difference(run)
    assert f"{2 * np.linalg.norm(up @ down):+.2f}" in shown and "background:rgba(232,89,12,0.70)" in shown  # orange


def test_a_merge_report_by_hand():
    """Errors on average and at most; for a block with an alpha for each neighbor, their sum."""
    blocks = [
        {"name": f"down_blocks.{number}.attentions.0.x", "alpha": alpha, "error": error}
        for number, (alpha, error) in enumerate([([0.5, 1.25], 0.1), (2.0, 0.3), (0.0, None)])
    ]
    shown = views.merge_report({"method": "weights", "blocks": blocks})
    assert "relative error 20.0% on average, 30.0% at most" in shown
    assert all(f"attentions.0.x: {text}" in shown for text in ("1.75", "2.00", "0.00", "0.10", "0.30", "&mdash;"))


def test_a_summary_by_hand(run):
    """Of two methods with four steps each, five steps are done."""
    log = run.folder / "reslora" / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    shown = views.summary(run, "running")
    assert "4 steps each" in shown and "5 of 8 done" in shown and "width:62.5%" in shown
    assert "rank 2 · learning rate 0.001" in shown and "width:50%" in views.progress("half", 0.5)


def test_an_export_that_cannot_be_read_has_no_norms(run):
    for content in (b"", b"no safetensors", (8).to_bytes(8, "little") + b"{}"):
        (run.folder / "reslora" / "pytorch_lora_weights.safetensors").write_bytes(content)
        assert run.lora_norms("reslora") == {} and "with both methods" in views.norm_difference(run)
    pairs = {
        "unet.x.lora_A.weight": np.full((2, 3), np.nan, "float32"),
        "unet.x.lora_B.weight": np.ones((3, 2), "float32"),
    }
    save_file(pairs, run.folder / "reslora" / "pytorch_lora_weights.safetensors")
    assert run.lora_norms("reslora") == {}
