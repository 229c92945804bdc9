"""Train the pipeline's text encoder and U-Net on five emoji sets, on latents encoded once; write a diffusers folder.

    OMP_NUM_THREADS=1 python assets/make/train_base.py                # after train_vae.py; rerun to continue
    python assets/make/train_base.py --steps 40000  # later: go on from where the steady learning rate had come to
    python assets/make/train_base.py --init assets/pipeline   # without checkpoints: go on from the shipped weights

The learning rate is steady until the last --cooldown steps, where it falls to 0 for the weights that are shipped, on
fewer variants of each picture. A longer run continues from before the cooldown. Losses go to loss.jsonl.
"""

import argparse
from pathlib import Path

import torch
from accelerate.utils import set_seed
from augment import load_pictures
from captions import new_tokenizer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from training import add_arguments, make_examples, start_from, train, warm_up
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--vae", default="assets/build/vae")
    parser.add_argument("--output", default="assets/build/base")
    parser.add_argument("--init", metavar="PIPELINE", help="start with the text encoder and U-Net of this pipeline")
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    if not (Path(args.vae) / "config.json").is_file():
        raise SystemExit(f"{args.vae}: no autoencoder there; train it with train_vae.py first")
    return args


def new_scheduler() -> DDIMScheduler:
    """Zero terminal SNR with trailing steps: without it the white ground comes out grey."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(channels: int = 16) -> UNet2DConditionModel:
    """Two levels of two (down) and three (up) layers; captions enter by cross-attention, and pooled beside the time."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    # On a CPU, plain matrix products are half as fast again as the fused attention for pictures this small.
    unet.set_attn_processor(AttnProcessor())
    return unet


def denoising_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of v, with the near-noiseless steps weighted down as if their SNR were at most 4 (min-SNR)."""
    noise = torch.randn(latents.shape, generator=generator)
    # Stratified over the batch: each batch covers all noise levels evenly.
    steps = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(latents)
    timesteps = (steps * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample.float()
    weight = (5 / (compute_snr(scheduler, timesteps) + 1)).clamp(max=1)
    return ((predicted - target).square().mean((1, 2, 3)) * weight).mean()


def new_pipeline(*parts) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        *parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae)
    # All captions' words get a token, so that a later run or a fine-tuning can teach more of them.
    tokenizer = new_tokenizer([row["text"] for row in load_pictures(f"{args.data}/noto")[1]])
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init, subfolder="tokenizer")

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    examples = make_examples(args, vae, tokenize)
    unet = new_unet(vae.config.latent_channels)
    text_encoder, scheduler = new_text_encoder(tokenizer), new_scheduler()

    def begin() -> None:
        if args.init:
            start_from(args.init, {"unet": unet, "text_encoder": text_encoder})
        elif args.warm_up_steps:
            width = text_encoder.config.hidden_size
            warm_up(text_encoder, read, width, examples, args.warm_up_steps, args.seed)

    def read(tokens: torch.Tensor) -> torch.Tensor:
        return text_encoder(tokens).last_hidden_state.mean(1)

    def loss_of(latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(unet, text_encoder, scheduler, latents, tokens, generator)

    pipeline = new_pipeline(vae, text_encoder, tokenizer, unet, scheduler)
    modules = {"unet": unet, "text_encoder": text_encoder}
    train(args, modules, pipeline, examples, tokenize([""])[0], loss_of, begin)


if __name__ == "__main__":
    main()
