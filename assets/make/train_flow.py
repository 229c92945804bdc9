"""Train the flow-matching pipeline's text encoder and transformer on five emoji sets; write a diffusers folder.

    OMP_NUM_THREADS=1 python assets/make/train_flow.py                  # rerun to continue; a C++ compiler is needed
    OMP_NUM_THREADS=1 python assets/make/train_flow.py --steps 90000    # later: go on from before the cooldown

Pictures, captions and autoencoder are those of the other bundled pipeline. As in train_base.py, the learning rate is
steady until the last --cooldown steps, where it falls to 0 for the weights that are shipped. A longer run continues
from before the cooldown; one with a very large --steps trains steadily until it is killed.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from augment import load_pictures
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from flow_model import (
    DRAW_TOKENS,
    PATCH,
    caption_tokens,
    new_flow_pipeline,
    new_flow_text_encoder,
    new_flow_tokenizer,
    new_transformer,
    rotations,
    velocity,
)
from torch import nn
from training import add_arguments, make_examples, start_from, train, warm_up

# Noise levels are drawn as the sigmoid of a normal variable; this mean favours the noisier half, which decides
# what is drawn where.
LEVEL_MEAN, LEVEL_STD = 0.4, 1.2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--vae", default="assets/build/vae")
    parser.add_argument("--output", default="assets/build/flow")
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=192, help="width of the transformer, 32 a head")
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--init", metavar="PIPELINE", help="start with this pipeline's text encoder and transformer")
    parser.add_argument("--no_compile", action="store_true", help="do not compile the training's forward pass")
    return parser.parse_args()


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (count) between 0 and 1, logit-normal and stratified: each batch covers all of them evenly."""
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.sigmoid(LEVEL_MEAN + LEVEL_STD * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)))


def lengths(tokens: torch.Tensor, text_encoder: nn.Module) -> torch.Tensor:
    """Number of tokens (N) of each caption in (N, length)."""
    return (tokens != text_encoder.config.pad_token_id).sum(1)


def flow_loss(forward, text_encoder: nn.Module, latents: torch.Tensor, tokens: torch.Tensor, generator) -> torch.Tensor:
    """Mean squared error of the flow. Z-Image's transformer is told 1 - noise level, and returns the flow negated:
    latents - noise."""
    noise = torch.randn(latents.shape, generator=generator)
    level = noise_levels(len(latents), generator)
    share = level[:, None, None, None]
    features = text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    flow = forward((1 - share) * latents + share * noise, 1 - level, features, lengths(tokens, text_encoder))
    return (flow.float() - (latents - noise)).square().mean()


def read_draw_tokens(text_encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the transformer will see of each caption's draw tokens, side by side: (N, draw tokens * width)."""
    features = text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    places = lengths(tokens, text_encoder)[:, None] - len(DRAW_TOKENS) + torch.arange(len(DRAW_TOKENS))
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])).flatten(1)


def new_forward(transformer: ZImageTransformer2DModel, side: int, compiled: bool):
    """The transformer's forward for the training: eager without gradients, where captions' lengths vary."""
    rope = rotations(transformer, side // PATCH, side // PATCH)
    quick = torch.compile(velocity, dynamic=False) if compiled else velocity

    def forward(noisy, time, features, lengths):
        run = quick if torch.is_grad_enabled() else velocity
        return run(transformer, noisy, time, features, lengths, rope)

    return forward


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae)
    tokenizer = new_flow_tokenizer([row["text"] for row in load_pictures(f"{args.data}/noto")[1]])
    examples = make_examples(args, vae, lambda texts: caption_tokens(tokenizer, texts))
    text_encoder = new_flow_text_encoder(tokenizer)
    transformer = new_transformer(args.dim, args.layers, args.dim // 32, channels=vae.config.latent_channels)
    forward = new_forward(transformer, examples.latents.shape[-1], not args.no_compile)
    known_length = int(lengths(examples.tokens[: examples.known].flatten(0, 2), text_encoder).max())

    def begin() -> None:
        if args.init:
            start_from(args.init, {"transformer": transformer, "text_encoder": text_encoder})
            return
        width = len(DRAW_TOKENS) * text_encoder.config.hidden_size
        warm_up(text_encoder, partial(read_draw_tokens, text_encoder), width, examples, args.warm_up_steps, args.seed)

    def loss_of(latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if torch.is_grad_enabled():
            tokens = tokens[:, :known_length]
        return flow_loss(forward, text_encoder, latents, tokens, generator)

    pipeline = new_flow_pipeline(vae, text_encoder, tokenizer, transformer)
    empty = torch.full_like(examples.tokens[0, 0, 0], tokenizer.pad_token_id)
    empty[: len(DRAW_TOKENS)] = caption_tokens(tokenizer, [""])[0]
    train(args, {"transformer": transformer, "text_encoder": text_encoder}, pipeline, examples, empty, loss_of, begin)


if __name__ == "__main__":
    main()
