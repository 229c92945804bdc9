"""The table of names of each family, in both directions, with fused layers."""

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from pipelines import FAMILIES

from images.model.lora_files.loras import PIPELINE_OF, names, random_factors, tiny, update
from reslora.errors import InvalidArgument
from reslora.export import Factors
from reslora.images.model.families import load_family
from reslora.images.model.lora_files.names import names_of
from reslora.images.model.lora_files.reading import Content, read_parts

Q, K, V = (f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
WIDTHS = {"to_q": 3072, "to_k": 3072, "to_v": 3072, "proj_mlp": 12288}  # of Flux's single blocks


def read(tensors, known) -> dict[str, Factors]:
    return read_parts(Content(None, "IN", tensors, {}, {}), known)["transformer"]


def linear(name: str, down: torch.Tensor, up: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("flux", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
        ("flux2_klein", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("flux", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("sd3", "diffusion_model.joint_blocks.0.x_block.attn.qkv"),
    ],
)
def test_a_trained_fused_layer_is_three_with_one_a(family, fused):
    """The rows of s B A are those of q, k and v, one after the other."""
    width = names(family).shapes[Q][0]
    down, up = torch.randn(4, width).double(), torch.randn(3 * width, 4).double()
    found = read(linear(fused, down, up, 6.0), names(family))
    assert list(found) == [Q, K, V] and all(factors.rank == 4 for factors in found.values())
    for factors, rows in zip(found.values(), (6 / 4 * up @ down).split(width), strict=True):
        torch.testing.assert_close(update(factors), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_three_layers_are_fused_at_three_times_the_rank_or_at_one_where_they_share_a(family):
    shape = names(family).shapes[Q]
    apart = {name: random_factors(shape, 2, 0.5 + number, number) for number, name in enumerate((Q, K, V))}
    shared = {name: factors._replace(down=apart[Q].down) for name, factors in apart.items()}
    for layers, rank in ((apart, 6), (shared, 2)):
        ((_, factors),) = names(family).to_kohya({"transformer": layers}).items()
        wanted = torch.cat([update(each) for each in layers.values()])
        torch.testing.assert_close(update(factors), wanted, rtol=1e-12, atol=1e-12)
        assert factors.rank == rank
    ((_, factors),) = names(family).to_kohya({"transformer": apart}).items()
    assert not factors.up[: shape[0], 2:].any() and factors.up[: shape[0], :2].all()


def test_stable_diffusion_3s_names_are_those_that_diffusers_reads_its_checkpoints_by():
    model = names("sd3").family.denoiser_class.from_pretrained(tiny("sd3") / "transformer")
    state = model.state_dict()
    checkpoint = {"pos_embed": state["pos_embed.pos_embed"]}
    for name, fused in names("sd3").original.items():
        for kind in ("weight", "bias"):
            rows = torch.cat([state[f"{layer}.{kind}"] for _, layer in fused.layers])
            checkpoint[f"{name}.{kind}"] = torch.cat(rows.chunk(2)[::-1]) if fused.swapped else rows
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert converted.keys() == state.keys() and not checkpoint
    assert all(torch.equal(converted[key], value) for key, value in state.items())


@pytest.mark.parametrize("left_out", [(), ("to_k",)])
@pytest.mark.parametrize("share", [False, True])
def test_stock_diffusers_splits_fluxs_first_single_layer_alike(left_out, share):
    """At the published size, the only one that diffusers knows; no configuration is read."""
    known = names_of(load_family(PIPELINE_OF["flux"]))
    place = "single_transformer_blocks.3."
    layers = {
        place + ("proj_mlp" if name == "proj_mlp" else f"attn.{name}"): random_factors((width, 3072), 3, 0.5, number)
        for number, (name, width) in enumerate(WIDTHS.items())
        if name not in left_out
    }
    if share:
        first = next(iter(layers.values())).down
        layers = {name: factors._replace(down=first) for name, factors in layers.items()}
    ((name, factors),) = known.to_kohya({"transformer": layers}).items()
    state = linear(name, factors.down.float(), factors.up.float() * factors.scale, float(factors.rank))
    found = FluxPipeline.lora_state_dict(state)
    inputs = torch.randn(3072)
    for layer, wanted in layers.items():
        down, up = (found[f"transformer.{layer}.lora_{letter}.weight"] for letter in "AB")
        outputs = wanted.scale * wanted.up @ (wanted.down @ inputs.double())
        torch.testing.assert_close((up @ (down @ inputs)).double(), outputs, rtol=1e-4, atol=1e-2)
    assert name == "lora_unet_single_blocks_3_linear1"


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [
        ("sd3", "norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"),
        (
            "sd3",
            "transformer_blocks.2.norm1_context.linear",
            "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1",
        ),
        ("flux", "norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"),
    ],
)
def test_scale_and_shift_of_the_last_norms_change_places(family, layer, name):
    factors = random_factors(names(family).shapes[layer], 2, 1.0, 0)
    written = names(family).to_kohya({"transformer": {layer: factors}})
    shift, scale = update(written[name]).chunk(2)
    assert torch.equal(torch.cat([scale, shift]), update(factors))


# Of each family: a layer, its name in ComfyUI's models, and its name in the models of kohya's scripts.
SINGLE, UP = "single_transformer_blocks.3", "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
READ = {
    "stable_diffusion": [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
        (UP, "output_blocks.5.1.transformer_blocks.0.attn2.to_k", UP),
    ],
    "sdxl": [(UP, *["output_blocks.5.1.transformer_blocks.0.attn2.to_k"] * 2)],
    "sd3": [
        ("transformer_blocks.1.attn.add_v_proj", *["joint_blocks.1.context_block.attn.qkv"] * 2),
        ("transformer_blocks.1.attn2.to_out.0", *["joint_blocks.1.x_block.attn2.proj"] * 2),
    ],
    "flux": [
        ("transformer_blocks.1.ff_context.net.2", *["double_blocks.1.txt_mlp.2"] * 2),
        (f"{SINGLE}.proj_mlp", *["single_blocks.3.linear1"] * 2),
        (f"{SINGLE}.norm.linear", *["single_blocks.3.modulation.lin"] * 2),
    ],
    "flux2": [
        (f"{SINGLE}.attn.to_qkv_mlp_proj", *["single_blocks.3.linear1"] * 2),
        (f"{SINGLE}.attn.to_out", *["single_blocks.3.linear2"] * 2),
        ("double_stream_modulation_img.linear", *["double_stream_modulation_img.lin"] * 2),
        ("time_guidance_embed.guidance_embedder.linear_1", *["guidance_in.in_layer"] * 2),
    ],
    "flux2_klein": [("transformer_blocks.1.ff.linear_in", *["double_blocks.1.img_mlp.0"] * 2)],
    "chroma": [
        ("distilled_guidance_layer.layers.2.linear_2", *["distilled_guidance_layer.layers.2.out_layer"] * 2),
        ("distilled_guidance_layer.in_proj", *["distilled_guidance_layer.in_proj"] * 2),
    ],
    # ComfyUI fuses q, k and v of Z-Image, and reads the three names of diffusers. musubi-tuner has three layers.
    "z_image": [("layers.2.attention.to_out.0", *["layers.2.attention.to_out.0"] * 2)],
    "lumina2": [
        ("noise_refiner.1.attn.to_v", *["noise_refiner.1.attention.qkv"] * 2),
        ("layers.2.feed_forward.linear_3", *["layers.2.feed_forward.w3"] * 2),
    ],
    "qwen_image": [("transformer_blocks.2.attn.add_k_proj", *["transformer_blocks.2.attn.add_k_proj"] * 2)],
    "krea2": [
        ("transformer_blocks.2.attn.to_gate", *["blocks.2.attn.gate"] * 2),
        ("text_fusion.refiner_blocks.1.ff.down", *["txtfusion.refiner_blocks.1.mlp.down"] * 2),
        ("time_mod_proj", *["tproj.1"] * 2),
        ("txt_in.linear_2", *["txtmlp.3"] * 2),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_are_those_that_comfyui_and_kohyas_scripts_have_read(family):
    """Read by the code of ComfyUI 0.33.0, sd-scripts and musubi-tuner, but for Lumina 2; see docs/convert.md."""
    up = ["CrossAttnUpBlock2D"] * 4
    config = FrozenDict({"layers_per_block": 2, "up_block_types": up, "block_out_channels": (1, 1, 1)})
    own = load_family(PIPELINE_OF[family])
    for layer, comfyui, kohya in READ[family]:
        assert (own.original_name(config, layer), own.kohya_name(config, layer)) == (comfyui, kohya)


def test_a_layer_without_a_name_there_is_refused():
    layers = {"norm_out.linear": random_factors(names("flux2_klein").shapes["norm_out.linear"], 1, 1.0, 0)}
    with pytest.raises(InvalidArgument, match=r"transformer\.norm_out\.linear: this format has no name for the layer"):
        names("flux2_klein").to_kohya({"transformer": layers})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_layers_share_a_name(family):
    for table in (names(family).original, names(family).kohya):
        layers = [layer for fused in table.values() for layer in fused.layers]
        assert len(layers) == len(set(layers)) > len(names(family).shapes) * 0.9
        assert len({name.replace(".", "_") for name in table}) == len(table)
