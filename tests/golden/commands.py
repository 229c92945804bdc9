"""The commands of the golden record, and the files that they read.

A command is run in a folder that has the files of `make_fixtures` and a link to the checkout's `assets`.
"""

import json
import sys
from pathlib import Path

SCRIPTS = {
    "sd": "train_sd.py",
    "llm": "train_llm.py",
    "glue": "train_glue.py",
    "convert": "reslora.convert",
}

# -- runs --------------------------------------------------------------------------------------------------------------

BRIEF = (
    "--train_batch_size 2 --rank 2 --learning_rate 1e-2 --num_validation_images 1 --num_inference_steps 1 "
    "--merge_calibration_samples 2 --mixed_precision no --report_to none --output_dir out"
)
BUNDLED = f"{BRIEF} --resolution 32 --max_train_samples 8 --max_train_steps 3 --validation_prompt tulip"
TINY = f"{BRIEF} --pretrained_model_name_or_path model --resolution 32 --validation_prompt 'red disc'"
IMAGES = f"{TINY} --train_data_dir images"
THREE = f"{IMAGES} --max_train_steps 3"
TEXT = (
    "--max_train_samples 24 --max_eval_samples 8 --per_device_train_batch_size 4 --max_steps 3 --learning_rate 5e-3 "
    "--calibration_examples 4 --use_cpu --report_to none --output_dir out"
)
ANSWERS = "--max_test_samples 4 --max_new_tokens 4"
MANY = f"{TEXT} {ANSWERS} --max_steps 16 --save_steps 2 --save_total_limit 1"
SIX = f"{IMAGES} --method reslora --gradient_accumulation_steps 2 --checkpointing_steps 1 --max_train_steps 6"
LORA = "out/lora/pytorch_lora_weights.safetensors"

RUNS = {
    "help": [
        f"{script} --{flag}"
        for script in SCRIPTS
        for flag in ("help", "version")
        if (script, flag) != ("convert", "version")
    ],
    "unet": [
        f"sd {BUNDLED} --method lora reslora --merge input",
        f"convert {LORA} kohya.safetensors --to kohya --base assets/pipeline",
        "convert kohya.safetensors peft --to peft --base assets/pipeline/unet",
        "convert peft comfyui.safetensors --to comfyui --base assets/pipeline --dtype float16",
        "convert out/reslora/peft smaller.safetensors --to diffusers --rank 1 --base assets/pipeline",
    ],
    "flow": [
        f"sd {BUNDLED} --pretrained_model_name_or_path assets/pipeline-flow --method lora reslora --shortcut middle "
        "--pre_num 2 --timestep_sampling logit_normal --logit_mean 0.5 --weighting_scheme sigma_sqrt",
    ],
    "methods": [
        f"sd {THREE} --method lora lora_x2 lora_matched reslora adalora rslora dora loha lokr oft",
    ],
    "shortcuts": [
        f"sd {THREE} --shortcut block --pre_num 2",
        f"sd {THREE} --shortcut block --pre_num 2 --resume_from_checkpoint latest --merge none",
        f"sd {THREE} --shortcut middle --pre_num -1 --merge weights --output_dir middle",
        f"sd {THREE} --shortcut middle --merge input --output_dir middle-input",
        f"sd {THREE} --shortcut input --head none --merge weights --output_dir input",
        f"sd {THREE} --shortcut input --merge input --merge_calibration_samples 0 --output_dir input-norms",
        f"sd {THREE} --method lora_matched --shortcut block --pre_num 1 --seed 3 --output_dir matched",
        f"sd {THREE} --method reslora --shortcut none --output_dir none",
    ],
    "text_encoder": [
        f"sd {THREE} --train_text_encoder --text_encoder_lr 1e-3 --method lora reslora --shortcut block "
        "--caption_dropout 0.2 --lora_dropout 0.1",
    ],
    "buckets": [
        f"sd {TINY} --train_data_dir images shapes --train_data_repeats 2 1 --train_data_weight 1 0.5 "
        "--use_aspect_ratio_buckets --class_data_dir class --class_prompt 'blue box' --num_class_images 3 "
        "--prior_loss_weight 0.5 --num_train_epochs 1 --scale_lr",
        f"sd {TINY} --train_data_dir shapes kohya --use_aspect_ratio_buckets --aspect_ratio_buckets '32,48;48,32' "
        "--max_train_steps 2 --output_dir named",
    ],
    "captions": [
        f"sd {TINY} --train_data_dir shapes masked --resolution 32 40 --shuffle_caption --keep_tokens 1 "
        "--caption_tag_dropout_rate 0.3 --caption_prefix red --caption_suffix box --caption_dropout 0.1 "
        "--enable_wildcard --masked_loss --masked_loss_normalised --random_flip --max_train_steps 4",
        f"sd {TINY} --train_data_dir masked --masked_loss --no-cache_latents --no-cache_text_embeddings --center_crop "
        "--max_train_steps 2 --output_dir uncached",
    ],
    "objective": [
        f"sd {IMAGES} --max_train_steps 3 --loss_type huber --huber_c 0.2 --noise_offset 0.1 --min_timestep 100 "
        "--max_timestep 900 --snr_gamma 5 --gradient_accumulation_steps 2 --gradient_checkpointing --method reslora",
    ],
    "optimizers": [
        f"sd {THREE} --optimizer adafactor --lr_scheduler cosine --lr_warmup_steps 1 --output_dir adafactor",
        f"sd {THREE} --optimizer lion --lr_scheduler piecewise_constant --lr_step_rules 1:1,0.1:2,0.01 "
        "--optimizer_args weight_decay=0.1 --output_dir lion",
        f"sd {THREE} --optimizer schedulefree --max_grad_norm 0.5 --output_dir schedulefree",
        f"sd {THREE} --optimizer prodigy --learning_rate 1 --output_dir prodigy",
        f"sd {THREE} --optimizer torch.optim.SGD --optimizer_args momentum=0.9 --output_dir sgd",
    ],
    "configuration": [
        "sd --config run.toml --plan",
        "sd --config run.toml --output_dir out",
        "sd --config out/config.json --output_dir again --max_train_steps 1",
        f"sd {THREE} --method lora --init_lora out/lora/peft --output_dir started",
    ],
    "memory": [
        f"sd {THREE} --base_precision fp8 --blocks_to_swap 1 --gradient_checkpointing --output_dir fp8",
        f"sd {THREE} --base_precision int8 --rank_pattern to_q=3 --alpha_pattern to_k=1.5 --output_dir int8",
    ],
    "two_processes": [
        f"two sd {THREE} --method lora reslora --shortcut block --train_batch_size 1 --validation_split 0.4",
    ],
    "killed": [
        f"kill sd {SIX}",
        f"sd {SIX}",
        f"sd {SIX} --resume_from_checkpoint latest --learning_rate 2e-2",
        f"sd {SIX} --resume_from_checkpoint latest --rank 3",
        f"sd {SIX} --resume_from_checkpoint latest --train_data_dir shapes",
        f"sd {SIX} --resume_from_checkpoint checkpoint-1 --method lora",
        f"sd {SIX} --resume_from_checkpoint latest",
        f"sd {SIX} --resume_from_checkpoint latest --max_train_steps 8",
    ],
    "save_best": [
        f"sd {IMAGES} --max_train_steps 4 --validation_split 0.4 --validation_steps 1 --validation_noises 1 "
        "--save_best --early_stopping_patience 2 --method lora reslora",
    ],
    "experiment": [
        f"sd {IMAGES} --max_train_steps 2 --learning_rate 1e-3 1e-2 --seed 0 1 --method lora reslora "
        "--select_split 0.25 --test_split 0.25",
        f"sd {IMAGES} --max_train_steps 2 --method lora reslora --shortcut input block --pre_num 1 2 "
        "--output_dir several",
    ],
    "llm": [
        f"llm {TEXT} {ANSWERS} --shortcut block --pre_num 2 --merge_and_save",
        f"llm {TEXT} {ANSWERS} --shortcut middle --merge lstsq --save_steps 2 --output_dir middle",
        f"llm {TEXT} {ANSWERS} --method adalora --gradient_checkpointing --output_dir adalora",
    ],
    "llm_stopped": [
        f"stop llm {MANY}",
        f"llm {MANY}",
        f"llm {MANY} --resume_from_checkpoint latest",
    ],
    "llm_experiment": [
        f"llm {TEXT} {ANSWERS} --learning_rate 1e-3 5e-3 --method lora reslora --shortcut middle",
    ],
    "glue": [
        f"glue {TEXT} --shortcut middle --pre_num 2",
        f"glue {TEXT} --method lora_matched --max_seq_length 8 --output_dir matched",
        f"two glue {TEXT} --method lora --output_dir two",
    ],
}
"""Commands by the name of the run; those of a run share a folder."""

# -- refusals ----------------------------------------------------------------------------------------------------------

MODEL = "--pretrained_model_name_or_path model"
FLOW = "--pretrained_model_name_or_path assets/pipeline-flow"

FLAGS_OF_SD = """
--rank 0
--rank four
--rank 100000
--rank
--learning_rate nan
--learning_rate 0
--lora_alpha inf
--lora_alpha 0
--lora_dropout 1
--logit_mean nan
--logit_std 0
--mode_scale inf
--discrete_flow_shift 0
--train_batch_size 0
--train_batch_size 99999999999999999999
--gradient_accumulation_steps 0
--num_train_epochs 0
--max_train_steps 0
--resolution 4
--resolution 99999999999999999999
--pre_num -2
--checkpointing_steps 0
--checkpointing_minutes 0
--checkpoints_total_limit 0
--method vera
--shortcut sideways
--head tail
--merge average
--merge_calibration_samples few
--prediction_type sample
--mixed_precision fp32
--base_precision int4
--blocks_to_swap 1.5
--loss_type l1
--huber_schedule linear
--huber_c 0
--huber_scale 0
--timestep_sampling normal
--weighting_scheme cosine
--guidance_scale nan
--guidance_scale_train inf
--max_sequence_length 0
--seed 1.5
--noise_offset nan
--min_timestep x
--max_timestep 0
--snr_gamma inf
--text_encoder_lr 0
--lr_scheduler no_such_schedule
--lr_warmup_steps 0.5
--adam_beta1 1
--adam_beta2 1
--adam_weight_decay nan
--adam_epsilon 0
--max_grad_norm inf
--num_validation_images one
--validation_height 4
--validation_width 4
--validation_steps 0
--validation_epochs 0
--validation_split 1
--max_validation_images 0
--validation_noises 0
--validation_prompt_options '{'
--validation_prompt_options '[1]'
--validation_prompt_options '{"no_such": 1}'
--early_stopping_patience 0
--num_inference_steps 0
--select_split 1
--test_split 0
--experiment_minutes 0
--arms_at_once 0
--train_data_repeats 0
--train_data_weight 0
--caption_dropout 1
--caption_tag_dropout_rate 1
--keep_tokens x
--num_class_images x
--prior_loss_weight nan
--max_train_samples 0
--aspect_ratio_buckets 32x32
--image_interpolation_mode cubic
--dataloader_num_workers x
--no_such_flag 1
--lr_warmup 1
--network_dim 4
--unet_lr 1e-4
--bucket_no_upscale
--repeats 3
"""

SETTINGS_OF_SD = f"""
--config missing.toml
--config list.json
--config syntax.toml
--config nested.toml
--config table.toml
--config unknown.toml
--config foreign.toml
--config choice.toml
--config switch.toml
--config several.toml

{MODEL}
--pretrained_model_name_or_path /no/such/folder --train_data_dir images
--pretrained_model_name_or_path prompts.txt --train_data_dir images
--pretrained_model_name_or_path images --train_data_dir images
--pretrained_model_name_or_path other --train_data_dir images
--train_data_dir missing
--output_dir prompts.txt/run
--cache_dir prompts.txt/cache
--dataset_name someone/images --train_data_dir images shapes
--train_data_dir images shapes --train_data_repeats 1 2 3
--train_data_dir images --train_data_weight 1 2
--class_prompt disc
--class_data_dir class
--aspect_ratio_buckets 32,32 --use_aspect_ratio_buckets --resolution 32 48
--text_encoder_lr 1e-4
--optimizer prodigy --train_text_encoder --learning_rate 1 --text_encoder_lr 0.5
--train_text_encoder --method adalora
--validation_prompt_options {{}} {{}}
--validation_split 0 --save_best
--validation_split 0 --early_stopping_patience 2
--validation_split 0 --validation_noises 2
--lora_dropout 0.1 --method oft
--rank_pattern to_q=2 --method adalora
--alpha_pattern to_q=2 --method oft
--rank_pattern to_q
--rank_pattern to_q=x
--rank_pattern to_q=2 to_q=3
--rank_pattern to_q(=2
--alpha_pattern to_q=0
--optimizer no_such
--optimizer no_such_package.Class
--optimizer_args lr=1
--optimizer_args beta3
--use_8bit_adam --optimizer lion
--init_lora lora.safetensors --method loha
--init_lora lora.safetensors --method lora_matched
--init_lora lora.safetensors --method reslora --shortcut block
--huber_c 0.2
--huber_schedule constant
--huber_scale 2 --loss_type huber
--dataset_config_name other
--keep_tokens 1
--aspect_ratio_buckets 32,32
--bucket_upscale
--bucket_upscale --use_aspect_ratio_buckets --aspect_ratio_buckets 32,32
--masked_loss_normalised
--prior_loss_weight 0.5
--num_class_images 7
--metric_model someone/dino --num_validation_images 0
--learning_rate 1e-8 --lr_scheduler polynomial
--lr_scheduler piecewise_constant
--lr_scheduler piecewise_constant --lr_step_rules 1:ten,0.1
--lr_scheduler piecewise_constant --lr_step_rules 1:10,nan
--lr_step_rules 1:10,0.1
--hub_token secret --report_to wandb
--push_to_hub --hub_model_id 'my style'
--push_to_hub --output_dir 'my style'
--merge lstsq --merge_calibration_samples 0
--method lora_matched --merge_calibration_samples 0
--compile --gradient_checkpointing --shortcut middle
--compile --blocks_to_swap 1
--compile --base_precision fp8
--max_train_steps 2 --method adalora
--validation_prompt prompts.txt tulip
--validation_prompt prompts.toml
--validation_prompt missing.txt
--validation_prompt empty.txt
--validation_prompt letters.txt
--validation_prompt table.json

--select_split 0.2
--test_split 0.2
--extend_rates
--experiment_minutes 5
--arms_at_once 2
--seed 0 0
--learning_rate 1e-3 1e-3
--pre_num 1 2 --method lora
--shortcut input block --method lora
--arms_at_once 9 --seed 0 1
--extend_rates --seed 0 1
--extend_rates --learning_rate 1e-3 1.001e-3
--rank 2 4 --init_lora lora.safetensors --method lora
--seed 0 1 --select_split 0.5 --test_split 0.5
--seed 0 1 --validation_split 0.1
--seed 0 1 --max_train_samples 8
--seed 0 1 --push_to_hub
--seed 0 1 --save_best
--seed 0 1 --validation_noises 2
--seed 0 1 --resume_from_checkpoint checkpoint-2
"""

CONTENT_OF_SD = f"""
--resolution 12
--validation_height 36
--num_inference_steps 2000
--target_modules to_nothing
--target_modules to_out
--target_modules .*attn1.*
--target_modules to_q(
--target_modules conv1 --method adalora
--rank 4096
--rank_pattern nothing=2
--max_timestep 2000
--min_timestep 1000
--timestep_sampling uniform
--weighting_scheme mode
--logit_mean 1
--max_sequence_length 64
--guidance_scale_train 3.5
--blocks_to_swap 99
--optimizer torch.nn.Linear
--optimizer torch.optim.NoSuch
--report_to no_such_tracker
--resume_from_checkpoint checkpoint-1
--mixed_precision fp16
--init_lora missing.safetensors --method lora
--train_data_dir images --caption_column caption
--train_data_dir semicolons
--train_data_dir broken
--train_data_dir outside
--train_data_dir columns
--train_data_dir bare
--train_data_dir images bare --strict
--train_data_dir images --masked_loss
--validation_prompt tulip --validation_prompt_options '{{"width": 36}}'
--use_aspect_ratio_buckets --aspect_ratio_buckets 36,32
{FLOW} --snr_gamma 5
{FLOW} --logit_mean 1
{FLOW} --train_text_encoder
"""

FLAGS_OF_LLM = """
--lora_r 0
--lora_r 1.5
--lora_alpha nan
--lora_dropout 1
--pre_num -2
--method nothing
--shortcut sideways
--merge lstsq --calibration_examples 0
--method lora_matched --calibration_examples 0
--rank 4
--rank_pattern q_proj
--weight_decay inf
--max_grad_norm nan
--num_train_epochs 0
--save_total_limit 0
--eval_steps 0
--eval_delay nan
--max_steps 0
--logging_steps 0
--per_device_train_batch_size 0
--data_seed 99999999999999999999
--neftune_noise_alpha inf
--adam_beta2 1
--label_smoothing_factor 1
--lr_scheduler_kwargs {foo
--accelerator_config '{"foo": 1}'
--bf16_full_eval
--fp16
--report_to no_such_tracker
--push_to_hub
--data_dir ''
--output_dir prompts.txt/run
--task nothing
--task gsm8k
--dtype float64
--max_length 1
--max_new_tokens 0
--max_test_samples 0
--metric_for_best_model f1
--torch_compile --gradient_checkpointing True --shortcut middle --use_cpu
--select_split 0.2
--arms_at_once 2
--seed 0 0
--learning_rate 1e-3 1e-2 --load_best_model_at_end
--learning_rate 1e-3 1e-2 --resume_from_checkpoint checkpoint-2
--learning_rate 1e-3 1e-2 --select_split 0.5 --test_split 0.5
"""

CONTENT_OF_LLM = """
--model_name_or_path /no/such/folder --data_dir assets/tiny-llama/task
--model_name_or_path assets/tiny-roberta --data_dir assets/tiny-llama/task
--data_dir missing
--target_modules nothing
"""

FLAGS_OF_GLUE = """
--lora_r 0
--method nothing
--head tail
--merge average
--lora_dropout 0.1 --method oft
--task_name nothing
--model_name_or_path /no/such/folder --task_name cola
--max_seq_length 3
--max_predict_samples 0
--adam_epsilon 0
--dataloader_num_workers x
--prediction_loss_only
--label_names label
--metric_for_best_model accuracy
--label_smoothing_factor 0.1 --task_name stsb --data_dir assets/tiny-roberta/task
--torch_compile --gradient_checkpointing True --shortcut input --use_cpu
--extend_rates
--lora_r 4 4
--shortcut input block --method lora
"""

CONTENT_OF_GLUE = """
--data_dir missing --task_name cola
--data_dir texts --task_name cola
--target_modules nothing
"""

FLAGS_OF_CONVERT = """
lora.safetensors OUT
OUT --to kohya
lora.safetensors OUT --to onnx
lora.safetensors OUT --to kohya --famil flux
lora.safetensors OUT --to kohya --family unknown
lora.safetensors OUT --to kohya --dtype float64
lora.safetensors OUT --to kohya --rank 0
'' OUT --to kohya
lora.safetensors '' --to kohya
lora.safetensors OUT --to kohya --base ''
"""

CONTENT_OF_CONVERT = """
missing.safetensors OUT --to kohya
lora.safetensors OUT --to kohya --base lora.safetensors
lora.safetensors OUT --to kohya --base images
lora.safetensors OUT --to kohya --base model --family sd3
lora.safetensors OUT --to kohya --base assets/pipeline-flow
lora.safetensors OUT.safetensors --to peft --base model
pickle.bin OUT --to kohya
empty.safetensors OUT --to kohya
half.safetensors OUT --to kohya
dora.safetensors OUT --to kohya
"""


def lines(text: str) -> list[str]:
    """Return the lines that are not empty."""
    return [line for line in text.splitlines() if line]


REFUSALS = {
    "refusals": {
        "sd": lines(FLAGS_OF_SD + SETTINGS_OF_SD),
        "llm": lines(FLAGS_OF_LLM),
        "glue": lines(FLAGS_OF_GLUE),
        "convert": lines(FLAGS_OF_CONVERT),
    },
    "refusals_by_content": {
        "sd": lines(CONTENT_OF_SD),
        "llm": lines(CONTENT_OF_LLM),
        "glue": lines(CONTENT_OF_GLUE),
        "convert": lines(CONTENT_OF_CONVERT),
    },
}
"""The words behind a script's name of commands that end with status 2: by the flags alone, and once the model, the data
or the LoRA have been looked at."""

# -- fixtures ----------------------------------------------------------------------------------------------------------

FILES = {
    "run.toml": "\n".join(
        [
            'pretrained_model_name_or_path = "model"', 'train_data_dir = "images"', 'method = ["lora", "loha"]',
            "resolution = 32", "rank = 2", "max_train_steps = 2", "train_batch_size = 2", 'mixed_precision = "no"',
            'validation_prompt = ["prompts.txt"]', "num_validation_images = 1", "random_flip = true",
            "checkpoints_total_limit = 1", "checkpointing_steps = 1", "num_inference_steps = 1", 'report_to = "none"',
        ]
    ),
    "prompts.txt": "# two\nred disc --n box --w 40 --h 32 --d 3 --s 2 --g 2\nblue box --l 1\n",
    "letters.txt": "red disc --x 4\n",
    "empty.txt": "",
    "table.json": "{}",
    "prompts.toml": "",
    "list.json": "[1]",
    "syntax.toml": "rank = 4 5",
    "nested.toml": "rank = [[4]]",
    "table.toml": "[rank]\nvalue = 4",
    "unknown.toml": "no_such_flag = 4",
    "foreign.toml": "network_dim = 4",
    "choice.toml": 'merge = "average"',
    "switch.toml": "random_flip = 1",
    "several.toml": "max_train_steps = [4]",
    "pickle.bin": "cos\nsystem\n",
    "semicolons/metadata.csv": "file_name;text\n0.png;red\n",
    "broken/metadata.jsonl": '{"file_name": "0.png", "text": "red"\n',
    "outside/metadata.jsonl": '{"file_name": "../images/0.png", "text": "red"}\n',
    "columns/metadata.csv": "file_name,title\n0.png,red\n",
    "bare/notes.md": "an image without a caption",
    "texts/train.jsonl": '{"Body": 1}\n',
    "other/model_index.json": '{"_class_name": "AudioLDMPipeline"}',
}  # fmt: skip
SHAPES = ((32, 32), (48, 32), (32, 56), (64, 40))


def make_fixtures(folder: Path) -> None:
    """Write the files that the commands read: text files, a tiny pipeline, images, a LoRA."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import PIL.Image
    import torch
    from pipelines import image_folder, random_image, stable_diffusion
    from safetensors.torch import save_file

    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    unet = {"transformer_layers_per_block": 2}
    stable_diffusion(folder / "model", text_encoder={"num_hidden_layers": 3}, unet=unet)
    image_folder(folder / "images", count=8)
    for name in ("semicolons", "broken", "outside", "columns", "bare"):
        random_image(0).save(folder / name / "0.png")
    image_folder(folder / "kohya" / "2_red disc", count=2, layout="none")
    (folder / "shapes").mkdir()
    for number, size in enumerate(SHAPES):
        image = random_image(10 + number).resize(size).convert("RGBA")
        image.putalpha(PIL.Image.linear_gradient("L").resize(size))
        image.save(folder / "shapes" / f"{number}.png")
        (folder / "shapes" / f"{number}.txt").write_text("{red|blue} disc, red box, box" if number % 2 else "disc, red")
    (folder / "masked").mkdir()
    rows = [{"file_name": f"{number}.png", "text": "red, disc", "mask": f"masks/{number}.png"} for number in range(3)]
    (folder / "masked" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "masked" / "masks").mkdir()
    for number in range(3):
        random_image(20 + number).resize((40, 32)).save(folder / "masked" / f"{number}.png")
        PIL.Image.radial_gradient("L").resize((40, 32)).save(folder / "masked" / "masks" / f"{number}.png")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, folder / "lora.safetensors")
    save_file({}, folder / "empty.safetensors")
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 16)}, folder / "half.safetensors")
    save_file(factors | {f"{layer}.lora_magnitude_vector.weight": torch.ones(16)}, folder / "dora.safetensors")
