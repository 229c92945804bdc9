"""Base models in single files: a transformer's weights equal those of the folder that it was written from."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import FAMILIES, image_folder
from safetensors.torch import load_file, save_file

from images.model.lora_files.loras import PIPELINE_OF, names, tiny
from images.runs import assert_same, final_weights, losses, main, refused
from reslora.errors import InvalidArgument
from reslora.images.model.families import load_family
from reslora.images.model.lora_files.names import names_of
from reslora.images.model.single_files import read_transformer, scheduler_settings

Q, K = "query_norm.scale", "key_norm.scale"
FLUX = {
    r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight": rf"double_blocks.\1.img_attn.norm.{Q}",
    r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight": rf"double_blocks.\1.img_attn.norm.{K}",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight": rf"double_blocks.\1.txt_attn.norm.{Q}",
    r"^transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight": rf"double_blocks.\1.txt_attn.norm.{K}",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": rf"single_blocks.\1.norm.{Q}",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": rf"single_blocks.\1.norm.{K}",
    r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"^distilled_guidance_layer\.norms\.(\d+)\.weight": r"distilled_guidance_layer.norms.\1.scale",
}
OTHERS = {
    "flux": FLUX, "flux2": FLUX, "flux2_klein": FLUX, "chroma": FLUX,
    "sd3": {r"^pos_embed\.pos_embed": "pos_embed"},
    "qwen_image": {},
    "z_image": {
        r"^all_(final_layer|x_embedder)\.2-1\.": r"\1.",
        r"\.attention\.to_out\.0\.": ".attention.out.",
        r"\.attention\.norm_([qk])\.": r".attention.\1_norm.",
    },
    "lumina2": {
        r"^time_caption_embed\.caption_embedder\.0\.": "cap_embedder.0.",
        r"\.attn\.norm_([qk])\.": r".attention.\1_norm.",
        r"\.norm1\.(norm\.)?weight": ".attention_norm1.weight", r"\.norm2\.": ".attention_norm2.",
    },
    "krea2": {
        r"^text_fusion\.": "txtfusion.", r"^transformer_blocks\.": "blocks.",
        r"\.norm1\.weight": ".prenorm.scale", r"\.norm2\.weight": ".postnorm.scale",
        r"\.attn\.norm_([qk])\.weight": r".attn.qknorm.\1norm.scale",
        r"^txt_in\.norm\.weight": "txtmlp.0.scale", r"^final_layer\.norm\.weight": "last.norm.scale",
        r"^final_layer\.scale_shift_table": "last.modulation.lin", r"\.scale_shift_table": ".mod.lin",
    },
}  # fmt: skip
"""Names of what is neither a linear layer nor a convolution, in the model's own code."""
IN_PUBLISHED_SIZE = ("flux", "chroma", "lumina2")
"""diffusers converts their single blocks, and Lumina 2's queries, keys and values, at the published width alone."""
SMALL = [family for family in OTHERS if family not in IN_PUBLISHED_SIZE]


def original_layout(family: str, known, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights by their names in the model's own code: q, k and v are fused, and some halves are swapped."""
    left, found = dict(state), {}
    fused = known.original if known.family.original else {}
    for name, layer in fused.items():
        for kind in ("weight", "bias"):
            if parts := [left.pop(f"{part}.{kind}") for _, part in layer.layers if f"{part}.{kind}" in left]:
                rows = torch.cat(parts)
                found[f"{name}.{kind}"] = torch.cat(rows.chunk(2)[::-1]) if layer.swapped else rows
    for name, value in left.items():
        new = name
        for pattern, place in OTHERS[family].items():
            new = re.sub(pattern, place, new)
        if family == "z_image" and (match := re.fullmatch(r"(.*\.attention)\.to_([qkv])\.weight", name)):
            if match[2] == "q":
                found[f"{match[1]}.qkv.weight"] = torch.cat([state[f"{match[1]}.to_{one}.weight"] for one in "qkv"])
            continue
        if new.startswith("final_layer.adaLN") and family.startswith("flux2"):
            value = torch.cat(value.chunk(2)[::-1])
        found[new] = value.flatten() if new.startswith("blocks.") and new.endswith(".mod.lin") else value
    return found


def file_of(family: str, folder: Path, path: Path, prefix: str = "", **more: torch.Tensor) -> Path:
    """Write the transformer of a pipeline's folder as one file in the model's own layout."""
    state = load_file(next((folder / "transformer").glob("*.safetensors")))
    layout = original_layout(family, names(family), state)
    save_file({f"{prefix}{name}": value.contiguous() for name, value in layout.items()} | more, path)
    return path


def read(family: str, path: Path, config: Path) -> dict[str, torch.Tensor]:
    return read_transformer(path, load_family(PIPELINE_OF[family]).denoiser_class, config, "IN").state_dict()


@pytest.mark.parametrize("family", SMALL)
def test_weights_are_those_of_the_folder_to_the_last_bit(family, tmp_path):
    """With the autoencoder's weights in the same file, as in ComfyUI's complete files."""
    more = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}
    folder = tiny(family)
    path = file_of(family, folder, tmp_path / "in.safetensors", "model.diffusion_model.", **more)
    wanted = load_file(next((folder / "transformer").glob("*.safetensors")))
    assert family == "qwen_image" or load_file(path).keys() != wanted.keys()
    found = read(family, path, folder / "transformer")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("family", OTHERS)
def test_diffusers_own_names_are_read_as_they_are(family, tmp_path):
    folder = tiny(family)
    wanted = load_file(next((folder / "transformer").glob("*.safetensors")))
    save_file(wanted, tmp_path / "in.safetensors")
    found = read(family, tmp_path / "in.safetensors", folder / "transformer")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", IN_PUBLISHED_SIZE)
def test_weights_in_published_width_are_those_of_the_model(family, tmp_path):
    kind = load_family(PIPELINE_OF[family]).denoiser_class
    config = {"num_layers": 1, "num_single_layers": 1}
    if family == "lumina2":
        config = {"num_layers": 1, "num_refiner_layers": 1}
    if family == "chroma":
        config |= {"approximator_hidden_dim": 32, "approximator_layers": 1}
    with torch.device("meta"):
        model = kind(**config)
    model.save_config(tmp_path)
    draws = torch.Generator().manual_seed(0)
    state = {}
    for name, value in model.state_dict().items():
        state[name] = torch.randint(-9, 9, value.shape, generator=draws, dtype=torch.int8).to(torch.bfloat16)
    known = names_of(load_family(PIPELINE_OF[family]), config)
    layout = original_layout(family, known, state)
    save_file({name: value.contiguous() for name, value in layout.items()}, tmp_path / "in.safetensors")
    found = read(family, tmp_path / "in.safetensors", tmp_path)
    (tmp_path / "in.safetensors").unlink()  # 1 GB
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


def flags_of(folder: Path, images: Path, *more: object) -> list[str]:
    words = ["--pretrained_model_name_or_path", folder, "--train_data_dir", images, "--resolution", 32, "--rank", 2]
    words += ["--method", "reslora", "--max_train_steps", 2, "--num_validation_images", 0, "--report_to", "none", *more]
    return list(map(str, words))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "data")


@pytest.mark.exhaustive
def test_a_run_from_a_file_is_the_run_from_the_folder_and_goes_on_in_it(images, tmp_path):
    """Without the folder's own weights, which are not read."""
    folder = tiny("z_image")
    path = file_of("z_image", folder, tmp_path / "in.safetensors")
    assert main(*flags_of(folder, images), "--output_dir", tmp_path / "folder") == 0
    base = shutil.copytree(folder, tmp_path / "base")
    next((base / "transformer").glob("*.safetensors")).unlink()
    flags = [*flags_of(base, images), "--pretrained_transformer_file", path, "--output_dir", tmp_path / "file"]
    assert main(*flags, "--max_train_steps", "1") == 0
    moved = path.rename(tmp_path / "moved.safetensors")
    flags[flags.index(path)] = moved
    assert main(*flags, "--resume_from_checkpoint", "latest") == 0
    assert losses(tmp_path / "file") == losses(tmp_path / "folder")
    assert_same(*(final_weights(tmp_path / name, step=2) for name in ("file", "folder")))
    merged = (tmp_path / name / "reslora" / "transformer" for name in ("file", "folder"))
    assert_same(*(load_file(next(folder.glob("*.safetensors"))) for folder in merged))


def test_of_a_pipeline_on_the_hub_the_transformers_weights_are_not_downloaded(images, tmp_path, monkeypatch):
    """Only its configuration is downloaded."""
    folder, asked = tiny("sd3"), []
    base = shutil.copytree(folder, tmp_path / "base")
    next((base / "transformer").glob("*.safetensors")).unlink()

    def download(name: str, **how: object) -> str:
        asked.append((name, {key: value for key, value in how.items() if value is not None or key == "transformer"}))
        return str(base)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *what, **how: asked.append(what))
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    path = file_of("sd3", folder, tmp_path / "in.safetensors")
    flags = flags_of("owner/model", images, "--pretrained_transformer_file", path, "--max_train_steps", 1)
    assert main(*flags, "--output_dir", tmp_path / "out") == 0
    whole = {"use_safetensors": True, "transformer": None}
    assert asked == [("owner/model", "transformer/config.json"), ("owner/model", whole)]


# -- what is refused ---------------------------------------------------------------------------------------------------


WIDE = torch.zeros(2, 2)
DOUBLE = "double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{DOUBLE}.weight": WIDE.to(torch.float8_e4m3fn)}, "its weights are quantized (dtype F8_E4M3)"),
        ({f"{DOUBLE}.weight": WIDE, f"{DOUBLE}.scale_weight": WIDE}, "quantized (scaled fp8)"),
        ({f"{DOUBLE}.weight": WIDE, "scaled_fp8": WIDE}, "quantized (scaled fp8)"),
        ({f"{DOUBLE}.weight": WIDE, f"{DOUBLE}.weight.absmax": WIDE}, "quantized (bitsandbytes' 4 or 8 bits)"),
        ({f"{DOUBLE}.weight": WIDE, f"{DOUBLE}.weight.quant_state.bitsandbytes__nf4": WIDE}, "bitsandbytes'"),
        ({f"{DOUBLE}.qweight": WIDE.to(torch.int32)}, "quantized (integers with scales)"),
        ({f"{DOUBLE}.weight": WIDE.to(torch.int8)}, "quantized (dtype I8)"),
    ],
)
def test_quantized_files_are_refused_by_name(tensors, words, images, capsys, tmp_path):
    save_file({name: value.clone() for name, value in tensors.items()}, path := tmp_path / "in.safetensors")
    for option, base in (("pretrained_transformer_file", tiny("sd3")), ("pretrained_model_name_or_path", path)):
        line = refused(capsys, *flags_of(base, images), f"--{option}", path, "--output_dir", tmp_path / "out")
        assert f"error: --{option} {path}: " in line and words in line and "--base_precision quantizes that" in line


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("in.gguf", {}, "its weights are quantized (GGUF); give its bf16"),
        ("in.ckpt", {}, "not a .safetensors file"),
        ("in.safetensors", {"lora_unet_x.lora_up.weight": WIDE}, "it is a LoRA"),
        ("in.safetensors", {"decoder.conv_in.weight": WIDE}, "it is an autoencoder alone"),
        ("in.safetensors", {"weight": WIDE}, "it is no known transformer"),
        ("in.safetensors", {f"{DOUBLE}.weight": WIDE}, "diffusers cannot convert it to a SD3Transformer2DModel ("),
        ("nowhere.safetensors", None, "no such file"),
    ],
)
def test_files_without_a_transformer_are_refused(name, tensors, words, images, capsys, tmp_path):
    if tensors is not None:
        save_file(tensors, tmp_path / name)
    flags = [*flags_of(tiny("sd3"), images), "--pretrained_transformer_file", tmp_path / name]
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out")
    assert f"error: --pretrained_transformer_file {tmp_path / name}: " in line and words in line
    assert not list(tmp_path.rglob("model_index.json"))


def other_depth(layout: dict, config: dict) -> None:
    config["num_layers"] += 1


def another_width(layout: dict, config: dict) -> None:
    config["joint_attention_dim"] += 8


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("flux2", other_depth, "only the pipeline's transformer has transformer_blocks.2."),
        ("flux2", another_width, "context_embedder.weight is (32, 24) in it, (32, 32) in the pipeline"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(family, change, words, tmp_path):
    """diffusers' own loader only warns of additional weights."""
    folder = tiny(family) / "transformer"
    config = json.loads((folder / "config.json").read_text())
    layout = load_file(file_of(family, tiny(family), tmp_path / "in.safetensors"))
    change(layout, config)
    save_file(layout, tmp_path / "in.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=f"^IN: {re.escape(words)}.*; give a file and a pipeline of the same"):
        read(family, tmp_path / "in.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("names", "header", "settings"),
    [
        ((), {}, {}),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        (("v_pred",), {}, {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {},
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
    ],
)
def test_a_complete_checkpoint_declares_what_it_predicts(names, header, settings, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(0) for name in ("weight", *names)}, path, header)
    assert scheduler_settings(path) == settings


def test_a_complete_checkpoint_with_other_noise_levels_is_refused(tmp_path):
    """CosXL and Playground 2.5 have SDXL's tensors, and are trained with EDM's noise levels."""
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in ("weight", "edm_vpred.sigma_max", "edm_vpred.sigma_min")}, path)
    with pytest.raises(InvalidArgument, match=r"its tensor edm_vpred.sigma_max declares EDM's noise levels"):
        scheduler_settings(path)


def test_every_family_with_a_transformer_is_here():
    assert {name for name in FAMILIES if load_family(PIPELINE_OF[name]).denoiser == "transformer"} == set(OTHERS)
