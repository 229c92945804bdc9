"""What a finished run uploads to the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

from ...common.errors import InvalidArgument, RunFailed, first_line
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from ..arguments import Flags, listed
from .summary import write_comparison

# Nothing else is: there may be settings, latents of the training images, their names, notes, the images themselves.
UPLOADED = ("README.md", "comparison.png", "loss.png", DIFFUSERS_FILE)
UPLOADED_OF_METHOD = (
    *(DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, "peft/*"),
    *("chains.json", "merge.json", "log.jsonl", "samples/step-*", "merged/*"),
)


def hub_repository(flags: Flags) -> str:
    """The repository to upload to, which is made if need be."""
    name = flags.hub_model_id or Path(flags.output_dir).resolve().name
    try:
        return huggingface_hub.create_repo(name, exist_ok=True, token=flags.hub_token).repo_id
    except Exception as error:  # requests' or httpx's, by the version of the hub's library
        problem = f"cannot make or reach the repository {name} ({first_line(error)})"
        raise InvalidArgument("--push_to_hub", problem, "log in with `hf auth login`, or leave it out") from None


def publish(flags: Flags) -> None:
    """Upload a model card with what the methods left: LoRA files, samples, losses and figures."""
    output, name = Path(flags.output_dir), hub_repository(flags)
    base = flags.pretrained_model_name_or_path
    local = Path(base).exists()
    description = (
        f"# {name}\n\n{', '.join(flags.method)} weights for {Path(base).name if local else base}, "
        f"trained on {', '.join(Path(name).name for name in listed(flags.dataset_name or flags.train_data_dir))}.\n"
    )
    if (output / "comparison.png").is_file():
        write_comparison(flags, output)  # nobody asked that images to learn from be uploaded
        description += "\n![samples](comparison.png)\n"
    try:
        card = load_or_create_model_card(
            repo_id_or_path=name,
            token=flags.hub_token,
            from_training=True,
            base_model=None if local else base,  # the hub refuses what is no name of its own
            model_description=description,
            inference=True,
        )
        tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "reslora"]
        populate_model_card(card, tags=tags).save(output / "README.md")
        huggingface_hub.upload_folder(
            repo_id=name,
            folder_path=output,
            commit_message="End of training",
            allow_patterns=[*UPLOADED, *(f"{name}/{file}" for name in flags.method for file in UPLOADED_OF_METHOD)],
            ignore_patterns=["*/.*"],
            token=flags.hub_token,
        )
    except Exception as error:
        problem = f"{name} could not be uploaded ({first_line(error)})"
        raise RunFailed(f"{problem}; the run is complete, the same command tries again") from None
    print(f"uploaded to {name}")
