"""Tiny text-to-image pipelines with random weights, one builder per family, and folders of images to train them on.

Each builder writes the folder that `DiffusionPipeline.from_pretrained` reads, and returns it. Keyword arguments are
named after the pipeline's parts (`unet={"sample_size": 16}`, `scheduler={"prediction_type": "epsilon"}`) and override
that part's configuration. All pipelines generate 32x32 images from 8x8 latents (Lumina 2: 4x4), and read captions made
of `WORDS`.
"""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<start>", "<end>", "<unk>", "red", "blue", "disc", "box"]
IMAGE_SIDE, LATENT_SIDE = 32, 8


def tiny_tokenizer(length: int = 8, chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of `WORDS`, up to `length` tokens; with `chat`, with a chat template."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)
    if chat:
        made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def tiny_clip(config: dict | None = None, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return CLIP's text tower, of width 16; with a projection, it also returns a pooled state."""
    model_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    return model_class(
        CLIPTextConfig(
            **{
                "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1,
                "pad_token_id": 1, "projection_dim": 16, **(config or {}),
            }
        )
    )  # fmt: skip


def tiny_t5(config: dict | None = None) -> T5EncoderModel:
    """Return T5's encoder, of width 32."""
    return T5EncoderModel(
        T5Config(
            **{
                "vocab_size": len(WORDS), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
                "pad_token_id": 1, "eos_token_id": 1, **(config or {}),
            }
        )
    )  # fmt: skip


def tiny_vae(config: dict | None = None) -> AutoencoderKL:
    """Return a VAE with latents of 4 channels and a quarter of the image's width and height."""
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
            "sample_size": IMAGE_SIDE, "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3, **(config or {}),
        }
    )  # fmt: skip


FLOW_VAE = {"scaling_factor": 0.36, "shift_factor": 0.12}


def stable_diffusion(folder: Path, text_encoder=None, unet=None, vae=None, scheduler=None) -> Path:
    """Write Stable Diffusion 1.x or 2.x at the smallest size that still has chains; by default it predicts v."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        text_encoder=tiny_clip({"num_hidden_layers": 1, **(text_encoder or {})}),
        unet=UNet2DConditionModel(
            **{
                "sample_size": LATENT_SIDE, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
                "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "use_linear_projection": True, **(unet or {}),
            }
        ),
        vae=tiny_vae(vae),
        tokenizer=tiny_tokenizer(),
        scheduler=DDIMScheduler(
            **{"prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1, **(scheduler or {})}
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sdxl(folder: Path, text_encoder=None, text_encoder_2=None, unet=None, vae=None, scheduler=None) -> Path:
    """Write Stable Diffusion XL: two text encoders, pooled states, `time_ids`, and a VAE that requires float32.

    As in the real model, the highest resolution has no attention, and the deepest blocks have the most layers of it.
    """
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        text_encoder=tiny_clip(text_encoder),
        text_encoder_2=tiny_clip({"hidden_size": 24, **(text_encoder_2 or {})}, projected=True),
        unet=UNet2DConditionModel(
            **{
                "sample_size": LATENT_SIDE, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16, 16),
                "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": (2, 4, 4),
                "cross_attention_dim": 16 + 24, "transformer_layers_per_block": (1, 1, 2),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 16 + 6 * 8, **(unet or {}),
            }
        ),
        vae=tiny_vae({"scaling_factor": 0.13025, "force_upcast": True, **(vae or {})}),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        scheduler=EulerDiscreteScheduler(
            **{
                "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                "timestep_spacing": "leading", **(scheduler or {}),
            }
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def z_image(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write Z-Image: states of a causal language model, refiners, and one stream of image and caption tokens."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    ZImagePipeline(
        text_encoder=Qwen3Model(Qwen3Config(**text | (text_encoder or {}))),
        tokenizer=tiny_tokenizer(512, chat=True),
        transformer=ZImageTransformer2DModel(
            **{
                "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2,
                "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [1024, 64, 64], **(transformer or {}),
            }
        ),
        vae=tiny_vae(FLOW_VAE | (vae or {})),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})}),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flux(folder: Path, text_encoder=None, text_encoder_2=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write FLUX.1: CLIP's pooled state and T5's states, packed latents, double and single blocks, and guidance."""
    torch.manual_seed(0)
    FluxPipeline(
        text_encoder=tiny_clip(text_encoder),
        text_encoder_2=tiny_t5(text_encoder_2),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(16),
        transformer=FluxTransformer2DModel(
            **{
                "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16,
                "guidance_embeds": True, "axes_dims_rope": (4, 6, 6), **(transformer or {}),
            }
        ),
        vae=tiny_vae(FLOW_VAE | (vae or {})),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{"shift": 3.0, "use_dynamic_shifting": True, **(scheduler or {})}
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flux_kontext(folder: Path, **parts) -> Path:
    """Write FLUX.1 Kontext: the parts of Flux.1 in the pipeline that reads a reference image."""
    index = flux(folder, **parts) / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxKontextPipeline"'))
    return folder


def sd3(
    folder: Path, with_t5: bool = True, text_encoder=None, text_encoder_2=None, text_encoder_3=None,
    transformer=None, vae=None, scheduler=None,
) -> Path:  # fmt: skip
    """Write Stable Diffusion 3: two CLIP towers with projections, T5 or none, joint attention."""
    torch.manual_seed(0)
    StableDiffusion3Pipeline(
        text_encoder=tiny_clip(text_encoder, projected=True),
        text_encoder_2=tiny_clip({"projection_dim": 8, **(text_encoder_2 or {})}, projected=True),
        text_encoder_3=tiny_t5(text_encoder_3) if with_t5 else None,
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        tokenizer_3=tiny_tokenizer(16) if with_t5 else None,
        transformer=SD3Transformer2DModel(
            **{
                "sample_size": LATENT_SIDE, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
                "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
                "caption_projection_dim": 16, "pooled_projection_dim": 16 + 8, "pos_embed_max_size": 8,
                **(transformer or {}),
            }
        ),
        vae=tiny_vae(FLOW_VAE | (vae or {})),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(scheduler or {})}),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def chroma(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write Chroma: only T5's states, packed latents, double and single blocks that an approximator modulates."""
    torch.manual_seed(0)
    ChromaPipeline(
        text_encoder=tiny_t5(text_encoder),
        tokenizer=tiny_tokenizer(16),
        transformer=ChromaTransformer2DModel(
            **{
                "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
                "approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 2,
                **(transformer or {}),
            }
        ),
        vae=tiny_vae(FLOW_VAE | (vae or {})),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **(scheduler or {})}),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_flux2_parts(transformer: dict | None, vae: dict | None, scheduler: dict | None) -> dict:
    """Return FLUX.2's parts except the text encoder: latents in patches that the autoencoder normalizes."""
    made_vae = AutoencoderKLFlux2(
        **{
            "block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "latent_channels": 4,
            "norm_num_groups": 4, **(vae or {}),
        }
    )  # fmt: skip
    made_vae.bn.running_mean.uniform_(-0.5, 0.5)
    made_vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "transformer": Flux2Transformer2DModel(
            **{
                "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 16,
                "axes_dims_rope": (4, 4, 4, 4), **(transformer or {}),
            }
        ),
        "vae": made_vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **(scheduler or {})}),
    }  # fmt: skip


def flux2(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write FLUX.2 dev: three layers of Mistral, captions after a system message, guidance embedding."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS) + 3, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 30,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 1024,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = tiny_tokenizer(1024)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    template = "{% for one in messages %}{% for part in one['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}"
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text, **(text_encoder or {})},
        vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 16, **vision},
        image_token_index=len(WORDS),
    )
    Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=template),
        **tiny_flux2_parts(transformer, vae, scheduler),
    ).save_pretrained(folder)
    return folder


def flux2_klein(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write FLUX.2 klein: Qwen3 with 28 layers, of which three are read."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **{
            "vocab_size": len(WORDS), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 28,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 512,
            **(text_encoder or {}),
        }
    )  # fmt: skip
    Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tiny_tokenizer(16, chat=True),
        **tiny_flux2_parts({"guidance_embeds": False, **(transformer or {})}, vae, scheduler),
    ).save_pretrained(folder)
    return folder


def tiny_qwen_vae(config: dict | None = None) -> AutoencoderKLQwenImage:
    """Return Qwen-Image's video autoencoder: 4 channels, each with a mean and a deviation, at a quarter of the size."""
    return AutoencoderKLQwenImage(
        **{
            "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True],
            "latents_mean": [-0.3, 0.2, 0.1, -0.1], "latents_std": [1.4, 0.7, 1.1, 0.9], **(config or {}),
        }
    )  # fmt: skip


QWEN_TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def qwen_image(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write Qwen-Image: Qwen2.5-VL with a caption template, packed latents, two streams."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0}
    text = QWEN_TEXT | {"rope_scaling": rope} | (text_encoder or {})
    QwenImagePipeline(
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION)),
        tokenizer=tiny_tokenizer(1100),
        transformer=QwenImageTransformer2DModel(
            **{
                "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
                "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6), **(transformer or {}),
            }
        ),
        vae=tiny_qwen_vae(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **(scheduler or {})}),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_image_edit(folder: Path, vae=None, kind=QwenImageEditPipeline) -> Path:
    """Write Qwen-Image-Edit: the parts of Qwen-Image, and a processor of reference images for Qwen2.5-VL.

    `kind`: the class of the pipeline, QwenImageEditPlusPipeline for Qwen-Image-Edit-2509.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(1100)
    tokens = [f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0}
    text = QWEN_TEXT | {"rope_scaling": rope, "vocab_size": len(tokenizer)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION, **ids)
    pipeline = QwenImagePipeline.from_pretrained(qwen_image(folder / "base", vae=vae))
    kind(
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()),
        **{name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler")},
    ).save_pretrained(folder / "model")
    return folder / "model"


def krea2(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write Krea 2: three fused layers of Qwen3-VL per token; one stream whose keys and values have half the width."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1000000.0}
    text = QWEN_TEXT | {"rope_scaling": rope} | (text_encoder or {})
    vision = QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    Krea2Pipeline(
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tiny_tokenizer(1100),
        transformer=Krea2Transformer2DModel(
            **{
                "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
                "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 16, "text_hidden_dim": 16,
                "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
                "text_intermediate_size": 24, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2,
                "axes_dims_rope": (4, 6, 6), **(transformer or {}),
            }
        ),
        vae=tiny_qwen_vae(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{"use_dynamic_shifting": True, "max_image_seq_len": 6400, **(scheduler or {})}
        ),
        text_encoder_select_layers=(1, 2, 3),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def lumina2(folder: Path, text_encoder=None, transformer=None, vae=None, scheduler=None) -> Path:
    """Write Lumina 2: Gemma 2, refiners of image and caption, fewer heads of keys and values than of queries.

    Its pipeline takes for granted that the autoencoder divides width and height by eight, so latents are 4x4.
    """
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    deeper = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    deeper |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    Lumina2Pipeline(
        text_encoder=Gemma2Model(Gemma2Config(**text | (text_encoder or {}))),
        tokenizer=tiny_tokenizer(512),
        transformer=Lumina2Transformer2DModel(
            **{
                "sample_size": 4, "in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 2,
                "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "cap_feat_dim": 16,
                "axes_dim_rope": (4, 6, 6), **(transformer or {}),
            }
        ),
        vae=tiny_vae(FLOW_VAE | deeper | (vae or {})),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **(scheduler or {})}),
    ).save_pretrained(folder)  # fmt: skip
    return folder


FAMILIES: dict[str, Callable[..., Path]] = {
    "stable_diffusion": stable_diffusion, "sdxl": sdxl, "z_image": z_image, "flux": flux, "sd3": sd3,
    "flux2": flux2, "flux2_klein": flux2_klein, "chroma": chroma, "qwen_image": qwen_image, "krea2": krea2,
    "lumina2": lumina2,
}  # fmt: skip


# Families that need a reference image for each image.
EDITS: dict[str, Callable[..., Path]] = {
    "flux_kontext": flux_kontext, "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": partial(qwen_image_edit, kind=QwenImageEditPlusPipeline),
}  # fmt: skip


def tiny_clip_of_images(folder: Path) -> Path:
    """Write an untrained CLIP with both towers, processor and tokenizer: a metric of images and captions."""
    text = tiny_clip().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_dino(folder: Path) -> Path:
    """Write an untrained DINOv2 with its processor: a metric of images only."""
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    Dinov2Model(Dinov2Config(**config)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def random_image(number: int) -> PIL.Image.Image:
    """Return a noise image, 32 high and 32, 40 or 48 wide; the same number gives the same image."""
    random = np.random.default_rng(number)
    return PIL.Image.fromarray(random.integers(0, 255, (32, 32 + 8 * (number % 3), 3), dtype=np.uint8))


def same_image(one: PIL.Image.Image, other: PIL.Image.Image) -> bool:
    """Return whether mode, size and all pixels are the same."""
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def red_or_blue(number: int) -> str:
    return ["red disc", "blue box"][number % 2]


def image_folder(folder: Path, count: int = 6, caption: Callable = red_or_blue, layout: str = "jsonl") -> Path:
    """Write `count` images named by their numbers, with their captions in `layout`: "jsonl", "csv" or "txt"."""
    folder.mkdir(parents=True)
    for number in range(count):
        random_image(number).save(folder / f"{number}.png")
        if layout == "txt":
            (folder / f"{number}.txt").write_text(caption(number))
    rows = [{"file_name": f"{number}.png", "text": caption(number)} for number in range(count)]
    if layout == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if layout == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return folder
