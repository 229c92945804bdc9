"""The parts of the bundled flow-matching pipeline, untrained, and a forward pass that is quicker to train with.

A diffusion transformer of the Z-Image class: image tokens and caption tokens in one stream, the caption only through
attention. The stock pipeline takes patches of 2x2 latents, so that 64x64 pixels are 16 tokens.
"""

import math

import torch
import torch.nn.functional as F
from captions import word_tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformerBlock
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

PATCH = 2
# Behind the caption's words: the only tokens that have read all of it, and so the ones that can say what to draw.
DRAW_TOKENS = ("<draw1>", "<draw2>", "<draw3>", "<draw4>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}" + "".join(DRAW_TOKENS) + "{% endif %}"
)


def new_flow_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the captions' words, with the chat template that the stock pipeline asks for."""
    return PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(captions, ["<pad>", "<unk>", *DRAW_TOKENS]),
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(DRAW_TOKENS),
        padding_side="right",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def caption_tokens(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids (N, longest) of captions, through the chat template as the stock pipeline does it."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def new_flow_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen3Model:
    """Two layers and a third one that nothing reads: the stock pipeline takes the states before the last layer."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3Model(config)


def new_transformer(dim: int = 192, layers: int = 13, heads: int = 6, caption_dim: int = 128, channels: int = 16):
    """A transformer whose blocks start as small steps, and its output at zero.

    Captions get no rotary positions (their axis has no dimensions), as the text encoder has told their order already;
    so all padding tokens of a caption are alike, which `velocity` uses.
    """
    transformer = ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        in_channels=channels,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=caption_dim,
        axes_dims=[0, dim // heads // 2, dim // heads // 2],
        axes_lens=[1024, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)
    for block in [*transformer.noise_refiner, *transformer.layers]:
        modulation = block.adaLN_modulation[0]
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        for gate in modulation.bias.data.chunk(4)[1::2]:
            gate.fill_(0.25)
    final = transformer.all_final_layer[f"{PATCH}-1"]
    for layer in (final.linear, final.adaLN_modulation[1]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def new_flow_pipeline(vae: AutoencoderKL, text_encoder, tokenizer, transformer) -> ZImagePipeline:
    # Z-Image's pipeline adds the autoencoder's shift, and fails where there is none.
    vae.register_to_config(shift_factor=vae.config.shift_factor or 0.0)
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, text_encoder, tokenizer, transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rotations(transformer: ZImageTransformer2DModel, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (height * width, 1, head dim) of the rotary positions of an image's tokens."""
    grid = transformer.create_coordinate_grid((1, height, width), (SEQ_MULTI_OF + 1, 0, 0)).flatten(0, 2)
    turns = transformer.rope_embedder(grid)[:, None]
    return turns.real.repeat_interleave(2, -1), turns.imag.repeat_interleave(2, -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first len(cos) tokens of x (N, tokens, heads, head dim) turned to their places; those behind stay."""
    turned, rest = x[:, : len(cos)], x[:, len(cos) :]
    pairs = turned.unflatten(-1, (-1, 2))
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return torch.cat([turned * cos.to(x.dtype) + across * sin.to(x.dtype), rest], 1)


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def attend(attention: nn.Module, x: torch.Tensor, bias: torch.Tensor, rope: tuple | None) -> torch.Tensor:
    """Attention written out, with `bias` (N or 1, tokens) added to each key's logits."""
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, -1)) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    q, k = rms_norm(attention.norm_q, q), rms_norm(attention.norm_k, k)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    q, k, v = (part.transpose(1, 2) for part in (q * q.shape[-1] ** -0.5, k, v))
    weights = (q @ k.transpose(-1, -2) + bias[:, None, None]).softmax(-1).to(v.dtype)
    return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def run_block(
    block: ZImageTransformerBlock, x: torch.Tensor, bias: torch.Tensor, rope: tuple | None, time: torch.Tensor | None
) -> torch.Tensor:
    scale1, gate1, scale2, gate2 = 1, 1, 1, 1
    if block.modulation:
        scale1, gate1, scale2, gate2 = block.adaLN_modulation(time).unsqueeze(1).chunk(4, dim=2)
        scale1, gate1, scale2, gate2 = 1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()
    attended = attend(block.attention, rms_norm(block.attention_norm1, x) * scale1, bias, rope)
    x = x + gate1 * rms_norm(block.attention_norm2, attended)
    return x + gate2 * rms_norm(block.ffn_norm2, block.feed_forward(rms_norm(block.ffn_norm1, x) * scale2))


def velocity(
    transformer: ZImageTransformer2DModel,
    noisy: torch.Tensor,
    time: torch.Tensor,
    features: torch.Tensor,
    lengths: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What the stock forward returns (N, C, H, W), for noisy latents (N, C, H, W), time (N) from 0 (noise) to 1, and
    captions' features (N, tokens, caption dim) of which the first `lengths` (N) count; under 32 tokens.

    The stock forward pads the image and the caption to 32 tokens each, and attends to the padding. All padding tokens
    of an image are alike and stay so, and so are those of a caption: here one stands for all, with the logarithm of
    their number added to its attention logits. That is the same function at a third of the cost.
    """
    n, channels, height, width = noisy.shape
    grid = (height // PATCH, width // PATCH)
    tokens = grid[0] * grid[1]
    x = noisy.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1).reshape(n, tokens, -1)
    x = transformer.all_x_embedder[f"{PATCH}-1"](x)
    x = torch.cat([x, transformer.x_pad_token.to(x.dtype).expand(n, 1, -1)], 1)
    x_bias = torch.cat([torch.zeros(n, tokens), torch.full((n, 1), math.log(-tokens % SEQ_MULTI_OF))], 1)
    time = transformer.t_embedder(time * transformer.t_scale)
    for block in transformer.noise_refiner:
        x = run_block(block, x, x_bias, rope, time)

    norm, embed = transformer.cap_embedder
    caption = embed(rms_norm(norm, features))
    caption = torch.cat([transformer.cap_pad_token.to(x.dtype).expand(n, 1, -1), caption], 1)
    absent = torch.arange(features.shape[1]) >= lengths[:, None]
    caption_bias = torch.cat([(SEQ_MULTI_OF - lengths).log()[:, None], absent * -1e4], 1)
    for block in transformer.context_refiner:
        caption = run_block(block, caption, caption_bias, None, None)

    stream, bias = torch.cat([x, caption], 1), torch.cat([x_bias, caption_bias], 1)
    for block in transformer.layers:
        stream = run_block(block, stream, bias, rope, time)
    final = transformer.all_final_layer[f"{PATCH}-1"]
    scale = 1 + final.adaLN_modulation(time).unsqueeze(1)
    out = final.linear(F.layer_norm(stream[:, :tokens], stream.shape[-1:], eps=final.norm_final.eps) * scale)
    return out.view(n, *grid, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4).reshape(n, channels, height, width)


@torch.no_grad()
def check_velocity(transformer: ZImageTransformer2DModel, side: int = 8) -> float:
    """Largest difference between `velocity` and the stock forward, captions of different length, relative to the
    largest output."""
    generator = torch.Generator().manual_seed(0)
    dtype = transformer.x_pad_token.dtype
    lengths = torch.tensor([1, 4, 7])
    noisy = torch.randn(3, transformer.in_channels, side, side, generator=generator, dtype=dtype)
    features = torch.randn(3, 7, transformer.config.cap_feat_dim, generator=generator, dtype=dtype)
    time = torch.tensor([0.0, 0.3, 0.9], dtype=dtype)
    captions = [part[:length] for part, length in zip(features, lengths, strict=True)]
    stock = transformer(list(noisy.unsqueeze(2)), time, captions, return_dict=False)[0]
    rope = rotations(transformer, side // PATCH, side // PATCH)
    ours = velocity(transformer, noisy, time, features, lengths, rope)
    stock = torch.stack(stock).squeeze(2)
    return ((ours - stock).abs().max() / stock.abs().max().clamp(min=1e-6)).item()
