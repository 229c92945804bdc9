"""Tiny models with more than one stream of hidden states: encoder-decoders, towers, and flow-matching transformers."""

import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

_SEQUENCES = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def bart() -> nn.Module:
    return BartForConditionalGeneration(BartConfig(**_SEQUENCES))


def mbart() -> nn.Module:
    return MBartForConditionalGeneration(MBartConfig(**_SEQUENCES))


def pegasus() -> nn.Module:
    return PegasusForConditionalGeneration(PegasusConfig(**_SEQUENCES))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4,
            pad_token_id=0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def whisper(length: int = 12) -> nn.Module:
    """Return a Whisper whose encoder reads exactly `length` frames, after two convolutions of which one halves them."""
    return WhisperForConditionalGeneration(
        WhisperConfig(**_SEQUENCES, num_mel_bins=8, max_source_positions=length, max_target_positions=48)
    )


def clip() -> nn.Module:
    """Return a CLIP with equally wide towers; the image tower (6 x 6 pixels) reads a class token and nine patches."""
    text = {"vocab_size": 64, "max_position_embeddings": 48, "eos_token_id": 2, "projection_dim": 16}
    vision = {"image_size": 6, "patch_size": 2, "projection_dim": 16}
    return CLIPModel(CLIPConfig(text_config=_TOWER | text, vision_config=_TOWER | vision))


def z_image(**overrides) -> nn.Module:
    config = {
        "in_channels": 4, "dim": 24, "n_layers": 4, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 12, "axes_dims": [4, 4, 4], "axes_lens": [256, 32, 32],
    }  # fmt: skip
    return ZImageTransformer2DModel(**config | overrides)


def flux(**overrides) -> nn.Module:
    config = {
        "patch_size": 1, "in_channels": 8, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 12,
        "num_attention_heads": 2, "joint_attention_dim": 10, "pooled_projection_dim": 6, "axes_dims_rope": (4, 4, 4),
    }  # fmt: skip
    return FluxTransformer2DModel(**config | overrides)


def flux2(**overrides) -> nn.Module:
    config = {
        "in_channels": 8, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 10, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    return Flux2Transformer2DModel(**config | overrides)


def chroma(**overrides) -> nn.Module:
    config = {
        "patch_size": 1, "in_channels": 8, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 12,
        "num_attention_heads": 2, "joint_attention_dim": 10, "axes_dims_rope": (4, 4, 4),
        "approximator_num_channels": 16, "approximator_hidden_dim": 20, "approximator_layers": 2,
    }  # fmt: skip
    return ChromaTransformer2DModel(**config | overrides)


def sd3(**overrides) -> nn.Module:
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 10, "caption_projection_dim": 16,
        "pooled_projection_dim": 6, "pos_embed_max_size": 16,
    }  # fmt: skip
    return SD3Transformer2DModel(**config | overrides)


def qwen_image(**overrides) -> nn.Module:
    config = {
        "in_channels": 8, "out_channels": 2, "num_layers": 4, "attention_head_dim": 12, "num_attention_heads": 2,
        "joint_attention_dim": 10, "axes_dims_rope": (4, 4, 4),
    }  # fmt: skip
    return QwenImageTransformer2DModel(**config | overrides)


def krea2(**overrides) -> nn.Module:
    """Return a Krea 2 transformer as wide as its text fusion transformer, so that widths do not end chains."""
    config = {
        "in_channels": 8, "num_layers": 4, "attention_head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 24, "num_text_layers": 3,
        "text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 32,
        "axes_dims_rope": (4, 4, 4),
    }  # fmt: skip
    return Krea2Transformer2DModel(**config | overrides)


def lumina2(**overrides) -> nn.Module:
    config = {
        "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_refiner_layers": 2, "num_attention_heads": 2,
        "num_kv_heads": 1, "multiple_of": 8, "cap_feat_dim": 12, "axes_dim_rope": (4, 4, 4),
    }  # fmt: skip
    return Lumina2Transformer2DModel(**config | overrides)


def tokens(length: int) -> torch.Tensor:
    return torch.arange(2, 2 + length)[None]


def sequences(source: int, target: int) -> dict:
    """Return inputs of an encoder-decoder."""
    return {"input_ids": tokens(source), "decoder_input_ids": tokens(target)}


def sounds(source: int, target: int) -> dict:
    """Return inputs of Whisper: `source` frames after the encoder's convolutions."""
    return {"input_features": torch.zeros(1, 8, 2 * source), "decoder_input_ids": tokens(target)}


def captioned_image(length: int) -> dict:
    """Return inputs of CLIP."""
    return {"input_ids": tokens(length), "pixel_values": torch.zeros(1, 3, 6, 6)}


def z_image_inputs(sides: list[tuple[int, int]], captions: list[int]) -> dict:
    """Return images of these sizes (in patches) with captions of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": [torch.randn(4, 1, 2 * height, 2 * width, generator=generator) for height, width in sides],
        "t": torch.full((len(sides),), 0.3),
        "cap_feats": [torch.randn(length, 12, generator=generator) for length in captions],
    }


def flux_inputs(image: int, caption: int, pooled: int | None = 6, axes: int = 3) -> dict:
    """Return inputs of `flux`, of `flux2` with `pooled=None, axes=4`, or of `chroma` with `pooled=None`."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, image, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, caption, 10, generator=generator),
        "timestep": torch.full((2,), 0.3),
        "img_ids": torch.zeros(image, axes),
        "txt_ids": torch.zeros(caption, axes),
    }
    if axes == 4:
        return inputs | {"guidance": torch.ones(2)}
    return inputs | ({"pooled_projections": torch.randn(2, pooled, generator=generator)} if pooled else {})


def sd3_inputs(height: int, width: int, caption: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(2, caption, 10, generator=generator),
        "pooled_projections": torch.randn(2, 6, generator=generator),
        "timestep": torch.full((2,), 300.0),
    }


def qwen_image_inputs(height: int, width: int, caption: int) -> dict:
    """Return an image of this size (in patches), and two captions of which the first has padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, height * width, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, caption, 10, generator=generator),
        "encoder_hidden_states_mask": torch.arange(caption) < torch.tensor([[caption - 1], [caption]]),
        "timestep": torch.full((2,), 0.3),
        "img_shapes": [[(1, height, width)]] * 2,
    }


def krea2_inputs(height: int, width: int, caption: int) -> dict:
    """Return an image of this size (in patches), and two captions of which the first has padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, height * width, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, caption, 3, 24, generator=generator),
        "encoder_attention_mask": torch.arange(caption) < torch.tensor([[caption - 1], [caption]]),
        "timestep": torch.full((2,), 0.3),
        "position_ids": torch.zeros(caption + height * width, 3),
    }


def lumina2_inputs(height: int, width: int, caption: int) -> dict:
    """Return an image of this size (in patches), and two captions of which the first has padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(2, caption, 12, generator=generator),
        "encoder_attention_mask": torch.arange(caption) < torch.tensor([[caption - 1], [caption]]),
        "timestep": torch.full((2,), 0.3),
    }
