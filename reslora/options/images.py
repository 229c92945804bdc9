"""The options of train_sd.py, with type, default, help and all other properties."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import InvalidArgument
from ..losses import LOSSES
from ..methods.patterns import HELP as PATTERNS
from ..methods.registry import IN_WORDS
from .groups import DEFAULTS
from .option import (
    COUNT,
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    Need,
    again,
    buckets,
    by_content,
    free,
    group,
    number,
    option,
    shown,
    whole,
)  # fmt: skip
from .prompts import LONGEST_SIDE, options_text
from .shared import (
    CHOSEN_OVER_SEEDS,
    HELD_OUT,
    SharedExperimentOptions,
    SharedMethodOptions,
    SharedOptimizerOptions,
    SharedOutputOptions,
    SharedTrainingOptions,
    SharedValidationOptions,
    TrainOptions,
)
from .values import listed

SAMPLINGS = ("uniform", "logit_normal", "mode", "sigmoid", "shift", "flux_shift")
WEIGHTINGS = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
INTERPOLATIONS = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
NOISES = 4  # number of noises for each image and timestep when losses are compared
DEFAULT_RANK = 16
NOISE, TIMESTEPS = "the noise of a step", "the timesteps of a step"

BUCKETS = Need(lambda options: options.data.use_aspect_ratio_buckets, "add --use_aspect_ratio_buckets")
CLASS_IMAGES = Need(lambda options: options.data.class_data_dir, "add --class_data_dir and --class_prompt")
PRESERVATION = Need(
    lambda options: options.training.output_preservation_weight, "add --output_preservation_weight 1, or leave it out"
)
HUBER = Need(
    lambda options: LOSSES[options.training.loss_type].has_threshold,
    "leave it out, or change --loss_type",
    "--loss_type {loss_type} does not use it",
)


# fmt: off
@group
class ModelOptions:
    """Model and precision."""

    pretrained_model_name_or_path: str = by_content("",
        "a model of any family in docs/models.md: a folder in diffusers' format or a name on the hub; for Stable "
        "Diffusion, SDXL and Flux.1 also a .safetensors file with the complete model",
        or_else="the bundled pipeline", metavar="MODEL", short="model",
        essential="model to fine-tune: a folder, a .safetensors file or a name on the hub", path="absolute",
        compared_as="base model")
    pretrained_vae_model_name_or_path: str | None = by_content(None,
        "another autoencoder: a folder in diffusers' format or a name on the hub", metavar="VAE", path="absolute",
        compared_as="base model", kohya=("vae",))
    pretrained_transformer_file: str | None = by_content(None,
        ".safetensors file with the transformer, in the model's own layout, ComfyUI's or diffusers'; the configuration "
        "and all other parts are those of --pretrained_model_name_or_path", metavar="FILE", path="absolute",
        compared_as="base model")
    assistant_lora: str | None = by_content(None,
        "LoRA file that is active in training and absent from samples, merges and exports, as ai-toolkit's assistants "
        "for FLUX.1-schnell and Z-Image-Turbo: trains adapters for distilled models", metavar="FILE", path="absolute",
        compared_as="how losses are measured",
        in_experiments="leave it out: experiments compare test losses, and exports have no assistant")
    revision: str | None = by_content(None, "revision of the model on the hub", compared_as="base model")
    variant: str | None = by_content(None, "variant of the model's files, such as fp16", compared_as="base model")
    cache_dir: str | None = free(None, "folder for downloads and encoded images and captions",
        or_else="the hub's own cache, and <output_dir>/cache", metavar="FOLDER", path="absolute")
    prediction_type: str | None = option(None, "what the denoiser predicts", or_else="what the scheduler says",
        choices=("epsilon", "v_prediction"), objective="ddpm", compared_as="how losses are measured",
        kohya=("v_parameterization v_prediction",))
    mixed_precision: str = option(None, "precision of the frozen weights and of the computation; the adapter's "
        "weights stay fp32",
        or_else="what accelerate was started with; bf16 for a bundled pipeline on a CPU that has instructions for it",
        choices=("no", "fp16", "bf16"))
    base_precision: str = option("no",
        "store the weights of the linear layers in the denoiser's blocks in 8 or 4 bits, and compute in "
        "--mixed_precision: less memory, slower", choices=("no", "fp8", "int8", "nf4"), compared_as="base model",
        kohya=("fp8_base fp8",), diffusers=("bnb_quantization_config_path",))
    blocks_to_swap: int = free(0,
        "keep the linear layers of this many of the denoiser's blocks in the CPU's memory, and copy each layer to "
        "the GPU when it is needed: less memory, slower, same results", NATURAL)
    allow_tf32: bool = option(False, "allow TF32 matrix products on Ampere and later GPUs")
    enable_xformers_memory_efficient_attention: bool = option(False, "use the attention of xformers instead of "
        "PyTorch's", kohya=("xformers",))


@group
class MethodOptions(SharedMethodOptions):
    """Adapter method and merge."""

    method: list[str] = again(default=["lora"],
        help=f"one or several, trained one after the other on the same images and noise. {IN_WORDS}. If an option of "
        "ResLoRA, such as --shortcut or --merge, is given, the default is reslora",
        # no other method has a lower final loss: RESULTS.md
        resume="free", bundled=["lora", "reslora"], kohya=("network_module",))
    rank: int = again(kohya=("network_dim",),
        by_family=f"{DEFAULT_RANK}; the width of the narrowest adapted layer where that is less")
    rank_pattern: list[str] | None = again(help=f"{PATTERNS['rank_pattern']}; for the denoiser only")
    alpha_pattern: list[str] | None = again(help=f"{PATTERNS['alpha_pattern']}; for the denoiser only")
    init_lora_weights: str = again(default="gaussian")  # initialization of diffusers' scripts
    init_lora: str | None = by_content(None,
        "start from this LoRA file, of any tool, instead of from zero; its layers, ranks and alphas are kept",
        metavar="FILE", path="absolute", kohya=("network_weights",))
    target_modules: list[str] = again(
        help="layers of the denoiser that get an adapter, by the end of their name; or one regular expression of "
        "their whole names",
        by_family="those of diffusers' script for the model, such as to_q, to_k, to_v, to_out.0 of U-Nets; without "
        "Z-Image's refiners and Krea 2's text_fusion.projector, and with FLUX.2's add_*_proj and to_add_out",
        yields_to="layers")
    layers: str | None = option(None,
        "named layers of the denoiser instead of --target_modules, joined by +: attention, mlp, style, content (SDXL), "
        "all; --help layers prints them by family, with their parameters", metavar="NAME", yields_to="target_modules",
        needs=Need(lambda options: not options.adapter.init_lora, "leave it out", "--init_lora has its own layers"))
    train_text_encoder: bool = option(False,
        "also train the CLIP text encoders (Stable Diffusion, SDXL, SD 3, Flux.1): their attention gets the same "
        "adapter, with shortcuts between its own layers. T5 is not trained", variable=True)
    new_tokens: list[str] = option([],
        "new tokens that are trained together with the adapter, for Stable Diffusion and SDXL: textual inversion, or "
        "pivotal tuning. After = are the words whose mean embedding a token starts from, for example '<sks>=dog'",
        metavar="TOKEN=WORDS", in_experiments="leave it out: experiments compare LoRA files, which have no tokens",
        kohya=("token_string", "init_word"),
        diffusers=("train_text_encoder_ti", "token_abstraction", "initializer_concept"))
    merge_calibration_samples: int = again(
        help="number of training images on which ResLoRA's merge and control methods are calibrated; with 0, "
        "--merge input uses norms recorded in training")

    @property
    def words_of_tokens(self) -> dict[str, str]:
        """For each new token, the words whose mean embedding it starts from; empty for the mean of all embeddings."""
        return {token: words for token, _, words in (text.partition("=") for text in self.new_tokens)}


@group
class DataOptions:
    """Images and captions: sources and preprocessing."""

    dataset_name: str | None = by_content(None, "dataset on the hub, or a folder", path="absolute",
        yields_to="train_data_dir", compared_as="held-out images")
    dataset_config_name: str | None = by_content(None, "configuration of --dataset_name", yields_to="train_data_dir",
        compared_as="held-out images",
        needs=Need(lambda options: options.data.dataset_name, "add --dataset_name, or leave it out"))
    train_data_dir: list[str] = by_content([],
        "images with a metadata.jsonl or .csv, or with .txt or .caption files of their names; or Parquet, .tar "
        "(webdataset) or JSON files, or what save_to_disk wrote; or kohya's folders, named <repeats>_<caption>",
        or_else="the bundled images", metavar="FOLDER", collapses=True, short="data",
        essential="folder of images with captions", path="absolute", yields_to="dataset_name",
        compared_as="held-out images", diffusers=("instance_data_dir",))
    train_data_repeats: list[int] = option([1],
        "how often an epoch uses each image: one number for all folders, or one per folder; it multiplies the "
        "repeats of kohya's folders", COUNT, metavar="N", collapses=True, kohya=("dataset_repeats",),
        diffusers=("repeats",))
    train_data_weight: list[float] = option([1.0],
        "weight of each image's loss: one number for all folders, or one for each", POSITIVE, metavar="WEIGHT",
        collapses=True)
    image_column: str = by_content("image", "column with the image", compared_as="held-out images")
    caption_column: str = by_content("text", "column with the caption, or a list of captions to choose from",
        compared_as="held-out images")
    conditioning_data_dir: list[str] = by_content([],
        "reference images of an edit model (Flux.1 Kontext, Qwen-Image-Edit, FLUX.2): for each --train_data_dir a "
        "folder with a file of the same name for each image; the caption is the instruction that turns the reference "
        "image into the image. Several references of an image are in several folders: give the folders of the first "
        "references, then those of the second",
        metavar="FOLDER", path="absolute", compared_as="held-out images")
    conditioning_image_column: list[str] = by_content([],
        "column with the reference image of an edit model, or its file name; several columns for several references "
        "of an image", metavar="COLUMN", compared_as="held-out images",
        diffusers=("cond_image_column",))
    caption_prefix: str | None = option(None, "trigger word, put before every caption except those of class images",
        metavar="TEXT", compared_as="held-out images")
    caption_suffix: str | None = option(None, "put after every caption except those of class images", metavar="TEXT",
        compared_as="held-out images")
    caption_dropout: float = option(0.0,
        "fraction of the training samples whose caption is replaced by the empty one, at random; class images keep "
        "theirs", FRACTION,
        kohya=("caption_dropout_rate",), diffusers=("proportion_empty_prompts",))
    enable_wildcard: bool = option(False,
        "for each training sample, take one line of the caption and one alternative of each {red|blue}, at random; "
        "write {{ and }} for literal braces")
    shuffle_caption: bool = option(False, "shuffle the comma-separated tags of a caption anew for each training "
        "sample")
    caption_tag_dropout_rate: float = option(0.0, "probability with which each tag of a caption is left out of a "
        "training sample",
        FRACTION)
    keep_tokens: int = option(0, "number of tags at the start, counting the prefix, that are neither shuffled nor "
        "left out", NATURAL,
        needs=Need(lambda options: options.data.shuffle_caption or options.data.caption_tag_dropout_rate,
        "add --shuffle_caption or --caption_tag_dropout_rate"))
    class_data_dir: str | None = by_content(None,
        "folder of class images: images of the same kind of thing, which keep the model from forgetting what it "
        "knows. If the folder has kohya's subfolders, no images are generated", metavar="FOLDER", path="absolute",
        compared_as="held-out images", diffusers=("with_prior_preservation FOLDER",))
    class_prompt: str | None = option(None,
        "caption of class images that have none, and prompt for generating class images if there are too few",
        metavar="PROMPT")
    num_class_images: int = option(100, "number of class images; missing ones are generated by the model", NATURAL,
        needs=CLASS_IMAGES)
    prior_loss_weight: float = option(1.0, "weight of the loss of class images", NOT_NEGATIVE, needs=CLASS_IMAGES)
    max_train_samples: int | None = option(None, "train on this many images, chosen at random", COUNT,
        compared_as="held-out images", in_experiments="leave it out: each seed would choose other images")
    resolution: list[int] = option([],
        "side of the square that images are cropped and scaled to; with several, each image is trained at all of "
        "them, and samples and the validation loss take the first", whole(8, LONGEST_SIDE), metavar="SIDE",
        collapses=True, essential="side of the images in pixels", compared_as="resolution", bundled=64,
        by_family="Stable Diffusion 1 and 2, Flux.1, FLUX.2, Chroma, Qwen-Image, Krea 2 512; others 1024")
    use_aspect_ratio_buckets: bool = option(False,
        "train each image near its own aspect ratio, at about the area of a --resolution square, without enlarging "
        "it",
        compared_as="resolution", kohya=("enable_bucket",))
    aspect_ratio_buckets: str | None = option(None,
        "sizes of the buckets, as heights and widths, instead of those derived from --resolution; images may be "
        "enlarged", buckets,
        metavar="H,W;H,W", compared_as="resolution", needs=BUCKETS)
    bucket_upscale: bool = option(False, "enlarge small images to a bucket derived from --resolution",
        compared_as="resolution", needs=(BUCKETS, Need(lambda options: not options.data.aspect_ratio_buckets,
        "leave it out, because --aspect_ratio_buckets enlarges small images too")))
    center_crop: bool = option(False,
        "crop the center instead of a random place; with --cache_latents, images of which a bucket keeps at least "
        "93% always get the center crop", compared_as="resolution")
    random_flip: bool = option(False, "mirror each image with a probability of one half", variable=True,
        unshared="the mirrored images of a step", kohya=("flip_aug",))
    image_interpolation_mode: str = option("lanczos", "how images are scaled", choices=INTERPOLATIONS)
    strict: bool = free(False, "end with an error if an image cannot be read or has no caption, instead of leaving it "
        "out")
    cache_latents: bool = free(True,
        "encode every image once and store its latents on disk, instead of encoding it in every step")
    cache_text_embeddings: bool = free(True,
        "encode every caption once, store the result on disk, and free the text encoder. The text encoder is kept if "
        "random changes of captions make more than 1000 texts, and more than four per caption")
    dataloader_num_workers: int = free(0, "processes that read images", NATURAL)

    @property
    def reference_flag(self) -> str:
        """The option that names the reference images, with its value; empty if there are none."""
        if self.conditioning_data_dir:
            return f"--conditioning_data_dir {' '.join(self.conditioning_data_dir)}"
        columns = " ".join(self.conditioning_image_column)
        return f"--conditioning_image_column {columns}" if columns else ""

    @property
    def references_per_image(self) -> int:
        """The number of reference images that each image has."""
        folders = len(self.conditioning_data_dir) // max(1, len(self.train_data_dir))
        return folders or len(self.conditioning_image_column)


@group
class TrainingOptions(SharedTrainingOptions):
    """Length of training, batch size and loss."""

    num_train_epochs: int = again()
    noise_offset: float = option(0.0, "scale of the noise added per channel while training", NOT_NEGATIVE,
        variable=True, unshared=NOISE)
    min_timestep: int = option(0,
        "train only at this timestep and above; 0 is the clean image, the last timestep is noise. Low timesteps "
        "determine details, so these change little. The validation loss uses all timesteps", NATURAL,
        variable=True, unshared=TIMESTEPS)
    max_timestep: int | None = option(None,
        "train only on timesteps below this one: the composition of images, which high timesteps determine, then "
        "changes little", COUNT,
        or_else="all", variable=True, unshared=TIMESTEPS)
    snr_gamma: float | None = option(None, "gamma of the min-SNR loss weights; 5.0 is usual, and 0 gives all "
        "timesteps the same weight",
        NOT_NEGATIVE, variable=True, objective="ddpm", bundled=1.0, bundled_flow=None,
        # preserves more of the subjects: assets/README.md
        kohya=("min_snr_gamma",))
    loss_type: str = option("l2",
        "; ".join(f"{name}: {loss.help}" for name, loss in LOSSES.items())
        + ". The validation loss is always the squared error", choices=tuple(LOSSES), variable=True)
    huber_schedule: str = option("snr",
        "huber and smooth_l1: how the threshold above which errors get less weight depends on the timestep. "
        "constant: always --huber_c; exponential: it falls from 1 at the clean image to --huber_c at pure noise; "
        "snr: it falls with the signal-to-noise ratio", choices=("constant", "exponential", "snr"), variable=True,
        needs=HUBER)
    huber_c: float = option(0.1,
        "huber and smooth_l1: the threshold; if --huber_schedule lets it fall, its lowest value",
        POSITIVE, variable=True, needs=HUBER)
    huber_scale: float = option(1.0,
        "huber and smooth_l1: factor by which the threshold is multiplied; not with --huber_schedule snr",
        POSITIVE, variable=True, needs=(HUBER, Need(lambda options: options.training.huber_schedule != "snr",
        "leave it out, or change --huber_schedule", "--huber_schedule snr does not use it")))
    output_preservation_weight: float = option(0.0,
        "weight of a second loss, which keeps the model's predictions for --output_preservation_prompt as they are "
        "without the adapter; a step takes more than twice as long", NOT_NEGATIVE,
        needs=Need(lambda options: options.training.output_preservation_prompt is not None,
        "add --output_preservation_prompt", "there is no prompt whose predictions to preserve"))
    output_preservation_prompt: str | None = option(None,
        "prompt whose images are preserved: usually the class of the trained subject, such as a photo of a cat",
        metavar="PROMPT", needs=PRESERVATION)
    masked_loss: bool = option(False,
        "multiply the loss of each pixel by the image's mask (1 where it is white and opaque). The mask is the file "
        "named in the column mask of metadata.jsonl or .csv, otherwise the image's alpha channel; images without a "
        "mask count completely. The validation loss is masked too", kohya=("alpha_mask",))
    masked_loss_normalised: bool = option(False,
        "average the loss over the area that the mask keeps, instead of the whole image",
        needs=Need(lambda options: options.training.masked_loss, "add --masked_loss"))
    timestep_sampling: str | None = option(None,
        "flow matching: how timesteps are sampled. uniform, logit_normal and mode: as in diffusers' scripts, from "
        "the scheduler's table; sigmoid, shift, flux_shift: as in kohya's", or_else="by --weighting_scheme",
        choices=SAMPLINGS, variable=True, unshared=TIMESTEPS, objective="flow")
    weighting_scheme: str = option(None,
        "flow matching: weights of the loss, as in diffusers' scripts; logit_normal and mode also set how timesteps "
        "are sampled",
        choices=WEIGHTINGS, variable=True, unshared=TIMESTEPS, objective="flow",
        by_family="SD 3 logit_normal, others none")
    logit_mean: float = option(0.0, "flow matching, logit_normal: mean of the normal distribution", number(),
        variable=True, unshared=TIMESTEPS, objective="flow", samplings=("logit_normal",))
    logit_std: float = option(1.0, "flow matching, logit_normal: standard deviation of the normal distribution",
        POSITIVE, variable=True, unshared=TIMESTEPS, objective="flow",
        samplings=("logit_normal",))
    mode_scale: float = option(1.29, "flow matching, mode: how far the distribution of timesteps is from uniform",
        number(), variable=True, unshared=TIMESTEPS, objective="flow",
        samplings=("mode",))
    discrete_flow_shift: float | None = option(None, "flow matching: shift of the timesteps towards noise", POSITIVE,
        or_else="the scheduler's; 3 with shift", objective="flow",
        samplings=("uniform", "logit_normal", "mode", "shift"), compared_as="how losses are measured")
    guidance_scale_train: float = option(1.0,
        "guidance scale that a guidance-distilled denoiser gets as input in training: only for Flux.1 and FLUX.2 dev "
        "(diffusers' script has 3.5)", NOT_NEGATIVE, compared_as="how losses are measured")
    max_sequence_length: int = option(None, "tokens of a caption that T5, Qwen or Gemma reads", COUNT,
        compared_as="how losses are measured", by_family="SD 3 77, Lumina 2 256, others with T5 or Qwen 512")
    local_rank: int = free(-1, "set by launchers", int)

    @property
    def preserved_prompts(self) -> list[str]:
        """The prompt of --output_preservation_prompt if the base model's predictions for it are preserved; otherwise
        none.
        """
        prompt = self.output_preservation_prompt
        return [prompt] if self.output_preservation_weight and prompt is not None else []


@group
class OptimizerOptions(SharedOptimizerOptions):
    """Optimizer and learning rate."""

    text_encoder_lr: float | None = option(None, "learning rate of the text encoders or of new tokens. The schedule "
        "is the same", POSITIVE, or_else="--learning_rate", needs=Need(
        lambda options: options.adapter.train_text_encoder or options.adapter.new_tokens,
        "add --train_text_encoder", "no text encoder is trained"))
    use_8bit_adam: bool = option(False, "8-bit AdamW of bitsandbytes, as --optimizer adamw8bit")


@group
class ValidationOptions(SharedValidationOptions):
    """Samples and losses during training."""

    validation_prompt: list[str] = shown([],
        "prompts of samples while training, with fixed seeds; or a .txt file of prompts as kohya's scripts read it (a "
        "line each, with --n --w --h --d --s --l --g), or a .json list of objects with a prompt and its options",
        metavar="PROMPT", essential="prompts of samples while training, or a file of them", compared_as="prompts",
        kohya=("sample_prompts FILE",), bundled=["cat face", "tulip", "guitar", "red apple"])
    validation_prompt_options: list[str] = shown([],
        "options of each prompt, as such a file has them: negative_prompt, width, height, seed, "
        "num_inference_steps, guidance_scale, cfg_scale; {} for none", options_text, metavar="JSON",
        yields_to="validation_prompt", compared_as="how samples are generated")
    validation_image: list[str] = shown([],
        "reference images of the samples of an edit model: one for each prompt, or one for all; with several "
        "references per image as many for each prompt, one after another", metavar="FILE",
        or_else="those of the first held-out images or, without these, of the first images", path="absolute",
        compared_as="how samples are generated")
    num_validation_images: int = shown(4, "samples per prompt; 0 generates none while training", NATURAL, bundled=1)
    validation_height: int | None = shown(None, "height of a sample in pixels", whole(8),
        or_else="the first --resolution", compared_as="how samples are generated")
    validation_width: int | None = shown(None, "width of a sample in pixels", whole(8),
        or_else="the first --resolution", compared_as="how samples are generated")
    validation_steps: int | None = shown(None,
        "steps between samples and between measurements of the validation loss; if not given, --validation_epochs "
        "decides, and a run of an experiment is measured at most ten times", COUNT,
        essential="steps between samples", yields_to="validation_epochs", bundled=50, kohya=("sample_every_n_steps",))
    validation_epochs: int = shown(1,
        "epochs between samples, unless --validation_steps is given; with a bundled pipeline the default is 50 steps",
        COUNT, counts_if_given=True)
    validation_split: float = option(0.0, "fraction of the images held out for a validation loss", FRACTION,
        essential=True, compared_as="held-out images", bundled=0.1,
        in_experiments="leave it out: experiments hold out --select_split and --test_split")
    max_validation_images: int = option(64,
        "largest number of held-out images for the validation loss, chosen by --seed or, with --validation_noises, "
        "by their content; the other held-out images are not trained on either", COUNT,
        compared_as="held-out images",
        needs=Need(HELD_OUT.met, "", "it has no effect without --validation_split", refuse=False))
    validation_noises: int | None = option(None,
        "measure the validation loss at eight fixed timesteps with N noises each, which depend only on the image's "
        "content", COUNT,
        or_else="4 with --save_best or --early_stopping_patience, else one timestep and noise in each quarter",
        metavar="N", needs=HELD_OUT, in_experiments=CHOSEN_OVER_SEEDS, compared_as="how losses are measured")
    metric_model: str | None = shown(None,
        "DINOv2 or CLIP, as a folder or a name on the hub: measures the similarity of samples to the held-out images "
        "and, with CLIP, to their prompts; experiments report it for every compared run", metavar="MODEL",
        path="relative", needs=Need(lambda options: options.experiment.select_split
        or (options.validation.validation_prompt and options.validation.num_validation_images),
        "add --validation_prompt and --num_validation_images 1, or leave it out"))
    num_inference_steps: int = shown(None, "denoising steps of a sample", COUNT,
        compared_as="how samples are generated", bundled=20,
        by_family="Stable Diffusion 1 and 2, SDXL, Lumina 2 30; Chroma 35; Qwen-Image 50; others 28")
    guidance_scale: float = shown(None, "classifier-free guidance of a sample", NOT_NEGATIVE,
        compared_as="how samples are generated", bundled=4.0, bundled_flow=3.0,
        by_family="Stable Diffusion 1 and 2 7.5; SDXL, Z-Image, Chroma 5; SD 3 7; Flux.1 3.5; FLUX.2, Qwen-Image, "
        "Lumina 2 4; Krea 2 4.5")


@group
class ExperimentOptions(SharedExperimentOptions):
    """Data splits and schedule of an experiment, which is several runs with different values of some options."""

    select_split: float | None = again(help="fraction of the images that is held out to choose learning rates and "
        "checkpoints")
    test_split: float | None = again(help="fraction of the images that is held out to compare methods; use 0.3 if "
        "there are few images")
    test_groups: str | None = option(None,
        "folder: the images of a folder, such as photos of one session, resemble each other. They are in the same "
        "split, and the folders rather than the images are compared. A column `group` of the metadata does the same",
        choices=("folder",))


@group
class OutputOptions(SharedOutputOptions):
    """Outputs and their location."""

    logging_dir: str = free("logs", "TensorBoard's folder inside --output_dir", metavar="FOLDER", path="relative")
    report_to: str = free("tensorboard",
        "tracker that accelerate supports, such as wandb; all: every installed one; none: no tracker")
    push_to_hub: bool = free(False,
        "upload LoRA files, samples, losses, figures and a model card when done; if the run's folder has a README.md, "
        "it is the card",
        in_experiments="leave it out, and upload the folder of the run that you choose")
    hub_token: str | None = free(None, "token for the hub", secret=True)
    hub_model_id: str | None = free(None, "repository on the hub", or_else="the folder's name")
# fmt: on


@dataclass(frozen=True)
class Options(TrainOptions):
    """Values of one run of train_sd.py.

    A value that depends on the model's family is None until the family is known.
    """

    model: ModelOptions = DEFAULTS
    adapter: MethodOptions = DEFAULTS
    data: DataOptions = DEFAULTS
    training: TrainingOptions = DEFAULTS
    optimizer: OptimizerOptions = DEFAULTS
    validation: ValidationOptions = DEFAULTS
    experiment: ExperimentOptions = DEFAULTS
    output: OutputOptions = DEFAULTS

    titles: ClassVar[Mapping[str, str]] = {
        "model": "model", "adapter": "method", "data": "images and captions", "training": "training",
        "optimizer": "optimizer", "validation": "samples and validation loss", "experiment": "experiments",
        "output": "output, checkpoints and reports",
    }  # fmt: skip

    def no_samples(self, prompts: str = "") -> str:
        """Return why training generates no samples of `prompts` or, without `prompts`, of the run's own prompts; empty
        if it generates samples.
        """
        generates = prompts or (self.validation.validation_prompt and self.validation.num_validation_images)
        return "" if generates else "give it --validation_prompt and --num_validation_images"

    def refuse_record(self, place: Path, settings: Mapping[str, Any]) -> None:
        """Raise `InvalidArgument` for --save_best or --early_stopping_patience if earlier losses are not comparable.

        Both options need validation losses with --validation_noises, and set this option by default. Therefore the
        message names these two options, and not --validation_noises.
        """
        names = ("save_best", "early_stopping_patience")
        steering = next((name for name in names if getattr(self.validation, name)), None)
        if steering and settings.get("validation_noises", NOISES) is None:
            flag = f"--{steering}" if steering == "save_best" else f"--{steering} {self[steering]}"
            problem = f"needs --validation_noises from the start, and {place} was trained without"
            raise InvalidArgument(flag, problem, "leave it out, or choose another --output_dir")

    @classmethod
    def more_settings(cls, values: Mapping[str, Any], samples: list[int]) -> dict[str, Any]:
        """Return the options of loss weights by timestep, and of the batch size for images of several resolutions."""
        found = {"snr_gamma": values["snr_gamma"] or 0}  # None and 0 both weight all timesteps equally
        if values["use_aspect_ratio_buckets"] or len(listed(values["resolution"])) > 1:
            # they all have the same resolution
            found["samples_per_forward"] = samples if len(samples) > 1 else samples[0]
        return found
