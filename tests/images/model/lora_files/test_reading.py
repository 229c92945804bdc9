"""LoRA files of every tool: scales, families, and formats that diffusers' converters read."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from pipelines import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from images.model.lora_files.loras import PIPELINE_OF, assert_same, names, random_lora, read, tiny, updates
from reslora.errors import InvalidArgument
from reslora.export import write_diffusers, write_kohya, write_peft
from reslora.images.model.families import load_family
from reslora.images.model.lora_files.names import names_of
from reslora.images.model.lora_files.reading import family_of, read_content

ALL = "transformer_blocks.0.attn.to_q"


def guessed(path) -> str:
    return family_of(read_content(path, "IN")).name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_header_says_whose_a_file_is(family, tmp_path):
    known = load_family(PIPELINE_OF[family])
    version, architecture = known.model_version(names(family).config, predicts_v=False)
    for metadata in ({"ss_base_model_version": version}, {"modelspec.architecture": f"{architecture}/lora"}):
        write_diffusers(tmp_path / "in.safetensors", random_lora(family, lambda name: "to_q" in name), metadata)
        assert guessed(tmp_path / "in.safetensors") == family


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_say_whose_a_file_is_where_no_other_family_has_them(family, tmp_path):
    """At published sizes. Stable Diffusion 3's attention equals that of Flux except for the number of blocks."""
    known = names_of(load_family(PIPELINE_OF[family]))
    layers = [layer for fused in known.original.values() for _, layer in fused.layers]
    tensors = {}
    for layer in (layer for layer in layers if ".attn" in layer or ".attention." in layer):
        tensors[f"{known.family.denoiser}.{layer}.lora_A.weight"] = torch.ones(1, known.shapes[layer][1])
        tensors[f"{known.family.denoiser}.{layer}.lora_B.weight"] = torch.ones(known.shapes[layer][0], 1)
    save_file(tensors, tmp_path / "in.safetensors")
    # Chroma's layers of attention are Flux.1's in name and size; to the approximator it has alone.
    assert guessed(tmp_path / "in.safetensors") == ("flux" if family == "chroma" else family)
    if family == "chroma":
        tensors["transformer.distilled_guidance_layer.in_proj.lora_A.weight"] = torch.ones(1, 64)
        tensors["transformer.distilled_guidance_layer.in_proj.lora_B.weight"] = torch.ones(5120, 1)
        save_file(tensors, tmp_path / "in.safetensors")
        assert guessed(tmp_path / "in.safetensors") == "chroma"


@pytest.mark.parametrize(("width", "outputs", "found"), [(2304, 2304 + 2 * 768, True), (3840, 3 * 3840, False)])
def test_z_images_fused_layers_are_not_taken_for_lumina_2s(width, outputs, found, tmp_path):
    """They have the same names in the models' own code, in other sizes."""
    name = "diffusion_model.layers.0.attention.qkv.lora_{}.weight"
    save_file({name.format("A"): torch.ones(1, width), name.format("B"): torch.ones(outputs, 1)}, tmp_path / "in.st")
    content = read_content((tmp_path / "in.st").rename(tmp_path / "in.safetensors"), "IN")
    if found:
        assert family_of(content).name == "lumina2"
    else:
        with pytest.raises(InvalidArgument, match="the layer names do not show the model family"):
            family_of(content)


def test_in_doubt_the_family_is_asked_for(tmp_path):
    shape = names("flux").shapes[ALL]
    tensors = {f"transformer.{ALL}.lora_A.weight": torch.ones(1, shape[1])}
    save_file(tensors | {f"transformer.{ALL}.lora_B.weight": torch.ones(shape[0], 1)}, tmp_path / "in.safetensors")
    with pytest.raises(InvalidArgument, match="the layer names fit several model families"):
        guessed(tmp_path / "in.safetensors")


def test_diffusers_metadata_says_the_scale_of_each_layer(tmp_path):
    """As `save_lora_adapter` writes it: B is not scaled."""
    unet = UNet2DConditionModel.from_pretrained(tiny("stable_diffusion") / "unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_k"], alpha_pattern={"attn1.to_k": 1}))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    unet.save_lora_adapter(tmp_path)
    layers = {n: m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k"))}
    wanted = {f"unet.{n}": m.get_delta_weight("default").detach().double() for n, m in layers.items()}
    assert_same(read(tmp_path, names("stable_diffusion")), wanted, 1e-5)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {f"unet.{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    packed = {f"unet.{key}": value for key, value in said.items()}
    save_file(tensors, tmp_path / "in.safetensors", {"lora_adapter_metadata": json.dumps(packed)})
    assert_same(read(tmp_path / "in.safetensors", names("stable_diffusion")), wanted, 1e-5)


def in_pefts_names(layers, name: str, path) -> None:
    """Write layers with A and B only, under names that `name` makes of the names of layer and factor."""
    factors = {(layer, word): value for layer, f in layers.items() for word, value in (("A", f.down), ("B", f.up))}
    save_file({name.format(*key): value.contiguous() for key, value in factors.items()}, path)


def stock_reads(path, known) -> set[str]:
    """Return the layers of the transformer that the family's pipeline finds in a file."""
    found = known.family.pipeline.lora_state_dict(load_file(path))
    return {key.removeprefix("transformer.").partition(".lora_")[0] for key in found if key.startswith("transformer.")}


PLAIN, NAMED, PEFTS = "{}.lora_{}.weight", "{}.lora_{}.default.weight", "base_model.model.{}.lora_{}.weight"
READ = [(NAMED, "qwen_image"), (NAMED, "z_image"), (PEFTS, "flux2"), (PEFTS, "flux2_klein")]
"""What diffusers reads, as other trainers write it."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [PLAIN, NAMED, PEFTS])
def test_a_layer_whose_scale_is_not_in_the_file_is_as_diffusers_reads_it_or_refused(name, family, tmp_path):
    """Such as the weights of a checkpoint, and PEFT's weights without their configuration."""
    known = names(family)
    layers = random_lora(family, lambda layer: "to_" in layer)[known.family.denoiser]
    in_pefts_names(layers, name, tmp_path / "in.safetensors")
    if (name, family) in READ:
        assert stock_reads(tmp_path / "in.safetensors", known) == set(layers)
        wanted = {known.family.denoiser: {layer: factors._replace(scale=1.0) for layer, factors in layers.items()}}
        assert_same(read(tmp_path / "in.safetensors", known), updates(wanted))
    else:
        with pytest.raises(InvalidArgument, match=r"it does not contain the scale of .*to_.*; give a finished LoRA"):
            read(tmp_path / "in.safetensors", known)


@pytest.mark.parametrize("family", ["flux2", "krea2"])
def test_trained_in_the_models_own_names_and_written_by_peft(family, tmp_path):
    """As in files of AI-Toolkit, which diffusers reads with scale 1."""
    known = names(family)
    layers = {name: f._replace(scale=1.0) for name, f in random_lora(family)[known.family.denoiser].items()}
    own = known._named({known.family.denoiser: layers}, "", known.original)
    in_pefts_names(own, PEFTS, tmp_path / "in.safetensors")
    assert stock_reads(tmp_path / "in.safetensors", known) == set(layers)
    assert_same(read(tmp_path / "in.safetensors", known), updates({known.family.denoiser: layers}))


def test_a_checkpoint_is_refused_by_what_to_give_in_its_place(tmp_path):
    """An unmerged ResLoRA has additional data, without which it would be another adapter."""
    save_file(
        {"reslora.norms": torch.zeros(2, 2), "x.lora_A.weight": torch.zeros(2, 2)},
        tmp_path / "reslora_model.safetensors",
    )
    for place, said in (
        (tmp_path, "a checkpoint, not a finished"),
        (tmp_path / "reslora_model.safetensors", "an unmerged ResLoRA"),
    ):
        with pytest.raises(InvalidArgument, match=f"{said}.*; give what its run has exported, such as pytorch_lora_we"):
            read(place, names("stable_diffusion"))
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")  # what may be given is read, whatever is beside it
    assert not read_content(tmp_path, "--init_lora").tensors


def test_older_words_without_a_scale_mean_one(tmp_path):
    """Of diffusers' `save_attn_procs` before PEFT, and of kohya's scripts."""
    words = ("lora_down", "lora_up")
    layers = random_lora("stable_diffusion", lambda layer: ".to_" in layer)["unet"]
    layers = {layer: factors._replace(scale=1.0) for layer, factors in layers.items()}
    for prefix in ("", "unet."):
        tensors = {f"{prefix}{layer}.{words[0]}.weight": f.down for layer, f in layers.items()}
        tensors |= {f"{prefix}{layer}.{words[1]}.weight": f.up for layer, f in layers.items()}
        save_file(tensors, tmp_path / "in.safetensors")
        assert_same(read(tmp_path / "in.safetensors", names("stable_diffusion")), updates({"unet": layers}))


def test_a_layer_that_diffusers_leaves_out_is_refused(tmp_path):
    """For layers of T5, diffusers would only log a warning."""
    lost, width, tensors = "text_encoders.t5xxl.transformer.mystery", names("flux").shapes[ALL][0], {}
    for name in ("lora_unet_double_blocks_0_img_attn_proj", lost):
        tensors |= {f"{name}.lora_{word}.weight": torch.randn(width, width) for word in ("down", "up")}
    save_file(tensors, tmp_path / "in.safetensors")
    assert len(names("flux").family.pipeline.lora_state_dict(tensors)) == 2
    with pytest.raises(InvalidArgument, match=f"{lost} is not a layer of flux that diffusers reads"):
        read(tmp_path / "in.safetensors", names("flux"))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        *(
            (field, "not (a )?plain LoRA")
            for field in ({"peft_type": "LOHA"}, {"peft_type": "OFT"}, {"use_dora": True})
        ),
        *((field, "plain LoRA") for field in ({"lora_bias": True}, {"modules_to_save": ["conv_in"]})),
        *(({"init_lora_weights": init}, f"{init}, has changed the base model") for init in ("pissa_niter_4", "OLoRA")),
    ],
)
def test_other_adapters_of_peft_are_refused(field, words, tmp_path):
    write_peft(tmp_path / "peft", random_lora("stable_diffusion")["unet"])
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | field))
    with pytest.raises(InvalidArgument, match=words):
        read_content(tmp_path / "peft", "IN")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    parts = random_lora("stable_diffusion", lambda name: name == "conv_in")
    parts["unet"]["conv_in"].up[0] = float("nan")
    write_diffusers(tmp_path / "in.safetensors", parts)
    with pytest.raises(InvalidArgument, match="conv_in is not finite"):
        read(tmp_path / "in.safetensors", names("stable_diffusion"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda down, up: (down[:0], up[:, :0]), "conv_in: the shapes of its factors do not match"),
        (lambda down, up: (down.int(), up.int()), "conv_in is int32 and int32; give a LoRA in floating point"),
    ],
)
@pytest.mark.parametrize("said", [True, False])
def test_factors_that_are_none_are_refused(change, words, said, tmp_path):
    """Whether or not the file has their scale."""
    factors = random_lora("stable_diffusion", lambda name: name == "conv_in")["unet"]["conv_in"]
    down, up = (factor.contiguous() for factor in change(factors.down, factors.up))
    tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    save_file(tensors | ({"lora_unet_conv_in.alpha": torch.tensor(2.0)} if said else {}), tmp_path / "in.safetensors")
    with pytest.raises(InvalidArgument, match=words):
        read(tmp_path / "in.safetensors", names("stable_diffusion"))


def test_a_factor_that_is_there_twice_is_refused(tmp_path):
    """Under the names of two tools: it is not defined which one counts."""
    word = "lora_A.default"
    write_diffusers(tmp_path / "in.safetensors", random_lora("stable_diffusion", lambda name: name == "conv_in"))
    tensors = load_file(tmp_path / "in.safetensors")
    tensors[f"unet.conv_in.{word}.weight"] = 2 * tensors["unet.conv_in.lora_A.weight"]
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(InvalidArgument, match=r"unet\.conv_in is in the file twice; remove one of the two"):
        read(tmp_path / "in.safetensors", names("stable_diffusion"))


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (float("nan"), "is not finite; give a LoRA that has not diverged"),
        ([1.0, 2.0], r": the scale of lora_unet_\w+ is damaged; repair its alpha"),
    ],
)
def test_a_scale_that_is_no_finite_number_is_refused(alpha, words, tmp_path):
    write_kohya(tmp_path / "in.safetensors", names("stable_diffusion").to_kohya(random_lora("stable_diffusion")))
    tensors = load_file(tmp_path / "in.safetensors")
    name = next(name for name in tensors if name.endswith(".alpha"))
    save_file(tensors | {name: torch.tensor(alpha)}, tmp_path / "in.safetensors")
    with pytest.raises(InvalidArgument, match=words):
        read(tmp_path / "in.safetensors", names("stable_diffusion"))


@pytest.mark.parametrize("said", [{"lora_alpha": None}, {"alpha_pattern": {"conv_in": "x"}}])
def test_a_configuration_whose_scale_is_no_number_is_refused(said, tmp_path):
    parts = random_lora("stable_diffusion", lambda name: name == "conv_in")
    write_peft(tmp_path / "peft", parts["unet"])
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    write_diffusers(tmp_path / "in.safetensors", {"unet": parts["unet"]})
    packed = json.dumps({f"unet.{name}": value for name, value in said.items()})
    save_file(load_file(tmp_path / "in.safetensors"), tmp_path / "in.safetensors", {"lora_adapter_metadata": packed})
    for path in (tmp_path / "peft", tmp_path / "in.safetensors"):
        with pytest.raises(InvalidArgument, match=r"the scale of .*conv_in is damaged; repair its alpha"):
            read(path, names("stable_diffusion"))
