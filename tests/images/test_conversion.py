"""`reslora-convert`: all formats, smaller ranks, and refusals."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from pipelines import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from suites import quick
from waiting import LIMIT

from images.model.lora_files.loras import assert_same, names, random_factors, random_lora, read, tiny, update, updates
from reslora.bundled import ASSETS
from reslora.convert import main
from reslora.export import Factors, write_diffusers

# Each format is read and written, by way of what all are made of: enough for a family. For one, each from every other.
CIRCLE = ["diffusers", "kohya", "comfyui", "peft", "diffusers"]
ROUND = ["diffusers", "kohya", "diffusers", "comfyui", "diffusers", "peft", "kohya", "comfyui", "kohya", "peft"]
ROUND += ["comfyui", "peft", "diffusers"]
EXAMPLE = ASSETS.parent / "app" / "example"
FILE = {"diffusers": ".safetensors", "kohya": ".safetensors", "comfyui": ".safetensors", "peft": ""}


def convert(*flags) -> int:
    """Return the exit status, also if argparse exits."""
    try:
        return main(list(map(str, flags)))
    except SystemExit as error:
        return error.code


def refused(capsys, *flags) -> str:
    """Return the one line of a refusal."""
    capsys.readouterr()
    assert convert(*flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("reslora-convert: error: "), lines
    return lines[0]


def written(path, family="stable_diffusion", parts=None, **metadata):
    """Write a LoRA in diffusers' format."""
    parts = random_lora(family) if parts is None else parts
    write_diffusers(path, parts, metadata)
    return updates(parts)


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_from_every_other_with_the_same_updates(family, tmp_path):
    wanted = written(tmp_path / "0.safetensors", family)
    before = tmp_path / "0.safetensors"
    for number, to in enumerate((ROUND if family == "flux" else CIRCLE)[1:]):
        path = tmp_path / f"{number + 1}{FILE[to]}"
        assert convert(before, path, "--to", to, "--base", tiny(family)) == 0
        assert_same(read(path, names(family)), wanted)
        before = path


# Stock diffusers reads no SD 3, Krea 2 or Lumina 2 names of kohya's, no Stable Diffusion names of ComfyUI's, and
# Flux's first single layer, which is Chroma's, too, in the real model's size alone.
STOCK = [(family, "diffusers") for family in FAMILIES]
STOCK += [(family, "kohya") for family in FAMILIES if family not in ("sd3", "krea2", "lumina2")]
STOCK += [(family, "comfyui") for family in ("z_image", "flux", "flux2", "flux2_klein", "chroma", "krea2")]
LINEAR1 = re.compile(r"single_transformer_blocks\.\d+\.(attn\.to_.|proj_mlp)|.*embed.*|proj_out|norm_out.*")


def stock_knows(family: str, to: str, layer: str) -> bool:
    if family in ("flux", "chroma") and to != "diffusers":
        return not (LINEAR1.fullmatch(layer) or "distilled_guidance" in layer)
    if to == "kohya" and family in ("flux2", "flux2_klein"):
        return "modulation" not in layer and "guidance_embedder" not in layer
    if to == "kohya" and family in ("stable_diffusion", "sdxl"):
        return "attentions" in layer
    return True


@pytest.mark.parametrize(("family", "to"), quick(STOCK, ("stable_diffusion", "kohya"), ("flux", "comfyui")))
def test_stock_diffusers_reads_what_was_written(family, to, tmp_path):
    parts = random_lora(family, lambda layer: stock_knows(family, to, layer))
    wanted = written(tmp_path / "in.safetensors", family, parts)
    assert convert(tmp_path / "in.safetensors", tmp_path, "--to", to, "--base", tiny(family), "--dtype", "float32") == 0
    pipeline = DiffusionPipeline.from_pretrained(tiny(family))
    (file,) = (path for path in tmp_path.iterdir() if path.name != "in.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    ((part, _),) = parts.items()
    found = {
        f"{part}.{name}": layer.get_delta_weight("default_0").detach().flatten(1).double()
        for name, layer in getattr(pipeline, part).named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert_same(found, wanted, 1e-5)


def test_stock_peft_reads_what_was_written(tmp_path):
    wanted = written(tmp_path / "in.safetensors")
    flags = ["--to", "peft", "--base", tiny("stable_diffusion"), "--dtype", "float32"]
    assert convert(tmp_path / "in.safetensors", tmp_path / "peft", *flags) == 0
    unet = UNet2DConditionModel.from_pretrained(tiny("stable_diffusion") / "unet")
    model = PeftModel.from_pretrained(unet, tmp_path / "peft").get_base_model()
    found = {
        f"unet.{name}": layer.get_delta_weight("default").detach().flatten(1).double()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert_same(found, wanted, 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_text_encoders_are_converted_too(family, tmp_path):
    parts = random_lora(family, lambda layer: layer.endswith("to_q"))
    pipeline = DiffusionPipeline.from_pretrained(tiny(family))
    for part in names(family).family.text_names:
        linear = {n: m for n, m in getattr(pipeline, part).named_modules() if isinstance(m, torch.nn.Linear)}
        ends = (".q_proj", ".out_proj", ".fc1", ".q")
        parts[part] = {
            name if name.startswith(("text_model", "encoder.block")) else f"text_model.{name}": random_factors(
                module.weight.shape, 2, 0.5, 7
            )
            for name, module in linear.items()
            if name.endswith(ends)
        }
    wanted = written(tmp_path / "0.safetensors", family, parts)
    before = tmp_path / "0.safetensors"
    for to in ("kohya", "comfyui", "peft", "diffusers"):
        assert convert(before, tmp_path / f"{to}{FILE[to]}", "--to", to, "--base", tiny(family)) == 0
        before = tmp_path / f"{to}{FILE[to]}"
        assert_same(read(before, names(family)), wanted)
    assert convert(before, tmp_path, "--to", "diffusers", "--base", tiny(family), "--dtype", "float32") == 0
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    for part in names(family).family.text_names:
        found = {n: m for n, m in getattr(pipeline, part).named_modules() if isinstance(m, LoraLayer)}
        if "encoder.block" in next(iter(parts[part])):
            assert not found  # diffusers has no LoRA for T5
            continue
        for name, factors in parts[part].items():
            layer = found.get(name) or found[name.removeprefix("text_model.")]
            delta = layer.get_delta_weight("default_0").detach().double()
            torch.testing.assert_close(delta, update(factors), rtol=1e-5, atol=1e-5)


def test_the_header_says_what_it_said_and_what_is_known_now(tmp_path):
    written(tmp_path / "in.safetensors", ss_seed="7", ss_network_dim="99", sshs_model_hash="old")
    flags = ["--to", "kohya", "--base", tiny("stable_diffusion")]
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", *flags) == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_seed"] == "7" and metadata["ss_network_dim"] == "2"
    assert metadata["ss_base_model_version"] == "sd_v1_v" and len(metadata["sshs_model_hash"]) == 64
    assert "lora_adapter_metadata" not in metadata


def test_dtypes_are_kept_or_as_asked_for(tmp_path):
    parts = {"unet": {layer: f for layer, f in random_lora("stable_diffusion")["unet"].items() if "attn1" in layer}}
    half = {k: Factors(f.down.half(), f.up.half(), f.scale) for k, f in parts["unet"].items()}
    write_diffusers(tmp_path / "in.safetensors", {"unet": half})
    for more, dtype in (((), torch.float16), (("--dtype", "bfloat16"), torch.bfloat16)):
        flags = ["--to", "kohya", "--base", tiny("stable_diffusion"), "--overwrite", *more]
        assert convert(tmp_path / "in.safetensors", *flags, tmp_path / "out.safetensors") == 0
        found = {value.dtype for value in load_file(tmp_path / "out.safetensors").values() if value.dim()}
        assert found == {dtype}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bits_become_16(kind, tmp_path, capsys):
    to = "diffusers"
    written(tmp_path / "in.safetensors", parts=random_lora("stable_diffusion", lambda name: "attn1" in name))
    small = {name: value.to(kind) for name, value in load_file(tmp_path / "in.safetensors").items()}
    save_file(small, tmp_path / "in.safetensors")
    wanted = {
        name.removesuffix(".lora_A.weight"): small[name.replace("lora_A", "lora_B")].double() @ down.double()
        for name, down in small.items()
        if "lora_A" in name
    }
    flags = ["--to", to, "--base", tiny("stable_diffusion")]
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", *flags) == 0
    assert f"float16, for {to}" in capsys.readouterr().out
    assert {value.dtype for value in load_file(tmp_path / "out.safetensors").values() if value.dim()} == {torch.float16}
    assert_same(read(tmp_path / "out.safetensors", names("stable_diffusion")), wanted, 2e-3)


# -- smaller ranks -----------------------------------------------------------------------------------------------------


def test_a_smaller_rank_loses_what_the_singular_values_say(tmp_path, capsys):
    wanted = written(tmp_path / "in.safetensors")
    flags = ["--to", "kohya", "--base", tiny("stable_diffusion"), "--rank", "1"]
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", *flags) == 0
    found, errors = read(tmp_path / "out.safetensors", names("stable_diffusion")), {}
    for name, value in wanted.items():
        left = torch.linalg.svdvals(value)
        errors[name] = float(left[1:].norm() / left.norm())
        assert float((found[name] - value).norm() / value.norm()) == pytest.approx(errors[name], abs=1e-9)
        assert torch.linalg.matrix_rank(found[name]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    worst = max(errors, key=errors.__getitem__)
    assert f"{len(errors)} layers" in line and f"{errors[worst]:.3g} at most ({worst})" in line
    assert f"{sum(errors.values()) / len(errors):.3g} on average" in line


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_runs_own_configuration_names_the_base(tmp_path, monkeypatch):
    """Bundled models from any working directory; other models while they exist."""
    out, base = tmp_path / "out.safetensors", ASSETS / "pipeline" / "unet"
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(EXAMPLE, tmp_path / "run")
    assert json.loads((run / "config.json").read_text())["pretrained_model_name_or_path"] == "assets/pipeline"
    assert convert(run / "lora", out, "--to", "kohya") == 0
    assert convert(run / "lora", "named.safetensors", "--to", "kohya", "--base", base) == 0
    assert_same(*({k: v.double() for k, v in load_file(path).items()} for path in (out, "named.safetensors")))
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_base_model_version"].startswith("sd_v")


def test_folders_of_no_known_denoiser_are_refused(tmp_path, capsys):
    written(tmp_path / "in.safetensors")
    for config, words in (("{", "a model without _class_name"), ('{"_class_name": "CLIPModel"}', "a CLIPModel")):
        (tmp_path / "config.json").write_text(config)
        flags = [tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "kohya", "--base", tmp_path]
        assert words in refused(capsys, *flags)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("IN OUT", "--to"),
        ("OUT --to kohya", "OUT"),
        ("IN OUT --to kohya --famil flux", "--famil"),
        ("LARGE OUT --to peft --base SD --dtype float16", "--dtype float16"),
        ('"" OUT --to kohya', "IN: is empty"),
        ('IN "" --to kohya', "OUT: is empty"),
        ("nowhere OUT --to kohya", "IN nowhere: no such file or folder"),
        ("IN OUT --to kohya --base ./nowhere", "--base ./nowhere: no such folder"),
        ("IN OUT --to kohya --base IN", "a single file does not say which model it is for"),
        ("IN OUT --to kohya --base FLUX --family sd3", "--family sd3"),
        ("IN OUT --to kohya --base FLUX", "is not a layer of flux"),
        ("IN OUT.safetensors --to peft --base SD", "--to peft writes a folder"),
        ("IN . --to peft --base SD", "would be replaced"),
    ],
)
def test_bad_input_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written("IN.safetensors")
    written(
        "LARGE.safetensors",
        parts={"unet": {"conv_in": random_factors(names("stable_diffusion").shapes["conv_in"], 1, 1e9, 0)}},
    )
    known = {
        "LARGE": "LARGE.safetensors",
        "IN": "IN.safetensors",
        "FLUX": tiny("flux"),
        "SD": tiny("stable_diffusion"),
        '""': "",
    }
    assert words in refused(capsys, *(known.get(flag, flag) for flag in flags.split()))
    assert {path.name for path in tmp_path.iterdir()} == {"IN.safetensors", "LARGE.safetensors"}


HEAVY = """
import sys
from reslora.convert import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, *sorted({"torch", "transformers", "diffusers", "peft"} & sys.modules.keys()))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["nowhere.safetensors", "OUT", "--to", "kohya"], 2)],
)
def test_help_and_refusals_import_nothing_heavy(words, status, tmp_path):
    command = [sys.executable, "-c", HEAVY, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.splitlines()[-1] == str(status), done.stdout[-500:]


def test_pefts_folder_is_replaced_and_one_with_anything_else_is_not(tmp_path, capsys, monkeypatch):
    written(tmp_path / "in.safetensors", parts=random_lora("stable_diffusion", lambda name: "attn1" in name))
    flags = ["--to", "peft", "--base", tiny("stable_diffusion"), "--overwrite"]
    for below in ("old/text_encoder", "old", "run/lora/peft", "adapters/one", "adapters/other"):
        assert convert(tmp_path / "in.safetensors", tmp_path / below, *flags) == 0
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "1.png").write_bytes(b"image")
    assert not (tmp_path / "old" / "text_encoder").exists()  # what it was of is no more
    before = sorted(path for path in tmp_path.rglob("*"))
    for name, first in (("run", "lora/peft/adapter_config.json"), ("adapters", "one/adapter_config.json")):
        line = refused(capsys, tmp_path / "in.safetensors", tmp_path / name, *flags)
        assert f"the folder also has {first}, which would be replaced" in line
    assert sorted(path for path in tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "OUT .: " in refused(capsys, tmp_path / "in.safetensors", ".", *flags)


def test_pickles_are_refused_by_name(tmp_path, capsys):
    name = "lora.bin"
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    for path in (tmp_path / name, tmp_path):
        assert f"{name} is a pickle" in refused(capsys, path, tmp_path / "out", "--to", "kohya")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("unet.conv_in.lora_magnitude_vector.weight", "is not part of a plain LoRA"),
        ("lora_unet_conv_in.dora_scale", "is not part of a plain LoRA"),
        ("lora_unet_conv_in.hada_w1_a", "is not part of a plain LoRA"),
        ("unet.conv_in.lora_mid.weight", "is not part of a plain LoRA"),
        ("unet.conv_out.lora_A.weight", "lacks one of its two factors"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(key, words, tmp_path, capsys):
    written(tmp_path / "in.safetensors", parts=random_lora("stable_diffusion", lambda name: "attn1" in name))
    save_file({**load_file(tmp_path / "in.safetensors"), key: torch.ones(2, 2)}, tmp_path / "in.safetensors")
    line = refused(capsys, tmp_path / "in.safetensors", tmp_path / "out", "--to", "kohya", "--family", "sdxl")
    assert words in line and key.partition(".lora_A")[0] in line


def test_a_damaged_file_leaves_what_was_there(tmp_path, capsys):
    written(tmp_path / "in.safetensors")
    content = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "in.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "out.safetensors").write_text("before")
    flags = [tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "kohya", "--overwrite"]
    assert "complete" in refused(capsys, *flags)
    assert (tmp_path / "out.safetensors").read_text() == "before"


def test_no_input_is_replaced_and_nothing_else_without_overwrite(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = random_lora("stable_diffusion", lambda name: "attn1" in name)
    base = ["--base", tiny("stable_diffusion")]
    for name in ("a.safetensors", "b.safetensors"):
        written(name, parts=parts)
    assert convert("a.safetensors", "peft", "--to", "peft", *base) == 0
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = refused(capsys, "a.safetensors", "b.safetensors", "--to", "kohya", *base)  # OUT was forgotten
    assert "OUT b.safetensors: b.safetensors exists; give another name, or add --overwrite" in line
    assert "OUT peft: peft exists" in refused(capsys, "a.safetensors", "peft", "--to", "peft", *base)
    for given, out, to in (
        ("a.safetensors", "a.safetensors", "kohya"),
        ("b.safetensors", tmp_path / "b.safetensors", "comfyui"),
        ("a.safetensors", "link.safetensors", "kohya"),
        ("peft", "peft/adapter_model.safetensors", "diffusers"),
        ("peft/adapter_model.safetensors", "peft", "peft"),
    ):
        line = refused(capsys, given, out, "--to", to, "--overwrite", *base)
        assert f"OUT {out}: would replace the input" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert convert("a.safetensors", "b.safetensors", "--to", "kohya", "--overwrite", *base) == 0
    assert any(key.startswith("lora_unet_") for key in load_file("b.safetensors"))
