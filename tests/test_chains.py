"""Which blocks are neighbors: roles, execution order and links, in tiny and in full-size models."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny_models
import torch
from core_models import (
    ARCHITECTURES,
    STACK_INPUTS,
    Architecture,
    Stack,
    adapter_layers,
    assert_one_line,
    lora_stack,
    run,
    tiny_llama,
    tiny_unet,
    token_inputs,
)
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model
from suites import quick
from torch import nn
from torch.nn.utils import prune

import reslora
from reslora import ResLoraConfig


def shape_of(chains) -> list[tuple[str, list[str]]]:
    """Return (role, names) of every chain."""
    return [(chain.role, [block.name for block in chain]) for chain in chains]


def counts(chains) -> dict[str, tuple[int, int]]:
    """Return the numbers of blocks and links of each role."""
    result = {}
    for chain in chains:
        blocks, links = result.get(chain.role, (0, 0))
        result[chain.role] = (blocks + len(chain), links + len(chain) - 1)
    return result


def assert_chains(chains, expected: dict[str, list[list[str]]]) -> None:
    found: dict[str, list[list[str]]] = {}
    for role, names in shape_of(chains):
        found.setdefault(role, []).append(names)
    assert found.keys() == expected.keys()
    for role, lists in expected.items():
        assert [len(names) for names in found[role]] == [len(names) for names in lists]
        for names, tails in zip(found[role], lists, strict=True):
            assert all(name == tail or name.endswith("." + tail) for name, tail in zip(names, tails, strict=True))


def test_roles_and_execution_order_match_the_hand_written_chains(arch):
    assert_chains(reslora.chains(arch.lora()), arch.chains)


def test_a_chain_is_a_sequence(llama):
    chain = next(iter(reslora.chains(llama.lora())))
    assert len(chain) == 5
    assert [chain[n].name for n in range(5)] == [block.name for block in chain]
    assert chain[-1].name == chain[4].name


def test_the_plan_is_the_same_before_and_after_connect(arch):
    model = arch.lora()
    before = shape_of(reslora.chains(model))
    connected = reslora.connect(model, ResLoraConfig("block", 2))
    assert shape_of(connected) == before == shape_of(reslora.chains(model))


def test_the_middle_block_of_a_unet_runs_between_down_and_up(unet):
    plan = shape_of(reslora.chains(unet.lora()))
    names = [name for role, names in plan if role == "attn2.to_k" for name in names]
    stages = [next(s for s in ("down_blocks", "mid_block", "up_blocks") if s in name) for name in names]
    order = [stage for n, stage in enumerate(stages) if n == 0 or stages[n - 1] != stage]
    assert order == ["down_blocks", "mid_block", "up_blocks"]


def test_feed_forward_layers_have_their_own_roles(unet):
    model = unet.lora(target_modules=["ff.net.0.proj", "ff.net.2", "to_q"])
    assert set(counts(reslora.chains(model))) == {"ff.net.0.proj", "ff.net.2", "attn1.to_q", "attn2.to_q"}


STABLE_DIFFUSION = {
    "sd15": (
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"image": (16, 9), "text": (16, 11)},
    ),
    "sd2": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        {"image": (16, 9), "text": (16, 11)},
    ),
    "sdxl": (
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        {"image": (70, 67), "text": (70, 67)},
    ),
}


@pytest.fixture(scope="module", params=quick(STABLE_DIFFUSION, "sd15"))
def stable_diffusion(request):
    """A full-size U-Net with LoRA on the meta device, and its numbers of blocks and links per role."""
    config, expected = STABLE_DIFFUSION[request.param]
    with torch.device("meta"):
        model = UNet2DConditionModel(**{"sample_size": 64, **config})
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    per_role = {
        f"{attention}.{role}": expected["text" if attention == "attn2" and role in ("to_k", "to_v") else "image"]
        for attention in ("attn1", "attn2")
        for role in ("to_q", "to_k", "to_v", "to_out.0")
    }
    return model, per_role


def test_full_size_unets_have_the_expected_blocks_and_links(stable_diffusion):
    model, expected = stable_diffusion
    chains = reslora.chains(model)
    assert counts(chains) == expected
    assert chains.links == sum(links for _, links in expected.values())


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CAPTION = ["add_q_proj", "add_k_proj", "add_v_proj"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]

TRANSFORMERS = {
    # Base and Turbo have one shape. Of every role: the image's two refiners, the caption's two, and the 30 layers
    # that read both together: 34 blocks. Two cuts, because the caption's refiners do not read the image's, and the
    # layers begin a new stream, longer than either.
    "z_image": (
        ZImageTransformer2DModel,
        {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560},
        r".*\.(to_[qkv]|to_out\.0|w[123]|\d+\.adaLN_modulation\.0)",
        {
            **dict.fromkeys([f"attention.{role}" for role in ATTENTION], (34, 31)),
            **dict.fromkeys(["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"], (34, 31)),
            # The caption's refiners have no modulation. The image's and the layers' read one vector a picture, of
            # equal shape, but of two streams.
            "adaLN_modulation.0": (32, 30),
        },
    ),
    # 19 blocks of two streams, then 38 of one: image, caption, and both together have three lengths.
    "flux_dev": (
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        [*ATTENTION, *CAPTION, "to_add_out", *FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
         "proj_out"],
        {
            # The same names in both kinds of block; cut where the caption's tokens join the image's.
            **dict.fromkeys(["attn.to_q", "attn.to_k", "attn.to_v"], (19 + 38, 18 + 37)),
            # Only the blocks of two streams have an output projection of attention, and halves for the caption.
            **dict.fromkeys(["attn.to_out.0", "attn.to_add_out", *(f"attn.{role}" for role in CAPTION)], (19, 18)),
            **dict.fromkeys([*FEED_FORWARD, *(f.replace("ff", "ff_context") for f in FEED_FORWARD)], (19, 18)),
            "proj_mlp": (38, 37),
            # The last layer of the model has this name too; no list holds it, and it is narrower.
            "proj_out": (38 + 1, 37),
        },
    ),
    # 24 joint blocks; the first 13 attend to the image once more. Nothing is cut: text has one length, image another.
    "sd35_medium": (
        SD3Transformer2DModel,
        {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        },
        [*ATTENTION, *CAPTION, "to_add_out", *FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2"],
        {
            **dict.fromkeys([f"attn.{role}" for role in (*ATTENTION, *CAPTION)], (24, 23)),
            **dict.fromkeys([f"attn2.{role}" for role in ATTENTION], (13, 12)),
            **dict.fromkeys(FEED_FORWARD, (24, 23)),
            # The last block returns no caption.
            **dict.fromkeys(["attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"], (23, 22)),
        },
    ),
    "sd35_large": (
        SD3Transformer2DModel,
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        [*ATTENTION, *CAPTION, "to_add_out", *FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2"],
        {
            **dict.fromkeys([f"attn.{role}" for role in (*ATTENTION, *CAPTION)], (38, 37)),
            **dict.fromkeys(FEED_FORWARD, (38, 37)),
            **dict.fromkeys(["attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"], (37, 36)),
        },
    ),
    # 5 blocks of two streams and 20 of one, whose projections are fused: no role is in both.
    "flux2_klein_4b": (
        Flux2Transformer2DModel,
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        ["to_q", "to_k", "to_v", *CAPTION, "to_add_out", "to_qkv_mlp_proj"],
        {
            **dict.fromkeys([f"attn.{role}" for role in ("to_q", "to_k", "to_v", *CAPTION, "to_add_out")], (5, 4)),
            "attn.to_qkv_mlp_proj": (20, 19),
        },
    ),
    # 8 and 48.
    "flux2_dev": (
        Flux2Transformer2DModel,
        {},
        ["to_q", "to_add_out", "to_qkv_mlp_proj"],
        {"attn.to_q": (8, 7), "attn.to_add_out": (8, 7), "attn.to_qkv_mlp_proj": (48, 47)},
    ),
    # As Flux.1.
    "chroma": (
        ChromaTransformer2DModel,
        {},
        ["to_q", "to_add_out", "proj_mlp"],
        {"attn.to_q": (19 + 38, 18 + 37), "attn.to_add_out": (19, 18), "proj_mlp": (38, 37)},
    ),
    # 60 blocks of two streams; nothing is cut.
    "qwen_image": (
        QwenImageTransformer2DModel,
        {},
        ["to_q", "add_k_proj", "img_mlp.net.2"],
        {"attn.to_q": (60, 59), "attn.add_k_proj": (60, 59), "img_mlp.net.2": (60, 59)},
    ),
    # Two blocks each for caption and image, and 26 over both. Keys and values are narrower than queries.
    "lumina2": (
        Lumina2Transformer2DModel,
        {"cap_feat_dim": 2304},
        [*ATTENTION, "feed_forward.linear_2"],
        dict.fromkeys([*(f"attn.{role}" for role in ATTENTION), "feed_forward.linear_2"], (30, 27)),
    ),
    # Two blocks over the layers of each token, two over the tokens of the caption, and 28 over those and the image's.
    # Queries are 6144 wide and keys and values 1536; text has 2560 of all.
    "krea2": (
        Krea2Transformer2DModel,
        {},
        ["to_q", "to_k", "ff.up", "img_in"],
        {**dict.fromkeys(["attn.to_q", "attn.to_k", "ff.up"], (2 + 2 + 28, 1 + 1 + 27)), "img_in": (1, 0)},
    ),
}  # fmt: skip

CUTS = {
    "z_image": {
        "context_refiner.0": "another stream: context_refiner.0 does not read the output of noise_refiner.1",
        "layers.0": "another stream: layers.0 combines the outputs of context_refiner.1 and noise_refiner.1",
    },
    "flux_dev": {
        "single_transformer_blocks.0": "88 follows 64 tokens",
        "proj_out": "one of the two is in no list of modules of one class",
    },
    "lumina2": {
        "noise_refiner.0": "another stream: noise_refiner.0 does not read the output of context_refiner.1",
        "layers.0": "another stream: layers.0 combines the outputs of context_refiner.1 and noise_refiner.1",
    },
    "krea2": {
        "text_fusion.refiner_blocks.0": "24 follows 12 tokens",
        "transformer_blocks.0": (
            "another stream: transformer_blocks.0 combines the outputs of img_in and text_fusion.refiner_blocks.1"
        ),
    },
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_full_size_transformers_have_the_expected_blocks_and_links(name):
    model_class, config, targets, expected = TRANSFORMERS[name]
    with torch.device("meta"):
        model = model_class(**config)
        model.add_adapter(LoraConfig(r=4, target_modules=targets))
    chains = reslora.chains(model)
    assert counts(chains) == expected
    reasons = {chain[0].name: chain[0].cut for chain in chains if chain[0].cut != "first of its role"}
    for place, reason in CUTS.get(name, {}).items():
        places = [cut for name, cut in reasons.items() if name == place or name.startswith(place + ".")]
        assert places and set(places) == {reason}


def test_a_bare_block_of_unequal_list_items_is_not_a_repeated_block(unet):
    roles = {block.role for chain in reslora.chains(unet.lora(target_modules=["to_out.0"])) for block in chain}
    assert roles == {"attn1.to_out.0", "attn2.to_out.0"}


def test_layers_left_out_do_not_break_the_chain(llama):
    model = llama.lora(target_modules=["q_proj"], layers_to_transform=[0, 2, 3])
    assert_chains(
        reslora.chains(model), {"self_attn.q_proj": [[f"model.layers.{n}.self_attn.q_proj" for n in (0, 2, 3)]]}
    )


def test_another_rank_cuts_the_chain(llama):
    model = llama.lora(target_modules=["q_proj"], rank_pattern={"layers.2.self_attn.q_proj": 7})
    assert_chains(
        reslora.chains(model),
        {"self_attn.q_proj": [[f"model.layers.{n}.self_attn.q_proj" for n in part] for part in ((0, 1), (2,), (3, 4))]},
    )


def test_another_alpha_does_not_cut_the_chain(llama):
    model = llama.lora(target_modules=["q_proj"], alpha_pattern={"layers.2.self_attn.q_proj": 16})
    assert reslora.chains(model).links == 4


def test_another_token_shape_cuts_the_chain():
    model = lora_stack(Stack(layers=5, pool_at=3))
    chains = reslora.chains(model, example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in part] for part in ((0, 1, 2), (3, 4))]})


def test_another_width_cuts_the_chain():
    class Widening(Stack):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Stack.Block(6), Stack.Block(6), Stack.Block(6, 10), Stack.Block(10, 10)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    chains = reslora.chains(lora_stack(Widening()), example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in part] for part in ((0, 1), (2,), (3,))]})


def test_order_is_execution_order_not_registration_order():
    class Reversed(Stack):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = x + layer(x)
            return x

    chains = reslora.chains(lora_stack(Reversed()), example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in (3, 2, 1, 0)]]})


def test_a_cut_is_made_between_neighbours_only():
    """A long, a short and a long token sequence are three chains: the third does not continue the first."""

    class Hourglass(Stack):
        def forward(self, x):
            for n, layer in enumerate(self.layers):
                x = x + (layer(x[:, ::2]).repeat_interleave(2, 1) if n in (2, 3) else layer(x))
            return x

    chains = reslora.chains(lora_stack(Hourglass(layers=6)), example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in part] for part in ((0, 1), (2, 3), (4, 5))]})


def test_batch_size_alone_does_not_cut_the_chain():
    class Splitting(Stack):
        def forward(self, x):
            for n, layer in enumerate(self.layers):
                x = torch.cat([layer(part) for part in [x]]) if n < 2 else layer(x[:1])
            return x

    chains = reslora.chains(lora_stack(Splitting()), example_inputs=STACK_INPUTS)
    assert chains.links == 3


def test_example_inputs_may_be_given_for_a_known_model(llama):
    chains = reslora.chains(llama.lora(), example_inputs=token_inputs(batch=1, length=3))
    assert_chains(chains, llama.chains)


def test_the_table_shows_roles_and_blocks(unet):
    model = unet.lora()
    chains = reslora.chains(model)
    table = str(chains)
    assert len(table.splitlines()) > 2
    for role in unet.chains:
        assert role in table
    assert str(chains.links) in table


def test_convolutions_are_listed_as_unlinked(unet):
    chains = reslora.chains(unet.lora(target_modules=["to_q", "conv_in"]))
    assert "unlinked" in str(chains).lower()
    assert "conv_in" in str(chains)
    assert all("conv_in" not in block.name for chain in chains for block in chain)


@dataclass(frozen=True)
class Streams:
    """A model of two streams, its inputs of any two lengths, and the layer where its second stream begins."""

    build: Callable[..., nn.Module]
    inputs: Callable[..., dict]
    targets: list[str]
    second: str
    roles: set[str]
    """Those in both streams; all others are in one of them."""


DECODER = {f"self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj", "out_proj")} | {"fc1", "fc2"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
STREAMS = {
    "bart": Streams(tiny_models.bart, tiny_models.sequences, PROJECTIONS, "model.decoder.layers.0", DECODER),
    "mbart": Streams(tiny_models.mbart, tiny_models.sequences, PROJECTIONS, "model.decoder.layers.0", DECODER),
    "pegasus": Streams(tiny_models.pegasus, tiny_models.sequences, PROJECTIONS, "model.decoder.layers.0", DECODER),
    "t5": Streams(
        tiny_models.t5,
        tiny_models.sequences,
        ["q", "k", "v", "o", "wi", "wo"],
        "decoder.block.0",
        {f"layer.0.SelfAttention.{role}" for role in "qkvo"},
    ),
    "whisper": Streams(tiny_models.whisper, tiny_models.sounds, PROJECTIONS, "model.decoder.layers.0", DECODER),
    "clip": Streams(
        tiny_models.clip,
        lambda source, target: tiny_models.captioned_image(target),
        PROJECTIONS,
        "text_model.encoder.layers.0",
        {f"self_attn.{role}" for role in PROJECTIONS[:4]} | {"mlp.fc1", "mlp.fc2"},
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("lengths", [(12, 12), (12, 7)])
@pytest.mark.parametrize("name", STREAMS)
def test_encoders_and_decoders_and_two_towers_are_two_streams(name, lengths):
    """Three layers each: two links per role in each stream, none between the streams, whatever their lengths."""
    streams = STREAMS[name]
    model = streams.build(lengths[0]) if name == "whisper" else streams.build()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=streams.targets))
    chains = reslora.chains(model, example_inputs=streams.inputs(*lengths))
    found = counts(chains)
    assert {role for role, (blocks, _) in found.items() if blocks == 6} == streams.roles
    assert all((blocks, links) in ((6, 4), (3, 2)) for blocks, links in found.values())
    cut = [chain[0] for chain in chains if chain[0].cut != "first of its role"]
    assert {block.role for block in cut} == streams.roles
    for block in cut:
        assert block.name.startswith(streams.second + ".")
        assert block.cut.startswith(f"another stream: {streams.second} does not read the output of ")


def test_cross_attention_reads_the_encoder_in_every_layer_and_stays_linked():
    model = get_peft_model(tiny_models.bart(), LoraConfig(r=2, target_modules=["encoder_attn.k_proj"]))
    chains = reslora.chains(model, example_inputs=tiny_models.sequences(6, 6))
    names = [f"model.decoder.layers.{n}.encoder_attn.k_proj" for n in range(3)]
    assert_chains(chains, {"encoder_attn.k_proj": [names]})


@pytest.mark.exhaustive
@pytest.mark.parametrize("image, caption", [((8, 4), 32), ((5, 5), 70)])
def test_z_images_refiners_are_linked_neither_to_each_other_nor_to_the_layers(image, caption):
    """Lengths are padded to multiples of 32, so image and caption often have as many tokens."""
    model = get_peft_model(tiny_models.z_image(), LoraConfig(r=2, target_modules="all-linear"))
    chains = reslora.chains(model, example_inputs=tiny_models.z_image_inputs([image], [caption]))
    for chain in chains:
        assert len({block.name.split(".")[0] for block in chain}) == 1
    assert counts(chains)["attention.to_q"] == (2 + 2 + 4, 1 + 1 + 3)
    assert counts(chains)["adaLN_modulation.0"] == (2 + 4, 1 + 3)


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
def test_image_and_caption_of_joint_attention_have_roles_of_their_own(name):
    build = getattr(tiny_models, name)
    kinds = {"flux": {}, "flux2": {"pooled": None, "axes": 4}, "chroma": {"pooled": None}}
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["to_q", "add_q_proj", "to_add_out"]))
    chains = reslora.chains(model, example_inputs=tiny_models.flux_inputs(*(16, 16), **kinds[name]))
    both = [f"transformer_blocks.{n}.attn." for n in range(3)]
    expected = {
        "attn.to_q": [[name + "to_q" for name in both]],
        "attn.add_q_proj": [[name + "add_q_proj" for name in both]],
        "attn.to_add_out": [[name + "to_add_out" for name in both]],
    }
    if name != "flux2":
        expected["attn.to_q"].append([f"single_transformer_blocks.{n}.attn.to_q" for n in range(4)])
    assert_chains(chains, expected)


RUNS_AT = {
    "z_image": (
        tiny_models.z_image,
        [
            tiny_models.z_image_inputs([(4, 4)], [7]),
            tiny_models.z_image_inputs([(8, 8)], [64]),
            tiny_models.z_image_inputs([(8, 12), (4, 6)], [70, 3]),
        ],
    ),
    "flux": (tiny_models.flux, [tiny_models.flux_inputs(*lengths) for lengths in ((9, 4), (24, 24), (30, 64))]),
    "flux2": (
        tiny_models.flux2,
        [tiny_models.flux_inputs(*lengths, pooled=None, axes=4) for lengths in ((9, 4), (24, 24), (30, 64))],
    ),
    "chroma": (
        tiny_models.chroma,
        [tiny_models.flux_inputs(*lengths, pooled=None) for lengths in ((9, 4), (24, 24), (30, 64))],
    ),
    "sd3": (
        lambda: tiny_models.sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        [tiny_models.sd3_inputs(*lengths) for lengths in ((8, 8, 16), (4, 12, 3), (16, 8, 77))],
    ),
    "qwen_image": (
        tiny_models.qwen_image,
        [tiny_models.qwen_image_inputs(*lengths) for lengths in ((2, 4, 8), (4, 2, 3), (3, 5, 70))],
    ),
    "krea2": (
        tiny_models.krea2,
        [tiny_models.krea2_inputs(*lengths) for lengths in ((2, 4, 8), (4, 2, 4), (3, 5, 70))],
    ),
    "lumina2": (
        tiny_models.lumina2,
        [tiny_models.lumina2_inputs(*lengths) for lengths in ((2, 4, 8), (4, 2, 4), (3, 5, 70))],
    ),
}


@pytest.mark.parametrize("shortcut", quick(["input", "middle"], "middle"))
@pytest.mark.parametrize("name", RUNS_AT)
def test_the_plan_holds_for_images_and_captions_of_other_sizes(name, shortcut):
    build, runs = RUNS_AT[name]
    model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear"))
    plan = reslora.connect(model, ResLoraConfig(shortcut, -1))
    assert plan.links > 0
    for inputs in runs:
        result = model(**inputs).sample
        sum(item.square().sum() for item in result).backward()
        assert reslora.chains(model, example_inputs=inputs) == plan


def test_several_adapters_have_their_own_chains(llama):
    model = llama.lora(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    assert set(counts(reslora.chains(model))) == {"self_attn.q_proj"}
    assert set(counts(reslora.chains(model, adapter_name="other"))) == {"self_attn.v_proj"}


def test_a_model_without_lora_layers_is_an_error():
    for model in (tiny_llama(1), tiny_unet()):
        with pytest.raises((ValueError, RuntimeError)) as error:
            reslora.chains(model)
        assert_one_line(error)


def test_an_unknown_adapter_is_named(llama):
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.chains(llama.lora(), adapter_name="missing")
    assert_one_line(error, "missing", "default")


def test_separate_self_and_cross_attention():
    """Two attentions in one block are two roles, whichever runs first."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.cross = nn.ModuleDict({"proj": nn.Linear(6, 6)})
            self.own = nn.ModuleDict({"proj": nn.Linear(6, 6)})

        def forward(self, x):
            return self.cross["proj"](self.own["proj"](x))

    model = Stack()
    model.layers = nn.ModuleList(Block() for _ in range(3))
    chains = reslora.chains(lora_stack(model), example_inputs=STACK_INPUTS)
    assert counts(chains) == {"cross.proj": (3, 2), "own.proj": (3, 2)}


def test_architectures_are_what_they_claim():
    """The chains written by hand contain every LoRA layer of each tiny model exactly once."""
    for arch in ARCHITECTURES.values():
        assert isinstance(arch, Architecture)
        names = [name for chain in arch.blocks for name in chain]
        found = adapter_layers(arch.lora())
        assert len(names) == len(set(names)) == len(found)
        assert all(any(n == name or n.endswith("." + name) for n in found) for name in names)


# --- what cannot be wired ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward_pre"])
def test_hooks_on_the_factors_are_refused_and_those_on_layers_are_called(kind):
    part = "lora_A"
    model, calls = lora_stack(), []
    layer = model.get_base_model().layers[1].proj
    hook = getattr(getattr(layer, part)["default"], f"register_{kind}_hook")(lambda *args: None)
    with pytest.raises(ValueError) as error:
        reslora.connect(model, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
    assert_one_line(error, f"layers.1.proj has hooks on its {part}", "remove")
    hook.remove()
    getattr(layer, f"register_{kind}_hook")(lambda *args: calls.append(kind))
    reslora.connect(model, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
    calls.clear()
    run(model, STACK_INPUTS).sum().backward()
    assert calls == [kind]


def test_pruned_factors_are_refused():
    """The second backward pass would end with torch's own error, because the pruned weight is not computed again."""
    model = lora_stack()
    prune.l1_unstructured(model.get_base_model().layers[2].proj.lora_B["default"], "weight", amount=0.5)
    with pytest.raises(ValueError) as error:
        reslora.connect(model, ResLoraConfig("block"), example_inputs=STACK_INPUTS)
    assert_one_line(error, "layers.2.proj", "lora_B", "prun")
