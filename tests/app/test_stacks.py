"""app/stacks.py: several LoRAs add up on any model, and those of another model are refused."""

import re
import shutil

import numpy as np
import pytest
import torch
from app_runs import REQUEST, image_of, own_runs, write_run
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from pipelines import stable_diffusion
from safetensors.torch import load_file, save_file

from app.downloads import downloads_of
from app.library import Library
from app.runs import BASE, RunError, Weights
from app.stacks import MOST, add, factors_of, loras, stack, stacked
from app.studio import Studio
from app.weight_files import uploaded
from reslora.export import DIFFUSERS_FILE, Factors, export_diffusers, merged_state_dict, write_diffusers
from reslora.images import conversion
from reslora.images.model.families import load_family

NAMES = ["tiny: lora", "tiny: reslora"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(own_runs(tmp_path_factory))


@pytest.fixture(scope="module")
def run(library):
    return library.find("tiny")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def summed_by_hand(run, model, strengths):
    """The U-Net's weights in float64: `W + sum_i strength_i B_i A_i`.

    The factors are those of diffusers' files, in which B includes the scale.
    """
    state = {name: value.double() for name, value in model.state_dict().items()}
    for method, strength in strengths.items():
        tensors = load_file(run.folder / method / DIFFUSERS_FILE)
        for name, down in tensors.items():
            if name.endswith(".lora_A.weight"):
                up = tensors[name.replace(".lora_A.", ".lora_B.")]
                layer = name.removeprefix("unet.").removesuffix(".lora_A.weight")
                state[f"{layer}.weight"] += strength * up.double() @ down.double()
    return state


@pytest.mark.exhaustive
def test_a_stack_is_the_base_plus_the_sum_of_its_updates(studio, library, run):
    """In the weights, and in the image of a stock pipeline with these weights."""
    base = run.word("pretrained_model_name_or_path")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    strengths = {"lora": 0.7, "reslora": -0.4}
    expected = summed_by_hand(run, unet, strengths)
    weights = stacked(library, run, NAMES, "0.7, -0.4")
    parts = factors_of(weights, load_family("StableDiffusionPipeline"), {"unet": unet})
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    add(unet, parts["unet"], 1.0)
    found = merged_state_dict(unet)
    assert found.keys() == expected.keys()
    assert max((found[name].double() - expected[name]).abs().max() for name in found) < 1e-6
    assert max((before[name].double() - expected[name]).abs().max() for name in found) > 1e-2

    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.unet.load_state_dict({name: value.float() for name, value in expected.items()})
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(REQUEST.seed)
    image = pipe(
        REQUEST.prompt, num_inference_steps=2, guidance_scale=REQUEST.guidance, height=32, width=32, generator=seed
    ).images[0]
    assert np.abs(np.asarray(image).astype(int) - image_of(studio, run, weights)).max() <= 1
    assert np.abs(np.asarray(image).astype(int) - image_of(studio, run, BASE)).max() > 8


@pytest.mark.exhaustive
def test_one_of_a_stack_is_that_lora_and_other_strengths_are_drawn_anew(studio, library, run):
    file = image_of(studio, run, run.find_weights(f"lora: {DIFFUSERS_FILE}"))
    assert np.abs(image_of(studio, run, stacked(library, run, NAMES[:1], "")) - file).max() <= 1
    assert np.abs(image_of(studio, run, stacked(library, run, NAMES, "1 0")) - file).max() <= 1
    assert np.abs(image_of(studio, run, stacked(library, run, NAMES, "1 0.5")) - file).max() > 2
    assert stacked(library, run, NAMES, "1 0.5").label == "tiny: lora x 1 + tiny: reslora x 0.5"


def test_the_sum_may_have_a_higher_rank_than_a_layer_and_be_of_convolutions(tmp_path):
    """Twelve ranks in layers with eight features, and layers that only one of the two LoRAs has."""
    model = stable_diffusion(tmp_path / "model")
    family, parts, deltas = load_family("StableDiffusionPipeline"), [], {}
    for number, targets in enumerate((["to_q", "conv1"], ["to_q", "to_v"])):
        torch.manual_seed(number)
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        unet.add_adapter(LoraConfig(r=6, target_modules=targets, init_lora_weights=False))
        path = export_diffusers(unet, tmp_path / str(number))
        parts.append((Weights(str(number), "file", "", path), 0.5 + number))
        for name, value in merged_state_dict(unet).items():
            deltas[name] = deltas.get(name, 0) + (0.5 + number) * (value - before[name]).double()
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    add(unet, factors_of(stack(parts), family, {"unet": unet})["unet"], 2.0)
    found = merged_state_dict(unet)
    for name, delta in deltas.items():
        torch.testing.assert_close(found[name].double(), before[name] + 2 * delta, rtol=1e-5, atol=1e-5)
    assert sum(bool(delta.abs().max() > 1e-2) for delta in deltas.values()) > 8


@pytest.mark.exhaustive
def test_loras_of_another_model_are_neither_offered_nor_taken(library, run, tmp_path):
    write_run(tmp_path / "runs" / "other", pretrained_model_name_or_path="/models/other")
    file = (run.folder / "lora" / DIFFUSERS_FILE).read_bytes()
    (tmp_path / "runs" / "other" / "lora" / DIFFUSERS_FILE).write_bytes(file)
    both = Library(tmp_path / "runs", (run.folder,))
    assert set(NAMES) <= set(loras(both, run)) and "other: lora" not in loras(both, run)
    assert list(loras(both, both.find("other"))) == ["other: lora"]
    with pytest.raises(RunError, match=r"^other: lora is a LoRA for other, but this run trains model: choose LoRAs"):
        stacked(both, run, ["tiny: lora", "other: lora"], "")


def test_loras_of_a_run_whose_config_is_damaged_are_not_offered(run, tmp_path):
    """Their base model is unknown; the run itself says why it cannot generate."""
    for name in ("whole", "damaged"):
        shutil.copytree(run.folder, tmp_path / name)
    (tmp_path / "damaged" / "config.json").write_text("{")
    library = Library(tmp_path)
    whole, damaged = library.find("whole"), library.find("damaged")
    assert set(loras(library, whole)) == {"whole: lora", "whole: reslora"} and not loras(library, damaged)
    assert damaged.weights() == [BASE] and not downloads_of(damaged) and downloads_of(whole)
    with pytest.raises(RunError, match=r"damaged: its config\.json cannot be read"):
        stacked(library, damaged, ["whole: lora"], "1")


@pytest.mark.parametrize(
    ("names", "strengths", "said"),
    [
        (["tiny: dora"], "", "There is no LoRA with this name"),
        (["../../etc/passwd"], "", "There is no LoRA with this name"),
        ([None], "", "There is no LoRA with this name"),
        ([["tiny: lora"]], "", "There is no LoRA with this name"),
        (NAMES, "1", "1 strength for 2 LoRAs: give one each, such as 1 0.5"),
        (NAMES[:1], "1 0.5", "2 strengths for 1 LoRA: give one each"),
        (NAMES, "1 much", "Strength of tiny: reslora: much is not a number from -2 to 2"),
        (NAMES, "1 nan", "Strength of tiny: reslora: nan is not a number"),
        (NAMES, "3 1", "Strength of tiny: lora: 3 is not a number"),
        (NAMES * 5, "", f"10 LoRAs: at most {MOST}"),
    ],
)
def test_a_stack_that_makes_no_sense_is_refused_in_a_line(library, run, names, strengths, said):
    with pytest.raises(RunError, match=f"^{said}"):
        stacked(library, run, names, strengths)


@pytest.mark.parametrize("end", [-100, 1000, 20])  # in its weights, and in its header
def test_a_lora_that_was_cut_is_refused_by_name(studio, run, tmp_path, end):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((run.folder / "lora" / DIFFUSERS_FILE).read_bytes()[:end])
    with pytest.raises(RunError, match=r"^cut: the file is incomplete, damaged, or not a safetensors file"):
        image_of(studio, run, stack([(Weights("cut", "file", "", path), 1.0)]))


# -- files of other tools: a drawing with one alone and a stack of one agree --------------------------------------


@pytest.fixture
def foreign(run, tmp_path):
    """Write the run's kohya file with changed tensors."""

    def write(change):
        save_file(change(load_file(run.folder / "lora" / "kohya.safetensors")), tmp_path / "foreign.safetensors")
        return uploaded(tmp_path / "foreign.safetensors")

    return write


def with_other_alphas(tensors):
    """Return the same LoRA with an alpha for each layer, as resize_lora.py of kohya or a LoCon with conv_alpha has."""
    for number, name in enumerate([name for name in tensors if name.endswith(".alpha")]):
        tensors[name] *= 1 + number % 3
        tensors[name.replace(".alpha", ".lora_up.weight")] /= 1 + number % 3
    return tensors


@pytest.mark.exhaustive
def test_each_layers_alpha_is_its_own(studio, run, foreign):
    expected = image_of(studio, run, run.find_weights("lora: kohya.safetensors"))
    file = foreign(with_other_alphas)
    for weights in (file, stack([(file, 1.0)])):
        assert np.abs(image_of(studio, run, weights) - expected).max() <= 1
    assert np.abs(image_of(studio, run, BASE) - expected).max() > 8


def test_what_the_converter_writes_is_drawn(studio, run, tmp_path):
    expected = image_of(studio, run, run.find_weights("lora: kohya.safetensors"))
    source, target = run.folder / "lora" / "kohya.safetensors", tmp_path / "comfyui.safetensors"
    base = run.word("pretrained_model_name_or_path")
    assert conversion.main([str(source), str(target), "--to", "comfyui", "--base", base]) == 0
    assert np.abs(image_of(studio, run, uploaded(target)) - expected).max() <= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("word", ["{}.dora_scale", "{}.hada_w1_a", "{}.lora_mid.weight", "bundle_emb.sks"])
def test_what_is_not_of_plain_lora_is_refused_by_name(studio, run, foreign, word):
    name = word.format("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
    file = foreign(lambda tensors: tensors | {name: torch.ones(8, 1)})
    said = rf"^foreign\.safetensors: {re.escape(name)} is not part of a plain LoRA; give a LoRA without that\.$"
    for weights in (file, stack([(file, 1.0)])):
        with pytest.raises(RunError, match=said):
            image_of(studio, run, weights)


@pytest.mark.parametrize(
    ("layer", "width", "said"),
    [
        (
            "text_model.encoder.layers.0.self_attn.q_proj",
            7,
            r"encoder\.layers\.0\.self_attn\.q_proj has shape 7 x 7, but",
        ),
        ("text_model.encoder.layers.9.self_attn.q_proj", 8, r"encoder\.layers\.9\.self_attn\.q_proj is not a layer of"),
    ],
)
def test_layers_of_another_text_encoder_are_refused_by_name(run, tmp_path, layer, width, said):
    pipe = DiffusionPipeline.from_pretrained(run.word("pretrained_model_name_or_path"))
    factors = Factors(torch.ones(2, width), torch.ones(width, 2), 1.0)
    write_diffusers(tmp_path / "own.safetensors", {"text_encoder": {layer: factors}})
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    with pytest.raises(RunError, match=rf"^own\.safetensors: text_encoder\.(text_model\.)?{said}"):
        factors_of(uploaded(tmp_path / "own.safetensors"), load_family("StableDiffusionPipeline"), models)
