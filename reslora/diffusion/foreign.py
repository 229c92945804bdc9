"""Flags of kohya's and diffusers' scripts that have another name here: what is to be typed in their place."""

from __future__ import annotations

from collections.abc import Iterable

DEFAULT = "the default"
KOHYA = {
    "config_file": "--config",
    "dataset_config": "--train_data_dir, --train_data_repeats, --resolution and others",
    "dataset_repeats": "--train_data_repeats",
    "reg_data_dir": "--class_data_dir, --class_prompt",
    "network_dim": "--rank",
    "network_alpha": "--lora_alpha",
    "network_weights": "--init_lora",
    "network_module": "--method",
    "network_args": "--method, --target_modules, --rank_pattern",
    "unet_lr": "--learning_rate",
    "optimizer_type": "--optimizer",
    "max_train_epochs": "--num_train_epochs",
    "enable_bucket": "--use_aspect_ratio_buckets",
    "bucket_no_upscale": DEFAULT,
    "flip_aug": "--random_flip",
    "cache_latents_to_disk": DEFAULT,
    "cache_text_encoder_outputs": DEFAULT,
    "caption_dropout_rate": "--caption_dropout",
    "alpha_mask": "--masked_loss",
    "min_snr_gamma": "--snr_gamma",
    "fp8_base": "--base_precision fp8",
    "sample_prompts": "--validation_prompt FILE",
    "sample_every_n_steps": "--validation_steps",
    "save_every_n_steps": "--checkpointing_steps",
    "save_state": DEFAULT,
    "resume": "--resume_from_checkpoint",
}
DIFFUSERS = {
    "repeats": "--train_data_repeats",
    "proportion_empty_prompts": "--caption_dropout",
    "bnb_quantization_config_path": "--base_precision",
}
FOREIGN = {name: ("kohya's", here) for name, here in KOHYA.items()}
FOREIGN |= {name: ("diffusers'", here) for name, here in DIFFUSERS.items()}


def in_words(flags: Iterable[str]) -> str:
    """What is to be typed for those of the flags that are other scripts' alone; empty where none is."""
    found = [(flag, *FOREIGN[flag[2:]]) for flag in flags if flag[:2] == "--" and flag[2:] in FOREIGN]
    return ". ".join(
        f"{flag} is {whose} name; here it is {here}{', leave it out' if here is DEFAULT else ''}"
        for flag, whose, here in found
    )
